"""What each estimator makes of a batch, against the advantages written out; and which can be made at all."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from genac_megatron.errors import InputError
from genac_megatron.evaluation.estimators import (
    LAMBDAS,
    Played,
    choose,
    every_estimator,
    reference_samples,
    with_values,
)
from genac_megatron.records import Completion, Judgement, Prompt, Rollout, Sample, State
from genac_megatron.stages.batch import Batch
from genac_megatron.stages.rollouts import Group

LIMIT = 20
ALL = ("outcomes", "groups", "scalar", "generative", "exact")


def made_batch(prompts: int = 3, samples: int = 2, seed: int = 0) -> Batch:
    """Responses of 4 to 12 tokens in segments of 4, with judgements whose values are drawn."""
    rng = random.Random(seed)
    groups = []
    for p in range(prompts):
        prompt = Prompt(f"train/{p}", (), "p", None, (1, 2, 3))
        group = Group(prompt)
        first = rng.random()
        for n in range(samples):
            ids = tuple(range(4 * rng.randint(1, 3)))
            rollout = Rollout(prompt, n, Completion(ids, (-0.5,) * len(ids), "stop"), "", float((p + n) % 2))
            states = [State(rollout, k, 4 * k, 4 * k + 4) for k in range(len(ids) // 4)]
            nothing = Completion((), (), "stop")
            values = [first, *(rng.random() for _ in states[1:])]
            group.rollouts.append(rollout)
            group.judgements.append(
                [
                    Judgement(s, (), nothing, "", v, used=round(v, 1))
                    for s, v in zip(states, values, strict=True)
                ]
            )
        groups.append(group)
    return Batch(groups)


def played(batch: Batch) -> Played:
    other = with_values(batch, [[0.5] * len(js) for js in batch.judgements])
    scalar = [torch.linspace(0.1, 0.9, len(r.completion.ids)) for r in batch.rollouts]
    return Played(batch, batch, other, scalar)


def advantages(samples: list[Sample]) -> list[list[float]]:
    return [sample.fields["advantages"] for sample in samples]


def by_name(name: str) -> list[Sample]:
    return next(one for one in every_estimator() if one.name == name).make(played(made_batch()), LIMIT)


def test_every_estimator_gives_each_token_an_advantage_and_a_weight() -> None:
    batch = made_batch()
    names = [one.name for one in every_estimator()]
    assert len(names) == len(set(names)) == 4 + 1 + 4 + 2 * 2 * (len(LAMBDAS) + 1)
    for one in every_estimator():
        samples = one.make(played(batch), LIMIT)
        assert [sample.trained for sample in samples] == [len(r.completion.ids) for r in batch.rollouts]
        for sample in samples:
            assert torch.tensor(sample.fields["advantages"]).isfinite().all()
            assert min(sample.fields["weights"]) > 0
        if one.name.endswith("-raw"):
            weights = {weight for sample in samples for weight in sample.fields["weights"]}
            assert [*weights] == [pytest.approx(1 / (len(samples) * LIMIT))], "all tokens alike"


def test_the_reference_is_each_outcome_less_the_others_mean() -> None:
    batch = made_batch()
    total, count = sum(batch.outcomes), len(batch.outcomes)
    for rollout, found in zip(batch.rollouts, advantages(reference_samples(batch, LIMIT)), strict=True):
        wanted = rollout.outcome - (total - rollout.outcome) / (count - 1)
        assert found == pytest.approx([wanted] * len(found))


def test_raw_estimators_of_states_are_the_textbooks() -> None:
    batch = made_batch()
    prompt, one, zero = (advantages(by_name(f"genac-{name}-raw")) for name in ("prompt", "1", "0"))
    for i, (rollout, judgements) in enumerate(zip(batch.rollouts, batch.judgements, strict=True)):
        values = [j.used for j in judgements]
        assert prompt[i] == pytest.approx([rollout.outcome - values[0]] * len(prompt[i]))
        assert one[i] == pytest.approx([rollout.outcome - v for v in values for _ in range(4)], abs=1e-6)
        after = [*values[1:], rollout.outcome]
        steps = [later - v for later, v in zip(after, values, strict=True)]
        assert zero[i] == pytest.approx([step for step in steps for _ in range(4)], abs=1e-6)


def test_estimators_as_trained_are_whitened_and_scalar_ones_go_by_tokens() -> None:
    for name in ("genac-0", "exact-1", "vc_ppo", "reinforce_pp"):
        tokens = torch.tensor([a for row in advantages(by_name(name)) for a in row], dtype=torch.float64)
        assert float(tokens.mean()) == pytest.approx(0.0, abs=1e-5), name
        assert float(tokens.std(correction=0)) == pytest.approx(1.0, abs=1e-4), name
    for row in advantages(by_name("exact-0.5")):
        assert len(set(row)) <= 3, "one figure per segment"
    assert any(len(set(row)) == len(row) for row in advantages(by_name("scalar-0.5")))


def named(name: str) -> list[Sample]:
    (one,) = choose((name,), ALL)  # type: ignore[arg-type]
    assert one.name == name
    return one.make(played(made_batch()), LIMIT)


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_a_share_of_the_baseline_is_what_its_name_says(share: float) -> None:
    batch = made_batch()
    zero, plain = (advantages(named(f"genac-0-b{share:g}{end}")) for end in ("-raw", ""))
    outcomes = advantages(named(f"reinforce_pp-b{share:g}-raw"))
    raw = []
    for i, (rollout, judgements) in enumerate(zip(batch.rollouts, batch.judgements, strict=True)):
        values = [j.used for j in judgements]
        wanted = [later - share * v for later, v in zip([*values[1:], rollout.outcome], values, strict=True)]
        raw += [step for step in wanted for _ in range(4)]
        assert zero[i] == pytest.approx([step for step in wanted for _ in range(4)], abs=1e-6)
        others = (sum(batch.outcomes) - rollout.outcome) / (len(batch.outcomes) - 1)
        assert outcomes[i] == pytest.approx([rollout.outcome - share * others] * len(outcomes[i]))
    size = (sum(x * x for x in raw) / len(raw)) ** 0.5
    assert [a for row in plain for a in row] == pytest.approx([x / size for x in raw], abs=1e-5)
    trained = torch.tensor([a for row in advantages(named(f"reinforce_pp-b{share:g}")) for a in row])
    assert float((trained.double() ** 2).mean()) == pytest.approx(1.0, abs=1e-4)


def test_the_whole_share_is_the_estimator_itself() -> None:
    assert advantages(named("reinforce_pp-b1")) == advantages(by_name("reinforce_pp"))
    assert named("exact-0-b1-raw") == by_name("exact-0-raw")


def test_rare_tokens_alone_have_weight() -> None:
    """All of the batch's have probability exp(-0.5), above a half: nothing is left of it."""
    assert all(not any(sample.fields["weights"]) for sample in named("exact-1-raw-rare"))
    batch = made_batch()
    logprobs = (-0.1, -2.0) * 6
    for group in batch.groups:
        for n, rollout in enumerate(group.rollouts):
            ids = rollout.completion.ids
            done = replace(rollout.completion, logprobs=logprobs[: len(ids)])
            group.rollouts[n] = replace(rollout, completion=done)
    (one,) = choose(("reinforce_pp-raw-rare",), ALL)  # type: ignore[arg-type]
    for sample in one.make(played(batch), LIMIT):
        assert [weight > 0 for weight in sample.fields["weights"]] == [False, True] * (sample.trained // 2)


def test_what_can_be_made_is_what_there_is_a_source_for() -> None:
    free = [one.name for one in choose((), ("outcomes",))]
    assert free == ["reinforce_pp"]
    with_teacher = [one.name for one in choose((), ("outcomes", "exact"))]
    assert "exact-0" in with_teacher
    assert not any(name.startswith("genac") for name in with_teacher)
    assert [one.name for one in choose(("exact-0", "rloo"), ALL)] == ["rloo", "exact-0"]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (("exact0",), "did you mean 'exact-0'"),
        (("nothing like it",), "is no estimator"),
        (("exact-0-b1.5",), "is no estimator"),
        (("exact-0.7-b0.5",), "is no estimator"),
        (("exact-0-rare",), "is no estimator"),
        (("rloo-b0.5",), "is no estimator"),
        (("genac-0-b0.5",), "--critic RUN"),
        (("rloo",), "two responses to each prompt"),
        (("vc_ppo",), "--scalar RUN"),
        (("genac-0",), "--critic RUN"),
    ],
)
def test_another_name_and_a_missing_critic_are_refused(names: tuple[str, ...], said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        choose(names, ("outcomes",))
    assert "way out" in str(caught.value)
