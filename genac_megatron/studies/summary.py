"""Records to a table: the best of each label, means over seeds with intervals, differences seed by seed."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from genac_megatron.evaluation.tables import table
from genac_megatron.studies.schema import Study

Record = dict[str, Any]
# Student's t, two-sided 95 %, by degrees of freedom.
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
BESIDE = {  # shown beside a figure: with each prefix of a step's prompts counted once (cost.py)
    "cost/flops": ("cost/flops_shared",),
    "step/flops": ("step/flops_shared",),
}
ALWAYS = ("actor/start", "actor/end", "actor/gain", "critic/brier", "critic/mse", "critic/auc")


@dataclass(frozen=True)
class Mean:
    """Of a figure over seeds, with Student's 95 % interval; NaN bounds for a single seed."""

    value: float
    half: float
    count: int

    def __str__(self) -> str:
        if not self.count:
            return "–"
        digits = 3 if abs(self.value) < 100 else 0
        spread = "" if math.isnan(self.half) else f" ± {self.half:.{digits}f}"
        return f"{self.value:.{digits}f}{spread}"


def mean(values: Sequence[float]) -> Mean:
    """Of finite figures, one per seed."""
    known = np.array([value for value in values if math.isfinite(value)])
    if not known.size:
        return Mean(math.nan, math.nan, 0)
    if known.size == 1:
        return Mean(float(known[0]), math.nan, 1)
    t = T95[min(known.size - 2, len(T95) - 1)]
    return Mean(float(known.mean()), float(t * known.std(ddof=1) / math.sqrt(known.size)), int(known.size))


def best_cells(study: Study, records: Sequence[Record]) -> dict[str, list[Record]]:
    """By label, the records of its cell whose `best` figure has the least mean, or of its only one.

    Where the study has seeds for its sweeps and a label has records of them, only they say which is best.
    """
    by_label: dict[str, dict[str, list[Record]]] = {}
    for record in records:
        by_label.setdefault(record["label"], {}).setdefault(record["cell"], []).append(record)

    def best(cells: dict[str, list[Record]]) -> list[Record]:
        seeds = {record["seed"] for members in cells.values() for record in members}
        seeds = (seeds & {*study.sweep_seeds}) or seeds

        def rank(members: list[Record]) -> float:
            value = mean(
                [r["figures"].get(study.best, math.nan) for r in members if r["seed"] in seeds]
            ).value
            return value if math.isfinite(value) else math.inf

        return min(cells.values(), key=rank)

    return {label: best(cells) for label, cells in by_label.items()}


def at_equal_cost(records: Sequence[Record], key: str = "flops") -> dict[tuple[str, int], float]:
    """Accuracy of each run (cell, seed) when it had spent what the cheapest run of its seed spends in all.

    Between two evaluations it is their line. NaN where a run's first evaluation comes later than that.
    """
    found: dict[tuple[str, int], float] = {}
    for seed in {record["seed"] for record in records}:
        mine = [
            record
            for record in records
            if record["seed"] == seed and len(record["curve"]) > 1 and _says(record["curve"], key)
        ]
        if not mine:
            continue
        least = min(record["curve"][-1][key] for record in mine)
        for record in mine:
            x = [point[key] for point in record["curve"]]
            y = [point["accuracy"] for point in record["curve"]]
            found[record["cell"], seed] = float(np.interp(least, x, y)) if x[0] <= least else math.nan
    return found


def area(points: Sequence[dict[str, float]], key: str = "steps", until: float | None = None) -> float:
    """The mean accuracy of a curve from 0 to `until` (None: its end) of `key`, straight between evaluations.

    Before the first it is the first's: a critic's pre-training leaves the actor as it is. NaN for a single
    evaluation, one that has no `key`, or a curve that ends before `until`.
    """
    if len(points) < 2 or not _says(points, key):
        return math.nan
    x = np.array([0.0, *(point[key] for point in points)])
    y = np.array([points[0]["accuracy"], *(point["accuracy"] for point in points)])
    end = float(x[-1] if until is None else until)
    if not 0.0 < end <= x[-1]:
        return math.nan
    inside = x < end
    x, y = np.append(x[inside], end), np.append(y[inside], np.interp(end, x, y))
    return float(np.trapezoid(y, x) / end)


