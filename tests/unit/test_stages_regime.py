"""How far a joint step trusts its critic: lambda, its gates and schedule, readiness, blended baselines."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import random
import statistics
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from genac_megatron.algorithms.advantages import blend_weight, others_mean, scheduled_lam
from genac_megatron.algorithms.filters import keep_whole
from genac_megatron.recipe.algorithms import AdvantageConfig, LamSchedule
from genac_megatron.recipe.schema import PpoStage
from genac_megatron.records import Completion, Judgement, Prompt, Rollout, State
from genac_megatron.stages.accuracy import blend_errors, within_prompts, within_responses
from genac_megatron.stages.batch import Batch, actor_samples
from genac_megatron.stages.heldout import draw_order
from genac_megatron.stages.progression import Progression
from genac_megatron.stages.regime import baselines, is_ready, lambdas, learn_of, trusted_samples
from genac_megatron.stages.rollouts import Group
from tests.unit.test_stages_batch import make_batch

FRACTIONS = st.floats(0, 1, width=32)


def stage(**advantage: Any) -> PpoStage:
    return PpoStage.model_validate({"kind": "ppo", "advantage": advantage})


def learned(at: Progression, config: AdvantageConfig, batch: Batch) -> None:
    learn_of(at, config, batch, torch.tensor(batch.outcomes))


def response(prompt: Prompt, sample: int, outcome: float, values: list[float], cut_off: bool = False) -> Any:
    """A response of two tokens a segment, and its judgements."""
    count = 2 * len(values)
    finish: Any = "length" if cut_off else "stop"
    rollout = Rollout(
        prompt, sample, Completion(tuple(range(count)), (-1.0,) * count, finish), "text", outcome
    )
    states = [State(rollout, k, 2 * k, 2 * k + 2) for k in range(len(values))]
    judged = [
        Judgement(s, (9,), Completion((8,), (-1.0,), "stop"), "", v, used=v)
        for s, v in zip(states, values, strict=True)
    ]
    return rollout, judged


def group(index: int, *responses: tuple[float, list[float]]) -> Group:
    made = Group(Prompt(f"train/{index}", (), "problem", "", (1, 2)))
    for sample, (outcome, values) in enumerate(responses):
        rollout, judged = response(made.prompt, sample, outcome, values)
        made.rollouts.append(rollout)
        made.judgements.append(judged if not made.judgements else [made.judgements[0][0], *judged[1:]])
    return made


# --- lambda --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given_schedule", "wanted"),
    [
        ({"start": 1.0, "end": 0.0, "steps": 5}, [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]),
        ({"shape": "cosine", "start": 1.0, "end": 0.0, "steps": 3}, [1.0, 0.5, 0.0, 0.0, 0.0, 0.0]),
        ({"start": 0.5, "end": 0.9, "steps": 1}, [0.9] * 6),
    ],
)
def test_a_schedule_by_hand(given_schedule: dict[str, Any], wanted: list[float]) -> None:
    schedule = LamSchedule.model_validate(given_schedule)
    assert [scheduled_lam(schedule, step) for step in range(1, 7)] == pytest.approx(wanted, abs=1e-12)


@given(FRACTIONS, FRACTIONS, st.integers(1, 30), st.sampled_from(["linear", "cosine"]))
def test_a_schedule_stays_between_its_ends(start: float, end: float, steps: int, shape: Any) -> None:
    schedule = LamSchedule(start=start, end=end, steps=steps, shape=shape)
    lams = [scheduled_lam(schedule, step) for step in range(1, steps + 3)]
    assert lams[0] == pytest.approx(end if steps == 1 else start)
    assert lams[-1] == pytest.approx(end)
    rising = [b - a for a, b in itertools.pairwise(lams)]
    assert all(x * (end - start) >= -1e-12 for x in rising), "one way only"


def test_a_gate_closes_again_where_the_critic_collapses() -> None:
    """Bug 7 of the review: the best figure ever kept it open."""
    at, batch = Progression(), make_batch(1)
    config = stage().advantage
    seen = []
    for figure in (None, 0.1, 0.5, -0.4, math.nan, 0.3):
        if figure is not None:
            at.measure({"explained_variance": figure}, ())
        seen.append(lambdas(at, config, batch, 1)[0])
    # Where an evaluation has no figure (all outcomes alike) the one before it stands.
    assert seen == [1.0, 1.0, 0.95, 1.0, 1.0, 0.95]


@pytest.mark.parametrize(
    ("gate", "figures", "wanted"),
    [
        (0, {"explained_variance": 0.01}, 0.0),  # EVPO's threshold
        (0, {"explained_variance": -0.01}, 1.0),
        (None, {}, 0.0),
        ({"figure": "explained_variance_prompt", "threshold": 0.1}, {"explained_variance_prompt": 0.2}, 0.0),
        ({"figure": "explained_variance_prompt", "threshold": 0.1}, {"explained_variance": 0.9}, 1.0),
        ({"figure": "explained_variance_response", "threshold": 0}, {"explained_variance_response": 0}, 1.0),
        ({"figure": "mse", "threshold": 0.04}, {"mse": 0.03}, 0.0),
        ({"figure": "mse", "threshold": 0.04}, {"mse": 0.04}, 1.0),
        ({"figure": "mse", "threshold": 0.04}, {}, 1.0),
    ],
)  # fmt: skip
def test_gates_by_figure(gate: Any, figures: dict[str, float], wanted: float) -> None:
    at, batch = Progression(), make_batch(2)
    at.measure(figures, ("explained_variance_prompt", "explained_variance_response", "mse"))
    assert set(lambdas(at, stage(lam=0.0, lam_gate=gate).advantage, batch, 1)) == {wanted}


def test_a_gate_by_the_batch_knows_nothing_of_the_batch_at_hand() -> None:
    """Values that fit their own outcomes by chance must not choose their own lambda."""
    config = stage(
        lam=0.0, lam_gate={"figure": "explained_variance", "threshold": 0.3, "of": "batch"}
    ).advantage
    good = Batch([group(0, (1.0, [0.9, 0.9]), (0.0, [0.9, 0.1])), group(1, (0.0, [0.1, 0.0]))])
    bad = Batch([group(2, (1.0, [0.5, 0.1]), (0.0, [0.5, 0.9]))])
    at, seen = Progression(), []
    for batch in (good, bad, good):
        seen.append(lambdas(at, config, batch, 1)[0])
        learned(at, config, batch)
    assert seen == [1.0, 0.0, 1.0]


def test_nothing_is_kept_of_batches_that_nothing_reads() -> None:
    at = Progression()
    learned(at, stage().advantage, make_batch(3))
    assert at.regime == {}


# --- readiness -----------------------------------------------------------------------------------

READY: dict[str, Any] = {"steps": 2, "error": 0.2, "own_error": 0.18}


def test_readiness_by_hand() -> None:
    config = stage(readiness=READY).advantage
    assert config.readiness is not None
    at = Progression()
    sure = group(0, (1.0, [0.9, 0.9]), (1.0, [0.9, 1.0]))  # small errors, right ones seen
    never = group(1, (0.0, [0.1, 0.0]))  # small errors, none right
    wrong = group(2, (1.0, [0.5, 0.5]))  # an error of 0.25
    batch = Batch([sure, never, wrong])
    assert lambdas(at, config, batch, 1) == [1.0] * 4, "nothing is known"
    learned(at, config, batch)
    assert lambdas(at, config, batch, 2) == [1.0] * 4, "one step is not two"
    learned(at, config, batch)
    assert lambdas(at, config, batch, 3) == [0.0, 0.0, 1.0, 1.0]
    # Its own last error, not its best.
    learned(at, config, Batch([group(0, (0.0, [0.9, 0.9]))]))
    assert not is_ready(at.regime, config.readiness, "train/0")
    learned(at, config, Batch([sure]))
    learned(at, config, Batch([sure]))
    assert is_ready(at.regime, config.readiness, "train/0")
    # A right response that was seen stays seen; a global error that rises closes all.
    learned(at, config, Batch([group(0, (0.0, [0.1, 0.1]))]))
    assert is_ready(at.regime, config.readiness, "train/0")
    for _ in range(2):
        learned(at, config, Batch([group(3, (1.0, [0.0, 0.0]))]))
    assert not is_ready(at.regime, config.readiness, "train/0")


@given(st.integers(0, 10**6), st.integers(1, 3), st.floats(0.05, 0.6), st.floats(0.05, 0.6))
def test_readiness_against_a_slow_reference(seed: int, steps: int, error: float, own: float) -> None:
    config = stage(readiness={"steps": steps, "error": error, "own_error": own}).advantage
    history: list[Batch] = []
    at = Progression()
    for turn in range(5):
        batch = make_batch(seed + turn)
        wanted = [slow_lam(history, r.prompt.id, steps, error, own) for r in batch.rollouts]
        assert lambdas(at, config, batch, turn + 1) == wanted
        learned(at, config, batch)
        history.append(batch)
        # What a checkpoint keeps is all there is.
        saved = json.loads(json.dumps(dataclasses.asdict(at)))
        at = Progression()
        at.load(saved)


def slow_lam(history: list[Batch], problem: str, steps: int, error: float, own: float) -> float:
    def errors(batch: Batch, only: str | None) -> list[float]:
        return [
            (j.used - r.target) ** 2
            for r, js in zip(batch.rollouts, batch.judgements, strict=True)
            for j in js
            if only in (None, r.prompt.id)
        ]

    seen = [batch for batch in history if errors(batch, problem)]
    if len(history) < steps or not seen:
        return 1.0
    of_all = sum(sum(e) / len(e) for e in (errors(b, None) for b in history[-steps:])) / steps
    last = errors(seen[-1], problem)
    right = any(r.target >= 0.5 for b in seen for r in b.rollouts if r.prompt.id == problem)
    return 0.0 if of_all < error and sum(last) / len(last) < own and right else 1.0


# --- blended baselines ---------------------------------------------------------------------------


@given(st.lists(FRACTIONS, min_size=2, max_size=6))
def test_the_mean_of_the_others_leaves_the_own_reward_out(rewards: list[float]) -> None:
    found = others_mean(torch.tensor(rewards)).tolist()
    for i, mean in enumerate(found):
        assert mean == pytest.approx(statistics.fmean(rewards[:i] + rewards[i + 1 :]), abs=1e-12)


@given(st.lists(st.tuples(FRACTIONS, FRACTIONS, st.sampled_from([0.0, 1.0])), min_size=1, max_size=12))
def test_a_blends_weight_is_the_best_of_a_fine_grid(rows: list[tuple[float, float, float]]) -> None:
    """rows: value, group mean, outcome."""

    def error(w: float) -> float:
        return statistics.fmean((r - w * v - (1 - w) * m) ** 2 for v, m, r in rows)

    distance = statistics.fmean((v - m) ** 2 for v, m, _ in rows)
    weight = blend_weight(error(1.0), error(0.0), distance)
    assert 0.0 <= weight <= 1.0
    assert error(weight) <= min(error(w / 100) for w in range(101)) + 1e-9


@given(st.integers(0, 10**6), st.floats(0, 1))
def test_blended_baselines_against_a_slow_reference(seed: int, weight: float) -> None:
    batch = Batch([g for g in make_batch(seed).groups if len(g.rollouts) > 1])
    if not batch.groups:
        return
    rewards = torch.tensor(batch.outcomes)
    found, figures = baselines(Progression(), stage(blend={"weight": weight}).advantage, batch, rewards)
    assert figures == {"actor/value_weight": weight}
    rows = iter(found)
    for g in batch.groups:
        for i, judgements in enumerate(g.judgements):
            others = statistics.fmean(r.outcome for k, r in enumerate(g.rollouts) if k != i)
            wanted = [weight * j.used + (1 - weight) * others for j in judgements]
            assert next(rows).tolist() == pytest.approx(wanted, abs=1e-6)


def test_a_rank_without_a_group_has_no_baselines() -> None:
    config = stage(blend={"weight": 0.5}).advantage
    found, figures = baselines(Progression(), config, Batch([]), torch.zeros(0))
    assert (found, figures) == ([], {"actor/value_weight": 0.5})


def test_errors_of_a_blend_by_hand_and_their_moving_average() -> None:
    batch = Batch([group(0, (1.0, [0.5, 0.75]), (0.0, [0.5, 0.25]))])
    # Others' means: 0 and 1. Values' errors .25, .0625, .25, .0625; the group's are 1 throughout.
    first = {"value_error": 0.15625, "group_error": 1.0, "group_distance": (0.25 + 0.5625) / 2}
    assert blend_errors(batch.groups, batch.outcomes) == pytest.approx(first)
    config = stage(blend={"momentum": 0.5}).advantage
    at, rewards = Progression(), torch.tensor(batch.outcomes)
    assert baselines(at, config, batch, rewards)[1] == {"actor/value_weight": 0.0}, "nothing is measured yet"
    learned(at, config, batch)
    assert at.regime["blend"] == pytest.approx(first)
    assert baselines(at, config, batch, rewards)[1] == {"actor/value_weight": 1.0}
    learned(at, config, Batch([group(1, (1.0, [0.0, 0.0]), (1.0, [0.0, 0.0]))]))
    second = {"value_error": 1.0, "group_error": 0.0, "group_distance": 1.0}
    wanted = {key: (first[key] + second[key]) / 2 for key in first}
    assert at.regime["blend"] == pytest.approx(wanted)


def test_a_blend_by_the_last_evaluation() -> None:
    at, batch = Progression(), Batch([group(0, (1.0, [0.5]), (0.0, [0.5]))])
    config = stage(blend={"of": "heldout"}).advantage
    names = ("value_error", "group_error", "group_distance")
    at.measure(dict(zip(names, (0.1, 0.2, 0.2), strict=True)), names)
    values, figures = baselines(at, config, batch, torch.tensor(batch.outcomes))
    assert figures["actor/value_weight"] == pytest.approx(0.75)
    assert [v.tolist() for v in values] == [pytest.approx([0.375]), pytest.approx([0.625])]


# --- accuracy ------------------------------------------------------------------------------------


def test_explained_variance_within_prompts_sees_through_a_critic_of_hard_prompts() -> None:
    easy = group(0, (1.0, [0.9, 0.9]), (1.0, [0.9, 0.9]), (0.0, [0.9, 0.9]))
    hard = group(1, (0.0, [0.1, 0.1]), (0.0, [0.1, 0.1]), (1.0, [0.1, 0.1]))
    assert within_prompts([easy, hard]) == pytest.approx(0.0)
    exact = group(0, (1.0, [0.5, 1.0]), (0.0, [0.5, 0.0]))
    assert within_prompts([exact]) == pytest.approx(1.0), "the shared prompt state says nothing here"
    assert math.isnan(within_prompts([group(0, (1.0, [0.5, 1.0]))]))


def test_states_for_monte_carlo_values_are_drawn_one_by_one_or_by_response() -> None:
    """Of 256 responses of 5 states 96 states: alone in theirs, mostly, or all of 19 responses and one."""
    keys = [(f"r{response}", state) for response in range(256) for state in range(5)]
    for whole, least, most in ((False, 60, 96), (True, 20, 20)):
        drawn = [key for _, key in draw_order(3, keys, whole=whole)][:96]
        assert len(set(drawn)) == 96
        assert least <= len({response for response, _ in drawn}) <= most


def test_explained_variance_within_responses_takes_the_draws_noise_off() -> None:
    """Exact values against noisy Monte-Carlo ones: 1 in the mean, as the noise is taken off both sums."""
    rng = random.Random(0)
    groups, known = [], {}
    for index in range(400):
        truth = [rng.choice([0.2, 0.5, 0.8]) for _ in range(3)]
        made = group(index, (1.0, truth))
        groups.append(made)
        for k, value in enumerate(truth):
            known[made.rollouts[0].key, k] = [float(rng.random() < value) for _ in range(8)]
    assert within_responses(groups, known) == pytest.approx(1.0, abs=0.1)
    flat = [group(i, (1.0, [0.5, 0.5, 0.5])) for i in range(400)]
    assert within_responses(flat, known) == pytest.approx(0.0, abs=1e-9)
    assert math.isnan(within_responses(groups, {}))


# --- what the actor learns from ------------------------------------------------------------------


def with_cut_off(batch: Batch, which: set[int]) -> Batch:
    for n, rollout in enumerate(batch.rollouts):
        finish: Any = "length" if n in which else "stop"
        rollout.completion = dataclasses.replace(rollout.completion, finish=finish)
    return batch


@given(st.integers(0, 10**6), st.data())
def test_the_overlong_filter_trains_as_if_cut_off_responses_were_not_there(seed: int, data: Any) -> None:
    batch = make_batch(seed)
    count = len(batch.rollouts)
    cut = data.draw(st.sets(st.integers(0, count - 1), max_size=count - 1))
    with_cut_off(batch, cut)
    kept = keep_whole([r.truncated for r in batch.rollouts])
    assert [not keep for keep in kept] == [n in cut for n in range(count)]
    given_stage = stage().model_copy(update={"overlong_filter": True})
    at = Progression(explained_variance=0.9)
    samples, figures = trusted_samples(at, given_stage, batch, 1)
    alone = batch.only(kept)
    assert samples == actor_samples(alone, given_stage.advantage, 0.95, given_stage.actor_loss, 1024)
    assert [r for g in alone.groups for r in g.rollouts] == [r for r in batch.rollouts if not r.truncated]
    assert figures["actor/filtered"] == pytest.approx(len(cut) / count)


def test_a_batch_of_cut_off_responses_alone_teaches_the_actor_nothing() -> None:
    batch = make_batch(5)
    with_cut_off(batch, set(range(len(batch.rollouts))))
    given_stage = stage().model_copy(update={"overlong_filter": True})
    samples, figures = trusted_samples(Progression(), given_stage, batch, 1)
    assert samples == []
    assert figures["actor/filtered"] == 1.0


def test_lambda_by_response_reaches_its_own_tokens() -> None:
    """V = .2, .6 and R = 1: with lambda 0 .4, .4; with lambda 1 .8, .4."""
    batch = Batch([group(0, (1.0, [0.2, 0.6])), group(1, (1.0, [0.2, 0.6]))])
    config = AdvantageConfig(normalise="none")
    samples = actor_samples(batch, config, [0.0, 1.0], stage().actor_loss, 99)
    assert samples[0].fields["advantages"] == pytest.approx([0.4] * 4)
    assert samples[1].fields["advantages"] == pytest.approx([0.8, 0.8, 0.4, 0.4])


def test_figures_of_the_advantages_by_hand() -> None:
    """lambda 1: A = R - V. Right: .8, .4 (mean .6); wrong: -.2, -.6 (mean -.4)."""
    batch = Batch([group(0, (1.0, [0.2, 0.6])), group(1, (0.0, [0.2, 0.6]))])
    _, figures = trusted_samples(Progression(), stage(normalise="none"), batch, 1)
    assert figures["advantage/gap"] == pytest.approx(1.0)
    # Variance .25 + .04, of which .04 within.
    assert figures["advantage/within_response"] == pytest.approx(0.04 / 0.29)
    assert (figures["advantage/whitened"], figures["advantage/centred"]) == (0.0, 0.0)
    _, figures = trusted_samples(Progression(), stage(normalise="centre"), batch, 1)
    assert (figures["advantage/whitened"], figures["advantage/centred"]) == (0.0, 1.0)
    _, figures = trusted_samples(Progression(), stage(), Batch(batch.groups[:1]), 1)
    assert "advantage/gap" not in figures, "all ended alike"


def test_figures_of_conversations_are_of_responses_also_where_each_turn_is_a_sample() -> None:
    """A chat template that rewrites earlier turns (environment.history: template)."""
    batch = Batch([group(0, (1.0, [0.2, 0.6])), group(1, (0.0, [0.2, 0.6]))])
    _, wanted = trusted_samples(Progression(), stage(normalise="none"), batch, 1)
    for rollout in batch.rollouts:
        rollout.completion = dataclasses.replace(rollout.completion, sampled=((0, 2), (2, 4)))
        rollout.behind = ((1, 2), (1, 9))
    samples, figures = trusted_samples(Progression(), stage(normalise="none"), batch, 1)
    assert len(samples) == 4
    assert figures == pytest.approx(wanted)


@pytest.mark.parametrize("how", ["whiten", "centre", "scale", "none"])
def test_normalised_advantages(how: Any) -> None:
    batch = make_batch(7)
    plain = actor_samples(batch, AdvantageConfig(normalise="none"), 1.0, stage().actor_loss, 99)
    raw = [x for sample in plain for x in sample.fields["advantages"]]
    made = actor_samples(batch, AdvantageConfig(normalise=how), 1.0, stage().actor_loss, 99)
    found = [x for sample in made for x in sample.fields["advantages"]]
    middle, spread = statistics.fmean(raw), statistics.pstdev(raw)
    if how == "none":
        assert found == raw
    elif how == "centre":
        assert found == pytest.approx([x - middle for x in raw], abs=1e-6)
    elif how == "scale":
        size = math.sqrt(statistics.fmean(x * x for x in raw))
        assert found == pytest.approx([x / size for x in raw], abs=1e-5)
    else:
        assert found == pytest.approx([(x - middle) / spread for x in raw], abs=1e-4)


def test_a_share_of_the_value_is_taken_off() -> None:
    """lambda 0: A = V' - share V; of values .5, .8 and outcome 1 with a half: .55 and .6."""
    batch = Batch([group(0, (1.0, [0.5, 0.8])), group(1, (0.0, [0.0, 0.0]))])
    by_credit = {"lam": 0.0, "lam_gate": None, "value_share": 0.5}
    given_stage = stage(normalise="none", **by_credit)
    samples, figures = trusted_samples(Progression(), given_stage, batch, 1)
    assert figures["advantage/value_share"] == 0.5
    assert sorted(set(samples[0].fields["advantages"])) == pytest.approx([0.55, 0.6])
    assert set(samples[1].fields["advantages"]) == {0.0}
    scaled, _ = trusted_samples(Progression(), stage(normalise="scale", **by_credit), batch, 1)
    assert set(scaled[1].fields["advantages"]) == {0.0}, "nothing is centred"


@pytest.mark.parametrize("how", ["whiten", "centre"])
def test_a_share_is_refused_where_the_mean_is_taken_off(how: str) -> None:
    with pytest.raises(ValueError, match=r"value_share 0\.3 leaves .* set normalise: scale, or none"):
        AdvantageConfig.model_validate({"value_share": 0.3, "normalise": how})
    assert AdvantageConfig.model_validate({"value_share": 0.3, "normalise": "scale"}).value_share == 0.3


def test_whiten_is_still_read() -> None:
    assert AdvantageConfig.model_validate({"whiten": True}) == AdvantageConfig()
    assert AdvantageConfig.model_validate({"whiten": False}).normalise == "none"
    assert AdvantageConfig.model_validate({"whiten": False, "normalise": "none"}).normalise == "none"
    for given_keys in ({"whiten": False, "normalise": "centre"}, {"whiten": "no"}):
        with pytest.raises(ValueError, match="whiten"):
            AdvantageConfig.model_validate(given_keys)
