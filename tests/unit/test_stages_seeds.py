"""Seeds: a pure function of their parts, the same on every machine, apart for different parts."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from genac_megatron.stages.seeds import seed_for

parts = st.lists(
    st.one_of(st.integers(), st.text(alphabet=st.characters(codec="utf-8", exclude_characters="\x1f"))),
    min_size=1,
)


def test_it_is_the_same_on_every_machine() -> None:
    """Frozen figures: a change of them would change every run."""
    assert seed_for(0, "ppo", 3, "train/7", 1) == 8790913739998282505
    assert seed_for("x") == 2697552496229297191


@given(parts)
def test_an_engine_takes_it(values: list[object]) -> None:
    assert 0 <= seed_for(*values) < 2**63
    assert seed_for(*values) == seed_for(*values)


@given(parts, parts)
def test_different_parts_differ(left: list[object], right: list[object]) -> None:
    """63 bits: no collision to be met."""
    same = [str(x) for x in left] == [str(x) for x in right]
    assert (seed_for(*left) == seed_for(*right)) is same


def test_the_border_between_parts_counts() -> None:
    seeds = [seed_for(1, 23), seed_for(12, 3), seed_for(123), seed_for(1, 2, 3), seed_for("1", "", "23")]
    assert len(set(seeds)) == len(seeds)
