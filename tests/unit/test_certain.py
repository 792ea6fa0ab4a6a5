"""Responses whose outcome is certain are not judged: who they are, and that nothing is biased by it."""

from __future__ import annotations

import asyncio
import functools
import itertools
import math
import random
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from genac_megatron.critic.score import fill_used
from genac_megatron.recipe.algorithms import CriticLossConfig
from genac_megatron.recipe.schema import AdvantageConfig, LossConfig, PpoStage
from genac_megatron.records import Completion, Judgement, Prompt, Rollout, State
from genac_megatron.stages.accuracy import blend_errors, pairs_of
from genac_megatron.stages.batch import Batch, actor_samples, critic_samples
from genac_megatron.stages.certain import Others, left_out
from genac_megatron.stages.critic_updates import critic_batch, launch_critic
from genac_megatron.stages.figures import judge_figures
from genac_megatron.stages.regime import baselines
from genac_megatron.stages.rollouts import Group
from tests.unit.test_joint_critic import stand_in_run

PROMPT = Prompt("train/0", (), "problem", None, (1, 2))


def response(
    sample: int, ids: tuple[int, ...], outcome: float, logprobs: tuple[float, ...] | None = None
) -> Rollout:
    given_to = logprobs or (-1.0,) * len(ids)
    return Rollout(PROMPT, sample, Completion(ids, given_to, "stop"), "", outcome)


async def told(outcomes: Sequence[float], arrival: Sequence[int]) -> list[float | None]:
    """What `Others` says of each response, where they are verified in such an order."""
    others = Others(range(len(outcomes)))
    asked = [asyncio.ensure_future(others.certain(sample)) for sample in range(len(outcomes))]
    for sample in arrival:
        await asyncio.sleep(0)
        others.tell(response(sample, (3,), outcomes[sample]))
    return list(await asyncio.gather(*asked))


outcomes_st = st.lists(st.sampled_from([0.0, 0.0, 0.5, 1.0]), min_size=3, max_size=6)


@given(outcomes_st, st.randoms(use_true_random=False))
def test_others_that_ended_alike_make_an_outcome_certain(outcomes: list[float], chance: Any) -> None:
    arrival = chance.sample(range(len(outcomes)), len(outcomes))
    wanted = []
    for sample in range(len(outcomes)):
        rest = {r for other, r in enumerate(outcomes) if other != sample}
        wanted.append(rest.pop() if len(rest) == 1 else None)
    assert asyncio.run(told(outcomes, arrival)) == wanted


def test_two_that_differ_are_enough_to_judge_the_others() -> None:
    async def work() -> float | None:
        others = Others(range(8))
        asked = asyncio.ensure_future(others.certain(7))
        for sample, outcome in ((7, 1.0), (0, 1.0), (1, 0.0)):
            assert not asked.done()
            others.tell(response(sample, (3,), outcome))
            await asyncio.sleep(0)
        return await asyncio.wait_for(asked, 5)

    assert asyncio.run(work()) is None


def test_a_rule_for_cut_off_responses_makes_outcomes_differ() -> None:
    """What the actor earns may be alike where what critics are to predict is not."""

    async def work() -> list[float | None]:
        others = Others(range(3))
        for sample in range(3):
            one = response(sample, (3,), 1.0)
            one.critic_outcome = 0.0 if sample == 1 else None
            others.tell(one)
        return [await others.certain(sample) for sample in range(3)]

    assert asyncio.run(work()) == [None, 1.0, None]


# --- no bias: every group of a small policy, with its probability --------------------------------

LIMIT, GROUP = 2, 3


def right(ids: tuple[int, ...]) -> float:
    return float(ids in ((2,), (0, 1), (1, 1), (1, 2)))


def everything() -> Iterator[tuple[tuple[int, ...], float, np.ndarray]]:
    """Every response of at most LIMIT tokens (2 ends it), its probability, and d log pi / d logits before
    each token and at its end, [T + 1, 3]: one softmax for all places."""
    p = np.array([0.4, 0.35, 0.25])

    def grow(prefix: tuple[int, ...], scores: tuple[np.ndarray, ...]) -> Any:
        if prefix and (prefix[-1] == 2 or len(prefix) == LIMIT):
            yield prefix, math.prod(p[token] for token in prefix), np.array(scores)
            return
        for token in range(3):
            yield from grow((*prefix, token), (*scores, scores[-1] + np.eye(3)[token] - p))

    return grow((), (np.zeros(3),))


