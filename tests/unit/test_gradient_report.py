"""The report of gradient estimators from what is kept: figures, table with predictions, plot; bad folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from genac_megatron.errors import InputError
from genac_megatron.evaluation.gradient_report import draw, report_of, shown, write_report
from genac_megatron.evaluation.parts import Parts
from genac_megatron.evaluation.plots import save

R, BLOCKS, EACH, D = 4, 5, 4, 30
NOISE = {"rloo": 3.0, "exact-0": 1.0, "exact-1-raw": 2.0}


def kept(seed: int = 0) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Manifest and rows of estimators of known noise."""
    rng = np.random.default_rng(seed)
    true = np.eye(D)[0]
    chunks = true + 0.1 * rng.normal(size=(R, D)) / np.sqrt(D)
    made = {
        name: true + noise * rng.normal(size=(BLOCKS * EACH, D)) / np.sqrt(D) for name, noise in NOISE.items()
    }
    sums = {name: one.reshape(BLOCKS, EACH, D).sum(1) for name, one in made.items()}
    rows: list[dict[str, Any]] = [{"kind": 0, "number": i, "outcomes": [1.0, 0.0]} for i in range(R)]
    for block in range(BLOCKS):
        mine = {name: one[block * EACH : (block + 1) * EACH] for name, one in made.items()}
        inner = {
            name: np.concatenate([one @ chunks.T, (one**2).sum(1, keepdims=True)], 1).tolist()
            for name, one in mine.items()
        }
        rows.append({"kind": 1, "number": block, "batches": EACH, "outcomes": [0.0, 1.0], "inner": inner})
    manifest = {
        "kind": "gradients",
        "plan": {"estimators": [*NOISE], "prompts": 8, "samples": 2, "batches": 20, "reference": 64},
        "made_from": {},
        "success_rate": 0.5,
        "unbiased": ["exact-1-raw"],
        "products": {
            "chunks": (chunks @ chunks.T).tolist(),
            "blocks": {name: (one @ one.T).tolist() for name, one in sums.items()},
        },
    }
    return manifest, rows


def test_a_quieter_estimator_has_the_higher_ratio_and_predictions_stand_beside() -> None:
    report = report_of(*kept())
    assert report["base"] == "rloo"
    found = report["estimators"]
    ratio = found["rloo"]["ratio"]
    assert [ratio[key] for key in ("value", "low", "high")] == [1.0, 1.0, 1.0]
    assert 0 < ratio["dropped"] < ratio["draws"] == 1000, "draws in which rloo's own is not above 0"
    assert found["exact-0"]["ratio"]["low"] > 1.5
    assert found["exact-1-raw"]["agrees"]
    assert found["exact-1-raw"]["noise"]["value"] == pytest.approx(1.0 + NOISE["exact-1-raw"] ** 2, rel=0.2)
    assert "noise" not in found["exact-0"], "of another scale"
    assert "agrees" not in found["exact-0"]
    assert "size" not in found["exact-0"], "of another scale than the reference"
    text = shown(report, {"exact-0": 9.0})
    assert "predicted" in text.splitlines()[2]
    row = next(line for line in text.splitlines() if line.startswith("| exact-0 "))
    assert [cell.strip() for cell in row.split("|")][5] == "9.00"
    assert f"({ratio['dropped']} of 1000 draws dropped)" in text
    excess = found["exact-1-raw"]["excess"]["high"]
    assert f"agrees, excess < {excess:.2f}" in text, "what it would not have seen stands beside"
    assert "predicted" not in shown(report)


def test_finished_work_leaves_figures_table_and_plot(tmp_path: Path) -> None:
    manifest, rows = kept()
    parts = Parts(tmp_path / "audit", "gradients.jsonl", ("kind", "number"))
    parts.begin(manifest["plan"])
    with pytest.raises(InputError, match="unfinished"):
        write_report(tmp_path / "audit")
    parts.finish(rows, manifest)
    text = write_report(tmp_path / "audit")
    out = tmp_path / "audit"
    assert (out / "table.md").read_text() == text
    assert json.loads((out / "figures.json").read_text())["estimators"].keys() == NOISE.keys()
    assert (out / "gradients.png").stat().st_size > 5000
    manifest["kind"] = "bank"
    (out / "manifest.json").unlink()
    parts.finish(rows, manifest)
    with pytest.raises(InputError, match="it holds bank"):
        write_report(out)


def test_the_plot_takes_reports_of_other_estimators(tmp_path: Path) -> None:
    first, second = report_of(*kept()), report_of(*kept(1))
    del second["estimators"]["rloo"]
    save(tmp_path / "plot.png", 4.0, draw({"short": first, "long": second}, {"long": {"exact-0": 3.0}}))
    assert (tmp_path / "plot.png").stat().st_size > 5000