def areas(records: Sequence[Record]) -> dict[tuple[str, int], dict[str, float]]:
    """By cell and seed, the area under held-out accuracy: of all steps, and at equal cost.

    actor/area, actor/area_KEY (up to what the cheapest run of the seed spends in all, pre-training of critics
    included) and actor/area_KEY_alone (without it), for KEY in decoded (tokens) and flops.
    """
    found: dict[tuple[str, int], dict[str, float]] = {}
    for seed in {record["seed"] for record in records}:
        mine = [record for record in records if record["seed"] == seed and len(record["curve"]) > 1]
        for record in mine:
            found[record["cell"], seed] = {"actor/area": area(record["curve"])}
        for key, alone in itertools.product(("decoded", "flops"), (False, True)):
            curves = [_from_first(record["curve"], key) if alone else record["curve"] for record in mine]
            # Those that do not say what they spent are no measure, wherever they stand.
            least = min((curve[-1][key] for curve in curves if _says(curve, key)), default=math.nan)
            for record, curve in zip(mine, curves, strict=True):
                name = f"actor/area_{key}{'_alone' if alone else ''}"
                found[record["cell"], seed][name] = area(curve, key, least)
    return found


def _says(points: Sequence[dict[str, float]], key: str) -> bool:
    """Whether a curve has finite figures of `key` everywhere."""
    return all(math.isfinite(point.get(key, math.nan)) for point in points)


def _from_first(points: Sequence[dict[str, float]], key: str) -> list[dict[str, float]]:
    """The curve without what was spent before its first evaluation."""
    if not _says(points, key):
        return list(points)
    return [{**point, key: point[key] - points[0][key]} for point in points]


def rows_of(study: Study, records: Sequence[Record]) -> list[dict[str, Any]]:
    """A row per label: which cell stands for it, how many seeds, and the mean of every figure."""
    best = with_areas(best_cells(study, records))
    equal = at_equal_cost([record for members in best.values() for record in members])
    reference = {r["seed"]: r for r in best.get(study.reference or "", [])}
    made = []
    for label, members in best.items():
        row: dict[str, Any] = {"label": label, "cell": members[0]["cell"], "seeds": len(members)}
        row["options"] = members[0]["options"]
        for name in sorted({key for record in members for key in record["figures"]}):
            row[name] = mean([r["figures"].get(name, math.nan) for r in members])
        row["actor/at_equal_flops"] = mean([equal.get((r["cell"], r["seed"]), math.nan) for r in members])
        if reference and label != study.reference:
            for name in ("actor/end", *study.differences):
                row[_less(name)] = _difference(members, reference, name)
        made.append(row)
    return made


def with_areas(best: dict[str, list[Record]]) -> dict[str, list[Record]]:
    """The same records, with the areas among their figures."""
    found = areas([record for members in best.values() for record in members])
    return {
        label: [r | {"figures": r["figures"] | found.get((r["cell"], r["seed"]), {})} for r in members]
        for label, members in best.items()
    }


def _less(name: str) -> str:
    return f"{name}_less_reference"


def _difference(members: Sequence[Record], reference: dict[int, Record], name: str) -> Mean:
    """Seed by seed: what seeds have in common is no part of the interval."""
    return mean(
        [
            r["figures"].get(name, math.nan) - reference[r["seed"]]["figures"].get(name, math.nan)
            for r in members
            if r["seed"] in reference
        ]
    )


def markdown(study: Study, records: Sequence[Record]) -> str:
    """The study's table: figures that at least one label has."""
    rows = rows_of(study, records)
    extra = ["actor/at_equal_flops", *(_less(name) for name in ("actor/end", *study.differences))]
    listed = [name for figure in study.figures for name in (figure, *BESIDE.get(figure, ()))]
    wanted = list(dict.fromkeys([*ALWAYS, *extra, *listed]))
    shown = [name for name in wanted if any(isinstance(r.get(name), Mean) and r[name].count for r in rows)]
    head, lines = ["", "seeds"], [[r["label"], str(r["seeds"])] for r in rows]
    for name in shown:
        head.append(name)
        predicted = study.predicted.get(name, {})
        head += ["predicted"] if predicted else []
        for line, row in zip(lines, rows, strict=True):
            line.append(_shown(row.get(name), row["seeds"]))
            if predicted:
                line.append(f"{predicted[row['label']]:+.3f}" if row["label"] in predicted else "")
    chosen = [f"{r['label']}: {r['cell']}" for r in rows if r["cell"] != r["label"]]
    note = f"\nBest of a sweep, by {study.best}: {', '.join(chosen)}.\n" if chosen else ""
    missing = sorted({f"{r['cell']} ({', '.join(r['missing'])})" for r in records if r.get("missing")})
    if missing:
        note += (
            "\nWhat the critics' base runs that are gone had spent is not known, so there is no accuracy "
            f"by cost: {'; '.join(missing)}.\n"
        )
    return f"{table(head, lines)}\n{note}"


def _shown(found: Any, seeds: int) -> str:
    """A mean, and of how many seeds where these are fewer than the row's: so many pairs has a difference."""
    if not isinstance(found, Mean):
        return "–"
    return f"{found} ({found.count} of {seeds})" if 0 < found.count < seeds else str(found)
