"""The critic's row of an evaluation, by hand and by definition."""

from __future__ import annotations

import asyncio
import pickle
import statistics
from types import SimpleNamespace
from typing import Any, cast

import pytest

from genac_megatron.errors import InputError, PeerLost
from genac_megatron.recipe.schema import RolloutConfig
from genac_megatron.records import Completion, Judgement, Prompt, Rollout, State
from genac_megatron.stages.heldout import (
    HeldOut,
    critic_row,
    held_out,
    monte_carlo_draws,
    tell_too_long,
    tokens_per_state,
    without_tokens,
)
from genac_megatron.stages.rollouts import Group, all_of


def judged(state: State, value: float | None, used: float, length: int) -> Judgement:
    return Judgement(state, (1,), Completion((7,) * length, (-1.0,) * length, "stop"), "", value, used=used)


def group(
    index: int, shared: float, responses: list[tuple[float, list[tuple[float | None, float]]]]
) -> Group:
    """A group: its prompt state's value; per response the outcome, and (value, used) of later states."""
    made = Group(Prompt(f"heldout/{index}", (), "problem", "", (1, 2)))
    nothing = Rollout(made.prompt, 0, Completion((), (), "stop"), "")
    first = judged(State(nothing, 0, 0, 0), shared, shared, 2)
    for sample, (outcome, later) in enumerate(responses):
        count = 10 * (len(later) + 1)
        rollout = Rollout(made.prompt, sample, Completion((3,) * count, (-1.0,) * count, "stop"), "", outcome)
        made.rollouts.append(rollout)
        made.judgements.append([first] + [
            judged(State(rollout, k, 10 * k, 10 * k + 10), value, used, 4)
            for k, (value, used) in enumerate(later, 1)
        ])  # fmt: skip
    return made


@pytest.fixture
def groups() -> list[Group]:
    return [
        group(0, 0.6, [(1.0, [(0.7, 0.7), (1.0, 1.0)]), (0.0, [(0.2, 0.2)])]),
        group(1, 0.3, [(0.0, [(None, 0.3)]), (1.0, [(0.9, 0.9)])]),
    ]


def test_every_state_meets_its_own_responses_outcome(groups: list[Group]) -> None:
    row = critic_row(groups, {})
    assert row["values"] == [0.6, 0.7, 1.0, 0.6, 0.2, 0.3, 0.3, 0.3, 0.9]
    assert row["outcomes"] == [1, 1, 1, 0, 0, 0, 0, 1, 1]
    assert row["positions"] == [0, 1, 2, 0, 1, 0, 1, 0, 1]
    assert row["prompts"] == ["heldout/0"] * 5 + ["heldout/1"] * 4
    pairs = list(zip(row["values"], row["outcomes"], strict=True))
    assert row["brier_used"] == pytest.approx(statistics.fmean((v - r) ** 2 for v, r in pairs))
    errors = [1.0 if i == 6 else (v - r) ** 2 for i, (v, r) in enumerate(pairs)]  # no score: the worst
    assert row["errors"] == pytest.approx(errors)
    assert row["brier"] == pytest.approx(statistics.fmean(errors))
    assert row["brier_constant"] == pytest.approx(statistics.pvariance(row["outcomes"]))
    later = [pair for pair, place in zip(pairs, row["positions"], strict=True) if place]
    wins = [(v > w) + (v == w) / 2 for v, r in later for w, q in later if r > q]
    assert row["auc"] == pytest.approx(statistics.fmean(wins))
    each = statistics.fmean([2, 4, 4, 4, 2, 4, 4])  # each judgement once
    assert tokens_per_state(groups) == pytest.approx(each)


def test_figures_need_no_tokens(groups: list[Group]) -> None:
    """What other ranks get of a group: neither ids nor texts, and the same row."""
    lean = [without_tokens(group) for group in groups]
    known = {("heldout/0#0", 1): [1.0, 0.0], ("heldout/0#0", 2): [1.0, 1.0], ("heldout/1#1", 1): [0.0, 1.0]}
    assert repr(critic_row(lean, known)) == repr(critic_row(groups, known))  # NaN too
    for one in lean:
        assert not one.prompt.ids
        assert not one.prompt.problem
        for judgements in one.judgements:
            assert judgements[0] is one.judgements[0][0], "one prompt state for all"
            assert not any(
                j.completion.ids or j.prompt_ids or j.state.rollout.completion.ids for j in judgements
            )
    long = [group(9, 0.5, [(1.0, [(0.5, 0.5)] * 500), (0.0, [(0.5, 0.5)])])]
    sizes = [len(pickle.dumps(made)) / 502 for made in (long, [without_tokens(one) for one in long])]
    assert sizes[0] > 2.5 * sizes[1]


