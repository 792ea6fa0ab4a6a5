"""A scalar critic's samples, advantages and figures, and DAPO's sampling: against loops, with stand-ins for
the run and its model."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from genac_megatron.recipe.algorithms import (
    ClipHigherLoss,
    LossConfig,
    RegressionConfig,
    ValueConfig,
    VapoLoss,
    VapoValue,
    VcPpoValue,
)
from genac_megatron.recipe.schema import PolicyStage, StatesConfig
from genac_megatron.records import Completion, Prompt, Rollout, Sample
from genac_megatron.stages import policy as policy_stage
from genac_megatron.stages.batch import Batch, response_samples
from genac_megatron.stages.policy import group_advantages, mixed_batch, table
from genac_megatron.stages.rollouts import Group
from genac_megatron.stages.under_way import collected
from genac_megatron.stages.values import (
    Lesson,
    advantages_and_targets,
    launch_values,
    places_of,
    response_values,
    returns,
    value_batch,
    value_samples,
)
from genac_megatron.tasks.tokenizer import load_tokenizer

TINY = load_tokenizer("builtin:tiny")
TEXT = "1 2 3\n4 5 6\n7 8 9\n"


def rollout(text: str, outcome: float, number: int = 0) -> Rollout:
    ids = tuple(TINY.encode(text, add_special_tokens=False))
    prompt = Prompt(f"train/{number}", (), "problem", "", (1, 2, 3))
    return Rollout(prompt, 0, Completion(ids, (-0.5,) * len(ids), "stop"), text, outcome)


class FakeRun:
    """What these functions ask of a run; its critic keeps what it is trained on."""

    def __init__(self) -> None:
        self.counted: dict[str, int] = {}
        self.trained: list[list[Sample]] = []
        self.tokenizers = {"actor": TINY}
        states = StatesConfig(cutter="lines", max_states=8, min_segment=1)
        self.recipe = SimpleNamespace(judging=SimpleNamespace(states=states), seed=1)
        shape = SimpleNamespace(logit=False)
        self.critic = SimpleNamespace(values=self.values, launch_step=self.launch_step, shape=shape)
        self.roles = {"actor": None, "critic": None}
        self.serving = SimpleNamespace(rest=lambda: None)

    def count_sequences(self, phase: str, samples: list[Sample]) -> None:
        self.counted[phase] = sum(len(sample.tokens) for sample in samples)

    def values(self, samples: list[Sample], counted: Any = None) -> list[list[float]]:
        return [[0.1 * t for t in range(sample.trained)] for sample in samples]

    def launch_step(self, samples: list[Sample], loss: Any) -> Any:
        self.trained.append(samples)
        stats = {"error": 0.5, "grad_norm": float(len(self.trained)), "tokens": 7.0, "computed_tokens": 5.0}
        return SimpleNamespace(result=lambda: SimpleNamespace(stats=stats))

    def phase(self, name: str) -> Any:
        return torch.no_grad()


@pytest.fixture
def run() -> Any:
    return FakeRun()


ROLLOUTS = [rollout(TEXT, 1.0), rollout("1 2\n", 0.0, 1)]
VALUES = [torch.linspace(0.1, 0.9, len(r.completion.ids)) for r in ROLLOUTS]
OUTCOMES = [r.outcome for r in ROLLOUTS]


def test_values_are_read_once_per_token_and_counted_to_their_phase(run: Any) -> None:
    values = response_values(run, ROLLOUTS)
    assert [len(value) for value in values] == [len(r.completion.ids) for r in ROLLOUTS]
    tokens = sum(3 + len(r.completion.ids) for r in ROLLOUTS)
    assert run.counted == {"value": tokens}
    response_values(run, ROLLOUTS, "evaluate")
    assert run.counted == {"value": tokens, "evaluate": tokens}


def slow_gae(values: list[float], outcome: float, lam: float) -> list[float]:
    after = [*values[1:], outcome]
    deltas = [b - a for a, b in zip(values, after, strict=True)]
    return [sum(lam ** (k - t) * deltas[k] for k in range(t, len(deltas))) for t in range(len(deltas))]


@pytest.mark.parametrize(
    "config", [ValueConfig(), VcPpoValue(), ValueConfig(lam_actor=0.7, lam_critic=0.4), VapoValue()]
)
def test_the_actor_and_the_critic_have_their_own_lambda(config: ValueConfig) -> None:
    advantages, targets = advantages_and_targets(VALUES, OUTCOMES, config)
    for value, outcome, advantage, target in zip(VALUES, OUTCOMES, advantages, targets, strict=True):
        lam = config.lam_actor
        if config.length_alpha is not None:
            lam = max(0.0, 1 - 1 / (config.length_alpha * len(value)))
        # float32 figures of about 1
        assert advantage.tolist() == pytest.approx(slow_gae(value.tolist(), outcome, lam), abs=1e-5)
        learnt = [v + a for v, a in zip(value.tolist(), slow_gae(value.tolist(), outcome, config.lam_critic),
                                        strict=True)]  # fmt: skip
        assert target.tolist() == pytest.approx(learnt, abs=1e-5)
    alone = returns(VALUES, OUTCOMES, RegressionConfig(lam_critic=config.lam_critic))
    assert all(torch.equal(a, b) for a, b in zip(alone, targets, strict=True))


def test_a_value_is_trained_on_every_token_or_at_its_places_alone() -> None:
    targets = [torch.full_like(value, 0.5) for value in VALUES]
    total = sum(len(value) for value in VALUES)
    for sample, one, value in zip(
        value_samples(ROLLOUTS, VALUES, Lesson(targets)), ROLLOUTS, VALUES, strict=True
    ):
        assert sample.tokens == [1, 2, 3, *one.completion.ids]
        assert sample.start == 3
        assert sample.fields["weights"] == pytest.approx([1 / total] * len(value))
        assert sample.fields["old"] == value.tolist()
        assert sample.fields["targets"] == [0.5] * len(value)
    places = [[0, 4], [1]]
    for sample, chosen in zip(value_samples(ROLLOUTS, VALUES, Lesson(targets, places)), places, strict=True):
        weights = [1 / 3 if t in chosen else 0.0 for t in range(sample.trained)]
        assert sample.fields["weights"] == pytest.approx(weights)


@pytest.mark.parametrize("at_cuts", [False, True])
def test_sp3o_trains_its_places_and_is_measured_there(run: Any, at_cuts: bool) -> None:
    """Places by share of the length, or the line ends that are nearest; values elsewhere are nobody's."""
    config = RegressionConfig(at=[0.3, 0.6], at_cuts=at_cuts)
    long, cuts = len(ROLLOUTS[0].completion.ids), [0]
    for t, token in enumerate(ROLLOUTS[0].completion.ids):
        if "\n" in TINY.decode([token]) and t + 1 < long:
            cuts.append(t + 1)
    assert len(cuts) == 3
    wanted = [int(0.3 * long), int(0.6 * long)]
    if at_cuts:
        wanted = [min(cuts, key=lambda cut, p=p: (abs(cut - p), cut)) for p in wanted]  # type: ignore[misc]
    values = [value.clone() for value in VALUES]
    values[0][[t for t in range(long) if t not in wanted]] = 50.0
    targets = [torch.full_like(value, r.outcome) for value, r in zip(VALUES, ROLLOUTS, strict=True)]
    lesson = Lesson(targets, places_of(run, ROLLOUTS, config))
    update = launch_values(
        run, value_batch(run, ROLLOUTS, values, lesson), values, lesson, config, parts=1, epochs=1, seed=0
    )
    figures = collected(run, [update])
    ((first, _),) = run.trained
    assert [t for t, weight in enumerate(first.fields["weights"]) if weight] == sorted(set(wanted))
    assert abs(figures["critic/explained_variance"]) < 5
    assert figures["tokens/critic_train"] == 7.0
    assert figures["unique/critic_train"] == 5.0


