"""Which of several judgements of states are worth imitating, and whether who gave them can be a teacher.

Rows as `genac traces` keeps them: a state with the outcomes of its continuations, and answers about it. Pure.
"""

from __future__ import annotations

import math
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from genac_megatron.critic.balance import MOST_OF_ONE, VALUE_BUCKETS, in_turn
from genac_megatron.critic.traces import bears_out
from genac_megatron.recipe.schema import TeacherConfig

T = TypeVar("T")
Row = dict[str, Any]
Verdict = Literal["accepted", "away", "unread", "cut off", "refused"]
LENGTH_BUCKETS = 3
RANKING = 0.5  # of a teacher, at least: a coin's
APART = 0.25  # two states' Monte-Carlo values, so that their order is known


def verdict(answer: Row, monte_carlo: float, config: TeacherConfig) -> Verdict:
    """What comes of one answer: `away` where Monte Carlo does not bear it out."""
    if answer.get("refused"):
        return "refused"
    if answer["finish"] != "stop":
        return "cut off"
    if answer["value"] is None:
        return "unread"
    return "accepted" if bears_out(answer["value"], monte_carlo, config) else "away"


def monte_carlo(state: Row) -> float:
    """A state's value by its continuations."""
    outcomes: list[float] = state["outcomes"]
    return math.fsum(outcomes) / len(outcomes)


def accepted(states: Sequence[Row], answers: Sequence[Row], config: TeacherConfig) -> list[tuple[Row, Row]]:
    """(state, the accepted answer that is nearest to its value) of the states that have one, in order."""
    by_state: dict[int, list[Row]] = defaultdict(list)
    for answer in answers:
        by_state[answer["state"]].append(answer)
    found = []
    for state in states:
        value = monte_carlo(state)
        good = [one for one in by_state[state["state"]] if verdict(one, value, config) == "accepted"]
        if good:
            found.append((state, min(good, key=lambda one: (abs(one["value"] - value), one["judgement"]))))
    return found


def bucket(value: float) -> int:
    """Which of the equal parts of [0, 1] a value is in."""
    return min(int(value * VALUE_BUCKETS + 1e-9), VALUE_BUCKETS - 1)


def place(state: Row) -> int:
    """The prompt state, the first half of a response, the second."""
    return 0 if state["used"] == 0 else 1 if state["place"] < 0.5 else 2


def evenly(
    items: Sequence[T], state: Callable[[T], Row], size: int, seed: int, most: float = MOST_OF_ONE
) -> list[T]:
    """At most `size` items, shuffled, as even over values as they allow, within these over places, within
    these over thirds of the range of lengths; no fifth of the values has more than `most` even shares.
    """
    rng = random.Random(f"evenly/{seed}")
    lengths = [state(item)["length"] for item in items]
    low, high = min(lengths, default=0), max(lengths, default=0)

    def third(item: T) -> int:
        return min(
            int((state(item)["length"] - low) / max(high - low, 1) * LENGTH_BUCKETS), LENGTH_BUCKETS - 1
        )

    def piled(some: Sequence[T], key: Callable[[T], Hashable]) -> list[list[T]]:
        piles: dict[Any, list[T]] = defaultdict(list)
        for item in some:
            piles[key(item)].append(item)
        return [piles[name] for name in sorted(piles)]

    def placed(some: Sequence[T]) -> list[T]:
        return in_turn([in_turn(piled(pile, third)) for pile in piled(some, lambda one: place(state(one)))])

    shuffled = rng.sample(list(items), len(items))
    limit = math.ceil(most * size / VALUE_BUCKETS)
    values = [placed(pile)[:limit] for pile in piled(shuffled, lambda one: bucket(monte_carlo(state(one))))]
    chosen = in_turn(values)[:size]
    rng.shuffle(chosen)
    return chosen


@dataclass(frozen=True)
class Teaching:
    """How good somebody's judgements are, all of them, before any is left out."""

    states: int
    answers: int
    parsed: float  # share of the answers
    brier: float  # of single continuations, over the answers that parse
    constant: float  # of the best constant, over the same
    ranking: float  # pairs of states that are surely apart, in the right order; NaN where there are none
    counts: dict[str, int]  # by verdict
    kept_brier: float  # of what is to be learnt
    kept_constant: float

    @property
    def faults(self) -> list[str]:
        """Why nobody should be taught by it; [] where all is well."""
        found = []
        if not self.kept_brier < self.kept_constant:
            found.append(
                f"of what would be learnt the Brier score {self.kept_brier:.4f} is not below the best "
                f"constant's {self.kept_constant:.4f}"
            )
        if not self.ranking > RANKING:
            found.append(
                f"of two states that are surely apart it puts {self.ranking:.3f} in the right order, no more "
                f"than a coin ({RANKING:g})"
            )
        return found


def teaching(
    states: Sequence[Row], answers: Sequence[Row], kept: Sequence[tuple[Row, Row]], config: TeacherConfig
) -> Teaching:
    """What a teacher's answers are worth, and those of them that are `kept`, by the outcomes of the states'
    continuations. Answers that were chosen by these look better than the teacher is; all of them do not.
    """
    known = {state["state"]: state for state in states}
    asked = [answer for answer in answers if answer["state"] in known]
    counts = Counter[str](verdict(one, monte_carlo(known[one["state"]]), config) for one in asked)
    judged = [(known[one["state"]], one["value"]) for one in asked if one["value"] is not None]
    brier, constant = _briers(judged)
    kept_brier, kept_constant = _briers([(state, answer["value"]) for state, answer in kept])
    return Teaching(
        states=len({one["state"] for one in asked}),
        answers=len(asked),
        parsed=len(judged) / len(asked) if asked else math.nan,
        brier=brier,
        constant=constant,
        ranking=_ranking([(monte_carlo(state), value) for state, value in judged]),
        counts=dict(counts),
        kept_brier=kept_brier,
        kept_constant=kept_constant,
    )


def _briers(judged: Sequence[tuple[Row, float]]) -> tuple[float, float]:
    """(the mean Brier score of values, that of the best constant) by single continuations; NaN of none."""
    if not judged:
        return math.nan, math.nan
    values = [monte_carlo(state) for state, _ in judged]
    mean = math.fsum(values) / len(values)
    spread = [math.fsum(o * o for o in state["outcomes"]) / len(state["outcomes"]) for state, _ in judged]
    # The mean of (v - o)^2 over a state's outcomes o of mean p is v^2 - 2 v p + mean(o^2).
    briers = [v * v - 2 * v * p + s for (_, v), p, s in zip(judged, values, spread, strict=True)]
    constants = [mean * mean - 2 * mean * p + s for p, s in zip(values, spread, strict=True)]
    return math.fsum(briers) / len(briers), math.fsum(constants) / len(constants)


def _ranking(judged: Sequence[tuple[float, float]]) -> float:
    """Of pairs whose Monte-Carlo values are APART the share that is ordered alike; ties count half."""
    right = pairs = 0.0
    levels = Counter((round(value, 6), round(said, 6)) for value, said in judged)
    for (value, said), count in levels.items():
        for (other, theirs), times in levels.items():
            if value - other >= APART - 1e-9:
                pairs += count * times
                right += count * times * (1.0 if said > theirs else 0.5 if said == theirs else 0.0)
    return right / pairs if pairs else math.nan


def shares(rows: Sequence[Row]) -> list[float]:
    """The share of each fifth of [0, 1] among states' values."""
    counts = Counter(bucket(monte_carlo(row)) for row in rows)
    return [counts[part] / max(len(rows), 1) for part in range(VALUE_BUCKETS)]
