"""What a scalar critic is taught, and which responses the actor is: with stand-ins for run and models."""

from __future__ import annotations

import math
import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from genac_megatron.algorithms.filters import keep_whole
from genac_megatron.critic.icc import IccState
from genac_megatron.critic.states import cut_states, state_text
from genac_megatron.errors import InputError
from genac_megatron.recipe.algorithms import RegressionConfig
from genac_megatron.recipe.schema import PolicyStage, RolloutConfig, StatesConfig, ValueStage
from genac_megatron.recipe.tasks import ChainedArithmeticTask, StateTrackingTask
from genac_megatron.records import Completion, Finish, Request, Rollout, Sample, State
from genac_megatron.stages import policy as policy_stage
from genac_megatron.stages.batch import Batch
from genac_megatron.stages.dealt import Dealt
from genac_megatron.stages.minibatches import critic_passes, critic_updates, minibatches, updates
from genac_megatron.stages.policy import train
from genac_megatron.stages.rollouts import Group
from genac_megatron.stages.under_way import Update
from genac_megatron.stages.value_targets import exact_values, lesson_of, states_at
from genac_megatron.stages.values import Lesson, launch_values, value_batch, value_samples
from genac_megatron.tasks import make_task
from genac_megatron.tasks.tokenizer import load_tokenizer

TINY = load_tokenizer("builtin:tiny")
TASK = StateTrackingTask(kind="state_tracking", min_swaps=2, max_swaps=4, slip_rate=0.4)
LIMIT = 64


class FakeRun:
    """One rank of a run, with a real task and teacher; its critic keeps what it is trained on, its engine
    answers by the request's seed."""

    def __init__(self, logit: bool = False) -> None:
        self.task, self.environment = make_task(TASK, TINY, 1), None
        self.tokenizers = {"actor": TINY}
        states = StatesConfig(cutter="lines", max_states=8, min_segment=1)
        self.recipe = SimpleNamespace(judging=SimpleNamespace(states=states), seed=1, task=TASK)
        shape = SimpleNamespace(logit=logit, max_positions=512)
        self.trained: list[tuple[str, list[Sample]]] = []
        self.skipped: list[int] = []
        self.critic = SimpleNamespace(shape=shape, values=self.values, launch_step=self.launch_step,
                                      skip=self.skipped.append)  # fmt: skip
        self.actor = SimpleNamespace(shape=shape, logprobs=self.logprobs, skip=self.skipped.append)
        self.icc = IccState(0.7)
        self.engines = {"actor": self}
        self.asked: list[Request] = []
        self.world = SimpleNamespace(size=1, rank=0)

    # --- what the stages ask of a run
    def share(self, items: Any) -> list[Any]:
        return list(items)

    gather = share

    def together(self, act: Any) -> Any:
        return act()

    generating = together

    def phase(self, name: str) -> Any:
        return torch.no_grad()

    def stop_ids(self, role: str) -> tuple[int, ...]:
        return ()

    def count_sequences(self, phase: str, samples: Any) -> None: ...

    def count(self, figures: Any) -> None: ...

    def spend(self, phase: str, role: str) -> None: ...

    # --- its models
    def values(self, samples: list[Sample], counted: Any = None) -> list[list[float]]:
        return [[0.25] * sample.trained for sample in samples]

    def logprobs(self, samples: list[Sample], temperature: float, counted: Any) -> list[list[float]]:
        """The actor has doubled its first token's chance, and made the second ten times as likely."""
        self.trained.append(("new logprobs", samples))
        return [[-2.0 + math.log(2), -2.0 + math.log(10), *[-2.0] * (s.trained - 2)] for s in samples]

    def launch_step(self, samples: list[Sample], loss: Any) -> Any:
        self.trained.append(("critic", samples))
        stats = {"error": 0.5, "grad_norm": 1.0, "tokens": 7.0, "computed_tokens": 7.0}
        return SimpleNamespace(result=lambda: SimpleNamespace(stats=stats), spoilt=lambda: False)

    async def complete(self, request: Request) -> Completion:
        self.asked.append(request)
        words = "answer : a" if request.seed % 2 else "answer : b"
        ids = tuple(TINY.encode(words, add_special_tokens=False))
        return Completion(ids, (-1.0,) * len(ids), "stop")


