"""Which states are made into traces: even over outcomes, places, lengths and values. No torch."""

from __future__ import annotations

import math
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import TypeVar

from genac_megatron.records import State

T = TypeVar("T")
VALUE_BUCKETS = 5  # equal parts of [0, 1]
LEAST_RATE = 0.1  # of judgements kept, by which a further round is reckoned
MOST_AT_ONCE = 4  # times the samples wanted, of states in a round
MOST_OF_ONE = 2.0  # even shares that the fullest bucket of values may have to count as even


def balance(states: Sequence[State], size: int, seed: int = 0, length_buckets: int = 1) -> list[State]:
    """At most `size` states, balanced by outcome (below, from 0.5) and position, in shuffled order.

    Positions: the prompt state, the first and the second half of the response. The six strata are
    drawn from in turn; one that runs out leaves its share to the others. Of a prompt's identical
    prompt states one is kept per outcome class.

    length_buckets: the range of all states' lengths (prompt and prefix, in tokens) in so many equal parts,
    which each stratum draws from in turn as well: so long states, which are few, are not lost among short
    ones.
    """
    rng = random.Random(f"balance/{seed}")
    strata: dict[tuple[bool, int], list[State]] = defaultdict(list)
    seen: set[tuple[str, bool]] = set()
    for state in rng.sample(list(states), len(states)):
        right = state.rollout.outcome >= 0.5
        if state.cut == 0:
            if (state.rollout.prompt.id, right) in seen:
                continue
            seen.add((state.rollout.prompt.id, right))
        strata[right, _position(state)].append(state)
    piles = [strata[key] for key in sorted(strata)]
    if length_buckets > 1 and states:
        span = shortest_and_longest(states)
        piles = [_even_in_length(pile, *span, length_buckets) for pile in piles]
    chosen = in_turn(piles)[:size]
    rng.shuffle(chosen)
    return chosen


def length(state: State) -> int:
    """Tokens of a state: the actor's prompt and what it has written."""
    return len(state.rollout.prompt.ids) + state.cut


def in_turn(piles: Sequence[Sequence[T]]) -> list[T]:
    """The piles' items, one of each in turn, so that every prefix is as even as they allow."""
    longest = max((len(pile) for pile in piles), default=0)
    return [pile[turn] for turn in range(longest) for pile in piles if turn < len(pile)]


def by_value(items: Sequence[T], values: Sequence[float], size: int, seed: int = 0) -> list[T]:
    """At most `size` items, shuffled, as even over the parts of [0, 1] of their values as these allow."""
    rng = random.Random(f"values/{seed}")
    piles: dict[int, list[T]] = defaultdict(list)
    for place in rng.sample(range(len(items)), len(items)):
        piles[_bucket(values[place])].append(items[place])
    chosen = in_turn([piles[key] for key in sorted(piles)])[:size]
    rng.shuffle(chosen)
    return chosen


def even_enough(values: Sequence[float], size: int) -> bool:
    """Whether `by_value` would find `size` items, of which no part of [0, 1] has far more than its share."""
    if len(values) < size:
        return False
    kept = Counter(_bucket(value) for value in by_value(values, values, size))
    return max(kept.values()) <= MOST_OF_ONE * math.ceil(size / VALUE_BUCKETS)


def collect(
    size: int,
    rounds: int,
    draw: Callable[[int], list[State]],
    judge: Callable[[list[State]], list[tuple[T, float] | None]],
) -> tuple[list[tuple[T, float]], int]:
    """(what was accepted, with its values; states asked about), from rounds of further states.

    draw: at most so many states. judge: what is accepted of each, with its value. It ends once `size` can be
    taken evenly over the values, or no state is left, or after `rounds`.
    """
    kept: list[tuple[T, float]] = []
    asked = 0
    for _ in range(rounds):
        missing = size - len(kept) if len(kept) < size else size
        rate = max(len(kept) / asked, LEAST_RATE) if asked else 1.0
        states = draw(min(math.ceil(missing / rate), MOST_AT_ONCE * size))
        if not states:
            break
        kept += [one for one in judge(states) if one is not None]
        asked += len(states)
        if even_enough([value for _, value in kept], size):
            break
    return kept, asked


def shortest_and_longest(states: Sequence[State]) -> tuple[int, int]:
    """The range of states' lengths; (0, 0) of none."""
    lengths = [length(state) for state in states]
    return min(lengths, default=0), max(lengths, default=0)


def scarce_part(
    chosen: Sequence[State], span: tuple[int, int], buckets: int
) -> tuple[int, tuple[int, int], int] | None:
    """Of the parts of the lengths in `span`: (which, from 1; its lengths; how many of `chosen` it has) for
    the one that has fewest, where it ran out and has less than an even share; None where none did.

    A stratum takes one of each part in turn: one that it has two fewer of than of another ran out.
    """
    if buckets < 2 or not chosen:
        return None
    strata: dict[tuple[bool, int], Counter[int]] = defaultdict(Counter)
    for state in chosen:
        stratum = state.rollout.outcome >= 0.5, _position(state)
        strata[stratum][_part(state, *span, buckets)] += 1
    ran_out = {
        part
        for counts in strata.values()
        for part in range(buckets)
        if counts[part] < max(counts.values()) - 1
    }
    totals = sum(strata.values(), Counter[int]())
    few = [part for part in ran_out if totals[part] < len(chosen) // buckets]
    if not few:
        return None
    least = min(few, key=lambda part: (totals[part], -part))
    width = max(span[1] - span[0], 1) / buckets
    edges = (span[0] + math.ceil(least * width), min(span[0] + math.ceil((least + 1) * width) - 1, span[1]))
    if least == buckets - 1:
        edges = edges[0], span[1]
    return least + 1, edges, totals[least]


def _even_in_length(pile: Sequence[State], shortest: int, longest: int, buckets: int) -> list[State]:
    parts: dict[int, list[State]] = defaultdict(list)
    for state in pile:
        parts[_part(state, shortest, longest, buckets)].append(state)
    return in_turn([parts[key] for key in sorted(parts)])


def _part(state: State, shortest: int, longest: int, buckets: int) -> int:
    width = max(longest - shortest, 1) / buckets
    return min(int((length(state) - shortest) / width), buckets - 1)


def _bucket(value: float) -> int:
    return min(int(value * VALUE_BUCKETS + 1e-9), VALUE_BUCKETS - 1)


def _position(state: State) -> int:
    if state.cut == 0:
        return 0
    return 1 if 2 * state.cut < len(state.rollout.completion.ids) else 2
