"""A joint step's critic: importance weights of a moved actor, whole responses, a teacher in its place."""

from __future__ import annotations

import asyncio
import math
import random
import statistics
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from genac_megatron.algorithms.importance import dropped, tail_ratios
from genac_megatron.critic.icc import IccState
from genac_megatron.critic.score import reward
from genac_megatron.critic.states import trained_indices
from genac_megatron.recipe.algorithms import CriticLossConfig
from genac_megatron.recipe.schema import JudgingConfig, PpoStage
from genac_megatron.recipe.tasks import StateTrackingTask
from genac_megatron.records import Completion, Rollout, State
from genac_megatron.stages.batch import Batch, actor_samples, critic_samples
from genac_megatron.stages.critic_updates import launch_critic_after
from genac_megatron.stages.figures import judge_figures
from genac_megatron.stages.judging import TeacherJudge
from genac_megatron.stages.rollouts import Generator, generate, judge_groups
from genac_megatron.tasks.state_tracking import StateTracking
from genac_megatron.tasks.tokenizer import load_tokenizer
from genac_megatron.training.role import StepResult
from tests.unit.test_stages_batch import FLOAT32, judgement, make_batch

TOKENIZER = load_tokenizer("builtin:tiny")


# --- importance weights --------------------------------------------------------------------------


@given(st.lists(st.tuples(st.floats(-3, 0), st.floats(-3, 0)), min_size=1, max_size=8))
def test_tail_ratios_are_products_of_the_tokens_behind_the_cut(rows: list[tuple[float, float]]) -> None:
    new, old = [a for a, _ in rows], [b for _, b in rows]
    cuts = range(len(rows) + 1)
    found = tail_ratios(new, old, cuts)
    for cut, ratio in zip(cuts, found, strict=True):
        wanted = math.prod(math.exp(a) / math.exp(b) for a, b in rows[cut:])
        assert ratio == pytest.approx(min(max(wanted, math.exp(-20)), math.exp(20)), rel=1e-9)


def test_ratios_beyond_the_limit_are_dropped() -> None:
    assert dropped([[0.0, 6.0, 6.1], [1.0]], 6.0) == [[0.0, 6.0, None], [1.0]]


def test_importance_weights_make_the_old_actors_outcomes_the_new_ones() -> None:
    """One state, two ways on (right or wrong), chances .3 -> .6: weighted rewards of the score v are those
    that the new actor's outcomes earn, E r = .6."""
    old, new, v = 0.3, 0.6, 0.4
    chances = ((1.0, old, new), (0.0, 1 - old, 1 - new))
    weighted = sum(
        before * tail_ratios([math.log(after)], [math.log(before)], [0])[0] * reward(v, r)
        for r, before, after in chances
    )
    assert weighted == pytest.approx(sum(after * reward(v, r) for r, _, after in chances))


@given(st.integers(0, 10**6), st.integers(1, 6), st.sampled_from(["leave_one_out", "none"]), st.data())
def test_weighted_and_dropped_entries_against_a_slow_reference(
    seed: int, most: int, baseline: str, data: Any
) -> None:
    batch = make_batch(seed)
    rng = random.Random(seed)
    ratios = [[rng.choice([None, 0.0, 0.5, 1.0, 5.0]) for _ in js] for js in batch.judgements]
    samples = critic_samples(batch, most, baseline, CriticLossConfig(), ratios=ratios)
    entries = [
        (js[i].prompt_ids[-1], reward(js[i].value, r.outcome), r.outcome, row[i])
        for r, js, row in zip(batch.rollouts, batch.judgements, ratios, strict=True)
        for i in trained_indices(len(js), most)
        if row[i] is not None
    ]
    wanted: dict[int, list[float]] = {}
    for number, earned, outcome, ratio in entries:
        others = [x for n, x, o, _ in entries if o == outcome and n != number]
        base = 0.0 if baseline == "none" else statistics.fmean(others) if others else earned
        wanted.setdefault(number, []).append((ratio or 0.0) * (earned - base))
    found = {sample.tokens[sample.start - 1]: sample.fields["advantages"][0] for sample in samples}
    assert found == pytest.approx({n: statistics.fmean(x) for n, x in wanted.items()}, abs=1e-12)


def stand_in_run(moved: float, updates: list[int]) -> Any:
    """A run whose actor finds every token `moved` nats likelier, and whose critic counts its updates."""

    class Done:
        def __init__(self, result: Any) -> None:
            self.kept = result

        def result(self) -> Any:
            return self.kept

        def spoilt(self) -> bool:
            return False

    def launch_step(samples: Any, loss: Any, **options: Any) -> Done:
        updates.append(len(samples))
        logprobs = [list(sample.fields["behaviour"]) for sample in samples]
        return Done(
            StepResult({"loss": 0.0, "grad_norm": 1.0, "tokens": 1.0, "computed_tokens": 1.0}, logprobs)
        )

    def logprobs(samples: Any, temperature: float, counted: Any) -> list[list[float]]:
        return [[x + moved for x in sample.fields["behaviour"]] for sample in samples]

    return SimpleNamespace(
        phase=lambda name: nullcontext(),
        count_sequences=lambda phase, samples: None,
        actor=SimpleNamespace(logprobs=logprobs),
        critic=SimpleNamespace(launch_step=launch_step, skip=lambda steps: updates.append(-steps)),
        recipe=SimpleNamespace(judging=JudgingConfig()),
    )