def batch_of(run: Any, prompts: int, samples: int, cut_off: tuple[int, ...] = ()) -> Batch:
    """Demonstrations, slips among them; those at `cut_off`, counted through, ended at the limit."""
    rng, groups, number = random.Random(5), [], 0
    for index in range(prompts):
        prompt = run.task.prompt("train", index)
        group = Group(prompt)
        for sample in range(samples):
            text = run.task.teacher.demonstrate(prompt, rng)
            ids = tuple(TINY.encode(text, add_special_tokens=False))
            finish: Finish = "length" if number in cut_off else "stop"
            rollout = Rollout(prompt, sample, Completion(ids, (-2.0,) * len(ids), finish), text)
            rollout.outcome = run.task.verify(prompt, text)
            group.rollouts.append(rollout)
            number += 1
        groups.append(group)
    return Batch(groups)


def learnt(batch: Batch) -> list[torch.Tensor]:
    return [torch.full((len(r.completion.ids),), r.target) for r in batch.rollouts]


@pytest.mark.parametrize(
    "config",
    [TASK, ChainedArithmeticTask(kind="chained_arithmetic", min_steps=2, max_steps=5, slip_rate=0.4)],
    ids=lambda config: config.kind,
)
def test_a_teachers_value_is_what_its_score_rounds(config: Any) -> None:
    task, rng, seen = make_task(config, TINY, 1), random.Random(2), set()
    assert task.teacher is not None
    for index in range(12):
        prompt = task.prompt("train", index)
        text = task.teacher.demonstrate(prompt, rng)
        for end in range(len(text) + 1):
            value = task.teacher.value(prompt, text[:end], 0.63)
            assert round(10 * value) == task.teacher.trace(prompt, text[:end], 0.63, rng)[1]
            seen.add(value)
        assert task.teacher.value(prompt, text, 0.63) == task.verify(prompt, text)
    assert len(seen) > 5  # no tenths


def test_a_mixture_asks_each_parts_teacher() -> None:
    from genac_megatron.recipe.tasks import MixtureTask

    other = {"kind": "chained_arithmetic", "min_steps": 2, "max_steps": 3}
    task = make_task(
        MixtureTask.model_validate(
            {
                "kind": "mixture",
                "parts": [{"name": "a", "task": TASK.model_dump()}, {"name": "b", "task": other}],
            }
        ),
        TINY,
        1,
    )
    for index in range(8):
        prompt = task.prompt("train", index)
        assert task.teacher is not None
        score = task.teacher.trace(prompt, "", 0.5, random.Random(1))[1]
        assert round(10 * task.teacher.value(prompt, "", 0.5)) == score > 0


def test_exact_values_are_the_teachers_of_every_prefix() -> None:
    run: Any = FakeRun()
    batch = batch_of(run, 3, 2)
    values = exact_values(run, batch.rollouts, None)
    seen = set()
    for rollout, found in zip(batch.rollouts, values, strict=True):
        assert len(found) == len(rollout.completion.ids)
        for cut, value in enumerate(found.tolist()):
            partial = TINY.decode(rollout.completion.ids[:cut], skip_special_tokens=True)
            assert value == pytest.approx(run.task.teacher.value(rollout.prompt, partial, 0.7), abs=1e-6)
            seen.add(round(value, 4))
    assert 0.0 in seen
    assert len(seen) > 3
    at = [[1, 5]] * len(batch.rollouts)
    for some, all_ in zip(exact_values(run, batch.rollouts, at), values, strict=True):
        assert some[[1, 5]].tolist() == all_[[1, 5]].tolist()
        assert float(some.sum()) == pytest.approx(float(all_[[1, 5]].sum()))


def test_a_task_without_a_teacher_has_no_exact_values() -> None:
    run: Any = FakeRun()
    batch = batch_of(run, 1, 1)
    run.task.teacher = None
    with pytest.raises(InputError, match=r"'state_tracking' has no exact teacher"):
        lesson_of(run, RolloutConfig(), batch, learnt(batch), RegressionConfig(target="exact"), (1,))


