"""From a judged batch to samples, checked against slow references written with loops."""

from __future__ import annotations

import math
import pickle
import random
import statistics
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from genac_megatron import metrics
from genac_megatron.critic.states import trained_indices, trained_responses
from genac_megatron.recipe.schema import AdvantageConfig, LossConfig
from genac_megatron.records import Completion, Judgement, Prompt, Rollout, Sample, State
from genac_megatron.stages.accuracy import pairs_of, within_prompts
from genac_megatron.stages.batch import Batch, actor_samples, critic_samples, supervised
from genac_megatron.stages.figures import judge_figures, rollout_figures, trained_figures
from genac_megatron.stages.parity import parity_figures
from genac_megatron.stages.regime import batch_accuracy
from genac_megatron.stages.rollouts import Group
from genac_megatron.stages.runtime import largest
from genac_megatron.training.role import StepResult

# Loss weights and advantages are float32 (24 bits) computed from float64 or exact figures of about 1.
FLOAT32 = 1e-5


def completion(rng: random.Random, length: int) -> Completion:
    ids = tuple(rng.randrange(100) for _ in range(length))
    logprobs = tuple(-rng.random() * 4 for _ in ids)
    return Completion(ids, logprobs, rng.choice(["stop", "length"]), ((3, length),))


def judgement(rng: random.Random, state: State, number: int) -> Judgement:
    """Its prompt ids end with a number of its own, so that samples can be told apart."""
    value = rng.choice([None, *(n / 10 for n in range(11))])
    ids = (*(rng.randrange(100) for _ in range(rng.randint(1, 4))), 1000 + number)
    made = Judgement(state, ids, completion(rng, rng.randint(1, 9)), "words", value)
    made.used = rng.random() if value is None else value
    return made


def make_batch(seed: int) -> Batch:
    """Groups of uneven size; responses of uneven length cut at random places."""
    rng = random.Random(seed)
    groups = []
    number = 0
    for index in range(rng.randint(1, 3)):
        prompt = Prompt(f"train/{index}", (), "problem", "", tuple(rng.randrange(100) for _ in range(4)))
        group = Group(prompt)
        shared = judgement(rng, State(Rollout(prompt, 0, Completion((), (), "stop"), ""), 0, 0, 0), number)
        for sample in range(rng.randint(1, 4)):
            length = rng.randint(1, 20)
            rollout = Rollout(prompt, sample, completion(rng, length), "text", rng.choice([0.0, 1.0, 0.5]))
            cuts = sorted(rng.sample(range(1, length), rng.randint(0, min(4, length - 1))))
            judgements = [shared]
            for k, (cut, end) in enumerate(zip(cuts, [*cuts, length][1:], strict=True), 1):
                number += 1
                judgements.append(judgement(rng, State(rollout, k, cut, end), number))
            number += 1
            group.rollouts.append(rollout)
            group.judgements.append(judgements)
        groups.append(group)
    return Batch(groups)


def slow_advantage(
    judgements: list[Judgement], outcome: float, token: int, gamma: float, lam: float
) -> float:
    """sum_l (gamma lam)^l delta_{k+l} of the segment that holds the token."""
    values = [j.used for j in judgements]
    segment = max(k for k, j in enumerate(judgements) if j.state.cut <= token)
    following = [*values[1:], None]
    deltas = [
        (outcome if after is None else gamma * after) - value
        for value, after in zip(values, following, strict=True)
    ]
    return sum((gamma * lam) ** (k - segment) * deltas[k] for k in range(segment, len(deltas)))


@given(
    st.integers(0, 10**6), st.sampled_from([0.0, 0.5, 0.95, 1.0]), st.sampled_from([0.9, 1.0]), st.booleans()
)
def test_advantages_land_on_the_tokens_of_their_segments(
    seed: int, lam: float, gamma: float, whiten: bool
) -> None:
    batch = make_batch(seed)
    config = AdvantageConfig(gamma=gamma, whiten=whiten)
    samples = actor_samples(batch, config, lam, LossConfig(), 99)
    wanted = [
        [slow_advantage(js, r.outcome, t, gamma, lam) for t in range(len(r.completion.ids))]
        for r, js in zip(batch.rollouts, batch.judgements, strict=True)
    ]
    if whiten:
        flat = [x for row in wanted for x in row]
        middle, deviation = statistics.fmean(flat), statistics.pstdev(flat)
        # A deviation of mere rounding counts as none: all figures are 0 then.
        scale = 1 / (deviation + 1e-8) if deviation > 1e-6 else 0.0
        wanted = [[(x - middle) * scale for x in row] for row in wanted]
    for sample, row in zip(samples, wanted, strict=True):
        # Whitening divides what float32 rounded (2^-24 of figures up to 2) by a deviation that can be small.
        assert sample.fields["advantages"] == pytest.approx(row, abs=FLOAT32 if not whiten else 1e-3)