def test_a_shared_prompt_state_is_one_state() -> None:
    """A critic that orders every later state right has nothing to order better: its prompt states, which are
    of right and wrong responses alike, are no states of one of them."""
    knowing = [group(n, 0.5, [(1.0, [(0.9, 0.9)]), (0.0, [(0.1, 0.1)])]) for n in range(3)]
    row = critic_row(knowing, {})
    assert row["auc"] == row["ranking_prompt"] == 1.0
    wrong = [group(n, 0.5, [(1.0, [(0.1, 0.1)]), (0.0, [(0.9, 0.9)])]) for n in range(3)]
    assert critic_row(wrong, {})["auc"] == critic_row(wrong, {})["ranking_prompt"] == 0.0


def test_between_prompts_a_prompt_state_counts_once_with_its_groups_mean_outcome() -> None:
    easy = group(0, 0.8, [(1.0, [(0.9, 0.9)]), (1.0, [(0.9, 0.9)]), (0.0, [(0.1, 0.1)])])  # mean 2/3
    hard = group(1, 0.2, [(1.0, [(0.6, 0.6)]), (0.0, [(0.3, 0.3)]), (0.0, [(0.3, 0.3)])])  # mean 1/3
    row = critic_row([easy, hard], {})
    mine = [(0.8, 2 / 3), (0.9, 1), (0.9, 1), (0.1, 0)]
    theirs = [(0.2, 1 / 3), (0.6, 1), (0.3, 0), (0.3, 0)]
    hits = [((v - w) * (p - q) > 0) + (v == w) / 2 for v, p in mine for w, q in theirs if abs(p - q) > 1e-9]
    assert row["ranking_between"] == pytest.approx(statistics.fmean(hits))


def test_where_only_prompts_are_judged_the_auc_is_over_prompt_states() -> None:
    row = critic_row([group(0, 0.8, [(1.0, []), (1.0, [])]), group(1, 0.2, [(0.0, []), (1.0, [])])], {})
    assert row["auc"] == pytest.approx((2 * 1 + 1 * 0.5) / 3)
    assert row["ranking_prompt"] != row["ranking_prompt"], "a prompt has one state: there is no pair"


def test_what_did_not_parse_is_no_score(groups: list[Group]) -> None:
    """Its fallback is used as a value; a prompt state's judgement counts once in the parse rate."""
    row = critic_row(groups, {})
    assert row["parse_rate"] == pytest.approx(6 / 7)
    histogram = [0] * 11
    for n in (6, 7, 10, 6, 2, 3, 3, 9):
        histogram[n] += 1
    assert row["scores_hist"] == histogram


def test_without_monte_carlo_values_there_is_no_error_against_them(groups: list[Group]) -> None:
    row = critic_row(groups, {})
    assert row["mse"] != row["mse"]
    assert "mse_spearman" not in row


def test_monte_carlo_values_of_some_states(groups: list[Group]) -> None:
    """Each known state once, the prompt state too; their sampling noise is taken off."""
    known = {
        ("heldout/0#0", 0): [1.0, 0.0, 1.0, 0.0, 0.5],  # an outcome may be any value in [0, 1]
        ("heldout/0#0", 2): [1.0, 1.0, 1.0, 0.0],
        ("heldout/1#1", 1): [1.0] * 5,
    }
    row = critic_row(groups, known)
    pairs = [(0.6, 0.5), (1.0, 0.75), (0.9, 1.0)]
    noises = [statistics.variance(drawn) / len(drawn) for drawn in known.values()]
    wanted = statistics.fmean((v - p) ** 2 - noise for (v, p), noise in zip(pairs, noises, strict=True))
    assert row["mse"] == pytest.approx(wanted)
    spread = statistics.variance(p for _, p in pairs)
    assert row["mse_constant"] == pytest.approx(spread - statistics.fmean(noises))
    assert row["mse_spearman"] == pytest.approx(0.5)  # ranks 1 3 2 against 1 2 3


