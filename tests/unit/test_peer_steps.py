"""benchmarks/peer_steps.py: its rows could be, and its results are those of the formulas."""

from __future__ import annotations

import json

import pytest

from benchmarks.machine import RESULTS
from benchmarks.peer_steps import ROWS, Published, on_paper, rows_of
from benchmarks.scale_model import Assumed, Measured


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.model)
def test_a_row_is_one_that_could_be(row: Published) -> None:
    """Its GPUs hold its layout, and its trained tokens are the generated ones and a short problem."""
    assert row.gpus % (row.tp * row.cp * row.pp) == 0
    assert 20 < row.trained - row.generated < 300


def test_slower_parts_make_a_longer_step() -> None:
    found, measured = on_paper(ROWS[1], Assumed(), Measured.read()), Measured.read()
    slower = on_paper(ROWS[1], Assumed(mfu=0.2), measured)
    assert slower["train"] == pytest.approx(2 * found["train"])
    assert slower["rollout"] > found["rollout"]
    assert found["logprobs"] == pytest.approx(found["train"] * 2 / 3)


def test_the_results_are_those_of_the_formulas() -> None:
    record = json.loads((RESULTS / "peer_steps.json").read_text())
    assert record["rows"] == rows_of(Assumed(), Measured.read()), "run python -m benchmarks.peer_steps"
