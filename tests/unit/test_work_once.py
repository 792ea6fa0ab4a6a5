"""Rows of a long run are read once, however many evaluations ask where they lie and what they cost."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fabricated_run import write_lines

from genac_megatron.models.registry import shape_of
from genac_megatron.observe.report_data import Row, RunData, number, read_run
from genac_megatron.recipe.schema import ModelConfig, ModelShape
from genac_megatron.studies.collect import DECODED, curve
from genac_megatron.studies.cost import total

SIZES = ModelShape(layers=1, hidden=8, ffn=16, heads=2, kv_heads=2, tie_embeddings=True)
SHAPE = shape_of(ModelConfig(family="qwen3", shape=SIZES), 11)
SHAPES = {"actor": SHAPE, "critic": SHAPE}


class Counted(dict[str, Any]):
    """A row that knows how often rows were read."""

    reads = 0

    def get(self, key: str, default: Any = None) -> Any:
        Counted.reads += 1
        return super().get(key, default)

    def __getitem__(self, key: str) -> Any:
        Counted.reads += 1
        return super().__getitem__(key)


def odd_rows(seed: int, steps: Any = (0, 1, 2, 2, 3, 4, None, "x")) -> list[Row]:
    """Of three stages, the second one mixed into the others; steps twice, in no order, or none."""
    rng = np.random.default_rng(seed)
    rows = []
    for stage in ["a"] * 9 + ["b", "a"] * 3 + ["c"] * 6 + ["b"] * 4:
        row = {"stage": stage, "kind": "ppo", "step": steps[rng.integers(len(steps))]}
        row |= {"tokens/rollout": float(rng.integers(9)), "tokens/rollout_prompt": 2.0, "time/total_s": 0.5}
        rows.append(row | ({"unique/rollout_prompt": 1.0} if rng.random() < 0.95 else {}))
    return rows


def positions_by_all_rows(run: RunData, asked: Row) -> float:
    for span in run.spans:
        if span.name == asked.get("stage"):
            rows = range(span.first, span.last)
            done = [
                run.places[i] for i in rows if number(run.metrics[i].get("step")) <= number(asked.get("step"))
            ]
            return float(max(done, default=span.begin))
    return float(run.places[-1] if run.places else 0)


@pytest.mark.parametrize("seed", range(8))
def test_an_evaluation_lies_where_all_rows_before_it_say(seed: int, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("name: run")
    write_lines(tmp_path / "metrics.jsonl", odd_rows(seed))
    evaluations = [
        {"stage": s, "name": "e", "step": at} for s in "abcd" for at in (-1, 0, 1, 2.5, 3, 99, None)
    ]
    write_lines(tmp_path / "evaluations.jsonl", evaluations)
    run = read_run(tmp_path)
    for asked in evaluations:
        assert run.position(asked) == positions_by_all_rows(run, asked), asked


def test_rows_are_read_once_for_all_positions(tmp_path: Path) -> None:
    rows = [Counted(stage="ppo", kind="ppo", step=step) for step in range(1, 501)]
    run = RunData(tmp_path, {}, list[Row](rows), [], [], {})
    assert run.position({"stage": "ppo", "step": 7}) == 7
    Counted.reads = 0
    assert [run.position({"stage": "ppo", "step": step}) for step in range(500)] == list(range(500))
    assert Counted.reads == 0


def curve_by_all_rows(rows: list[Row], evaluations: list[Row]) -> list[dict[str, float]]:
    points = []
    for evaluation in evaluations:
        stage, step = evaluation["stage"], evaluation["step"]
        first = next((i for i, row in enumerate(rows) if row["stage"] == stage), len(rows))
        before = rows[:first] + [
            row for row in rows[first:] if row["stage"] == stage and 0 < row["step"] <= step
        ]
        decoded = sum(float(row.get(key) or 0.0) for row in before for key in DECODED)
        point = {"steps": float(step), "accuracy": evaluation["actor"]["accuracy"]}
        points.append(point | total(before, SHAPES) | {"decoded": decoded})
    return points


@pytest.mark.parametrize("seed", range(8))
def test_a_curve_costs_what_all_rows_before_each_evaluation_do(seed: int) -> None:
    rows = odd_rows(seed, steps=(0, 1, 2, 2, 3, 4))
    evaluations = [
        {"stage": stage, "kind": "policy", "step": at, "actor": {"accuracy": at / 8}}
        for stage in "abcd" for at in (0, 1, 2, 4, 5)
    ]  # fmt: skip
    wanted = curve_by_all_rows(rows, evaluations)
    assert sum("flops_shared" in point for point in wanted) > 1 or seed, "with and without"
    for got, want in zip(curve(rows, evaluations, SHAPES), wanted, strict=True):
        assert got == pytest.approx(want, rel=1e-12)


def test_rows_are_read_once_for_all_of_a_curve() -> None:
    rows = [Counted({"stage": "ppo", "step": step, "tokens/rollout": 1.0}) for step in range(1, 201)]
    reads = []
    for count in (1, 100):
        evaluations = [
            {"stage": "ppo", "kind": "ppo", "step": 2 * at, "actor": {"accuracy": 0.5}} for at in range(count)
        ]
        Counted.reads = 0
        assert [p["tokens"] for p in curve(list[Row](rows), evaluations, SHAPES)] == [
            2.0 * at for at in range(count)
        ]
        reads.append(Counted.reads)
    assert reads[0] == reads[1]
    assert math.isfinite(reads[0])
