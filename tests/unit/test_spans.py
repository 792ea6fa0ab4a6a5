"""Samples with several trained spans: of what lies between them nothing is learnt and nothing is counted."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from genac_megatron.algorithms.baselines.ppo import token_gae
from genac_megatron.algorithms.losses import make_ppo_loss
from genac_megatron.errors import InputError
from genac_megatron.recipe.schema import AdvantageConfig, LossConfig
from genac_megatron.records import Completion, Judgement, Prompt, Rollout, Sample, State, sample_of
from genac_megatron.stages.batch import Batch, actor_samples
from genac_megatron.stages.figures import rollout_figures
from genac_megatron.stages.parity import parity_figures
from genac_megatron.stages.rollouts import Group
from genac_megatron.training.packing import build_pack, unpack
from genac_megatron.training.tree_packs import build_tree_pack
from genac_megatron.training.trees import forest_of, order_of

FLOAT32 = 1e-5


@st.composite
def conversations(draw: st.DrawFn) -> Completion:
    """Turns of the actor, with what others wrote before, between and behind them; a third have one turn."""
    rng = random.Random(draw(st.integers(0, 10**6)))
    ids: list[int] = []
    ranges = []
    turns = rng.choice([1, 2, 4])
    for number in range(turns):
        if turns > 1:
            ids += [50 + rng.randrange(3) for _ in range(rng.randint(0 if number == 0 else 1, 4))]
        begin = len(ids)
        ids += [rng.randrange(3) for _ in range(rng.randint(1, 5))]
        ranges.append((begin, len(ids)))
    if turns > 1 and rng.random() < 0.3:
        ids += [50]
    count = sum(end - begin for begin, end in ranges)
    logprobs = tuple(-3.0 * rng.random() for _ in range(count))
    return Completion(tuple(ids), logprobs, "stop", ((1, count),), sampled=tuple(ranges) if turns > 1 else ())


batches = st.lists(conversations(), min_size=1, max_size=6)


def slow_mask(completion: Completion) -> list[bool]:
    """Of each id whether it was sampled."""
    if not completion.sampled:
        return [True] * len(completion.ids)
    return [any(begin <= i < end for begin, end in completion.sampled) for i in range(len(completion.ids))]


def logp(before: list[int], token: int) -> float:
    """A model: a figure for a token that depends on everything before it."""
    return -random.Random(str((before, token))).random() * 3


def samples_of(completions: list[Completion]) -> list[Sample]:
    samples = []
    for number, completion in enumerate(completions):
        sample = sample_of([1, 2, 3], completion)
        sample.fields = {"advantages": [100.0 * number + t for t in range(sample.trained)]}
        samples.append(sample)
    return samples


def packs_of(samples: list[Sample]) -> list[Any]:
    """A flat pack, one filled up for context parallelism, and trees."""
    indices = list(range(len(samples)))
    forest = forest_of(order_of(samples, 1), indices)
    return [
        build_pack(samples, indices, multiple=4, field_names=["advantages"]),
        build_pack(samples, indices, multiple=8, field_names=["advantages"], sample_multiple=4),
        build_tree_pack(samples, indices, forest, field_names=["advantages"]),
    ]


@given(batches)
@settings(max_examples=60)
def test_counts_are_of_sampled_tokens(completions: list[Completion]) -> None:
    for completion in completions:
        mask = slow_mask(completion)
        assert completion.written == sum(mask)
        for cut in range(len(mask) + 1):
            assert completion.written_before(cut) == sum(mask[:cut])
        sample = sample_of([7, 7], completion)
        kept = [i for begin, end in sample.ranges for i in range(begin, end)]
        assert [i - 2 for i in kept] == [i for i, own in enumerate(mask) if own]
        assert sample.trained == sum(mask)


@given(batches)
@settings(max_examples=60)
def test_every_trained_token_has_its_label_field_and_way_back(completions: list[Completion]) -> None:
    samples = samples_of(completions)
    for pack in packs_of(samples):
        rows = torch.arange(len(pack.labels_T)) if pack.rows_E is None else pack.rows_E
        assert int(pack.loss_mask_T.sum()) == sum(sample.trained for sample in samples)
        labels, places, fields = (unpack(pack, x) for x in (pack.labels_T, rows, pack.fields["advantages"]))
        for number, (sample, completion) in enumerate(zip(samples, completions, strict=True)):
            wanted = [i + 3 for i, own in enumerate(slow_mask(completion)) if own]
            assert labels[number].tolist() == [sample.tokens[t] for t in wanted]
            assert fields[number].tolist() == sample.fields["advantages"]
            for t, row in zip(wanted, places[number].tolist(), strict=True):
                assert int(pack.tokens_T[row]) == sample.tokens[t - 1]
                assert int(pack.positions_T[row]) == t - 1


def cut_at_turns(rollout: Rollout, values: list[float]) -> list[Judgement]:
    """A judgement before each turn, the first of the prompt."""
    completion = rollout.completion
    cuts = [0, *(begin for begin, _ in completion.ranges[1:])]
    ends = [*cuts[1:], len(completion.ids)]
    judgements = []
    for k, (cut, end) in enumerate(zip(cuts, ends, strict=True)):
        made = Judgement(State(rollout, k, cut, end), (1,), Completion((2,), (0.0,), "stop"), "", values[k])
        made.used = values[k]
        judgements.append(made)
    return judgements


def batch_of(completions: list[Completion], seed: int) -> Batch:
    rng = random.Random(seed)
    prompt = Prompt("train/0", (), "", "", (1, 2, 3))
    group = Group(prompt)
    for number, completion in enumerate(completions):
        rollout = Rollout(prompt, number, completion, "", float(rng.random() < 0.5))
        group.rollouts.append(rollout)
        group.judgements.append(cut_at_turns(rollout, [rng.random() for _ in range(9)]))
    return Batch([group])


def slow_loss(batch: Batch, config: LossConfig, lam: float, limit: int) -> float:
    """PPO's loss by loops over ids, each asked whether it was sampled."""
    responses, rows = len(batch.rollouts), []
    for rollout, judgements in zip(batch.rollouts, batch.judgements, strict=True):
        values, mask = [j.used for j in judgements], slow_mask(rollout.completion)
        deltas = [b - a for a, b in zip(values, [*values[1:], rollout.outcome], strict=True)]
        logprobs = iter(rollout.completion.logprobs)
        for i, own in enumerate(mask):
            if not own:
                continue
            turn = max(k for k, j in enumerate(judgements) if j.state.cut <= i)
            advantage = sum(lam ** (k - turn) * deltas[k] for k in range(turn, len(deltas)))
            weight = {
                "token": 1 / sum(r.completion.written for r in batch.rollouts),
                "sequence": 1 / (responses * sum(mask)),
                "constant": 1 / (responses * limit),
            }[config.aggregate]
            before = [*rollout.prompt.ids, *rollout.completion.ids[:i]]
            now = logp(before, rollout.completion.ids[i])
            tis = min(math.exp(now - next(logprobs)), config.tis_cap or math.inf)
            rows.append(-weight * tis * advantage)
    return math.fsum(rows)