@given(st.integers(0, 10**6), st.sampled_from(["token", "sequence"]))
def test_actor_samples_hold_the_sampled_ids_and_weights_that_sum_to_one(seed: int, aggregate: str) -> None:
    batch = make_batch(seed)
    samples = actor_samples(batch, AdvantageConfig(), 0.95, LossConfig(aggregate=aggregate), 99)
    assert len(samples) == len(batch.rollouts)
    for sample, rollout in zip(samples, batch.rollouts, strict=True):
        assert tuple(sample.tokens[: sample.start]) == rollout.prompt.ids
        assert tuple(sample.tokens[sample.start :]) == rollout.completion.ids
        assert tuple(sample.fields["behaviour"]) == rollout.completion.logprobs
        assert all(len(values) == sample.trained for values in sample.fields.values())
    per_sample = [sum(sample.fields["weights"]) for sample in samples]
    assert sum(per_sample) == pytest.approx(1.0, abs=FLOAT32)
    tokens = sum(sample.trained for sample in samples)
    for share, sample in zip(per_sample, samples, strict=True):
        wanted = sample.trained / tokens if aggregate == "token" else 1 / len(samples)
        assert share == pytest.approx(wanted, abs=FLOAT32)


def test_the_advantage_of_a_right_response_by_hand() -> None:
    """V = 0.2, 0.6, R = 1, lambda 1: R - V on each token; lambda 0: 0.4 then 0.4."""
    prompt = Prompt("train/0", (), "problem", "", (1, 2))
    rollout = Rollout(prompt, 0, Completion((5, 6, 7), (-1.0, -2.0, -3.0), "stop"), "text", 1.0)
    states = [State(rollout, 0, 0, 2), State(rollout, 1, 2, 3)]
    judgements = [
        Judgement(state, (9,), Completion((8,), (-1.0,), "stop"), "", value, used=value)
        for state, value in zip(states, (0.2, 0.6), strict=True)
    ]
    batch = Batch([Group(prompt, [rollout], [judgements])])
    config = AdvantageConfig(whiten=False)
    for lam, wanted in ((1.0, [0.8, 0.8, 0.4]), (0.0, [0.4, 0.4, 0.4])):
        (sample,) = actor_samples(batch, config, lam, LossConfig(), 99)
        assert sample.fields["advantages"] == pytest.approx(wanted, abs=1e-6)
        assert (sample.tokens, sample.start) == ([1, 2, 5, 6, 7], 2)
        assert sample.fields["weights"] == pytest.approx([1 / 3] * 3)


# --- the critic ----------------------------------------------------------------------------------


def slow_weights(
    batch: Batch, most: int, baseline: str, rows: Sequence[int] | None = None
) -> dict[int, float]:
    """Judgement number (its last prompt id) to mean of R - b over its entries, in O(n^2)."""
    entries = [
        (
            js[i].prompt_ids[-1],
            0.0 if js[i].value is None else 1 - (r.outcome - (js[i].value or 0.0)) ** 2,
            r.outcome,
        )
        for n, (r, js) in enumerate(zip(batch.rollouts, batch.judgements, strict=True))
        if rows is None or n in rows
        for i in trained_indices(len(js), most)
    ]  # fmt: skip
    parts: dict[int, list[float]] = {}
    for number, reward, outcome in entries:
        others = [x for n, x, o in entries if o == outcome and n != number]
        base = (statistics.fmean(others) if others else reward) if baseline == "leave_one_out" else 0.0
        parts.setdefault(number, []).append(reward - base)
    return {number: statistics.fmean(values) for number, values in parts.items()}


