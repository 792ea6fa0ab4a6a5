"""A study's audits of gradient estimators: what is done of them, their tables and their plot."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from genac_megatron.errors import InputError
from genac_megatron.evaluation.gradient_report import FIGURES as REPORT
from genac_megatron.evaluation.gradient_report import draw, height_of, shown
from genac_megatron.evaluation.plots import save
from genac_megatron.evaluation.tables import table
from genac_megatron.studies.digests import digests_of
from genac_megatron.studies.kept import FIGURES
from genac_megatron.studies.places import Places, made_from
from genac_megatron.studies.schema import Audit, RunSpec, Study
from genac_megatron.studies.standing import stands_on
from genac_megatron.studies.summary import mean

Record = dict[str, Any]
Key = tuple[str, int]
COLUMNS = {
    "cosine": "cosine of a batch",
    "snr": "SNR of a rollout x 1000",
    "ratio": "x {base}'s",
    "bias": "bias",
}
PLOT = "estimators.png"


def audit_records(places: Places, seeds: Sequence[int]) -> list[Record]:
    """One record per audit and seed that is done, or was and stands in figures.json."""
    kept, digests, found = kept_audits(places), digests_of(places).audits, list[Record]()
    for name, audit in places.study.audits.items():
        for seed in seeds:
            if _done(places, name, seed):
                report = json.loads((places.audit(name, seed) / REPORT).read_text(encoding="utf-8"))
                found.append(
                    {
                        "audit": name,
                        "seed": seed,
                        "made_from": digests[name],
                        "stands_on": stands_on(places, _runs(audit), seed),
                        "report": report,
                    }
                )
            elif (name, seed) in kept:
                found.append(kept[name, seed])
    return found


def kept_audits(places: Places) -> dict[Key, Record]:
    """By audit and seed, records of figures.json that are as the study has them today, and have no folder."""
    return _sorted(places)[0]


def audits_of_other_bases(places: Places) -> list[Key]:
    """Those that would be kept if their base runs were the ones that are here."""
    return sorted(_sorted(places)[1])


def _sorted(places: Places) -> tuple[dict[Key, Record], dict[Key, Record]]:
    path, audits = places.out / FIGURES, places.study.audits
    kept, others = dict[Key, Record](), dict[Key, Record]()
    if not audits or not path.exists():
        return kept, others
    try:
        for record in json.loads(path.read_text(encoding="utf-8")).get("audits", []):
            name, seed = record["audit"], record["seed"]
            if name not in audits or record["made_from"] != digests_of(places).audits[name]:
                continue
            if not _done(places, name, seed):
                here, there = stands_on(places, _runs(audits[name]), seed), record["stands_on"]
                same = all(there.get(base, digest) == digest for base, digest in here.items())
                (kept if same else others)[name, seed] = record
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"not a study's figures: {error!r}", where=str(path), way_out="restore it, or move it away"
        ) from None
    return kept, others


def _done(places: Places, name: str, seed: int) -> bool:
    folder = places.audit(name, seed)
    return (folder / REPORT).exists() and made_from(folder) == digests_of(places).audits[name]


def _runs(audit: Audit) -> RunSpec:
    return RunSpec(start={base: base for base in audit.bases})


# --- what is shown -------------------------------------------------------------------------------


def markdown(study: Study, records: Sequence[Record]) -> str:
    """A table for each audit: of its one seed with that one's intervals, of several their mean."""
    parts = []
    for name, audit in study.audits.items():
        reports = [record["report"] for record in records if record["audit"] == name]
        if len(reports) == 1:
            parts.append(f"## {name}\n\n{shown(reports[0], audit.predicted)}\n")
        elif reports:
            parts.append(f"## {name}\n\n{_over_seeds(reports, audit.predicted)}\n")
    return "\n".join(parts)


def _over_seeds(reports: Sequence[Record], predicted: Mapping[str, float]) -> str:
    base = reports[0]["base"]
    head = ["", *(title.format(base=base) for title in COLUMNS.values()), "unbiased?"]
    rows = []
    for name in dict.fromkeys(name for report in reports for name in report["estimators"]):
        each = [report["estimators"][name] for report in reports if name in report["estimators"]]
        row = [name]
        for key in COLUMNS:
            values = [one[key]["value"] for one in each]
            known = [math.nan if value is None else value for value in values]
            row.append(str(mean([1000.0 * value for value in known] if key == "snr" else known)))
        row.append(_agreement(each))
        if predicted:
            row.insert(4, f"{predicted[name]:.2f}" if name in predicted else "")
        rows.append(row)
    if predicted:
        head.insert(4, "predicted")
    return f"Mean over {len(reports)} seeds, 95 % intervals.\n\n{table(head, rows)}"


def _agreement(each: Sequence[Record]) -> str:
    """In how many seeds it agrees, of those in which that can be told, and the least that all could see."""
    known = [one for one in each if one.get("agrees") is not None]
    if not known:
        return "cannot be told" if any("agrees" in one for one in each) else ""
    bounds = [one["excess"]["high"] for one in known if one.get("excess", {}).get("high") is not None]
    seen = f", excess < {max(0.0, *bounds):.2f}" if bounds else ""
    return f"{sum(one['agrees'] for one in known)} of {len(known)}{seen}"


def draw_audits(study: Study, records: Sequence[Record], folder: Path) -> None:
    """The plot: a panel for each audit, of its first seed that is done, with that one's intervals."""
    first = dict[str, Record]()
    for record in records:
        first.setdefault(record["audit"], record["report"])
    if first:
        predicted = {name: study.audits[name].predicted for name in first}
        height = max(height_of(report) for report in first.values())
        save(folder / PLOT, height, draw(first, predicted))