def test_outcomes_are_taught_as_they_are() -> None:
    run: Any = FakeRun()
    batch = batch_of(run, 2, 2)
    targets = learnt(batch)
    lesson = lesson_of(run, RolloutConfig(), batch, targets, RegressionConfig(), (1,))
    assert lesson == Lesson(targets)
    assert not run.asked


@pytest.mark.parametrize("at", [[], [0.0, 0.5]])
def test_monte_carlo_values_are_means_at_the_cuts(at: list[float]) -> None:
    """Each continued as often as asked, at the rollouts' temperature, within what is left of their limit."""
    run: Any = FakeRun()
    run.task.verify = lambda prompt, text: float(text.endswith("a"))
    batch = batch_of(run, 2, 2)
    config = RegressionConfig(target="monte_carlo", continuations=3, at=at, at_cuts=bool(at))
    rollouts = RolloutConfig(temperature=0.8, max_new_tokens=LIMIT)
    lesson = lesson_of(run, rollouts, batch, learnt(batch), config, (1, "value", 4))
    assert lesson.places is not None
    cuts = [[s.cut for s in cut_states(r, TINY, run.recipe.judging.states)] for r in batch.rollouts]
    if not at:
        assert lesson.places == cuts
    else:
        assert all(len(places) <= 2 and places[0] == 0 for places in lesson.places)
    later = sum(len(places) - 1 for places in lesson.places)
    assert len(run.asked) == 3 * (2 + later)  # a prompt's state once per group
    assert {request.params.temperature for request in run.asked} == {0.8}
    starts = {len(r.prompt.ids) for r in batch.rollouts}
    for request in run.asked:
        assert any(request.params.max_new_tokens == LIMIT - (len(request.ids) - n) for n in starts)
    thirds = {0.0, 1 / 3, 2 / 3, 1.0}
    for i, places in enumerate(lesson.places):
        got = lesson.targets[i]
        assert all(any(abs(float(got[p]) - x) < 1e-6 for x in thirds) for p in places)
        assert float(got[0]) == float(lesson.targets[i - i % 2][0])  # the group's own
    again: Any = FakeRun()
    again.task.verify = run.task.verify
    same = lesson_of(again, rollouts, batch_of(again, 2, 2), learnt(batch), config, (1, "value", 4))
    assert all(torch.equal(a, b) for a, b in zip(same.targets, lesson.targets, strict=True))


def test_a_noisy_prompts_responses_weigh_less_and_the_batch_as_much() -> None:
    run: Any = FakeRun()
    batch = batch_of(run, 2, 2)
    for rollout, outcome in zip(batch.rollouts, (1.0, 0.0, 1.0, 1.0), strict=True):
        rollout.outcome = outcome
    lesson = lesson_of(run, RolloutConfig(), batch, learnt(batch), RegressionConfig(by_spread=True), (1,))
    assert lesson.scales is not None
    noisy, _, quiet, _ = lesson.scales
    assert quiet / noisy == pytest.approx(math.sqrt(2))  # 1/2 against the floor
    samples = value_samples(batch.rollouts, learnt(batch), lesson)
    each = [sum(sample.fields["weights"]) / sample.trained for sample in samples]
    assert each[2] / each[0] == pytest.approx(math.sqrt(2), rel=1e-5)
    # in parts, a response keeps what it weighs against those of the other parts
    parts = minibatches(samples, 2, 1, 3, constant=True)
    shares = {s.tokens[-1] + 1000 * len(s.tokens): sum(s.fields["weights"]) for part in parts for s in part}
    whole = {s.tokens[-1] + 1000 * len(s.tokens): sum(s.fields["weights"]) for s in samples}
    assert all(shares[key] == pytest.approx(2 * whole[key]) for key in whole)


def test_dropped_tokens_are_not_trained_and_their_share_is_told() -> None:
    run: Any = FakeRun()
    batch = batch_of(run, 1, 2)
    kept = [torch.ones(len(r.completion.ids), dtype=torch.bool) for r in batch.rollouts]
    kept[0][:3] = False
    total = sum(len(k) for k in kept)
    values = [torch.full((len(k),), 0.5) for k in kept]
    lesson = Lesson(learnt(batch), kept=kept)
    options: Any = {"parts": 1, "epochs": 1, "seed": 0}
    figures = launch_values(
        run, value_batch(run, batch.rollouts, values, lesson), values, lesson, RegressionConfig(), **options
    ).figures()
    assert figures["critic/dropped_share"] == pytest.approx(3 / total)
    ((_, samples),) = run.trained
    assert samples[0].fields["weights"][:4] == pytest.approx([0, 0, 0, 1 / (total - 3)])
    nothing = Lesson(learnt(batch), kept=[torch.zeros_like(k) for k in kept])
    update = launch_values(
        run, value_batch(run, batch.rollouts, values, nothing), values, nothing, RegressionConfig(), **options
    )
    assert update.figures() == {"critic/dropped_share": 1.0}
    assert run.skipped == [1]
    assert len(run.trained) == 1