RESPONSES = list(everything())


@functools.cache
def value(prefix: tuple[int, ...]) -> float:
    """A critic that knows nothing: any number."""
    return random.Random(f"critic/{prefix}").random()


@functools.cache
def certain_of(outcomes: tuple[float, ...]) -> tuple[float | None, ...]:
    return tuple(asyncio.run(told(outcomes, range(len(outcomes)))))


def played(members: Sequence[int], certain: Sequence[float | None]) -> Group:
    group = Group(PROMPT)
    first = Judgement(State(response(0, (), 0.0), 0, 0, 0), (7,), Completion((5,), (-1.0,), "stop"), "", 0.0)
    first.value = value(())
    for sample, member in enumerate(members):
        ids = RESPONSES[member][0]
        rollout = response(sample, ids, right(ids))
        known = certain[sample]
        judgements = [first]
        if known is not None:
            judgements = left_out(rollout, known, final=False)
        elif len(ids) > 1:
            state = State(rollout, 1, 1, len(ids))
            judgements.append(Judgement(state, (7, sample), first.completion, "", value(ids[:1])))
        fill_used(judgements, 0.5)
        group.rollouts.append(rollout)
        group.judgements.append(judgements)
    return group


def gradient(rule: Any) -> np.ndarray:
    """The mean of sum_i sum_t A_t d log pi(y_t) over all groups, by the samples that the actor has."""
    config = AdvantageConfig.model_validate({"lam": 1.0, "lam_gate": None, "normalise": "none"})
    total = np.zeros(3)
    for members in itertools.product(range(len(RESPONSES)), repeat=GROUP):
        outcomes = tuple(right(RESPONSES[member][0]) for member in members)
        group = played(members, rule(outcomes))
        chance = math.prod(RESPONSES[member][1] for member in members)
        samples = actor_samples(Batch([group]), config, 1.0, LossConfig(), LIMIT)
        for member, sample in zip(members, samples, strict=True):
            steps = np.diff(RESPONSES[member][2], axis=0)
            total += chance * np.array(sample.fields["advantages"]) @ steps
    return total


def test_the_actors_gradient_has_no_bias_whatever_the_critic_says() -> None:
    """And one that leaves out groups by all of their outcomes, the response's own among them, has."""
    assert sum(p for _, p, _ in RESPONSES) == pytest.approx(1.0)
    true = GROUP * sum(p * right(ids) * scores[-1] for ids, p, scores in RESPONSES)
    assert np.linalg.norm(true) > 0.3
    assert gradient(certain_of) == pytest.approx(true, abs=1e-6)  # advantages are fp32
    assert gradient(lambda outcomes: (None,) * GROUP) == pytest.approx(true, abs=1e-6)

    def whole_groups(outcomes: tuple[float, ...]) -> tuple[float | None, ...]:
        return (outcomes[0],) * GROUP if len(set(outcomes)) == 1 else (None,) * GROUP

    assert np.abs(gradient(whole_groups) - true).max() > 0.05


def test_the_critic_still_meets_the_mean_outcome() -> None:
    """Of the responses that are judged, at every prefix, as of all of them."""
    sums: dict[tuple[int, ...], np.ndarray] = {}
    for members in itertools.product(range(len(RESPONSES)), repeat=GROUP):
        certain = certain_of(tuple(right(RESPONSES[member][0]) for member in members))
        chance = math.prod(RESPONSES[member][1] for member in members)
        for member, known in zip(members, certain, strict=True):
            ids = RESPONSES[member][0]
            if known is None:
                for cut in range(len(ids)):
                    sums.setdefault(ids[:cut], np.zeros(2))
                    sums[ids[:cut]] += chance * np.array([right(ids), 1.0])
    assert len(sums) == 3
    for prefix, (total, count) in sums.items():
        of = [(p, right(ids)) for ids, p, _ in RESPONSES if ids[: len(prefix)] == prefix]
        assert total / count == pytest.approx(sum(p * r for p, r in of) / sum(p for p, _ in of))


