"""A study's plots: accuracy against what was spent, and figures against an axis."""

from __future__ import annotations

import textwrap
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
from genac_megatron.studies.summary import Mean, best_cells, rows_of, with_areas

Record = dict[str, Any]
NAMES = {
    "steps": "steps of RL",
    "tokens": "tokens, critic's training included",
    "decoded": "decoded tokens, critic's training included",
    "flops": "FLOPs, critic's training included",
    "seconds": "seconds, evaluations and checkpoints left out",
}
MARKERS = "osD^vP*X<>"
DASHES = ("-", "--", ":")
FROM = 6  # a power of ten
FEW = 6  # lines whose spread is shaded: that of more would hide them


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
    if study.dots:
        made.append(folder / "figures.png")
        best = with_areas(best_cells(study, records))
        save(made[-1], 1.6 + 0.28 * len(best), partial(_dots, study, best, rows_of(study, records)))
    return made


def _look(number: int) -> dict[str, Any]:
    """Colour, dashes and marker of a line; no two of a plot's first thirty look the same."""
    colours = LIGHT.phases
    dashes = DASHES[number // len(colours) % len(DASHES)]
    return {"color": colours[number % len(colours)], "ls": dashes, "marker": MARKERS[number % len(MARKERS)]}


def _curves(study: Study, records: Sequence[Record], curve: Curve, figure: Figure) -> None:
    axes, cells = figure.subplots(), best_cells(study, records)
    for number, (label, members) in enumerate(cells.items()):
        with_curve = [
            record["curve"]
            for record in members
            if len(record["curve"]) > 1 and all(curve.x in point for point in record["curve"])
        ]
        if not with_curve:
            continue
        length = min(len(points) for points in with_curve)
        x = np.mean([[p[curve.x] for p in points[:length]] for points in with_curve], axis=0)
        y = np.array([[p["accuracy"] for p in points[:length]] for points in with_curve])
        fewer = f", {_seeds(len(y))}" if len(y) < len(study.seeds) else ""
        (line,) = axes.plot(x, y.mean(0), markersize=4, label=label + fewer, **_look(number))
        if len(cells) <= FEW:
            axes.fill_between(x, y.min(0), y.max(0), color=line.get_color(), alpha=0.12, linewidth=0)
    axes.set(xlabel=NAMES[curve.x], ylabel="held-out accuracy")
    _large(axes)
    shaded = ", least to most shaded" if len(cells) <= FEW else ""
    axes.set_title(f"mean over {_seeds(len(study.seeds))}{shaded}", loc="left", fontsize=9)
    _legend(axes)


def _large(axes: Axes) -> None:
    """Large numbers in units of a power of ten, which the label names: at the axis it would run into it."""
    power = 3 * int(np.log10(max(axes.get_xlim()[1], 1.0)) // 3)
    if power >= FROM:
        axes.xaxis.set_major_formatter(lambda x, _: f"{x / 10**power:g}")
        axes.set_xlabel(f"{axes.get_xlabel()} (1e{power})")


def _lines(study: Study, records: Sequence[Record], lines: Lines, figure: Figure) -> None:
    axes = figure.subplots()
    # cells beside the axes are in the table alone
    rows = [row for row in rows_of(study, records) if {lines.x, lines.lines} <= row["options"].keys()]
    options = list(dict.fromkeys(row["options"][lines.x] for row in rows))
    labels = list(dict.fromkeys(row["options"][lines.lines] for row in rows))
    for number, label in enumerate(labels):
        found: list[tuple[int, Mean]] = [
            (options.index(row["options"][lines.x]), row[lines.figure])
            for row in rows
            if row["options"][lines.lines] == label and lines.figure in row
        ]
        if not found:
            continue
        x = np.array([place for place, _ in found]) + 0.04 * (number - (len(labels) - 1) / 2)
        y, half = ([getattr(m, name) for _, m in found] for name in ("value", "half"))
        axes.errorbar(
            x, y, yerr=np.nan_to_num(half), markersize=5, capsize=3, label=str(label), **_look(number)
        )  # fmt: skip
    axes.set_xticks(range(len(options)), [str(option) for option in options])
    axes.set(xlabel=lines.x, ylabel=lines.figure)
    axes.set_title(f"mean over {_seeds(len(study.seeds))}, 95 % intervals", loc="left", fontsize=9)
    _legend(axes)


def _dots(study: Study, best: dict[str, list[Record]], rows: Sequence[Record], figure: Figure) -> None:
    """Every seed as a dot, their mean with its interval; the reference's mean as a line."""
    panels = figure.subplots(1, len(study.dots), sharey=True, squeeze=False)[0]
    for axes, name in zip(panels, study.dots, strict=True):
        for place, (row, members) in enumerate(zip(rows, best.values(), strict=True)):
            seeds = [record["figures"][name] for record in members if name in record["figures"]]
            axes.plot(seeds, [place + 0.18] * len(seeds), ".", color=LIGHT.soft, markersize=4)
            if not seeds:
                continue
            found, colour = row[name], LIGHT.phases[0]
            half = np.nan_to_num(found.half)
            axes.errorbar(found.value, place, xerr=half, fmt="o", color=colour, markersize=5, capsize=3)
            if row["label"] == study.reference:
                axes.axvline(found.value, color=LIGHT.soft, linewidth=0.8, linestyle=":")
        words = name.replace("/", ": ").replace("_", " ")
        axes.set_title("\n".join(textwrap.wrap(words, 60 // len(study.dots))), loc="left", fontsize=8)
    panels[0].set_yticks(range(len(rows)), [row["label"] for row in rows])
    panels[0].invert_yaxis()
    figure.supxlabel(f"{_seeds(len(study.seeds))}, their mean and its 95 % interval", fontsize=8)


def _seeds(count: int) -> str:
    return f"{count} seed{'' if count == 1 else 's'}"


def _legend(axes: Axes) -> None:
    count = len(axes.get_legend_handles_labels()[0])
    if count > FEW:  # beside the plot
        axes.legend(frameon=False, fontsize=8, handlelength=4, loc="center left", bbox_to_anchor=(1.0, 0.5))
    elif count:
        axes.legend(frameon=False, fontsize=8)
