"""What a study's runs have come to, as plain figures: one record per cell and seed."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

from genac_megatron.models.families.base import Shape
from genac_megatron.observe.report_data import ACTOR_KINDS
from genac_megatron.observe.runinfo import EVALUATIONS, METRICS, read_jsonl
from genac_megatron.recipe.loader import load_recipe
from genac_megatron.recipe.rules import read_shape
from genac_megatron.recipe.schema import Recipe
from genac_megatron.studies.cost import Weights, total, weights_of
from genac_megatron.studies.digests import digests_of
from genac_megatron.studies.kept import kept_records
from genac_megatron.studies.places import Places, made_from, newer
from genac_megatron.studies.schema import Cell, bases_of, cells_of
from genac_megatron.studies.standing import has_ended, stands_on

DECODED = ("tokens/rollout", "tokens/judge")
COSTS = ("tokens", "flops", "flops_shared", "seconds", "decoded")
Record = dict[str, Any]
Shapes = Mapping[str, Shape]


def records_of(places: Places, seeds: list[int]) -> list[Record]:
    """One record per cell and seed that is done, or was and stands in figures.json."""
    kept, digests, found = kept_records(places), digests_of(places).records, list[Record]()
    for cell in cells_of(places.study, str(places.file)):
        for seed in seeds:
            if has_ended(places, cell.name, seed):
                found.append(record_of(places, cell, seed) | {"made_from": digests[cell.name]})
            elif (cell.name, seed) in kept:
                found.append(kept[cell.name, seed] | {"label": cell.label, "options": cell.options})
    return found


def record_of(places: Places, cell: Cell, seed: int) -> Record:
    """Cell, label, options, seed, figures (flat names), curve (of held-out accuracy), what it stands on."""
    folder = places.run(cell.name, seed)
    rows, _ = read_jsonl(folder / METRICS)
    evaluations, _ = read_jsonl(folder / EVALUATIONS)
    recipe = load_recipe(folder / "recipe.yaml")
    shapes, weights = _shapes(recipe), _weights(recipe)
    figures = _critic(evaluations) | _spent(rows, shapes, weights) | _actor(evaluations)
    before, missing = _before(places, cell, seed)
    for bank in places.study.banks:
        figures |= scores_of(places, bank, cell.name, seed)
    return {
        "cell": cell.name,
        "label": cell.label,
        "options": cell.options,
        "seed": seed,
        "figures": {key: value for key, value in figures.items() if math.isfinite(value)},
        "curve": curve(rows, evaluations, shapes, before, weights),
        "stands_on": stands_on(places, cell.spec, seed),
    } | ({"missing": missing} if missing else {})


def _before(places: Places, cell: Cell, seed: int) -> tuple[dict[str, float] | None, list[str]]:
    """What the base runs of other roles than the actor had spent, and those that they start from in turn: a
    critic's pre-training is its method's. None, and their names, where some of them are not there."""
    bases = _critics_bases(places, cell)
    missing = [base for base in bases if not has_ended(places, base, seed)]
    if missing:
        return None, missing
    spent = dict.fromkeys(COSTS, 0.0)
    for base in bases:
        folder = places.run(base, seed)
        rows, _ = read_jsonl(folder / METRICS)
        recipe = load_recipe(folder / "recipe.yaml")
        found = _total(rows, _shapes(recipe), _weights(recipe))
        spent = {key: value + found[key] for key, value in spent.items() if key in found}
    return spent, []


def _critics_bases(places: Places, cell: Cell) -> list[str]:
    """Each once, however many start from it."""
    specs, found = dict(bases_of(places.study)), list[str]()
    left = [base for role, base in cell.spec.start.items() if role != "actor"]
    while left:
        base = left.pop()
        if base not in found:
            found.append(base)
            left += [other for role, other in specs[base].start.items() if role != "actor"]
    return sorted(found)


def _shapes(recipe: Recipe) -> dict[str, Shape]:
    return {name: read_shape(role.model) for name, role in recipe.roles.items()}


def _weights(recipe: Recipe) -> dict[str, Weights]:
    return {n: weights_of(role.training, read_shape(role.model)) for n, role in recipe.roles.items()}


def _total(
    rows: list[Record], shapes: Mapping[str, Shape], weights: Mapping[str, Weights]
) -> dict[str, float]:
    """What rows have spent, and of their tokens those that were decoded: which take nearly all the time."""
    decoded = sum(float(row.get(key) or 0.0) for row in rows for key in DECODED)
    return {**total(rows, shapes, weights), "decoded": decoded}


def _critic(evaluations: list[Record]) -> dict[str, float]:
    judged = [row for row in evaluations if isinstance(row.get("critic"), dict)]
    if not judged:
        return {}
    return {
        f"critic/{key}": float(value)
        for key, value in judged[-1]["critic"].items()
        if isinstance(value, int | float)
    }


def _actor(evaluations: list[Record]) -> dict[str, float]:
    acted = [row for row in evaluations if row.get("kind") in ACTOR_KINDS]
    if not acted:
        return {}
    start, end = (float(acted[i]["actor"]["accuracy"]) for i in (0, -1))
    return {"actor/start": start, "actor/end": end, "actor/gain": end - start}


def _spent(
    rows: list[Record], shapes: Mapping[str, Shape], weights: Mapping[str, Weights]
) -> dict[str, float]:
    """The whole run, and a step of the actor's RL."""
    whole = {f"cost/{key}": value for key, value in total(rows, shapes, weights).items()}
    steps = [row for row in rows if row.get("kind") in ACTOR_KINDS and "actor/loss" in row]
    if not steps:
        return whole
    return whole | {f"step/{key}": value / len(steps) for key, value in total(steps, shapes, weights).items()}