# --- what is made of them ------------------------------------------------------------------------


def mixed_batch(outcomes: Sequence[float]) -> Batch:
    """A group of responses 0 0 0, 0 0 1, ...: by outcome alone."""
    by = {right(ids): n for n, (ids, _, _) in enumerate(RESPONSES) if len(ids) == LIMIT}
    return Batch([played([by[r] for r in outcomes], certain_of(tuple(outcomes)))])


@pytest.mark.parametrize("lam", [1.0, 0.5])
def test_a_response_that_is_left_out_is_one_segment_against_the_others(lam: float) -> None:
    batch = mixed_batch([0.0, 1.0, 1.0, 1.0])
    config = AdvantageConfig.model_validate({"lam_gate": None, "normalise": "none"})
    samples = actor_samples(batch, config, lam, LossConfig(), LIMIT)
    assert samples[0].fields["advantages"] == [-1.0] * LIMIT
    for sample, judgements in zip(samples[1:], batch.judgements[1:], strict=True):
        assert len(set(sample.fields["advantages"])) == 2, "and the others have two segments"
        assert [j.used for j in judgements] == [value(()), value((sample.tokens[2],))]


def test_figures_are_of_what_was_judged() -> None:
    batch = mixed_batch([0.0, 1.0, 1.0, 1.0])
    figures = judge_figures(batch)
    assert figures["judge/certain"] == 0.25
    assert figures["judge/states"] == 4.0
    assert figures["judge/skipped"] == 0.0
    judged = [j for js in batch.judgements[1:] for j in js]
    assert figures["judge/brier"] == pytest.approx(sum((j.used - 1.0) ** 2 for j in judged) / len(judged))
    assert figures["judge/value_first"] == pytest.approx(value(()))
    assert len(pairs_of(batch.groups)) == len(judged) == 6
    errors = blend_errors(batch.groups, batch.outcomes)
    assert errors["value_error"] == pytest.approx(figures["judge/brier"])
    assert "judge/certain" not in judge_figures(mixed_batch([0.0, 0.0, 1.0, 1.0]))


def test_a_blend_leaves_the_others_mean_as_it_is() -> None:
    batch = mixed_batch([0.0, 1.0, 1.0, 1.0])
    config = AdvantageConfig.model_validate({"blend": {"weight": 0.3}})
    at: Any = None
    values, _ = baselines(at, config, batch, torch.tensor(batch.outcomes))
    assert values[0].tolist() == [1.0]


def test_the_critic_is_trained_on_what_was_judged() -> None:
    batch = mixed_batch([0.0, 1.0, 1.0, 1.0])
    samples = critic_samples(batch, 4, "leave_one_out", CriticLossConfig())
    assert len(samples) == 4, "the prompt state once, and three responses' second states"
    assert sum(sum(sample.fields["weights"]) for sample in samples) == pytest.approx(1.0)
    with_finals = mixed_batch([1.0, 1.0, 1.0])
    for group in with_finals.groups:
        group.finals = [left_out(rollout, 1.0, final=True)[-1] for rollout in group.rollouts]
    assert critic_samples(with_finals, 4, "leave_one_out", CriticLossConfig()) == []
    figures = judge_figures(with_finals)
    assert figures == {"judge/certain": 1.0}


def test_a_batch_that_is_certain_throughout_moves_no_critic_with_a_stand_in_for_the_run() -> None:
    updates: list[int] = []
    run, stage = stand_in_run(0.0, updates), PpoStage(kind="ppo")

    def launched(batch: Batch) -> Any:
        return launch_critic(run, stage, batch, critic_batch(run, stage, batch, None))

    assert launched(mixed_batch([1.0, 1.0, 1.0])).figures() == {"critic/skipped": 1.0}
    launched(mixed_batch([0.0, 1.0, 1.0]))
    assert updates == [-1, 3], "no update, and the learning rate goes on; then one"