def test_only_right_responses_are_made_likelier() -> None:
    batch = Batch([Group(r.prompt, [r]) for r in [*ROLLOUTS, rollout(TEXT, 0.9, 2)]])
    flat = [torch.zeros(len(r.completion.ids)) for r in batch.rollouts]
    lengths = [len(r.completion.ids) for r in batch.rollouts]
    for loss, right in ((VapoLoss(), [0]), (VapoLoss(nll_from=0.9), [0, 2])):
        tokens = sum(lengths[i] for i in right)
        for i, sample in enumerate(response_samples(batch, flat, loss, 64)):
            weight = 1 / tokens if i in right else 0.0
            assert sample.fields["nll_weights"] == pytest.approx([weight] * lengths[i])
    assert "nll_weights" not in response_samples(batch, flat, LossConfig(), 64)[0].fields


def group(number: int, outcomes: list[float]) -> Group:
    made = [rollout(TEXT if i else "1 2\n", outcome, number) for i, outcome in enumerate(outcomes)]
    return Group(made[0].prompt, made)


def test_dapo_plays_on_until_enough_groups_are_mixed(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rounds = [
        Batch([group(0, [1, 1]), group(1, [1, 0])], frozenset({"actor", "critic"})),
        Batch([group(2, [0.5, 0.5]), group(3, [0, 1])], frozenset({"critic"})),
        Batch([group(4, [0, 1])], frozenset({"actor"})),
    ]
    played = iter(rounds)
    monkeypatch.setattr(policy_stage, "next_prompts", lambda *_: [])
    monkeypatch.setattr(policy_stage, "play", lambda *_, **__: next(played))
    monkeypatch.setattr(policy_stage, "batch_figures", lambda run, batch: {"all": len(batch.groups)})
    stage = PolicyStage.model_validate(
        {"kind": "policy", "algorithm": {"kind": "dapo"}, "rollout": {"prompts": 2, "samples": 2}}
    )
    batch, figures = mixed_batch(run, stage, 8, 1)
    assert [g.prompt.id for g in batch.groups] == ["train/1", "train/3"]
    assert batch.fresh == {"critic"}, "the actor was not the newest in one round"
    assert figures == {"all": 4, "rollout/rounds": 2.0, "rollout/groups": 2.0}


def test_dapo_without_a_mixed_group_teaches_nothing(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policy_stage, "next_prompts", lambda *_: [])
    monkeypatch.setattr(policy_stage, "play", lambda *_, **__: Batch([group(0, [1, 1])]))
    monkeypatch.setattr(policy_stage, "batch_figures", lambda run, batch: {})
    stage = PolicyStage.model_validate(
        {"kind": "policy", "algorithm": {"kind": "dapo", "overlong": {"cache": 16}},
         "rollout": {"prompts": 1, "samples": 2, "max_new_tokens": 16}}
    )  # fmt: skip
    batch, figures = mixed_batch(run, stage, 3, 1)
    assert (figures["rollout/rounds"], figures["rollout/groups"]) == (3.0, 0.0)
    assert not group_advantages(stage.algorithm, *table(batch), 16).any()  # type: ignore[arg-type]
    assert isinstance(stage.algorithm.loss, ClipHigherLoss)


def test_dapo_takes_its_penalty_off_long_responses() -> None:
    stage = PolicyStage.model_validate(
        {"kind": "policy", "algorithm": {"kind": "dapo", "overlong": {"cache": 8}}}
    )
    batch = Batch([group(0, [1.0, 1.0, 0.0])])
    limit = len(batch.rollouts[1].completion.ids)
    short, long, wrong = group_advantages(stage.algorithm, *table(batch), limit)[0].tolist()  # type: ignore[arg-type]
    assert short > long > wrong
    plain = stage.algorithm.model_copy(update={"overlong": None})
    without = group_advantages(plain, *table(batch), limit)[0].tolist()  # type: ignore[arg-type]
    assert without[0] == without[1]
