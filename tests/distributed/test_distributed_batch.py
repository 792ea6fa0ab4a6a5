"""A batch that stays where it was made trains as one that every rank has whole, in every layout."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from tests.distributed.cases import make_role, published, role_config
from tests.distributed.pool import RANKS

LAYOUTS: dict[str, dict[str, Any]] = {
    "dp4": {},
    "tp2 dp2": {"tp": 2},
    "pp2 dp2": {"pp": 2},
    "cp2 dp2": {"cp": 2},
    "a part of the world": {"first_rank": 1, "count": 2},
}


def nested(seed: int, experts: bool = False) -> list[Any]:
    """Groups of samples with a common prompt, whose prompts begin alike; some of several spans. Group g of
    rank g % 4: in the order of a batch that ranks deal out.
    """
    from genac_megatron.records import Sample

    rng = random.Random(seed)

    def ids(count: int) -> list[int]:
        return [rng.randrange(67) for _ in range(count)]

    head, samples = ids(20), []
    for group in range(6):
        prompt = head + ids(rng.randint(3, 30))
        for k in range(rng.randint(1, 3)):
            tokens = prompt + ids(rng.randint(2, 30))
            start = len(prompt)
            spans = (
                ((start, start + 1), (start + 2, len(tokens))) if k == 1 and len(tokens) > start + 2 else ()
            )
            one = Sample(tokens, start, spans=spans, place=len(samples), source=str(group))
            samples.append(one)
    total = sum(one.trained for one in samples)
    for one in samples:
        one.fields = {
            "weights": [1 / total] * one.trained,
            "advantages": [rng.gauss(0, 1) for _ in range(one.trained)],
            "behaviour": [-4.0 + rng.gauss(0, 0.3) for _ in range(one.trained)],
        }
    return samples


def parted(samples: list[Any], rank: int) -> list[Any]:
    """What `rank` made of them: the groups of rank 3 are rank 0's too, so that one has nothing."""
    return [one for one in samples if (int(one.source) % 4) % 3 == rank]


def step_case(rank: int, layout: dict[str, Any], spread: bool, own_rows: bool = False) -> Any:
    """Log-probs, an update with them as a field, two updates of parts: what this rank gets of each.

    own_rows: ranks plan their own micro-batches, as of a large batch.
    """
    from genac_megatron.training import microbatches

    before, microbatches.MANY = microbatches.MANY, 0 if own_rows else microbatches.MANY
    try:
        return stepped(rank, layout, spread)
    finally:
        microbatches.MANY = before


def stepped(rank: int, layout: dict[str, Any], spread: bool) -> Any:
    from genac_megatron.algorithms.losses import make_ppo_loss
    from genac_megatron.recipe.schema import LossConfig
    from genac_megatron.stages.minibatches import launch_parts, minibatches
    from genac_megatron.stages.ppo import add_field
    from genac_megatron.training.distributed_batch import distributed

    role = make_role("actor", role_config(layout=layout, training={"tokens_per_microbatch": 96}), RANKS)
    role.begin_stage(None, 10)
    whole = nested(3)
    mine = parted(whole, rank) if spread else whole
    taken = role.take(distributed(mine)) if spread else whole
    loss, options = make_ppo_loss(LossConfig()), {"temperature": 0.8, "with_entropy": True}
    before = role.launch_logprobs(taken, temperature=0.8)
    add_field(taken, "old", before, role.layout)
    known = before.result()
    parts = minibatches(taken, 2, 1, 5)
    launched = launch_parts(role, parts, loss, 2, **options)
    results = [one.result() for one in launched]
    untaken = role.train_step(distributed(mine) if spread else nested(3), loss, **options)
    places = [one.place for one in mine]
    return {
        "known": dict(zip(places, known, strict=True)),
        "last": dict(zip(places, untaken.logprobs, strict=True)),
        "parts": sum(sum(map(len, one.logprobs)) for one in results),
        "stats": [one.stats for one in (*results, untaken)],
        "weights": published(role),
    }


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_batch_that_stays_where_it_was_made_trains_as_a_list(pool: Any, name: str) -> None:
    """To rounding: what is shared by trees goes by the order in which ranks know it."""
    found = pool.run(step_case, LAYOUTS[name], True)
    wanted = pool.run(step_case, LAYOUTS[name], False)[0]
    for key in ("known", "last"):
        merged = {place: values for one in found for place, values in one[key].items()}
        assert sum(len(one[key]) for one in found) == len(merged) == len(wanted[key]), "each at its own rank"
        for place, values in wanted[key].items():
            assert merged[place] == pytest.approx(values, abs=2e-5)
    assert sum(one["parts"] for one in found) == wanted["parts"]
    for one in found:
        for stats, others in zip(one["stats"], wanted["stats"], strict=True):
            told = {key for key in others if key != "computed_tokens"}
            assert {key: stats[key] for key in told} == pytest.approx(
                {key: others[key] for key in told}, rel=1e-4, abs=1e-5
            )
            # Beginnings are shared over ranks too.
            assert stats["computed_tokens"] <= 1.05 * others["computed_tokens"] <= 1.05 * stats["tokens"]
        for key, tensor in wanted["weights"].items():
            torch.testing.assert_close(one["weights"][key], tensor, atol=2e-5, rtol=0, msg=key)


