"""Figures that a study left earlier: a cell that stands in figures.json as it is today is not run again.

So a study goes on although its runs are gone: on another machine, or from a repository with its figures.
"""

from __future__ import annotations

import json
from typing import Any

from genac_megatron.errors import InputError
from genac_megatron.studies.digests import digests_of
from genac_megatron.studies.places import Places
from genac_megatron.studies.schema import cells_of
from genac_megatron.studies.standing import has_ended, stands_on

FIGURES = "figures.json"
Record = dict[str, Any]


def kept_records(places: Places) -> dict[tuple[str, int], Record]:
    """By cell and seed: records of figures.json that are whole, made from what the study says today, from the
    base runs that are here where any are, and have no run beside them that has ended.

    Raises InputError where the file cannot be read.
    """
    return _sorted(places)[0]


def of_other_bases(places: Places) -> list[tuple[str, int]]:
    """Cells and seeds that would be kept if their base runs were those that are here."""
    return sorted(_sorted(places)[1])


def _sorted(places: Places) -> tuple[dict[tuple[str, int], Record], dict[tuple[str, int], Record]]:
    """Kept records, and those of other base runs."""
    path = places.out / FIGURES
    if not path.exists():
        return {}, {}
    try:
        records = json.loads(path.read_text(encoding="utf-8"))["records"]
        today = digests_of(places).records
        specs = {cell.name: cell.spec for cell in cells_of(places.study, str(places.file))}
        kept, others = dict[tuple[str, int], Record](), dict[tuple[str, int], Record]()
        for record in records:
            cell, seed = record["cell"], record["seed"]
            if record.get("made_from") != today.get(cell, "") or not _whole(places, record):
                continue
            if not has_ended(places, cell, seed):
                here, there = stands_on(places, specs[cell], seed), record.get("stands_on", {})
                same = all(there.get(base, digest) == digest for base, digest in here.items())
                (kept if same else others)[cell, seed] = record
        return kept, others
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"not a study's figures: {error!r}", where=str(path), way_out="restore it, or move it away"
        ) from None


def _whole(places: Places, record: Record) -> bool:
    """A run whose banks were not yet scored when the figures were written is not."""
    return all(any(key.startswith(f"{bank}/") for key in record["figures"]) for bank in places.study.banks)
