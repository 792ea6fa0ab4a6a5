"""Plots of several runs in one, with intervals: figures of all, and differences to the first."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from genac_megatron.evaluation.intervals import Estimate
from genac_megatron.observe.report_canvas import Theme, drawn_png, legend, per_cent, smooth, stacked
from genac_megatron.observe.report_data import RunData, number
from genac_megatron.watch.compare import (
    LEAST,
    Comparison,
    Sums,
    accuracy_rows,
    brier_rows,
    by_step,
    over_steps,
    place,
    shared_places,
)

WINDOWS = 24  # of a curve of differences

Draw = Callable[[Figure, Comparison, Theme], bool]


def draw(made: Comparison, id_: str, theme: Theme) -> bytes | None:
    """A plot as PNG; None where the runs have no data for it. Raises KeyError for one that there is not."""
    height, how = {name: (height, how) for name, _, _, height, how in PLOTS}[id_]
    return drawn_png(lambda figure: how(figure, made, theme), theme, height)


def _colour(theme: Theme, index: int) -> str:
    return theme.phases[index % len(theme.phases)]


def _steps(axes: Axes) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
    axes.set_xlabel("step, over all stages of each run")


def _evaluated(
    figure: Figure, made: Comparison, theme: Theme, rows: Callable[..., Sums], *, share: bool
) -> bool:
    """A held-out figure with its interval; below, the differences to the first in what all have evaluated."""
    by_run = [{place(e): rows(e) for e in run.evaluations if rows(e)} for run in made.runs]
    if not any(by_run):
        return False
    shared = shared_places(by_run) if made.same_prompts else []
    panels = stacked(figure, 2 if shared else 1)
    for index, (name, run, places) in enumerate(zip(made.names, made.runs, by_run, strict=True)):
        if not places:
            continue
        estimates = [made.over_prompts(sums, list(sums)) for sums in places.values()]
        _band(panels[0], _positions(run, list(places)), estimates, _colour(theme, index), name)
    if share:
        per_cent(panels[0])
    legend(panels[0])
    for index in range(1, len(made.runs)) if shared and by_run[0] else ():
        if not by_run[index]:
            continue
        less = []
        for at in shared:
            one, other = by_run[0][at], by_run[index][at]
            prompts = [p for p in one if p in other]
            less.append(made.over_prompts(other, prompts).minus(made.over_prompts(one, prompts)))
        _band(panels[1], _positions(made.runs[0], shared), less, _colour(theme, index), None)
    if shared:
        panels[1].axhline(0.0, color=theme.soft, linestyle=":", linewidth=1.2)
        panels[1].set_ylabel(f"less {made.names[0]}"[:40])
    _steps(panels[-1])
    return True


def _positions(run: RunData, places: Sequence[tuple[str, str, float]]) -> list[float]:
    return [run.position({"stage": stage, "step": step}) for stage, _, step in places]


def _band(
    axes: Axes, x: Sequence[float], estimates: Sequence[Estimate], colour: str, label: str | None
) -> None:
    value, low, high = (np.array([getattr(e, part) for e in estimates]) for part in ("value", "low", "high"))
    axes.fill_between(x, low, high, color=colour, alpha=0.14, linewidth=0)
    axes.vlines(x, low, high, color=colour, alpha=0.5, linewidth=1)
    axes.plot(x, value, color=colour, marker="o", markersize=3.5, label=label)


def accuracy(figure: Figure, made: Comparison, theme: Theme) -> bool:
    return _evaluated(figure, made, theme, accuracy_rows, share=True)


def brier(figure: Figure, made: Comparison, theme: Theme) -> bool:
    return _evaluated(figure, made, theme, brier_rows, share=False)


def _logged(figure: Figure, made: Comparison, theme: Theme, key: str, *, share: bool = False) -> bool:
    """A figure of each step: running means of all runs; below, the differences to the first."""
    series = [run.series(key) for run in made.runs]
    if not any(x.size for x, _ in series):
        return False
    found = [by_step(run, key) for run in made.runs]
    common = [[at for at in found[0] if at in other] for other in found[1:]]
    apart = any(len(shared) >= LEAST for shared in common)
    panels = stacked(figure, 2 if apart else 1)
    for index, (name, (x, y)) in enumerate(zip(made.names, series, strict=True)):
        if x.size:
            if x.size > 40:
                panels[0].plot(x, y, color=_colour(theme, index), alpha=0.2, linewidth=0.8)
            panels[0].plot(x, smooth(y), color=_colour(theme, index), label=name)
    if share:
        per_cent(panels[0])
    legend(panels[0])
    for index, shared in enumerate(common, start=1):
        if len(shared) >= LEAST:
            less = np.array([found[index][at] - found[0][at] for at in shared])
            places = [made.runs[0].position({"stage": stage, "step": step}) for stage, step in shared]
            _difference(panels[1], np.array(places), less, _colour(theme, index))
    if apart:
        panels[1].axhline(0.0, color=theme.soft, linestyle=":", linewidth=1.2)
        panels[1].set_ylabel(f"less {made.names[0]}"[:40])
    _steps(panels[-1])
    return True


def _difference(axes: Axes, x: np.ndarray, less: np.ndarray, colour: str) -> None:
    """Running means of paired differences with 95 % intervals. Windows are equally wide, also at the ends."""
    width = max(LEAST, len(less) // 5)
    centres = np.unique(np.linspace(0, len(less) - 1, WINDOWS).astype(int))
    begins = np.clip(centres - width // 2, 0, len(less) - width)
    means = [over_steps(less[begin : begin + width]) for begin in begins]
    at = x[centres]
    low, high, value = (np.array([getattr(m, part) for m in means]) for part in ("low", "high", "value"))
    axes.fill_between(at, low, high, color=colour, alpha=0.16, linewidth=0)
    axes.plot(at, value, color=colour)


def reward(figure: Figure, made: Comparison, theme: Theme) -> bool:
    return _logged(figure, made, theme, "rollout/outcome_mean", share=True)


def response_lengths(figure: Figure, made: Comparison, theme: Theme) -> bool:
    return _logged(figure, made, theme, "rollout/length_mean")


def parsing(figure: Figure, made: Comparison, theme: Theme) -> bool:
    return _logged(figure, made, theme, "judge/parse_rate", share=True)


def entropies(figure: Figure, made: Comparison, theme: Theme) -> bool:
    return _logged(figure, made, theme, "actor/entropy")


def mismatch(figure: Figure, made: Comparison, theme: Theme) -> bool:
    return _logged(figure, made, theme, "parity/actor_p99")


def seconds(figure: Figure, made: Comparison, theme: Theme) -> bool:
    """Of each run in all, by what it spent them on together."""
    totals = [float(np.nansum([number(row.get("time/total_s")) for row in run.metrics])) for run in made.runs]
    if not any(totals):
        return False
    figure.set_figheight(1.1 + 0.36 * len(totals))
    axes = figure.subplots()
    colours = [_colour(theme, index) for index in range(len(totals))]
    axes.barh(range(len(totals)), totals, 0.6, color=colours)
    axes.set_yticks(range(len(totals)), made.names)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("seconds in all")
    return True


BAND = "Bands: 95 % intervals"
BY_PROMPT = f"{BAND}, prompts resampled. Below: paired by prompt."
BY_STEP = f"Running means. Below: paired by step. {BAND}, by blocks of steps."
PLOTS: tuple[tuple[str, str, str, float, Draw], ...] = (
    ("accuracy", "Held-out accuracy", BY_PROMPT, 4.4, accuracy),
    ("reward", "Training reward", BY_STEP, 4.4, reward),
    ("brier", "Critic: Brier score, held out", BY_PROMPT, 4.4, brier),
    ("parsing", "Critic: judgements that parse", BY_STEP, 4.4, parsing),
    ("lengths", "Response length", BY_STEP, 4.4, response_lengths),
    ("entropy", "Actor: entropy, nats", BY_STEP, 4.4, entropies),
    ("mismatch", "Trainer against engine: p99", BY_STEP, 4.4, mismatch),
    ("seconds", "Time in all", "", 2.0, seconds),
)