# --- the policy stage ----------------------------------------------------------------------------


@pytest.fixture
def actors(monkeypatch: pytest.MonkeyPatch) -> list[list[Sample]]:
    """What the actor is trained on, by a stand-in for its updates."""
    seen: list[list[Sample]] = []

    def launch(run: Any, stage: Any, config: Any, batch: Batch, taught: Dealt, step: int) -> Update:
        run.trained.append(("actor", taught.mine))
        seen.append(taught.mine)
        return Update([], lambda: {"actor/loss": 0.0})

    monkeypatch.setattr(policy_stage, "launch_policy", launch)
    return seen


def stage_of(algorithm: dict[str, Any], **more: Any) -> PolicyStage:
    rollout = {"prompts": 2, "samples": 2, "max_new_tokens": LIMIT}
    return PolicyStage.model_validate({"kind": "policy", "algorithm": algorithm, "rollout": rollout, **more})


def test_pact_trains_the_actor_first_and_the_critic_towards_it(actors: list[list[Sample]]) -> None:
    run: Any = FakeRun(logit=True)
    batch = batch_of(run, 2, 2)
    figures = train(run, stage_of({"kind": "pact"}), batch, 1)
    assert [what for what, _ in run.trained] == ["actor", "new logprobs", "critic"]
    count = sum(len(r.completion.ids) for r in batch.rollouts)
    assert figures["critic/dropped_share"] == pytest.approx(4 / count)  # the second token of each, ratio 10
    for sample, rollout in zip(run.trained[-1][1], batch.rollouts, strict=True):
        assert sample.fields["targets"][0] == pytest.approx(2 * rollout.outcome, rel=1e-5)
        assert sample.fields["targets"][2] == pytest.approx(rollout.outcome)
        assert sample.fields["weights"][1] == 0.0
        assert sample.fields["weights"][2] == pytest.approx(1 / (count - 4), rel=1e-5)


def test_pact_of_exact_values_has_nothing_to_correct(actors: list[list[Sample]]) -> None:
    run: Any = FakeRun(logit=True)
    exact = {"target": "exact", "importance_limit": None}
    train(run, stage_of({"kind": "pact", "value": exact}), batch_of(run, 2, 2), 1)
    assert [what for what, _ in run.trained] == ["critic", "actor"]


def test_sao_updates_its_critic_twice(actors: list[list[Sample]]) -> None:
    run: Any = FakeRun()
    train(run, stage_of({"kind": "sao"}), batch_of(run, 2, 2), 1)
    assert [what for what, _ in run.trained] == ["critic", "critic", "actor"]


@pytest.mark.parametrize("kind", ["vc_ppo", "pact", "reinforce_pp", "grpo"])
def test_cut_off_responses_teach_the_critic_alone(kind: str, actors: list[list[Sample]]) -> None:
    run: Any = FakeRun(logit=kind == "pact")
    batch = batch_of(run, 2, 2, cut_off=(1, 2))
    batch.rollouts[1].outcome = batch.rollouts[3].outcome = 0.0
    batch.rollouts[0].outcome = batch.rollouts[2].outcome = 1.0
    algorithm: dict[str, Any] = {"kind": kind}
    train(run, stage_of(algorithm, overlong_filter=True), batch, 1)
    (samples,) = actors
    wanted = [batch.rollouts[0], batch.rollouts[3]]
    assert [s.tokens for s in samples] == [[*r.prompt.ids, *r.completion.ids] for r in wanted]
    assert sum(sum(s.fields["weights"]) for s in samples) == pytest.approx(1.0, abs=1e-5)
    critic = [samples for what, samples in run.trained if what == "critic"]
    if kind in ("vc_ppo", "pact"):
        assert len(critic[0]) == 4
    if kind != "grpo":  # whitened without them
        flat = torch.tensor([a for s in samples for a in s.fields["advantages"]])
        assert float(flat.mean()) == pytest.approx(0.0, abs=1e-5)
        assert float(flat.std(correction=0)) == pytest.approx(1.0, abs=1e-4)
    else:  # the group's mean is that of all its responses
        assert samples[0].fields["advantages"][0] == pytest.approx(1 / math.sqrt(2), rel=1e-4)
    train(run, stage_of(algorithm), batch, 1)
    assert len(actors[-1]) == 4


