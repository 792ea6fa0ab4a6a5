"""What a cell's figures stand on: on another machine, which rounds otherwise, a recipe ends in other weights.

Cells of one seed are compared because they begin with the same base runs; figures from two machines do not.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from genac_megatron.errors import InputError
from genac_megatron.observe.runinfo import METRICS, read_jsonl, write_json_atomic
from genac_megatron.studies.digests import digests_of
from genac_megatron.studies.places import Places, made_from
from genac_megatron.studies.schema import RunSpec

BEGAN_WITH = ".began_with"  # beside a run or audit
TELLING = ("/loss", "/grad_norm")  # figures of a step that no two trainings have alike


def stands_on(places: Places, spec: RunSpec, seed: int) -> dict[str, str]:
    """A digest of the training of each base run that a cell begins with or its banks are of, if there."""
    actors = (bank.actor for bank in places.study.banks.values())
    return trained(places, [*spec.runs, *actors], seed)


def has_ended(places: Places, name: str, seed: int) -> bool:
    """Whether that run is there, whole, and made from what the study says today."""
    folder, today = places.run(name, seed), digests_of(places).runs[name]
    return folder.exists() and places.ended(name, seed).exists() and made_from(folder) == today


def trained(places: Places, names: Iterable[str], seed: int) -> dict[str, str]:
    """A digest of the training of each base run of these that is there and has ended."""
    ended = [name for name in sorted({*names}) if has_ended(places, name, seed)]
    return {name: training_of(places.run(name, seed) / METRICS) for name in ended}


def told(folder: Path) -> dict[str, str]:
    """What a run or audit began with, as it was then (`tell`); nothing where it does not say."""
    path = folder.with_name(f"{folder.name}{BEGAN_WITH}")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        return {}
    except ValueError:
        raise InputError(
            "cannot be read", where=str(path), way_out="remove it and the run beside it, which is made again"
        ) from None
    return {str(name): str(digest) for name, digest in found.items()}


def tell(folder: Path, began_with: Mapping[str, str]) -> None:
    """Say beside a run or audit what it begins with."""
    write_json_atomic(folder.with_name(f"{folder.name}{BEGAN_WITH}"), began_with)


def began_with_others(places: Places, folder: Path, seed: int) -> list[str]:
    """Base runs that were made anew since a run or audit began with them."""
    if not folder.exists() or not (before := told(folder)):
        return []
    return [name for name, digest in trained(places, before, seed).items() if before[name] != digest]


def training_of(metrics: Path) -> str:
    """A digest of every step's losses and gradient norms, to the last digit."""
    return _digest(metrics, metrics.stat().st_mtime_ns if metrics.exists() else 0)


@functools.lru_cache(maxsize=256)
def _digest(metrics: Path, _mtime: int) -> str:
    rows, _ = read_jsonl(metrics)
    told = [{key: row[key] for key in sorted(row) if key.endswith(TELLING)} for row in rows]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]
