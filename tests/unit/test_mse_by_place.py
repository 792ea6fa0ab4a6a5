"""The error of prompt states and of others, told from the figures that studies kept."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from tools.mse_by_place import KINDS, by_seed, split

EXPERIMENTS = Path(__file__).resolve().parents[2] / "experiments"


def test_shares_are_found_from_the_figures() -> None:
    rng = random.Random(0)
    counts = [12, 20, 25, 19, 24]
    figures = []
    for _ in range(7):
        parts = [rng.uniform(0, 0.3) for _ in KINDS]
        mse = sum(n * part for n, part in zip(counts, parts, strict=True)) / sum(counts)
        figures.append({"b/mse": mse} | {f"b/mse_{k}": part for k, part in zip(KINDS, parts, strict=True)})
    for one, (prompt, others) in zip(figures, split(figures, "b"), strict=True):
        assert prompt == one["b/mse_prompt_state"]
        rest = sum(n * one[f"b/mse_{k}"] for n, k in zip(counts[1:], KINDS[1:], strict=True)) / sum(
            counts[1:]
        )
        assert others == pytest.approx(rest)
    with pytest.raises(ValueError, match="do not tell"):
        split(figures[:3], "b")
    figures[3]["b/mse"] += 0.01
    with pytest.raises(ValueError, match="do not tell"):
        split(figures, "b")


@pytest.mark.parametrize("study", ["scaling", "scaling_chain"])
def test_the_figures_that_are_here_can_be_told_apart(study: str) -> None:
    """A critic that is trained on every prefix knows prompts well: its error is elsewhere."""
    records = json.loads((EXPERIMENTS / study / "figures.json").read_text(encoding="utf-8"))["records"]
    found = by_seed(records, "in")
    dense = [part for cell, seeds in found.items() if "dense" in cell for part in seeds.values()]
    assert len(dense) >= 9
    assert all(prompt < 0.01 and prompt < others for prompt, others in dense)
    assert {seed for seeds in found.values() for seed in seeds} == {1, 2, 3}
