"""`genac compare RUN RUN ...`: runs beside each other, with intervals of their differences. No torch.

What is measured on held-out prompts is paired by prompt, which are resampled; what is logged each step is
paired by step, with Student's intervals of the means of blocks of steps, as neighbours are alike. The first
run is the one that others are compared with.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from genac_megatron.evaluation.gradient_figures import student
from genac_megatron.evaluation.intervals import Estimate, Resampled, plain
from genac_megatron.evaluation.tables import table
from genac_megatron.observe.report_data import Row, RunData, groups, number, phase_totals

if TYPE_CHECKING:
    import pandas as pd

DRAWS = 1000
LEAST = 20  # steps with an interval
BLOCKS = 5  # of them at least: of fewer means nobody can tell how they spread
PER_STEP = (
    ("rollout/outcome_mean", "training reward", 3),
    ("rollout/length_mean", "tokens per response", 1),
    ("rollout/truncated", "share cut off", 3),
    ("judge/brier", "critic's Brier score in training", 4),
    ("judge/parse_rate", "judgements that parse", 3),
    ("actor/entropy", "actor's entropy, nats", 3),
    ("actor/grad_norm", "actor's gradient norm", 3),
    ("critic/loss", "critic's loss", 4),
    ("parity/actor_p99", "trainer against engine, p99", None),
    ("time/total_s", "seconds a step", 2),
)
Place = tuple[str, str, float]  # of an evaluation: stage, name, step
Sums = dict[str, tuple[float, float]]  # by prompt: a figure's sum and how many it is of


@dataclass(frozen=True)
class Line:
    """One figure of every run: each one's own, and the differences to the first, where these are paired."""

    key: str
    title: str
    digits: int | None  # after the point; None: three in all
    values: list[Estimate | None]
    less: list[Estimate | None]  # of the runs after the first
    of: str  # what it is measured on


