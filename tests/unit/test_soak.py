"""tools/soak.py: what it takes for memory that grows."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tools.soak import FEWEST, FLAT, HELPERS, WARM, Sample, growth

MIB = 2.0**20


def samples(sizes: list[float], stage: int = 0) -> list[Sample]:
    return [(stage, step, {"rank 0": size * MIB, HELPERS: 3.0}) for step, size in enumerate(sizes)]


@given(st.integers(WARM + FEWEST + 1, 400), st.floats(1.0, 3.0))
def test_steps_that_fill_caches_are_left_out_and_swings_about_one_level_are_no_growth(
    count: int, start: float
) -> None:
    sizes = [500 / start] * WARM + [500.0 + 20 * (-1) ** step for step in range(WARM, count)]
    assert growth(samples(sizes))["rank 0"] == pytest.approx(1.0, abs=0.01)


@given(st.integers(WARM + FEWEST + 1, 400), st.floats(0.12, 1.0))
def test_a_leak_is_found(count: int, leaked: float) -> None:
    """The middles of the outer thirds lie two thirds of all growth apart."""
    grown = [500 * (1 + leaked * max(0, step - WARM) / (count - WARM)) for step in range(count)]
    assert growth(samples(grown))["rank 0"] > FLAT


def test_an_attempt_of_few_steps_says_nothing() -> None:
    assert growth(samples([500.0] * (WARM + FEWEST))) == {}
    assert growth([]) == {}


def test_a_new_stage_may_take_more() -> None:
    before, after = samples([400.0] * 200), samples([800.0] * (WARM + FEWEST + 1), stage=1)
    assert growth(before + after) == {"rank 0": pytest.approx(1.0)}
    assert growth(before + after[:-1]) == {}
