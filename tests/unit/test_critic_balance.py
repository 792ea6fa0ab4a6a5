"""How a critic's own judgements are gathered, in the review's worlds: invented values, the real rejection."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable

import pytest

from genac_megatron.critic.balance import MOST_AT_ONCE, balance, by_value, collect, even_enough
from genac_megatron.critic.traces import accept
from genac_megatron.recipe.schema import TeacherConfig
from genac_megatron.records import Completion, Judgement, Prompt, Rollout, State

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