def test_updates_after_the_actors_with_a_stand_in_run() -> None:
    stage = PpoStage(kind="ppo", critic_updates=3)
    batch, updates = make_batch(11), list[int]()
    update = launch_critic_after(stand_in_run(0.0, updates), stage, batch)
    assert len(update.passes) == len(updates) == 3
    figures = update.figures()
    assert (figures["critic/importance"], figures["critic/importance_dropped"]) == (1.0, 0.0)
    assert figures["tokens/critic_train"] == 3.0
    # Where every token is e times as likely all states but those before the last token are beyond 6.
    updates.clear()
    figures = launch_critic_after(stand_in_run(1.0, updates), stage, batch).figures()
    tails = [
        len(r.completion.ids) - j.state.cut
        for r, js in zip(batch.rollouts, batch.judgements, strict=True)
        for j in js
    ]
    assert figures["critic/importance_dropped"] == pytest.approx(1 - sum(n < 2 for n in tails) / len(tails))


def test_where_every_ratio_is_dropped_the_schedule_of_a_stand_in_run_goes_on() -> None:
    batch, updates = make_batch(11), list[int]()
    update = launch_critic_after(stand_in_run(9.0, updates), PpoStage(kind="ppo", critic_updates=2), batch)
    assert update.figures() == {"critic/importance": 0.0, "critic/importance_dropped": 1.0}
    assert updates == [-2], "no update, and the learning rate goes on"


# --- whole responses -----------------------------------------------------------------------------


def with_finals(seed: int) -> Batch:
    rng, batch = random.Random(seed), make_batch(seed)
    for number, group in enumerate(batch.groups):
        for n, (rollout, judgements) in enumerate(zip(group.rollouts, group.judgements, strict=True)):
            whole = len(rollout.completion.ids)
            state = State(rollout, len(judgements), whole, whole)
            group.finals.append(judgement(rng, state, 10_000 + 100 * number + n))
    return batch


@given(st.integers(0, 10**6), st.sampled_from([0.5, 1.0, 4.0]), st.sampled_from(["token", "sequence"]))
def test_whole_responses_teach_the_critic_by_their_weight(seed: int, weight: float, aggregate: Any) -> None:
    batch, plain = with_finals(seed), make_batch(seed)
    loss = CriticLossConfig(aggregate=aggregate)
    samples = critic_samples(batch, 4, "leave_one_out", loss, final_weight=weight)
    without = critic_samples(plain, 4, "leave_one_out", loss)
    finals = samples[len(without) :]
    assert len(finals) == len(batch.rollouts)
    assert [s.tokens for s in samples[: len(without)]] == [s.tokens for s in without]
    # They change nobody's baseline, and are compared with one another.
    assert [s.fields["advantages"] for s in samples[: len(without)]] == [
        s.fields["advantages"] for s in without
    ]
    earned = [reward(j.value, r.outcome) for j, r in zip(batch.finals, batch.rollouts, strict=True)]
    for i, (sample, rollout) in enumerate(zip(finals, batch.rollouts, strict=True)):
        others = [x for k, x in enumerate(earned) if k != i and batch.rollouts[k].outcome == rollout.outcome]
        base = statistics.fmean(others) if others else earned[i]
        assert sample.fields["advantages"] == pytest.approx([earned[i] - base] * sample.trained, abs=1e-12)
    # As if each stood there `weight` times.
    sizes = [(s.trained, weight if s in finals else 1.0) for s in samples]
    unit = [m if aggregate == "token" else m / n for n, m in sizes]
    total = sum(u * n for u, (n, _) in zip(unit, sizes, strict=True))
    for sample, u in zip(samples, unit, strict=True):
        assert sample.fields["weights"] == pytest.approx([u / total] * sample.trained, abs=FLOAT32)


@given(st.integers(0, 10**6))
def test_a_whole_response_is_no_segments_baseline(seed: int) -> None:
    batch, plain = with_finals(seed), make_batch(seed)
    stage = PpoStage(kind="ppo")
    arguments = stage.advantage, 0.5, stage.actor_loss, 99
    assert actor_samples(batch, *arguments) == actor_samples(plain, *arguments)
    figures, before = judge_figures(batch), judge_figures(plain)
    finals = [(j.used - r.target) ** 2 for j, r in zip(batch.finals, batch.rollouts, strict=True)]
    assert figures.pop("judge/final_brier") == pytest.approx(statistics.fmean(finals))
    assert figures.pop("judge/final_skipped") == 0.0
    assert figures == pytest.approx(before, nan_ok=True)


# --- figures of a batch --------------------------------------------------------------------------