def test_where_all_are_cut_off_the_actor_is_left_as_it_is(actors: list[list[Sample]]) -> None:
    run: Any = FakeRun()
    batch = batch_of(run, 2, 2, cut_off=(0, 1, 2, 3))
    stage = stage_of({"kind": "vc_ppo"}, overlong_filter=True, minibatches=2)
    figures = train(run, stage, batch, 1)
    assert not actors
    assert run.skipped == [2]  # its schedule goes on
    assert figures["actor/skipped"] == 1.0
    assert "critic/error" in figures


def test_responses_are_left_out_with_their_judgements() -> None:
    run: Any = FakeRun()
    batch = batch_of(run, 2, 2, cut_off=(0, 2, 3))
    kept = keep_whole([rollout.truncated for rollout in batch.rollouts])
    assert [r.key for r in batch.only(kept).rollouts] == ["train/0#1"], "without judgements too"
    for group in batch.groups:
        made: Any = [[f"of {r.key}"] for r in group.rollouts]
        group.judgements = made
    left = batch.only(kept)
    assert [str(one) for (one,) in left.judgements] == ["of train/0#1"]
    assert left.fresh == batch.fresh


def test_a_critics_updates_are_counted_as_they_are_made() -> None:
    rollout = {"prompts": 2, "samples": 2, "max_new_tokens": LIMIT}
    sao = stage_of({"kind": "sao"})
    assert (updates(sao), critic_passes(sao), critic_updates(sao)) == (1, (1, 2), 2)
    quarter = stage_of({"kind": "vc_ppo", "value": {"minibatches": 4}}, epochs=2)
    assert (updates(quarter), critic_passes(quarter), critic_updates(quarter)) == (2, (4, 2), 8)
    small = stage_of({"kind": "sao", "value": {"minibatches": 16}}, minibatches=3)
    assert (updates(small), critic_updates(small)) == (3, 8)  # no more parts than responses
    value = ValueStage.model_validate({"kind": "value", "rollout": rollout, "minibatches": 2})
    assert critic_updates(value) == 2
    more = value.model_copy(update={"value": RegressionConfig(updates=3, minibatches=4)})
    assert critic_updates(more) == 12
    assert critic_passes(stage_of({"kind": "grpo"})) == (0, 0)


def test_a_prefixs_text_is_what_a_generative_critic_is_shown() -> None:
    """So the teacher is asked about the same text by both."""
    run: Any = FakeRun()
    rollout = batch_of(run, 1, 1).rollouts[0]
    for state in cut_states(rollout, TINY, run.recipe.judging.states):
        decoded = TINY.decode(rollout.completion.ids[: state.cut], skip_special_tokens=True)
        assert state_text(state, TINY) == decoded


def test_monte_carlo_values_of_conversations_stand_at_sampled_tokens() -> None:
    """ids 0-2 and 9-11 are the actor's; the state before its second turn is at the fourth sampled token."""
    said = Completion(tuple(range(14)), (-0.5,) * 6, "stop", sampled=((0, 3), (9, 12)))
    rollout = Rollout(make_task(TASK, TINY, 1).prompt("train", 0), 0, said, "")
    states = [State(rollout, n, cut, 14) for n, cut in enumerate((0, 3, 9, 12))]
    found = states_at(said, states, RegressionConfig())
    assert {place: state.cut for place, state in found.items()} == {0: 0, 3: 9}, "12: no token is behind it"
    nearest = states_at(said, states, RegressionConfig(target="monte_carlo", at=[0.9]))
    assert {place: state.cut for place, state in nearest.items()} == {3: 9}
