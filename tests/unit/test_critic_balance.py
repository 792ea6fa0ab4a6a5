"""How a critic's own judgements are gathered, in the review's worlds: invented values, the real rejection."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from genac_megatron.critic.balance import MOST_AT_ONCE, balance, by_value, collect, even_enough, length
from genac_megatron.critic.traces import accept
from genac_megatron.recipe.schema import TeacherConfig
from genac_megatron.records import Completion, Judgement, Prompt, Rollout, State
from tests.unit.test_critic_traces import rollout, states_of

Rates = Callable[[random.Random], float]
SIZE, CONTINUATIONS, PER_RESPONSE = 1000, 8, 5


class World:
    """States whose values are known, drawn balanced as a stage draws them; an invented critic judges them."""

    def __init__(self, rates: Rates, judge: Callable[[float], float | None]) -> None:
        self.rng, self.rates, self.says = random.Random(7), rates, judge
        self.values: dict[int, float] = {}
        self.kept: list[State] = []  # so that no id is used twice
        self.asked: list[int] = []

    def draw(self, wanted: int) -> list[State]:
        states = []
        while len(states) < 2 * wanted:
            rate = self.rates(self.rng)
            for sample in range(8):
                outcome = float(self.rng.random() < rate)
                ids = tuple(range(40 * PER_RESPONSE))
                prompt = Prompt(f"train/{len(self.kept)}/{len(states)}", (), "", "")
                rollout = Rollout(prompt, sample, Completion(ids, (), "stop"), "", outcome)
                for k in range(PER_RESPONSE):
                    state = State(rollout, k, 40 * k, 40 * k + 40)
                    late = k / PER_RESPONSE
                    self.values[id(state)] = (1 - late) * rate + late * (0.9 * outcome + 0.05)
                    states.append(state)
        self.kept += states
        self.asked.append(wanted)
        return balance(states, wanted, 0)

    def judge(self, states: list[State]) -> list[tuple[float, float] | None]:
        """(what it says, the value by Monte Carlo) where that bears it out."""
        config = TeacherConfig(kind="self", continuations=CONTINUATIONS)
        found: list[tuple[float, float] | None] = []
        for state in states:
            value = self.values[id(state)]
            drawn = sum(self.rng.random() < value for _ in range(CONTINUATIONS)) / CONTINUATIONS
            words = Completion((1,), (0.0,), "stop")
            [one] = accept([[Judgement(state, (), words, "", self.says(value))]], [drawn], config)
            found.append(None if one is None or one.value is None else (one.value, drawn))
        return found


def saturated(rng: random.Random) -> float:
    return rng.betavariate(12, 0.8)  # 94 % on average: a strong actor on easy problems


def broad(rng: random.Random) -> float:
    return rng.betavariate(0.9, 0.9)


def honest(rng: random.Random) -> Callable[[float], float | None]:
    """A raw judge: biased by 0.1, of deviation 0.2, and four of ten times without a score."""

    def says(value: float) -> float | None:
        said = min(max(round(10 * (value + 0.1 + rng.gauss(0, 0.2))) / 10, 0.0), 1.0)
        return said if rng.random() < 0.6 else None

    return says


@pytest.mark.parametrize("rates", [saturated, broad], ids=["saturated", "broad"])
def test_as_many_are_gathered_as_were_asked_for(rates: Rates) -> None:
    """Before, 47 % of them were, as what rejection took was not drawn again."""
    world = World(rates, honest(random.Random(1)))
    kept, asked = collect(SIZE, 6, world.draw, world.judge)
    chosen = by_value(kept, [value for _, value in kept], SIZE)
    assert len(chosen) == SIZE
    assert asked <= sum(world.asked) <= 6 * MOST_AT_ONCE * SIZE
    first = world.judge(world.draw(SIZE))
    assert sum(one is not None for one in first) < 0.75 * SIZE, "one round would not do"


def test_what_is_kept_is_even_over_values_as_far_as_it_goes() -> None:
    """Of a saturated actor's states 92 % of what was kept said 0.9 or 1."""
    world = World(saturated, honest(random.Random(1)))
    one_round = [one for one in world.judge(world.draw(SIZE)) if one is not None]
    kept, _ = collect(SIZE, 6, world.draw, world.judge)
    chosen = by_value(kept, [value for _, value in kept], SIZE)

    def sure(pairs: list[tuple[float, float]]) -> float:
        return sum(said >= 0.9 for said, _ in pairs) / len(pairs)

    assert sure(chosen) < sure(one_round) - 0.1
    rare = Counter(min(int(value * 5), 4) for _, value in kept)
    taken = Counter(min(int(value * 5), 4) for _, value in chosen)
    for part in range(4):
        assert taken[part] == min(rare[part], taken[part]), "more than there are"
        if rare[part] < SIZE / 5:
            assert taken[part] == rare[part], "what is rare is kept whole"


