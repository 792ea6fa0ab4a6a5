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
from genac_megatron.metrics import Floats
from genac_megatron.observe.runinfo import read_jsonl, write_json_atomic, write_text_atomic

SCORES, STATES = "scores.json", "states.jsonl"
AGAIN = "score the bank again: genac evaluate bank score BANK RECIPE --checkpoint RUN"
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

    Raises InputError where a folder holds none that this version makes. Writes compare.md, compare.json,
    compare.png to `out`.
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
    if fault := _fault(report):
        raise InputError(f"no scores of this version: {fault}", where=str(path), way_out=AGAIN)
    return report


def _fault(report: Any) -> str:
    """The first thing that scores have and a file's content has not; "" where it has all."""
    if not isinstance(report, dict):
        return "it holds no object"
    for key in ("name", "bank"):
        if not isinstance(report.get(key), str):
            return f"{key} is not there"
    figures = report.get("figures")
    for key, _ in ROWS:
        figure = figures.get(key) if isinstance(figures, dict) else None
        for part in ("value", "low", "high"):
            if not isinstance(figure, dict) or part not in figure:
                return f"figures.{key}.{part} is not there"
            if not isinstance(figure[part], int | float | None):
                return f"figures.{key}.{part} is no number"
    return ""


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
    (prompts, first), *others = map(_errors, folders)
    for folder, (theirs, _) in zip(folders[1:], others, strict=True):
        if theirs != prompts:
            what = f"not the states that {folders[0] / STATES} has: no states of these scores"
            raise InputError(what, where=str(folder / STATES), way_out=AGAIN)
    sample = Resampled(prompts, draws)
    return [sample.mean(errors - first) for _, errors in others]


def _errors(folder: Path) -> tuple[list[str], Floats]:
    """Of each state its prompt, and the squared distance of the critic's value to the Monte-Carlo one."""
    rows, bad = read_jsonl(folder / STATES)
    try:
        prompts = [str(row["prompt"]) for row in rows]
        errors = np.array([(row["used"] - row["monte_carlo"]) ** 2 for row in rows])
    except (KeyError, TypeError):
        bad += 1
    if bad or not rows:
        what = "no states of these scores, or not all of them, can be read there"
        raise InputError(what, where=str(folder / STATES), way_out=AGAIN)
    return prompts, errors
