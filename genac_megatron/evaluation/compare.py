"""`genac evaluate bank compare`: critics side by side. No torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from genac_megatron.errors import InputError
from genac_megatron.evaluation import plots
from genac_megatron.evaluation.intervals import Estimate, Resampled, plain
from genac_megatron.evaluation.tables import table, with_interval
from genac_megatron.observe.runinfo import read_jsonl, write_json_atomic, write_text_atomic

SCORES, STATES = "scores.json", "states.jsonl"
ROWS = (
    ("mse", "MSE to Monte-Carlo values"),
    ("mse_constant", "  of the best constant"),
    ("explained_variance", "explained variance"),
    ("brier", "Brier"),
    ("ece", "calibration error (ECE)"),
    ("spearman", "Spearman"),
    ("ranking_between", "pairs in order: between prompts"),
    ("ranking_prompt", "  within a prompt"),
    ("ranking_response", "  within a response"),
    ("ranking_between_clear", "clear pairs: between prompts"),
    ("ranking_prompt_clear", "  within a prompt"),
    ("ranking_response_clear", "  within a response"),
    ("parse_rate", "scores that parse"),
    ("tokens_per_state", "critic tokens per state"),
)


def compare(folders: Sequence[Path], out: Path | None, draws: int = 500) -> str:
    """One table of several scores; on one bank also the paired difference of each MSE to the first's.

    Raises InputError where a folder holds no scores. Writes compare.md, compare.json, compare.png to `out`.
    """
    reports = [_read_scores(folder) for folder in folders]
    names = _names(reports, folders)
    paired = _paired(folders, reports, draws)
    rows = [[title, *(with_interval(report["figures"][key]) for report in reports)] for key, title in ROWS]
    if paired:
        rows.insert(1, ["  less the first's", "", *(with_interval(plain(one)) for one in paired)])
    text = table(["", *names], rows)
    if not paired and len(reports) > 1:
        text += "\n\nNot one bank: the figures are not paired."
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        write_text_atomic(out / "compare.md", text + "\n")
        differences = [plain(difference) for difference in paired]
        write_json_atomic(
            out / "compare.json", {"names": names, "scores": reports, "mse_less_the_first": differences}
        )
        figures = [report["figures"] for report in reports]
        height = len(plots.COMPARED) * (0.55 + 0.24 * len(names))
        plots.save(out / "compare.png", height, plots.comparison(names, figures), width=6.4)
    return text


def _read_scores(folder: Path) -> dict[str, Any]:
    path = folder / SCORES
    try:
        report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"no {SCORES} that can be read there ({error})",
            where=str(folder),
            way_out="give folders that `genac evaluate bank score` has made",
        ) from error
    return report


def _names(reports: Sequence[dict[str, Any]], folders: Sequence[Path]) -> list[str]:
    """The scores' names, those that are alike with their banks' before."""
    names = [str(report["name"]) for report in reports]
    if len(set(names)) == len(names):
        return names
    return [
        f"{folder.resolve().parent.parent.name}/{name}" for folder, name in zip(folders, names, strict=True)
    ]


def _paired(folders: Sequence[Path], reports: Sequence[dict[str, Any]], draws: int) -> list[Estimate]:
    """Each one's MSE less the first's, the same prompts drawn for both; [] where they are of several banks.

    The noise of the Monte-Carlo values is the same in both, and falls out.
    """
    if len({report["bank"] for report in reports}) != 1 or len(reports) < 2:
        return []
    tables = [read_jsonl(folder / STATES)[0] for folder in folders]
    errors = [np.array([(row["used"] - row["monte_carlo"]) ** 2 for row in rows]) for rows in tables]
    sample = Resampled([row["prompt"] for row in tables[0]], draws)
    return [sample.mean(error - errors[0]) for error in errors[1:]]
