"""Plots of scores: a critic's reliability and values against Monte Carlo, and critics side by side."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from genac_megatron import metrics
from genac_megatron.evaluation.figures import Scored
from genac_megatron.observe.report_canvas import DPI, LIGHT, WIDTH, style

COMPARED = (
    ("mse", "MSE to Monte-Carlo values", None),
    ("ranking_between_clear", "Clear pairs of different prompts in order", 0.5),
    ("ranking_prompt_clear", "Clear pairs of one prompt's responses in order", 0.5),
    ("ranking_response_clear", "Clear pairs of one response's states in order", 0.5),
)


def save(path: Path, height: float, draw: Callable[[Figure], None], width: float = WIDTH) -> None:
    """Draw onto a figure of `width` x `height` inches and write it as PNG."""
    with mpl.rc_context(style(LIGHT)):
        figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
        FigureCanvasAgg(figure)
        draw(figure)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", metadata={"Software": None})
    path.write_bytes(buffer.getvalue())


def reliability(found: Scored) -> Callable[[Figure], None]:
    """Mean Monte-Carlo value by the critic's value, and how often it gives each."""
    bins = metrics.reliability(np.clip(found.used, 0, 1), found.p)

    def draw(figure: Figure) -> None:
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
        full = bins.count > 0
        upper.plot([0, 1], [0, 1], color=LIGHT.soft, linewidth=1, linestyle="--")
        upper.plot(bins.value[full], bins.outcome[full], marker="o", markersize=5, color=LIGHT.critic)
        upper.set(ylabel="Monte-Carlo value", xlim=(-0.05, 1.05), ylim=(-0.05, 1.05))
        upper.set_title(f"calibration error (ECE) {bins.ece:.3f}", loc="left")
        centres = (bins.edges[:-1] + bins.edges[1:]) / 2
        lower.bar(centres, bins.count, width=0.08, color=LIGHT.critic, alpha=0.5)
        lower.set(xlabel="critic's value", ylabel="states")

    return draw


def values(found: Scored) -> Callable[[Figure], None]:
    """Each state: the critic's value against its Monte-Carlo value, by kind of response."""
    rng = np.random.default_rng(0)
    kinds = ((1, "of wrong responses", LIGHT.sft), (0, "of right responses", LIGHT.ppo),
             (-1, "prompt states", LIGHT.ink))  # fmt: skip

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        axes.plot([0, 1], [0, 1], color=LIGHT.soft, linewidth=1, linestyle="--")
        for kind, label, colour in kinds:
            rows = found.response == kind
            apart = rng.uniform(-0.025, 0.025, rows.sum())  # values are tenths: points would hide each other
            axes.plot(found.p[rows], found.used[rows] + apart, ".", color=colour, alpha=0.45, label=label)
        axes.set(xlabel="Monte-Carlo value", ylabel="critic's value", xlim=(-0.05, 1.05), ylim=(-0.06, 1.06))
        axes.legend(
            loc="upper center", bbox_to_anchor=(0.5, 1.14), ncols=3, columnspacing=1, handletextpad=0.2
        )

    return draw


def comparison(names: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> Callable[[Figure], None]:
    """Critics side by side: a panel per figure, with intervals."""

    def draw(figure: Figure) -> None:
        panels = figure.subplots(len(COMPARED), 1)
        places = np.arange(len(names))[::-1]
        for axes, (key, title, line) in zip(panels, COMPARED, strict=True):
            for place, row, colour in zip(places, rows, _colours(len(names)), strict=True):
                value, low, high = (_number(row[key][part]) for part in ("value", "low", "high"))
                axes.plot([low, high], [place, place], color=colour)
                axes.plot([value], [place], "o", color=colour, markersize=5)
            if line is not None:
                axes.axvline(line, color=LIGHT.soft, linewidth=1, linestyle="--")
            axes.set_yticks(places, names)
            axes.set_ylim(-0.6, len(names) - 0.4)
            axes.set_title(title, loc="left")

    return draw


def _colours(count: int) -> list[str]:
    return [LIGHT.phases[n % len(LIGHT.phases)] for n in range(count)]


def _number(value: float | None) -> float:
    return float("nan") if value is None else float(value)
