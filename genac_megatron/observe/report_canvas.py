"""What the report's plots share: colours, the axis of all steps, lines, PNG bytes."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from genac_megatron.observe.report_data import RunData

WIDTH = 4.6  # inches; its 9.5 pt text stays legible at the width of a phone
DPI = 170


@dataclass(frozen=True)
class Theme:
    """Colours of one page, told apart by people who see few."""

    card: str
    ink: str
    soft: str
    grid: str
    sft: str
    reinforce: str
    ppo: str
    value: str
    policy: str
    actor: str
    critic: str
    phases: Sequence[str]

    def of(self, name: str) -> str:
        """The colour of a kind of stage or of a role; that of secondary text for any other."""
        return str(getattr(self, name, self.soft))


LIGHT = Theme(
    card="#ffffff",
    ink="#1c2230",
    soft="#7b8494",
    grid="#e7eaf0",
    sft="#d97706",
    reinforce="#7c3aed",
    ppo="#2563eb",
    value="#b45309",
    policy="#0891b2",
    actor="#0f766e",
    critic="#be185d",
    phases=[
        "#2563eb",
        "#0f766e",
        "#d97706",
        "#7c3aed",
        "#be185d",
        "#65a30d",
        "#0891b2",
        "#b45309",
        "#475569",
        "#e11d48",
    ],
)
DARK = Theme(
    card="#171b23",
    ink="#e8ebf1",
    soft="#8b94a5",
    grid="#2b313d",
    sft="#fbbf24",
    reinforce="#a78bfa",
    ppo="#60a5fa",
    value="#fb923c",
    policy="#22d3ee",
    actor="#2dd4bf",
    critic="#f472b6",
    phases=[
        "#60a5fa",
        "#2dd4bf",
        "#fbbf24",
        "#a78bfa",
        "#f472b6",
        "#a3e635",
        "#22d3ee",
        "#fb923c",
        "#94a3b8",
        "#fb7185",
    ],
)

# draws onto the figure; False where the run has no data for it
Draw = Callable[[Figure, RunData, Theme], bool]


def style(theme: Theme) -> dict[str, object]:
    """matplotlib's settings for a theme."""
    return {
        "font.size": 9.5, "axes.titlesize": 9.5, "figure.facecolor": theme.card, "axes.facecolor": theme.card,
        "savefig.facecolor": theme.card, "text.color": theme.ink, "axes.labelcolor": theme.soft,
        "axes.titlecolor": theme.soft, "axes.edgecolor": theme.grid, "xtick.color": theme.soft,
        "ytick.color": theme.soft, "grid.color": theme.grid, "axes.grid": True, "axes.axisbelow": True,
        "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False, "lines.linewidth": 1.8,
        "legend.fontsize": 8.5, "xtick.major.size": 0, "ytick.major.size": 0,
    }  # fmt: skip


def png(draw: Draw, run: RunData, theme: Theme, height: float) -> bytes | None:
    """The plot as PNG bytes, `height` inches high; None where the run has no data for it."""
    return drawn_png(lambda figure: draw(figure, run, theme), theme, height)


def drawn_png(draw: Callable[[Figure], bool], theme: Theme, height: float) -> bytes | None:
    """What `draw` puts onto a figure; None where it says that it has no data."""
    with mpl.rc_context(style(theme)):
        figure = Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained")
        FigureCanvasAgg(figure)
        if not draw(figure):
            return None
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", metadata={"Software": None})
        return buffer.getvalue()


def bands(axes: Axes, run: RunData, theme: Theme, names: bool = True) -> None:
    """Stages as lightly tinted bands of the axis of all steps, named along the top, each equally wide.

    A stage of fifty dear steps is as much worth seeing as one of a thousand cheap ones.
    """
    spans = [span for span in run.spans if span.end > span.begin]
    edges = [spans[0].begin, *(span.end for span in spans)] if spans else [0, 1]
    places = np.linspace(0.0, 1.0, len(edges))
    if len(spans) > 1:
        axes.set_xscale(
            "function",
            functions=(lambda x: np.interp(x, edges, places), lambda y: np.interp(y, places, edges)),
        )
    for span in spans:
        axes.axvspan(span.begin, span.end, color=theme.of(span.kind), alpha=0.07, linewidth=0)
        if span.begin:
            axes.axvline(span.begin, color=theme.soft, alpha=0.35, linewidth=0.8)
        if names and 1.0 / len(spans) >= 0.015 * len(span.name):
            axes.annotate(
                span.name,
                (float(np.interp((span.begin + span.end) / 2, edges, places)), 1.0),
                xycoords="axes fraction",
                xytext=(0, 3),
                textcoords="offset points",
                ha="center",
                va="bottom",
                fontsize=8,
                color=theme.of(span.kind),
            )
    axes.set_xlim(edges[0], edges[-1])
    if len(spans) > 1:
        halves = [(a + b) // 2 for a, b in pairwise(edges)]
        axes.xaxis.set_major_locator(FixedLocator(sorted({*edges, *halves})))
        axes.xaxis.set_minor_locator(NullLocator())
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
    axes.set_xlabel("step, over all stages" + (" (stages drawn equally wide)" if len(spans) > 1 else ""))


def smooth(values: np.ndarray) -> np.ndarray:
    """Running mean over about a twentieth of the run, shorter at the ends."""
    half = len(values) // 40
    total = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    low, high = np.maximum(0, index - half), np.minimum(len(values), index + half + 1)
    return np.asarray((total[high] - total[low]) / (high - low))


def stage_lines(axes: Axes, run: RunData, key: str, colour: str, label: str | None, style: str = "-") -> bool:
    """A figure over all steps, each stage a line of its own: faint as logged, strong as running mean."""
    x, y = run.series(key)
    for span in run.spans:
        inside = (x > span.begin) & (x <= span.end)
        if not inside.any():
            continue
        if inside.sum() > 40:
            axes.plot(x[inside], y[inside], color=colour, alpha=0.25, linewidth=0.9)
        mark = "." if inside.sum() < 3 else ""
        axes.plot(x[inside], smooth(y[inside]), style, marker=mark, color=colour, label=label)
        label = None
    return bool(x.size)


def per_cent(axes: Axes) -> None:
    """Label the vertical axis, which holds shares, in per cent, and leave out what no share can be."""
    low, high = axes.get_ylim()
    low = max(low, 0.0)
    axes.set_ylim(low, min(high, 1.0 + 0.03 * (1.0 - low)))  # room for a mark at 100 %
    axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{100 * v:.3g} %"))


def legend(axes: Axes, **options: object) -> None:
    """A legend, where anything drawn has a label."""
    if axes.get_legend_handles_labels()[1]:
        axes.legend(**options)


def stacked(figure: Figure, count: int) -> list[Axes]:
    """`count` panels, one above the other, over one horizontal axis."""
    return list(np.atleast_1d(figure.subplots(count, 1, sharex=True)))