@dataclass
class Comparison:
    """Runs beside each other."""

    names: list[str]
    runs: list[RunData]
    draws: int = DRAWS
    notes: list[str] = field(default_factory=list)  # what a reader must know of the differences

    def __post_init__(self) -> None:
        tasks = [run.recipe.get("task") for run in self.runs]
        seeds = [run.recipe.get("seed") for run in self.runs]
        self.same_prompts = all(task == tasks[0] for task in tasks) and all(s == seeds[0] for s in seeds)
        if not self.same_prompts:
            self.notes.append(
                "Not of one task and seed, so not on the same held-out prompts, which are not paired."
            )
        if all(seed == seeds[0] for seed in seeds) and len(self.runs) > 1:
            self.notes.append(
                "One run each: the intervals are of prompts and steps. Runs of one recipe differ by their "
                "seeds too (genac study)."
            )

    @cached_property
    def lines(self) -> list[Line]:
        """All figures that any of the runs has."""
        made = [*self._heldout(), *self._logged(), *self._totals()]
        return [line for line in made if any(value is not None for value in line.values)]

    # --- held out --------------------------------------------------------------------------------

    def _heldout(self) -> list[Line]:
        found = []
        for role, title, rows, digits in (
            ("actor", "held-out accuracy", accuracy_rows, 3),
            ("critic", "critic's Brier score, held out", brier_rows, 4),
        ):
            by_run = [{place(e): rows(e) for e in run.evaluations if rows(e)} for run in self.runs]
            last = [list(places)[-1] if places else None for places in by_run]
            tables = [places[at] if at is not None else None for places, at in zip(by_run, last, strict=True)]
            where = [told(at) for at in last if at is not None]
            of = where[0] if where and len(set(where)) == 1 else "each one's last"
            key = "accuracy" if role == "actor" else "brier"
            found.append(self._by_prompt(f"heldout/{key}", f"{title}, at the end", digits, tables, of))
            shared = shared_places(by_run)
            if len(shared) > 1 and self.same_prompts:
                means = [sum_over(places, shared) for places in by_run]
                words = f"{len(shared)} evaluations"
                found.append(
                    self._by_prompt(f"heldout/{key}_mean", f"{title}, all through", digits, means, words)
                )
        return found

    def _by_prompt(self, key: str, title: str, digits: int, tables: Sequence[Sums | None], of: str) -> Line:
        """tables: per run, its figure by prompt."""
        values = [None if t is None else self.over_prompts(t, list(t)) for t in tables]
        less = [self._paired(tables[0], other) for other in tables[1:]]
        return Line(key, title, digits, list(values), less, of)

    def _paired(self, one: Sums | None, other: Sums | None) -> Estimate | None:
        if one is None or other is None or not self.same_prompts:
            return None
        shared = [prompt for prompt in one if prompt in other]
        return self.over_prompts(other, shared).minus(self.over_prompts(one, shared)) if shared else None

    def over_prompts(self, sums: Sums, prompts: Sequence[str]) -> Estimate:
        """The figure over these prompts, which are resampled: alike for every run."""
        above, below = (np.array([sums[p][part] for p in prompts]) for part in (0, 1))
        return Resampled(range(len(prompts)), self.draws).ratio(above, below)

    # --- each step -------------------------------------------------------------------------------

    def _logged(self) -> list[Line]:
        return [self._by_step(key, title, digits) for key, title, digits in PER_STEP]

    def _by_step(self, key: str, title: str, digits: int | None) -> Line:
        """Of the last stage that all runs have it in that have it at all, over its steps in common."""
        found = [by_step(run, key) for run in self.runs]
        present = [steps for steps in found if steps]
        shared = [at for at in present[0] if all(at in steps for steps in present)] if present else []
        if len(present) > 1 and not shared:
            means = [exact(float(np.mean(list(steps.values())))) if steps else None for steps in found]
            return Line(key, title, digits, means, [None] * (len(found) - 1), "no step in common")
        stage = shared[-1][0] if shared else ""
        places = [at for at in shared if at[0] == stage]
        values = [exact(float(np.mean([steps[at] for at in places]))) if steps else None for steps in found]
        less = [
            over_steps([other[at] - found[0][at] for at in places]) if other and found[0] else None
            for other in found[1:]
        ]
        few = "" if len(places) >= LEAST or not any(less) else ", too few for an interval"
        return Line(key, title, digits, values, less, f"{stage}, {len(places)} steps{few}")

    # --- what it took ----------------------------------------------------------------------------

    def _totals(self) -> list[Line]:
        seconds = [float(np.sum(run.series("time/total_s")[1])) for run in self.runs]
        tokens = [sum(phase_totals(run.metrics, "tokens/").values()) for run in self.runs]
        return [
            Line(key, title, 0, [exact(x) if x else None for x in totals],
                 [exact(x - totals[0]) if x and totals[0] else None for x in totals[1:]], "the whole run")
            for key, title, totals in (("total/time_s", "seconds in all", seconds),
                                       ("total/tokens", "tokens in all", tokens))
        ]  # fmt: skip

    # --- shown -----------------------------------------------------------------------------------

    def head(self) -> list[str]:
        """Of the table."""
        return ["", *self.names, *(f"{name} less {self.names[0]}" for name in self.names[1:])]

    def rows(self) -> list[list[str]]:
        """Of the table, as text."""
        return [
            [f"{line.title} ({line.of})", *(shown(one, line.digits) for one in (*line.values, *line.less))]
            for line in self.lines
        ]

    def text(self) -> str:
        """For a terminal."""
        notes = "".join(f"\n{note}" for note in self.notes)
        return table(self.head(), self.rows()) + (f"\n{notes}" if notes else "")

    def html(self) -> str:
        """The table for a page. Differences that zero is outside of are marked."""
        head = "".join(f"<th>{escape(cell)}</th>" for cell in self.head())
        body = ""
        for line, row in zip(self.lines, self.rows(), strict=True):
            sure = [False] * (1 + len(line.values)) + [
                one is not None and told_apart(one) for one in line.less
            ]
            cells = map(_cell, row, sure)
            body += f"<tr>{''.join(cells)}</tr>"
        shown = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
        return f"<div class='scroll figures'>{shown}</div>"

    def frame(self) -> pd.DataFrame:
        """A row per figure and run: its value and interval, and the difference to the first run's."""
        import pandas as pd  # half a second

        rows = []
        for line in self.lines:
            for name, value, less in zip(self.names, line.values, [None, *line.less], strict=True):
                row = {"figure": line.key, "of": line.of, "run": name, **(estimate_data(value) or {})}
                differs = estimate_data(less) or {}
                rows.append(row | {"less": differs.get("value"), "less_low": differs.get("low"),
                                   "less_high": differs.get("high")})  # fmt: skip
        return pd.DataFrame(rows)

    def write(self, folder: str | Path) -> Path:
        """Write index.html, compare.json and plots/*.png; the page. Raises InputError where it cannot be."""
        from genac_megatron.watch.compared import write_comparison

        return write_comparison(self, Path(folder))

    def data(self) -> dict[str, Any]:
        """All of it as plain data: each figure's `runs` and `less_the_first` by the runs' names."""
        figures = [
            {
                "key": line.key,
                "title": line.title,
                "of": line.of,
                "runs": {name: estimate_data(v) for name, v in zip(self.names, line.values, strict=True)},
                "less_the_first": {
                    name: estimate_data(v) for name, v in zip(self.names[1:], line.less, strict=True)
                },
            }
            for line in self.lines
        ]
        return {"runs": self.names, "notes": self.notes, "figures": figures}


