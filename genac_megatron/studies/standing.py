"""What a cell's figures stand on: on another machine, which rounds otherwise, a recipe ends in other weights.

Cells of one seed are compared because they begin with the same base runs; figures from two machines do not.
"""

from __future__ import annotations

import functools
import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

from genac_megatron.observe.runinfo import METRICS, read_jsonl
from genac_megatron.studies.schema import RunSpec

if TYPE_CHECKING:
    from genac_megatron.studies.runner import Places

TELLING = ("/loss", "/grad_norm")  # figures of a step that no two trainings have alike


def stands_on(places: Places, spec: RunSpec, seed: int) -> dict[str, str]:
    """A digest of the training of each base run that a cell begins with or its banks are of, if there."""
    names = {*spec.start.values(), *(bank.actor for bank in places.study.banks.values())}
    ended = [name for name in sorted(names) if places.has_ended(name, seed)]
    return {name: training_of(places.run(name, seed) / METRICS) for name in ended}


def training_of(metrics: Path) -> str:
    """A digest of every step's losses and gradient norms, to the last digit."""
    return _digest(metrics, metrics.stat().st_mtime_ns if metrics.exists() else 0)


@functools.lru_cache(maxsize=256)
def _digest(metrics: Path, _mtime: int) -> str:
    rows, _ = read_jsonl(metrics)
    told = [{key: row[key] for key in sorted(row) if key.endswith(TELLING)} for row in rows]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]