@given(
    st.integers(0, 10**6),
    st.integers(1, 6),
    st.sampled_from(["leave_one_out", "none"]),
    st.sampled_from(["token", "sequence"]),
)
def test_critic_samples_follow_their_definition(seed: int, most: int, baseline: str, aggregate: str) -> None:
    batch = make_batch(seed)
    samples = critic_samples(batch, most, baseline, LossConfig(aggregate=aggregate))  # type: ignore[arg-type]
    wanted = slow_weights(batch, most, baseline)
    by_number = {sample.tokens[sample.start - 1]: sample for sample in samples}
    assert len(by_number) == len(samples) == len(wanted), "each judgement is trained once"
    judged = {j.prompt_ids[-1]: j for js in batch.judgements for j in js}
    for number, weight in wanted.items():
        sample, source = by_number[number], judged[number]
        assert sample.tokens == [*source.prompt_ids, *source.completion.ids]
        assert sample.start == len(source.prompt_ids)
        assert sample.fields["behaviour"] == list(source.completion.logprobs)
        assert sample.fields["advantages"] == pytest.approx([weight] * sample.trained, abs=1e-12)
        assert source.weight == pytest.approx(weight, abs=1e-12)
    assert sum(sum(s.fields["weights"]) for s in samples) == pytest.approx(1.0, abs=FLOAT32)


@given(st.integers(0, 10**6), st.integers(1, 6), st.floats(0.01, 1.0))
def test_a_share_of_the_responses_is_trained_as_if_the_others_were_not_there(
    seed: int, most: int, share: float
) -> None:
    batch = make_batch(seed)
    rows = trained_responses(len(batch.rollouts), share)
    samples = critic_samples(batch, most, "leave_one_out", LossConfig(), share)
    wanted = slow_weights(batch, most, "leave_one_out", rows)
    found = {sample.tokens[sample.start - 1]: sample.fields["advantages"][0] for sample in samples}
    assert found == pytest.approx(wanted, abs=1e-12)
    assert sum(sum(s.fields["weights"]) for s in samples) == pytest.approx(1.0, abs=FLOAT32)


def test_a_prompt_state_is_trained_once_per_group_with_the_mean_over_its_outcomes() -> None:
    """v = 0.8 for a group with outcomes 1, 0, 0: R = 0.96, 0.36, 0.36, without a baseline mean 0.56."""
    rng = random.Random(0)
    prompt = Prompt("train/0", (), "problem", "", (1,))
    shared = judgement(rng, State(Rollout(prompt, 0, Completion((), (), "stop"), ""), 0, 0, 0), 0)
    shared.value = 0.8
    rollouts = [Rollout(prompt, i, completion(rng, 3), "", r) for i, r in enumerate((1.0, 0.0, 0.0))]
    batch = Batch([Group(prompt, rollouts, [[shared]] * 3)])
    (sample,) = critic_samples(batch, 4, "none", LossConfig())
    assert sample.fields["advantages"] == pytest.approx([0.56] * len(shared.completion.ids))
    (alone,) = critic_samples(batch, 4, "leave_one_out", LossConfig())
    assert alone.fields["advantages"] == pytest.approx([0.0] * len(shared.completion.ids))


@given(st.integers(0, 10**6))
def test_a_batch_from_other_ranks_trains_the_same(seed: int) -> None:
    """Groups come pickled from other ranks; a prompt state must still be one judgement."""
    batch = make_batch(seed)
    sent = Batch(pickle.loads(pickle.dumps(batch.groups)))
    assert critic_samples(sent, 4, "leave_one_out", LossConfig()) == critic_samples(
        batch, 4, "leave_one_out", LossConfig()
    )


# --- figures -------------------------------------------------------------------------------------


