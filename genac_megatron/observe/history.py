"""When a run was begun and how it ended: a row for each start and each end in `history.jsonl`, and the words
that a run ends with. No torch.

Rank 0 writes both rows; whoever started the ranks corrects the end where a rank could not.
"""

from __future__ import annotations

import shlex
import signal
import time
from collections.abc import Mapping, Sequence
from typing import Any

from genac_megatron.errors import (
    EXIT_FAILED,
    EXIT_GATE,
    EXIT_INPUT,
    EXIT_LOST,
    EXIT_OK,
    EXIT_REQUEUE,
)
from genac_megatron.observe.manifest import survey
from genac_megatron.observe.origin import Origin, again, typed
from genac_megatron.observe.progress import format_duration
from genac_megatron.observe.runinfo import RunFolder, read_jsonl

HISTORY = "history.jsonl"
MEANS = {
    EXIT_OK: "done",
    EXIT_FAILED: "failed",
    EXIT_INPUT: "ended: the recipe or an input is wrong",
    EXIT_GATE: "ended: a gate is not reached",
    EXIT_LOST: "ended: an engine or a rank was lost",
    EXIT_REQUEUE: "stopped as asked, with a checkpoint",
    128 + signal.SIGINT: "left at once, as asked",
}
Row = dict[str, Any]


def meaning(code: int) -> str:
    """What an exit code says of a run."""
    if code in MEANS or code <= 128:
        return MEANS.get(code, f"ended with code {code}")
    try:
        name = signal.Signals(code - 128).name
    except ValueError:
        return f"ended with code {code}"
    hint = ", as where memory runs out" if name == "SIGKILL" else ""
    return f"ended: a rank was killed by {name}{hint}"


def history(folder: RunFolder) -> list[Row]:
    """The rows of a run's starts and ends, oldest first."""
    return read_jsonl(folder.path / HISTORY)[0]


def note_start(folder: RunFolder, origin: Origin, **more: Any) -> None:
    """A run begins. Raises GenacError where it cannot be written."""
    row = {"event": "start", "time": time.time(), **origin.row(), "before": typed(), **more}
    folder.append(HISTORY, row)


def note_end(folder: RunFolder, code: int, told: str = "") -> None:
    """It ends. told: the error's words. Raises GenacError where it cannot be written."""
    folder.append(HISTORY, {"event": "end", "time": time.time(), "code": code, "told": told})


def attempts(rows: Sequence[Row]) -> list[tuple[Row, Row | None]]:
    """Each start with the last word of its end; None where there is none: it was killed, or is going on."""
    found: list[tuple[Row, Row | None]] = []
    for row in rows:
        if row.get("event") == "start":
            found.append((row, None))
        elif row.get("event") == "end" and found:
            found[-1] = (found[-1][0], row)
    return found


def ran_for(start: Row, end: Row | None) -> str:
    """How long an attempt took, for a sentence; "" where its end is not noted."""
    return "" if end is None else f" after {format_duration(float(end['time']) - float(start['time']))}"


def next_commands(folder: RunFolder, start: Row, code: int, ways: Sequence[str] = ()) -> list[str]:
    """What to type after a run's end, best first. ways: overrides with which a gate's stage may go on."""
    words, recipe, before = start["words"], start["recipe"], start["before"]
    resumes = survey(folder.checkpoints).newest is not None

    def command(*more: str) -> str:
        asked = [*more, "--resume"] if resumes else list(more)
        return again([word for word in words if word != "--resume"], recipe, *asked, before=before)

    if code == EXIT_OK:
        genac = before if not before.startswith("make ") else "make genac"
        return [_tool(genac, "convert", "to-hf", str(folder.path), f"{folder.path.name}-hf")]
    if code == EXIT_GATE and ways:
        return [command(*shlex.split(way)) for way in ways]
    return [command()]


def _tool(before: str, *words: str) -> str:
    """Another genac command, where the run was begun by make through make too."""
    text = shlex.join(words)
    return f"{before} ARGS={shlex.quote(text)}" if before.startswith("make ") else f"{before} {text}"


SHOWN_VALUES = 12


def other_values(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What two resolved recipes differ in, as "key: before -> now"; keys that one of them has not are passed
    over, as versions have their own.
    """
    old, new = _flat(before), _flat(now)
    found = [
        f"{key}: {old[key]} -> {value}" for key, value in new.items() if key in old and old[key] != value
    ]
    return (
        found if len(found) <= SHOWN_VALUES else [*found[:SHOWN_VALUES], f"{len(found) - SHOWN_VALUES} more"]
    )


def _flat(block: Any, at: str = "") -> dict[str, Any]:
    """Values by dotted key, a list's entries by their names."""
    if isinstance(block, Mapping) and block:
        return {k: v for key, child in block.items() for k, v in _flat(child, f"{at}.{key}").items()}
    if isinstance(block, list) and block and all(isinstance(one, Mapping) for one in block):
        named = [(str(one.get("name", i)), one) for i, one in enumerate(block)]
        return {k: v for name, child in named for k, v in _flat(child, f"{at}.{name}").items()}
    return {at.removeprefix("."): block}
