"""Figures that a study left earlier: a cell that stands in figures.json as it is today is not run again.

So a study goes on although its runs are gone: on another machine, or from a repository with its figures.
"""

from __future__ import annotations

import functools
import hashlib
import json
from typing import Any

from genac_megatron.errors import InputError
from genac_megatron.recipe import document
from genac_megatron.studies.runner import Places
from genac_megatron.studies.schema import RunSpec, bases_of, cells_of

FIGURES = "figures.json"
# Where and how it ran, not what it is. Seconds depend on them, and are told as measured.
CIRCUMSTANCES = {"name", "runs", "seed", "world", "cluster", "observe", "checkpoint"}
Record = dict[str, Any]


@functools.cache  # every recipe is read for it
def digests_of(places: Places) -> dict[str, str]:
    """By cell: a digest of its recipe as merged, of what it starts from, and of the banks. Not of the code.

    Raises InputError where a recipe cannot be read.
    """
    study = places.study
    bases = dict(bases_of(study))

    def whole(spec: RunSpec) -> Record:
        start = {role: whole(bases[base]) for role, base in spec.start.items()}
        return {"recipe": _merged(places, str(spec.recipe), spec.set), "start": start}

    banks = {
        name: {
            "recipe": _merged(places, bank.recipe, bank.set),
            "actor": whole(bases[bank.actor]),
            **bank.model_dump(include={"states_from", "p_bar_of", "options"}),
        }
        for name, bank in study.banks.items()
    }
    return {
        cell.name: _digest({"run": whole(cell.spec), "banks": banks})
        for cell in cells_of(study, str(places.file))
    }


def _merged(places: Places, recipe: str, settings: list[str]) -> Record:
    root = document.read(places.file.parent / recipe)
    for text in [*places.study.set, *settings, *places.overrides]:
        document.override(root, text)
    # What is set, not every default: a new option of a later version changes no cell.
    return {key: value for key, value in document.plain(root).items() if key not in CIRCUMSTANCES}


def _digest(content: Record) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def kept_records(places: Places) -> dict[tuple[str, int], Record]:
    """By cell and seed: records of figures.json that are whole, made from what the study says today, and all
    that is left of their runs.

    Raises InputError where the file cannot be read.
    """
    path = places.out / FIGURES
    if not path.exists():
        return {}
    try:
        records = json.loads(path.read_text(encoding="utf-8"))["records"]
        today = digests_of(places)
        return {
            (record["cell"], record["seed"]): record
            for record in records
            if record.get("made_from") == today.get(record["cell"], "")
            and _whole(places, record)
            and not places.run(record["cell"], record["seed"]).exists()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"not a study's figures: {error!r}", where=str(path), way_out="restore it, or move it away"
        ) from None


def _whole(places: Places, record: Record) -> bool:
    """A run whose banks were not yet scored when the figures were written is not."""
    return all(any(key.startswith(f"{bank}/") for key in record["figures"]) for bank in places.study.banks)