@pytest.mark.parametrize("name", ["dp4", "pp2 dp2", "a part of the world"])
def test_ranks_that_plan_their_own_rows_train_to_the_bit_alike(pool: Any, name: str) -> None:
    found, wanted = (pool.run(step_case, LAYOUTS[name], True, own_rows) for own_rows in (True, False))
    for one, other in zip(found, wanted, strict=True):
        weights, others = one.pop("weights"), other.pop("weights")
        assert one == other
        assert all(torch.equal(weights[key], tensor) for key, tensor in others.items())


def sft_case(rank: int, spread: bool) -> Any:
    """Two SFT steps, of samples that ranks have a share of each, or all have whole."""
    from types import SimpleNamespace

    from genac_megatron.algorithms.losses import make_sft_loss
    from genac_megatron.stages.batch import supervised
    from genac_megatron.stages.runtime import Run
    from genac_megatron.stages.sft import _ranks, _share, part_figures
    from genac_megatron.training.layout import World

    role = make_role("actor", role_config(layout={"tp": 2}), RANKS)
    role.begin_stage(None, 10)
    run: Any = SimpleNamespace(world=World(rank, RANKS, rank))  # no more of a run is used
    run.places = lambda count: Run.places(run, count)
    found = []
    for seed in (5, 6):
        samples = nested(seed)
        for number, one in enumerate(samples):
            one.part, one.fields = "ab"[number % 2], {"weights": [1.0] * (one.trained - 1) + [0.0]}
        if spread:
            batch = _share(run, samples)
            result = role.train_step(batch.where, make_sft_loss())
            figures = part_figures("actor", batch.mine, result.logprobs, _ranks(run))
        else:
            whole = supervised(samples)
            result = role.train_step(whole, make_sft_loss())
            figures = part_figures("actor", whole, result.logprobs)
        told = {key: result.stats[key] for key in ("loss", "grad_norm", "tokens")}
        found.append((told | figures, len(result.logprobs), len(samples)))
    return found, published(role)


def test_sft_steps_of_shares_are_those_of_a_list(pool: Any) -> None:
    spread, whole = (pool.run(sft_case, way) for way in (True, False))
    wanted, weights = whole[0]
    for steps, own in spread:
        for (figures, _, _), (others, _, _) in zip(steps, wanted, strict=True):
            assert figures == pytest.approx(others, rel=1e-4, abs=1e-5)
        for key, tensor in weights.items():
            torch.testing.assert_close(own[key], tensor, atol=2e-5, rtol=0, msg=key)
    for step in range(2):
        assert sum(steps[step][1] for steps, _ in spread) == wanted[step][2], "each sample on one rank"


def moved_case(rank: int, layout: dict[str, Any]) -> Any:
    """What arrives where a role computes it, against what was made."""
    import numpy as np

    from genac_megatron.errors import InputError
    from genac_megatron.training.distributed_batch import distributed

    samples, rng = nested(4), np.random.default_rng(0)
    for one in samples[::2]:
        one.experts = rng.integers(0, 4, (len(one.tokens) - 1, 2, 2)).astype(np.uint8)
    role = make_role("actor", role_config(layout=layout), RANKS)
    batch = distributed(parted(samples, rank))
    owner = np.arange(len(samples)) % role.layout.dp
    brought = batch.brought(role.layout, role.groups, owner)
    held = brought.fetched(role.groups, owner[::-1].copy()) if role.active else {}
    for found in (brought.held, held):
        for place, one in found.items():
            made = samples[place]
            assert (list(one.tokens), one.start, one.spans) == (made.tokens, made.start, made.spans)
            assert (one.experts is None) == (made.experts is None)
            assert made.experts is None or np.array_equal(one.experts, made.experts)
            for name, values in made.fields.items():
                assert np.array_equal(one.fields[name], np.array(values, np.float32))
    places = [sorted(brought.held), sorted(held)]
    shared = batch.order()
    for k, common in enumerate(shared.shared):
        a, b = (samples[i] for i in shared.order[k : k + 2])
        assert a.tokens[:common] == b.tokens[:common]
        rows = (None, None) if a.experts is None or b.experts is None else (a.experts, b.experts)
        assert not common or rows[0] is None or np.array_equal(rows[0][:common], rows[1][:common])
    samples[0].fields["advantages"] = [1.0] * (samples[0].trained + 1)  # of one rank alone
    with pytest.raises(InputError, match="'advantages' of a rank's sample 0 has"):
        distributed(parted(samples, rank))
    return places, None if role.groups is None else role.groups.dp.rank(), len(samples)


@pytest.mark.parametrize("name", ["cp2 dp2", "a part of the world"])
def test_samples_arrive_as_they_were_made(pool: Any, name: str) -> None:
    for (first, second), dp_rank, count in pool.run(moved_case, LAYOUTS[name]):
        if dp_rank is None:
            assert first == second == []
        else:
            assert first == list(range(dp_rank, count, 2))
            assert second == sorted(count - 1 - place for place in first)