def test_rounds_end_where_nothing_more_is_found() -> None:
    world = World(broad, lambda value: None)
    assert collect(50, 3, world.draw, world.judge) == ([], world.asked[0] + sum(world.asked[1:]))
    assert len(world.asked) == 3
    assert world.asked[1] == MOST_AT_ONCE * 50, "not without bound"
    assert collect(50, 3, lambda wanted: [], world.judge) == ([], 0)


def test_one_round_is_enough_where_all_are_kept_and_even() -> None:
    world = World(lambda rng: rng.random(), lambda value: value)
    kept, asked = collect(200, 4, world.draw, world.judge)
    assert len(world.asked) <= 2
    assert len(kept) > 0.9 * asked
    assert even_enough([value for _, value in kept], 200)
    assert not even_enough([1.0] * 200, 200)
    assert not even_enough([0.5] * 3, 4)
    assert even_enough([0.3], 1)


def test_balance_by_outcome_and_position() -> None:
    states: list[State] = []
    for index in range(40):
        prompt = Prompt(f"train/{index}", (), "p", None)
        for sample in range(4):
            right = sample == 0 and index < 25  # one in six is right
            states += states_of(rollout("a b\nc d\ne f\ng h\ni j", prompt, sample, float(right)))
    chosen = balance(states, 60, seed=1)
    assert len(chosen) == 60
    assert all(any(c is s for s in states) for c in chosen)

    def stratum(state: State) -> tuple[float, int]:
        late = 2 * state.cut >= len(state.rollout.completion.ids)
        return state.rollout.outcome, 0 if state.cut == 0 else 1 + late

    counts: dict[tuple[float, int], int] = {}
    for state in chosen:
        counts[stratum(state)] = counts.get(stratum(state), 0) + 1
    assert len(counts) == 6
    assert set(counts.values()) == {10}
    starts = [(s.rollout.prompt.id, s.rollout.outcome) for s in balance(states, 10_000) if s.cut == 0]
    assert len(starts) == len(set(starts)) == 40 + 25
    again = balance(states, 60, seed=1)
    assert all(a is b for a, b in zip(chosen, again, strict=True))
    assert any(a is not b for a, b in zip(chosen, balance(states, 60, seed=2), strict=True))
    assert balance([], 5) == []


def test_balance_evenly_over_lengths() -> None:
    """Most states are short, as long responses are few; in buckets each length has as many."""
    states: list[State] = []
    for index in range(60):
        lines = 4 if index % 6 else 24  # one response in six is long
        prompt = Prompt(f"train/{index}", (), "p", None)
        made = rollout("\n".join("a b" for _ in range(lines)), prompt, 0, float(index % 2))
        made.limit = 100  # known beforehand, so that long responses have states near their end
        states += states_of(made)
    lengths = [length(state) for state in states]
    width = (max(lengths) - min(lengths)) / 4

    def counted(chosen: list[State]) -> Counter[tuple[float, bool, int]]:
        """Of states behind the prompt, by outcome, half of the response, and quarter of all lengths."""
        return Counter(
            (
                state.rollout.outcome,
                2 * state.cut < len(state.rollout.completion.ids),
                min(int((length(state) - min(lengths)) / width), 3),
            )
            for state in chosen
            if state.cut
        )

    there, taken = counted(states), counted(even := balance(states, 90, seed=1, length_buckets=4))
    for stratum, count in there.items():
        most = max(n for other, n in taken.items() if other[:2] == stratum[:2])
        assert taken[stratum] >= min(count, most - 1), stratum
    plain = counted(balance(states, 90, seed=1))
    late = [(right, False, quarter) for right in (0.0, 1.0) for quarter in (2, 3)]
    assert sum(taken[one] for one in late) > 1.2 * sum(plain[one] for one in late), "long ones are more"
    later = [state for state in states if state.cut]
    assert len(even) == len({id(state) for state in even}) == 90
    assert balance(states, 90, seed=1, length_buckets=1) == balance(states, 90, seed=1)
    same = balance(later[:1] * 3, 3, length_buckets=5)
    assert len(same) == 3, "all of one length"


@given(
    st.lists(st.floats(0, 1), max_size=60),
    st.integers(1, 40),
)
def test_values_are_taken_as_evenly_as_they_allow(values: list[float], size: int) -> None:
    chosen = by_value(list(range(len(values))), values, size, seed=3)
    assert len(chosen) == len(set(chosen)) == min(size, len(values))
    parts = [min(int(value * 5 + 1e-9), 4) for value in values]
    there, taken = Counter(parts), Counter(parts[place] for place in chosen)
    for part, count in there.items():
        if taken[part] < count:  # one that has some left has no fewer than any other, but for the last turn
            assert taken[part] >= max(taken.values()) - 1
    assert chosen == by_value(list(range(len(values))), values, size, seed=3)
