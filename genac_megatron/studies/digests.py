"""What a study's runs, banks and figures are made from, as digests: of recipes as merged, not of the code."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from genac_megatron.recipe import document
from genac_megatron.studies.places import Places
from genac_megatron.studies.schema import RunSpec, bases_of, cells_of

# Where and how it ran, not what it is. Seconds depend on them, and are told as measured.
CIRCUMSTANCES = {"name", "runs", "seed", "world", "cluster", "observe", "checkpoint"}
ROLES = ("actor", "critic", "scalar")  # whose runs an audit names
Content = dict[str, Any]


@dataclass(frozen=True)
class Digests:
    """By name."""

    runs: dict[str, str]  # cells and base runs: their recipe, and what they start from
    banks: dict[str, str]  # their recipe and options, their actor, and the banks that they look at
    records: dict[str, str]  # a cell's figures: its run, and all banks
    audits: dict[str, str]  # their recipe and options, and the runs that they look at; not what was predicted


@functools.cache  # every recipe is read for it
def digests_of(places: Places) -> Digests:
    """Raises InputError where a recipe cannot be read."""
    study = places.study
    bases = dict(bases_of(study))
    cells = {cell.name: cell.spec for cell in cells_of(study, str(places.file))}

    @functools.cache  # by cells, banks and other bases
    def base(name: str) -> Content:
        return whole(bases[name])

    def whole(spec: RunSpec) -> Content:
        start = {role: base(name) for role, name in spec.start.items()}
        content = {"recipe": _merged(places, str(spec.recipe), spec.set), "start": start}
        beside = {role: base(name) for role, name in spec.beside.items()}
        return content | ({"beside": beside} if beside else {})

    banks = {
        name: {
            "recipe": _merged(places, bank.recipe, bank.set),
            "actor": base(bank.actor),
            **bank.model_dump(include={"states_from", "p_bar_of", "options"}),
        }
        for name, bank in study.banks.items()
    }

    audits = {
        name: {
            "recipe": _merged(places, audit.recipe, audit.set),
            "runs": {role: whole(bases[getattr(audit, role)]) for role in ROLES if getattr(audit, role)},
            "options": audit.options,
        }
        for name, audit in study.audits.items()
    }

    def seen(name: str) -> list[Content]:
        others = {banks[name]["states_from"], banks[name]["p_bar_of"]} - {None, name}
        return [banks[name], *(content for other in sorted(others) for content in seen(other))]

    contents = {name: whole(spec) for name, spec in {**bases, **cells}.items()}
    return Digests(
        runs={name: _digest(content) for name, content in contents.items()},
        banks={name: _digest(seen(name)) for name in banks},
        records={name: _digest({"run": contents[name], "banks": banks}) for name in cells},
        audits={name: _digest(content) for name, content in audits.items()},
    )


def _merged(places: Places, recipe: str, settings: list[str]) -> Content:
    root = document.read(places.file.parent / recipe)
    for text in [*places.study.set, *settings, *places.overrides]:
        document.override(root, text)
    # What is set, not every default: a new option of a later version changes no cell.
    kept = {key: value for key, value in document.plain(root).items() if key not in CIRCUMSTANCES}
    return dict(_contents(kept))


def _contents(value: Any) -> Any:
    """The same with a file's digest in place of its path: where it lies says nothing."""
    if isinstance(value, dict):
        return {key: _contents(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_contents(one) for one in value]
    if isinstance(value, str) and os.path.isabs(value) and os.path.isfile(value):
        return hashlib.sha256(Path(value).read_bytes()).hexdigest()
    return value


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
