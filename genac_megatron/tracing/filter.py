"""The second step: of what was asked, what is learnt. Reads folders, asks nobody, needs no recipe. No torch.

OUT is a file of traces; beside what is kept it says how the teacher did, and refuses one that cannot teach.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from genac_megatron.critic.trace_rows import plain, trace_row
from genac_megatron.critic.verdicts import Row, Teaching, accepted, evenly, shares, teaching
from genac_megatron.errors import GateFailed, InputError
from genac_megatron.evaluation.parts import Parts
from genac_megatron.observe.runinfo import write_text_atomic
from genac_megatron.recipe.schema import TeacherConfig

STATES, VALUES, ANSWERS, TRACES = "states", "values", "answers", "traces.jsonl"
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FilterOptions:
    """What is kept."""

    out: Path
    size: int | None = None  # None: as many as are even
    tolerance_floor: float = 0.05
    tolerance_errors: float = 2.0
    most: float = 2.0  # even shares that a fifth of the values may have
    seed: int = 0
    gate: Literal["stop", "warn", "off"] = "stop"


def parts_of(folder: Path) -> dict[str, Parts]:
    """The three kinds of rows in a folder of `genac traces`."""
    return {
        STATES: Parts(folder / STATES, "states.jsonl", ("state",)),
        VALUES: Parts(folder / VALUES, "values.jsonl", ("state",)),
        ANSWERS: Parts(folder / ANSWERS, "answers.jsonl", ("state", "judgement")),
    }


def read_folder(folder: Path) -> tuple[list[Row], list[Row]]:
    """(states with the outcomes of their continuations, answers), in order; also of a folder whose asking is
    under way, or was ended. Raises InputError where it is none.
    """
    found: dict[str, list[Row]] = {}
    for name, parts in parts_of(folder).items():
        if parts.complete:
            found[name] = parts.read()[1]
            continue
        found[name] = parts.so_far()
        if not found[name]:
            raise InputError(
                f"there are no {name} in it", where=str(folder), way_out="give a folder of `genac traces ask`"
            )
    return joined(found[STATES], found[VALUES]), found[ANSWERS]


def joined(states: Sequence[Row], values: Sequence[Row]) -> list[Row]:
    """States with the outcomes of their continuations, those that have some, in order."""
    outcomes = {row["state"]: row["outcomes"] for row in values}
    known = sorted((row for row in states if row["state"] in outcomes), key=lambda row: row["state"])
    return [{**row, "outcomes": outcomes[row["state"]]} for row in known]


def run_filter(folders: Sequence[Path], options: FilterOptions) -> str:
    """Write OUT; what is said of it. Raises GateFailed where the teacher cannot teach and `gate` is stop."""
    states: list[Row] = []
    answers: list[Row] = []
    for place, folder in enumerate(folders):
        some, about = read_folder(folder)
        # Numbers of states are a folder's own.
        states += [{**row, "state": (place, row["state"])} for row in some]
        answers += [{**row, "state": (place, row["state"])} for row in about]
    kept, text = filtered(states, answers, options)
    traces = [{**row, "state": list(row["state"])} for row in kept]
    write_text_atomic(options.out, plain(traces))
    return f"{text}\n{options.out}"


def filtered(states: Sequence[Row], answers: Sequence[Row], options: FilterOptions) -> tuple[list[Row], str]:
    """(the traces, what is said of them). Raises GateFailed."""
    continuations = min((len(state["outcomes"]) for state in states), default=1)
    config = TeacherConfig(
        kind="self",
        continuations=continuations,
        tolerance_floor=options.tolerance_floor,
        tolerance_errors=options.tolerance_errors,
    )
    pairs = accepted(states, answers, config)
    size = len(pairs) if options.size is None else options.size
    chosen = evenly(pairs, lambda pair: pair[0], size, options.seed, options.most)
    found = teaching(states, answers, chosen, config)
    text = told(found, [state for state, _ in chosen], len(pairs), options)
    _gate(found, text, options)
    if not chosen:
        raise InputError(
            f"nothing is left to learn\n{text}",
            where=str(options.out),
            way_out="another teacher, more judgements of a state (teacher.judgements), or a wider tolerance",
        )
    return [trace_row(*pair) for pair in chosen], text


def told(found: Teaching, chosen: Sequence[Row], borne_out: int, options: FilterOptions) -> str:
    """What people are told."""
    verdicts = ", ".join(f"{count} {name}" for name, count in sorted(found.counts.items()))
    parts = " / ".join(f"{share:.0%}" for share in shares(chosen))
    wanted = "" if options.size is None or len(chosen) >= options.size else f" of {options.size}"
    lines = [
        f"{found.answers} answers about {found.states} states: {verdicts}; {found.parsed:.1%} parse",
        f"of these Brier {found.brier:.4f} (best constant {found.constant:.4f}), ranking {found.ranking:.3f}",
        f"{borne_out} states have an answer that Monte Carlo bears out, {len(chosen)}{wanted} are kept, by "
        f"fifths of their values: {parts}",
    ]
    return "\n".join(lines)


def _gate(found: Teaching, text: str, options: FilterOptions) -> None:
    if options.gate == "off" or not found.faults:
        return
    why = "; ".join(found.faults)
    if options.gate == "warn":
        logger.warning("this teacher cannot teach values: %s", why)
        return
    raise GateFailed(
        f"this teacher cannot teach values: {why}\n{text}",
        where=str(options.out),
        way_out="ask another teacher (a folder of its own), or pass it by --gate warn: an SFT on it may "
        "still teach the form, which REINFORCE then fills",
    )