def test_values_of_states_that_are_not_there_are_passed_over(groups: list[Group]) -> None:
    """Another rank's rollouts may have been cut elsewhere by now."""
    row = critic_row(groups, {("heldout/9#0", 0): [0.5, 0.5]})
    assert row["mse"] != row["mse"]


def test_states_that_had_no_room_do_not_count_against_the_critics_form(groups: list[Group]) -> None:
    unasked = groups[1].judgements[0][1]
    unasked.skipped = unasked.too_long = True
    row = critic_row(groups, {})
    assert row["parse_rate"] == 1.0
    assert row["errors"][6] == pytest.approx(0.3**2), "the value that stands in for it"


def test_states_that_had_no_room_are_told_once_and_end_a_run_where_all_are_such(groups: list[Group]) -> None:
    every = [j for group in groups for judgements in group.judgements for j in judgements]
    notes: list[str] = []
    run: Any = SimpleNamespace(  # no more of a run is used
        told=set(),
        critic=SimpleNamespace(shape=SimpleNamespace(max_positions=120)),
        progress=SimpleNamespace(note=notes.append),
    )
    tell_too_long(run, every)
    assert notes == []
    every[1].too_long = True
    tell_too_long(run, every)
    tell_too_long(run, every)
    assert len(notes) == 1
    assert "1 of 7 states, heldout/0#0@1 for example" in notes[0]
    for judgement in every:
        judgement.too_long = True
    with pytest.raises(InputError, match="7 of 7 states"):
        tell_too_long(run, every)


def test_failed_verifications_are_counted_with_a_stand_in_for_the_run() -> None:
    """The task's own count goes up while responses are made; a row of figures has what it went up by."""
    counted: list[dict[str, float]] = []
    task = SimpleNamespace(late=5, heldout_size=0)

    def generating(act: Any) -> list[Any]:
        task.late += 2
        return []

    first, second, other = (
        cast(Any, SimpleNamespace(rollout=rollout))
        for rollout in (
            RolloutConfig(prompts=32, samples=8),
            RolloutConfig(prompts=16, samples=4),
            RolloutConfig(max_new_tokens=7),
        )
    )
    evaluation = SimpleNamespace(prompts=4, temperature=1.0, samples=1, mc_states=3, mc_continuations=2)
    run: Any = SimpleNamespace(
        at=SimpleNamespace(versions={"actor": 1}),
        recipe=SimpleNamespace(evaluation=evaluation, seed=0),
        heldout_cache={},
        task=task,
        together=lambda act: act(),
        gather=list,
        share=list,
        generating=generating,
        count=counted.append,
        spend=lambda phase, role: 0.0,
    )
    held_out(run, first)
    held_out(run, second)  # of the same actor, evaluated alike: nothing is made
    monte_carlo_draws(run, second, [])
    # Once made, once as they were (0, so that rows have the same figures), once drawn.
    assert counted == [{"verify/late": 2.0}, {"verify/late": 0.0}, {"verify/late": 2.0}]
    held_out(run, other)  # shorter responses are others
    assert counted[3:] == [{"verify/late": 2.0}]


def test_draws_of_another_kind_are_not_taken_over() -> None:
    """REINFORCE draws states one by one; a gate by what is known within responses needs whole ones."""
    held = HeldOut((1, "key"), [])
    assert held.lacks(False)
    held.draws, held.whole = {}, False
    assert not held.lacks(False)
    assert held.lacks(True)


def test_a_failed_response_ends_its_siblings() -> None:
    """In a loop that goes on they would, and answer turns of those that are begun anew."""
    ended: list[str] = []

    async def fails() -> None:
        await asyncio.sleep(0)
        raise PeerLost("gone", where="here", way_out="none")

    async def plays() -> None:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            await asyncio.sleep(0)
            ended.append("sibling")
            raise

    async def both() -> set[asyncio.Task[Any]]:
        with pytest.raises(PeerLost):
            await all_of([plays(), fails()])
        return asyncio.all_tasks() - {asyncio.current_task()}  # type: ignore[arg-type]

    assert asyncio.run(both()) == set()
    assert ended == ["sibling"]
