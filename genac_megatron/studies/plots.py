"""A study's plots: accuracy against what was spent, and figures against an axis."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from genac_megatron.evaluation.plots import save
from genac_megatron.observe.report_canvas import LIGHT
from genac_megatron.studies.schema import Curve, Lines, Study
from genac_megatron.studies.summary import Mean, best_cells, rows_of

Record = dict[str, Any]
NAMES = {
    "steps": "steps of RL",
    "tokens": "tokens, critic's training included",
    "flops": "FLOPs, critic's training included",
    "seconds": "seconds, evaluations and checkpoints left out",
}
MARKERS = "osD^vP*X<>"


def draw_all(study: Study, records: Sequence[Record], folder: Path) -> list[Path]:
    """Every plot of the study, as PNG files."""
    made = []
    for curve in study.curves:
        path = folder / f"accuracy-{curve.x}.png"
        save(path, 4.2, partial(_curves, study, records, curve))
        made.append(path)
    for lines in study.lines:
        path = folder / f"{lines.figure.replace('/', '-')}-{lines.x}.png"
        save(path, 4.0, partial(_lines, study, records, lines))
        made.append(path)
    return made


def _colour(number: int) -> str:
    return LIGHT.phases[number % len(LIGHT.phases)]


def _curves(study: Study, records: Sequence[Record], curve: Curve, figure: Figure) -> None:
    axes = figure.subplots()
    for number, (label, members) in enumerate(best_cells(study, records).items()):
        with_curve = [record["curve"] for record in members if len(record["curve"]) > 1]
        if not with_curve:
            continue
        length = min(len(points) for points in with_curve)
        x = np.mean([[p[curve.x] for p in points[:length]] for points in with_curve], axis=0)
        y = np.array([[p["accuracy"] for p in points[:length]] for points in with_curve])
        colour = _colour(number)
        axes.plot(
            x, y.mean(0), marker=MARKERS[number % len(MARKERS)], markersize=4, color=colour, label=label
        )
        axes.fill_between(x, y.min(0), y.max(0), color=colour, alpha=0.12, linewidth=0)
    axes.set(xlabel=NAMES[curve.x], ylabel="held-out accuracy")
    axes.set_title(f"mean over {len(study.seeds)} seeds, least to most shaded", loc="left", fontsize=9)
    _legend(axes)


def _lines(study: Study, records: Sequence[Record], lines: Lines, figure: Figure) -> None:
    axes = figure.subplots()
    rows = rows_of(study, records)
    options = list(dict.fromkeys(row["options"].get(lines.x) for row in rows))
    labels = list(dict.fromkeys(row["options"].get(lines.lines) for row in rows))
    for number, label in enumerate(labels):
        found: list[tuple[int, Mean]] = [
            (options.index(row["options"][lines.x]), row[lines.figure])
            for row in rows
            if row["options"].get(lines.lines) == label and lines.figure in row
        ]
        if not found:
            continue
        x = np.array([place for place, _ in found]) + 0.04 * (number - (len(labels) - 1) / 2)
        y, half = ([getattr(m, name) for _, m in found] for name in ("value", "half"))
        axes.errorbar(
            x, y, yerr=np.nan_to_num(half), marker=MARKERS[number % len(MARKERS)], markersize=5,
            color=_colour(number), capsize=3, label=str(label),
        )  # fmt: skip
    axes.set_xticks(range(len(options)), [str(option) for option in options])
    axes.set(xlabel=lines.x, ylabel=lines.figure)
    axes.set_title(f"mean over {len(study.seeds)} seeds, 95 % intervals", loc="left", fontsize=9)
    _legend(axes)


def _legend(axes: Axes) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8)