def scores_of(places: Places, bank: str, cell: str, seed: int) -> dict[str, float]:
    """Of this run on the bank as the study has it today; none where they are of another."""
    path = places.scores(bank, cell, seed) / "scores.json"
    today = digests_of(places).banks[bank]
    if made_from(places.bank(bank, seed)) != today or not newer(path, places.run(cell, seed) / METRICS):
        return {}
    found = json.loads(path.read_text(encoding="utf-8"))["figures"]
    return {
        f"{bank}/{key}": float(value["value"] if isinstance(value, dict) else value)
        for key, value in found.items()
        if value is not None and (not isinstance(value, dict) or value.get("value") is not None)
    }


def curve(
    rows: list[Record],
    evaluations: list[Record],
    shapes: Mapping[str, Shape],
    earlier: Mapping[str, float] | None = MappingProxyType({}),
    weights: Mapping[str, Weights] = MappingProxyType({}),
) -> list[dict[str, float]]:
    """Held-out accuracy after so many steps of the actor's RL, and all that the run had spent by then.

    earlier: what its critic's own base runs had spent; None: that is not known, and no cost is in the curve.
    """
    points, spent, by = [], {} if earlier is None else earlier, _Spent(rows, shapes, weights)
    lacking = {*COSTS} if earlier is None else {"flops_shared"} - earlier.keys() if earlier else set[str]()
    for evaluation in evaluations:
        if evaluation.get("kind") not in ACTOR_KINDS:
            continue
        stage, step = evaluation["stage"], evaluation["step"]
        found = {
            key: value + spent.get(key, 0.0)
            for key, value in by.step(stage, step).items()
            if key not in lacking
        }
        points.append({"steps": float(step), "accuracy": evaluation["actor"]["accuracy"], **found})
    return points


class _Spent:
    """What rows had spent by a step of a stage: all before the stage, and its own from step 1 on."""

    def __init__(self, rows: list[Record], shapes: Shapes, weights: Mapping[str, Weights]) -> None:
        each = [_total([row], shapes, weights) for row in rows]
        # NaN where a row does not say, and in all sums from there on
        table = np.array([[one.get(key, math.nan) for key in COSTS] for one in each]).reshape(-1, len(COSTS))
        self._all = np.cumsum(np.vstack([np.zeros(len(COSTS)), table]), axis=0)
        members: dict[str, list[int]] = {}
        for place, row in enumerate(rows):
            members.setdefault(str(row.get("stage")), []).append(place)
        self._by_stage = {}
        for stage, places in members.items():
            steps = np.array([rows[place]["step"] for place in places], dtype=float)
            order = np.argsort(steps, kind="stable")[int((steps <= 0).sum()) :]
            parts = [self._all[places[:1]], table[np.array(places)[order]]]
            self._by_stage[stage] = steps[order], np.cumsum(np.vstack(parts), axis=0)

    def step(self, stage: str, step: float) -> dict[str, float]:
        """As `_total`."""
        steps, sums = self._by_stage.get(stage, (np.array([]), self._all[-1:]))
        row = sums[np.searchsorted(steps, step, side="right")]
        return {key: float(x) for key, x in zip(COSTS, row, strict=True) if not math.isnan(x)}
