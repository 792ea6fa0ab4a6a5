"""In-context conditioning: the moving average, the figures shown, the ablations, checkpointing."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from genac_megatron.critic.icc import IccState
from genac_megatron.recipe.schema import JudgingConfig

ON = JudgingConfig(actor_name="tiny")
OFF = JudgingConfig(icc="off")
SHUFFLED = JudgingConfig(icc="shuffled")
batches = st.lists(st.lists(st.floats(0, 1), min_size=1, max_size=8), max_size=12)


def test_seeded_by_the_first_evaluation_then_momentum() -> None:
    icc = IccState.from_evaluation([1.0, 0.0, 0.0, 1.0], momentum=0.9)
    assert (icc.p_bar, icc.step) == (0.5, 0)
    icc.update([1.0, 1.0])
    assert icc.p_bar == pytest.approx(0.9 * 0.5 + 0.1 * 1.0)
    assert icc.step == 1


def test_the_step_moves_on_only_with_the_actor() -> None:
    icc = IccState(p_bar=0.5, step=7, momentum=0.5)
    icc.update([1.0], advance=False)
    assert (icc.p_bar, icc.step) == (0.75, 7)


@given(batches, st.floats(0, 1), st.floats(0, 1))
def test_stays_within_the_outcomes_range(history: list[list[float]], first: float, momentum: float) -> None:
    icc = IccState(p_bar=first, momentum=momentum)
    seen = [first, *(x for batch in history for x in batch)]
    for batch in history:
        icc.update(batch)
        # 1e-12: rounding of a convex combination.
        assert min(seen) - 1e-12 <= icc.p_bar <= max(seen) + 1e-12
    assert icc.step == len(history)


def test_wrong_outcomes_are_refused() -> None:
    with pytest.raises(ValueError, match="no outcomes"):
        IccState(0.5).update([])
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        IccState(0.5).update([1.5])
    with pytest.raises(ValueError, match="p_bar"):
        IccState(1.5)


def test_figures_of_each_mode() -> None:
    icc = IccState(p_bar=0.6249, step=12)
    assert icc.block(ON, "train/0", 31, 96).figures() == {
        "actor": "tiny", "p_bar": "0.62", "step": "12", "used": "31", "limit": "96",
    }  # fmt: skip
    assert icc.block(OFF, "train/0", 31, 96).figures() == {"used": "31", "limit": "96"}


def test_shuffled_is_a_function_of_seed_step_and_key() -> None:
    def shown(seed: int, step: int, key: str) -> float:
        p_bar = IccState(p_bar=0.5, step=step, seed=seed).block(SHUFFLED, key, 0, 1).p_bar
        assert p_bar is not None
        return p_bar

    assert shown(0, 3, "train/1") == shown(0, 3, "train/1")
    assert len({shown(s, t, k) for s in (0, 1) for t in (3, 4) for k in ("train/1", "train/2")}) == 8
    draws = [shown(0, 0, f"train/{i}") for i in range(400)]
    # Uniform on [0, 1]: mean 0.5 with deviation 0.289 / sqrt(400) = 0.0144; five of them.
    assert abs(sum(draws) / 400 - 0.5) < 0.075
    assert min(draws) < 0.05
    assert max(draws) > 0.95


@given(batches)
def test_resumed_equals_uninterrupted(history: list[list[float]]) -> None:
    whole, first = IccState(0.3, momentum=0.8, seed=5), IccState(0.3, momentum=0.8, seed=5)
    half = len(history) // 2
    for batch in history:
        whole.update(batch)
    for batch in history[:half]:
        first.update(batch)
    resumed = IccState(0.9)
    resumed.load_state_dict(first.state_dict())
    for batch in history[half:]:
        resumed.update(batch)
    assert resumed == whole
