"""Figures that a study left earlier: a cell that stands in figures.json as it is today is not run again.

So a study goes on although its runs are gone: on another machine, or from a repository with its figures.
"""

from __future__ import annotations

import json
from typing import Any

from genac_megatron.errors import InputError
from genac_megatron.studies.digests import digests_of
from genac_megatron.studies.runner import Places

FIGURES = "figures.json"
Record = dict[str, Any]


def kept_records(places: Places) -> dict[tuple[str, int], Record]:
    """By cell and seed: records of figures.json that are whole, made from what the study says today, and have
    no run beside them that has ended.

    Raises InputError where the file cannot be read.
    """
    path = places.out / FIGURES
    if not path.exists():
        return {}
    try:
        records = json.loads(path.read_text(encoding="utf-8"))["records"]
        today = digests_of(places).records
        return {
            (record["cell"], record["seed"]): record
            for record in records
            if record.get("made_from") == today.get(record["cell"], "")
            and _whole(places, record)
            and not places.has_ended(record["cell"], record["seed"])
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"not a study's figures: {error!r}", where=str(path), way_out="restore it, or move it away"
        ) from None


def _whole(places: Places, record: Record) -> bool:
    """A run whose banks were not yet scored when the figures were written is not."""
    return all(any(key.startswith(f"{bank}/") for key in record["figures"]) for bank in places.study.banks)