def test_figures_of_scores_and_places_by_hand() -> None:
    batch = make_batch(3)
    figures = judge_figures(batch)
    unique = {j.prompt_ids[-1]: j.value for js in batch.judgements for j in js}
    scores = [value for value in unique.values() if value is not None]
    shares = [scores.count(value) / len(scores) for value in set(scores)]
    assert figures["judge/score_entropy"] == pytest.approx(-sum(p * math.log(p) for p in shares))
    assert figures["judge/value_first"] == pytest.approx(
        statistics.fmean(js[0].used for js in batch.judgements)
    )
    assert figures["judge/value_last"] == pytest.approx(
        statistics.fmean(js[-1].used for js in batch.judgements)
    )


# --- a teacher in the critic's place -------------------------------------------------------------


class FixedActor:
    """An engine that writes what it is given, by key: no model is needed to judge."""

    def __init__(self, texts: dict[str, str]) -> None:
        self.texts = texts

    def deal(self, places: Any) -> None:
        pass

    async def complete(self, request: Any) -> Completion:
        await asyncio.sleep(0)
        ids = tuple(TOKENIZER.encode(self.texts[request.key], add_special_tokens=False))
        return Completion(ids, (-1.0,) * len(ids), "stop", ((1, len(ids)),))


def test_the_teacher_judges_a_fixed_actor_as_it_writes_traces_and_generates_nothing() -> None:
    task = StateTracking(StateTrackingTask(kind="state_tracking", slip_rate=0.2), TOKENIZER, 0)
    prompt = task.prompt("train", 3)
    written = [task.teacher.demonstrate(prompt, random.Random(n)) for n in range(40)]
    right, wrong = (next(t for t in written if task.verify(prompt, t) == r) for r in (1.0, 0.0))
    judging = JudgingConfig(teacher="exact", states={"max_states": 8, "min_segment": 1})  # type: ignore[arg-type]
    judge = TeacherJudge(task.teacher, TOKENIZER, judging, IccState(0.64), (1, "judge"), final=True)
    engine: Any = FixedActor({f"{prompt.id}#0": right, f"{prompt.id}#1": wrong})
    stage = PpoStage(kind="ppo")
    generator = Generator(engine, TOKENIZER, task, stage.rollout, (), (1, "actor"), judge)
    (group,) = generate(generator, [prompt], 2)
    assert [r.outcome for r in group.rollouts] == [1.0, 0.0]
    for rollout, judgements, final in zip(group.rollouts, group.judgements, group.finals, strict=True):
        assert final.state.cut == final.state.end == len(rollout.completion.ids)
        assert len(judgements) > 2
        for one in [*judgements, final]:
            assert (one.prompt_ids, one.completion.ids, one.skipped) == ((), (), False)
            partial = TOKENIZER.decode(rollout.completion.ids[: one.state.cut])
            _, score = task.teacher.trace(prompt, partial, 0.64, random.Random(0))
            assert one.value == score / 10
    assert group.judgements[0][0] is group.judgements[1][0], "one judgement of the prompt"
    assert group.finals[0].value == 1.0
    assert group.finals[1].value == 0.0
    exact = replace(judge, final=False, config=judging.model_copy(update={"score": "soft"}))
    (unrounded,) = judge_groups(exact, [group])
    for soft, rounded in zip(unrounded.judgements[0], group.judgements[0], strict=True):
        assert soft.value == rounded.value
        assert soft.soft is not None
        assert abs(soft.soft - (rounded.value or 0.0)) <= 0.05 + 1e-9
    assert {j.soft for j in unrounded.judgements[0]} - {j.value for j in unrounded.judgements[0]}
    # Evaluations judge the same states, without whole responses.
    (again,) = judge_groups(replace(judge, final=False), [group])
    assert again.finals == []
    assert [[j.value for j in js] for js in again.judgements] == [
        [j.value for j in js] for js in group.judgements
    ]


def test_a_prompt_with_one_response_of_a_fixed_actor_is_judged_alone() -> None:
    task = StateTracking(StateTrackingTask(kind="state_tracking"), TOKENIZER, 0)
    prompts = [task.prompt("train", n) for n in range(3)]
    texts = {f"{p.id}#0": task.teacher.demonstrate(p, random.Random(0)) for p in prompts}
    judge = TeacherJudge(task.teacher, TOKENIZER, JudgingConfig(teacher="exact"), IccState(0.5), (1, "judge"))
    engine: Any = FixedActor(texts)
    generator = Generator(engine, TOKENIZER, task, PpoStage(kind="ppo").rollout, (), (1, "actor"), judge)
    groups = generate(generator, prompts, 1)
    assert len({id(group.judgements[0][0]) for group in groups}) == 3
    for group in groups:
        for j in [x for js in group.judgements for x in js]:
            j.used = j.value or 0.0
    batch = Batch(groups)
    assert [type(r) for r in batch.rollouts] == [Rollout] * 3
    stage = PpoStage(kind="ppo")
    (first, *_) = actor_samples(batch, stage.advantage, 0.0, stage.actor_loss, 99)
    assert len(first.fields["advantages"]) == len(groups[0].rollouts[0].completion.ids)