@given(st.lists(st.lists(st.tuples(st.floats(-8, 0), st.floats(-2, 2)), min_size=1, max_size=30), min_size=1))
def test_parity_figures_follow_their_definition(rows: list[list[tuple[float, float]]]) -> None:
    samples = [Sample([0] * len(row), 0, {"behaviour": [x for x, _ in row]}) for row in rows]
    trainer = [[x + delta for x, delta in row] for row in rows]
    figures = parity_figures("actor", samples, trainer)
    deltas = [(x + delta) - x for row in rows for x, delta in row]
    sizes = sorted(abs(delta) for delta in deltas)
    place = 0.99 * (len(sizes) - 1)
    low, high = sizes[math.floor(place)], sizes[math.ceil(place)]
    wanted = {
        "parity/actor_mean": statistics.fmean(sizes),
        "parity/actor_p99": low + (high - low) * (place - math.floor(place)),
        "parity/actor_max": sizes[-1],
        "parity/actor_k3": statistics.fmean(math.exp(d) - 1 - d for d in deltas),
    }
    assert figures.keys() == wanted.keys()
    for key, value in wanted.items():  # exp(d) - 1 - d loses half the digits of a small d
        assert figures[key] == pytest.approx(value, abs=1e-9)


def test_parity_of_equal_log_probs_is_zero() -> None:
    sample = Sample([1, 2, 3], 1, {"behaviour": [-1.5, -0.25]})
    assert set(parity_figures("critic", [sample], [[-1.5, -0.25]]).values()) == {0.0}


def test_figures_of_a_batch_by_hand() -> None:
    batch = make_batch(3)
    outcomes = [r.outcome for r in batch.rollouts]
    figures = rollout_figures(batch, {"actor": 5, "critic": 9})  # sampled with version 3
    assert figures["rollout/outcome_mean"] == pytest.approx(statistics.fmean(outcomes))
    assert figures["rollout/staleness"] == 2.0
    mixed = [len({r.outcome for r in g.rollouts}) > 1 for g in batch.groups]
    assert figures["rollout/mixed_groups"] == pytest.approx(statistics.fmean(mixed))
    judged = judge_figures(batch)
    pairs = [(j.used, r.outcome) for r, js in zip(batch.rollouts, batch.judgements, strict=True) for j in js]
    assert judged["judge/brier"] == pytest.approx(statistics.fmean((v - r) ** 2 for v, r in pairs))
    assert judged["judge/brier_constant"] == pytest.approx(statistics.pvariance(r for _, r in pairs))
    numbers = {j.prompt_ids[-1] for js in batch.judgements for j in js}
    assert judged["judge/states"] == len(numbers), "a prompt state counts once"


@given(st.lists(st.integers(1, 30), min_size=1, max_size=8))
def test_supervised_weights_are_the_token_mean(lengths: list[int]) -> None:
    samples = supervised(Sample([7] * (n + 2), 2, {"weights": [9.0] * n}) for n in lengths)
    assert sum(sum(s.fields["weights"]) for s in samples) == pytest.approx(1.0, abs=FLOAT32)
    flat = [w for s in samples for w in s.fields["weights"]]
    assert flat == pytest.approx([1 / sum(lengths)] * sum(lengths))
    assert [(s.tokens, s.start) for s in samples] == [([7] * (n + 2), 2) for n in lengths]


@pytest.mark.parametrize("spoilt", [0, 1, 2])
@pytest.mark.parametrize("key", ["grad_norm", "loss"])
def test_nan_of_any_minibatch_is_told(key: str, spoilt: int) -> None:
    """`max` keeps NaN only where it comes first."""
    stats = [{"loss": 1.0, "grad_norm": float(i), "tokens": 3.0, "computed_tokens": 2.0} for i in range(3)]
    stats[spoilt][key] = math.nan
    sample = Sample([1, 2], 1, {"weights": [1.0], "behaviour": [0.0]})
    results = [StepResult(one, [[0.0]]) for one in stats]
    assert math.isnan(trained_figures("actor", results, Batch([]), [sample], [[0.0]])[f"actor/{key}"])
    assert math.isnan(largest(one["grad_norm"] for one in stats)) is (key == "grad_norm")


@given(st.integers(0, 10**6))
def test_a_batch_is_as_accurate_as_its_states(seed: int) -> None:
    batch = make_batch(seed)
    pairs = pairs_of(batch.groups)
    whole = metrics.explained_variance([j.used for j, _ in pairs], [r.target for _, r in pairs])
    wanted = {"explained_variance": whole, "explained_variance_prompt": within_prompts(batch.groups)}
    assert batch_accuracy(batch) == pytest.approx(wanted, nan_ok=True)