@given(batches, st.integers(0, 99), st.sampled_from(["token", "sequence", "constant"]))
@settings(max_examples=60)
def test_ppo_is_that_of_loops_over_sampled_ids(
    completions: list[Completion], seed: int, aggregate: str
) -> None:
    batch, config = batch_of(completions, seed), LossConfig(aggregate=aggregate)
    advantage = AdvantageConfig(normalise="none")
    samples = actor_samples(batch, advantage, 0.9, config, 40)
    wanted = slow_loss(batch, config, 0.9, 40)
    names = ["weights", "advantages", "behaviour"]
    indices = list(range(len(samples)))
    forest = forest_of(order_of(samples, 1), indices)
    for pack in (
        build_pack(samples, indices, multiple=8, field_names=names),
        build_tree_pack(samples, indices, forest, field_names=names),
    ):
        now = torch.zeros(len(pack.labels_T))  # 0 where no loss is, as the model gives it
        for index, values in unpack(pack, torch.arange(len(pack.labels_T))).items():
            tokens = samples[index].tokens
            where = [t for begin, end in samples[index].ranges for t in range(begin, end)]
            now[values] = torch.tensor([logp(list(tokens[:t]), tokens[t]) for t in where])
        loss, stats = make_ppo_loss(config)(now, None, pack.fields)
        assert float(loss) == pytest.approx(wanted, abs=FLOAT32)
        assert all(math.isfinite(float(value)) for value in stats.values())


@given(batches, st.integers(0, 99))
@settings(max_examples=40)
def test_whitening_and_figures_count_sampled_tokens_alone(completions: list[Completion], seed: int) -> None:
    batch = batch_of(completions, seed)
    samples = actor_samples(batch, AdvantageConfig(normalise="centre"), 0.9, LossConfig(), 40)
    flat = [x for sample in samples for x in sample.fields["advantages"]]
    assert len(flat) == sum(sum(slow_mask(completion)) for completion in completions)
    assert sum(flat) == pytest.approx(0.0, abs=1e-4)
    figures = rollout_figures(batch, {"actor": 1})
    mean = sum(sum(slow_mask(completion)) for completion in completions) / len(completions)
    assert figures["rollout/length_mean"] == pytest.approx(mean)
    same = [list(sample.fields["behaviour"]) for sample in samples]
    assert parity_figures("actor", samples, same)["parity/actor_max"] == 0.0


@given(conversations(), st.floats(0.0, 1.0), st.integers(0, 99))
def test_gae_jumps_over_what_others_wrote(completion: Completion, lam: float, seed: int) -> None:
    """A scalar critic has a value before every id; those of others' ids are never looked at."""
    rng = random.Random(seed)
    everywhere = [rng.random() for _ in completion.ids]
    own = [i for i, sampled in enumerate(slow_mask(completion)) if sampled]
    running, wanted = 0.0, []
    for n in reversed(range(len(own))):
        after = 1.0 if n == len(own) - 1 else everywhere[own[n + 1]]
        running = after - everywhere[own[n]] + lam * running
        wanted.append(running)
    values = torch.tensor([everywhere[i] for i in own])
    found = token_gae([values], torch.tensor([1.0]), lam=lam)[0]
    assert found.tolist() == pytest.approx(wanted[::-1], abs=FLOAT32)


@pytest.mark.parametrize(
    ("start", "spans"), [(2, ((3, 4),)), (2, ((2, 4), (3, 5))), (2, ((2, 7),)), (4, ((4, 5), (2, 3)))]
)
def test_spans_that_cannot_be_are_refused(start: int, spans: tuple[tuple[int, int], ...]) -> None:
    sample = Sample([1, 2, 3, 4, 5, 6], start, spans=spans)
    with pytest.raises(InputError, match="spans"):
        build_pack([sample], [0])