def _cell(text: str, sure: bool) -> str:
    """Of the page's table: a figure, its interval below it."""
    figure, bracket, interval = text.partition(" [")
    inner = f"<b>{escape(figure)}</b>" if sure else escape(figure)
    return f"<td>{inner}{f'<br><span class=soft>[{escape(interval)}</span>' if bracket else ''}</td>"


def place(row: Row) -> Place:
    """Where an evaluation stands in its run."""
    return str(row.get("stage")), str(row.get("name")), number(row.get("step"))


def told(at: Place) -> str:
    """An evaluation's place in words."""
    return f"{at[0]}, {at[1]}"


def accuracy_rows(row: Row) -> Sums:
    """An evaluation's outcomes by prompt; {} where none is kept."""
    outcomes = groups((row.get("actor") or {}).get("outcomes"))
    return {prompt: (float(np.sum(x)), float(len(x))) for prompt, x in outcomes.items()}


def brier_rows(row: Row) -> Sums:
    """The critic's squared errors by prompt; {} where none is kept."""
    critic = row.get("critic") or {}
    found: Sums = {}
    for error, prompt in zip(critic.get("errors") or [], critic.get("prompts") or [], strict=False):
        if not math.isnan(number(error)):
            above, below = found.get(str(prompt), (0.0, 0.0))
            found[str(prompt)] = above + number(error), below + 1.0
    return found


def shared_places(by_run: Sequence[Mapping[Place, Any]]) -> list[Place]:
    """Evaluations that all runs have that have any."""
    present = [places for places in by_run if places]
    return [at for at in present[0] if all(at in places for places in present)] if len(present) > 1 else []


def sum_over(places: Mapping[Place, Sums], shared: Sequence[Place]) -> Sums | None:
    """The figure over several evaluations, of prompts that are in all of them."""
    if not places:
        return None
    prompts = [p for p in places[shared[0]] if all(p in places[at] for at in shared)]
    kept = {p: [places[at][p] for at in shared] for p in prompts}
    return {p: (sum(a for a, _ in x), sum(b for _, b in x)) for p, x in kept.items()} or None


def by_step(run: RunData, key: str) -> dict[tuple[str, int], float]:
    """A figure by stage and step; a stage's rows outside of steps are left out."""
    found: dict[tuple[str, int], float] = {}
    for row in run.metrics:
        step, value = number(row.get("step")), number(row.get(key))
        at = str(row.get("stage")), int(step) if step == step else 0
        if at[1] > 0 and not math.isnan(value):
            found.setdefault(at, value)  # what follows a stage's last step is no step
    return found


def over_steps(figures: Sequence[float] | np.ndarray) -> Estimate:
    """The mean over steps in a row, with Student's 95 % interval of the means of blocks of about twice the
    square root of their number: what is alike among neighbours falls inside of them (Künsch 1989). Without
    one of fewer than LEAST steps.
    """
    values, count = np.asarray(figures, dtype=np.float64), len(figures)
    if count < LEAST:
        return exact(float(values.mean()))
    blocks = max(BLOCKS, math.ceil(math.sqrt(count) / 2))
    means = np.array([block.mean() for block in np.array_split(values, blocks)])
    value, half = float(values.mean()), 1.96 * student(blocks) * float(means.std()) / math.sqrt(blocks)
    return Estimate(value, value - half, value + half, np.array([]))


def exact(value: float) -> Estimate:
    """A figure without a spread."""
    return Estimate(value, math.nan, math.nan, np.array([]))


def told_apart(one: Estimate) -> bool:
    """Whether an interval leaves zero out."""
    return one.low > 0 or one.high < 0


def shown(one: Estimate | None, digits: int | None) -> str:
    """A figure with its interval as text. digits: after the point; None: three in all."""
    if one is None or math.isnan(one.value):
        return "–"
    figure, low, high = (_plain_number(x, digits) for x in (one.value, one.low, one.high))
    return figure if math.isnan(one.low) else f"{figure} [{low}, {high}]"


def _plain_number(value: float, digits: int | None) -> str:
    """As text, without a sign where it is 0."""
    text = f"{value:.3g}" if digits is None else f"{value:,.{digits}f}"
    return text.lstrip("-") if text.strip("-0.") == "" else text


def estimate_data(one: Estimate | None) -> dict[str, float] | None:
    """As plain data."""
    return None if one is None else plain(one)
