"""Run folders read while their runs go on: whole lines of logs, each parsed once. Nothing is written."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from genac_megatron.errors import GenacError, InputError
from genac_megatron.observe.history import HISTORY, attempts
from genac_megatron.observe.report_data import RunData, latest_evaluations
from genac_megatron.observe.runinfo import EVALUATIONS, METRICS, ROLLOUTS, RunFolder

LOOK_S = 1.0  # between looks at a run's files, however many ask
SCAN_S = 3.0  # between looks for new run folders
TAIL = 256  # bytes before a place, by which it is known again
SIGNS = ("recipe.yaml", METRICS, HISTORY)  # a folder with one of them is a run's
Row = dict[str, Any]


class Log:
    """A file of JSON lines that may grow, or be replaced by a shorter one when a run resumes.

    A last line without its end is one that is being written: it is read once it is whole.
    """

    def __init__(self, path: Path, keep: Callable[[Row, int, int], Any] | None = None) -> None:
        """keep: what is kept of a row that lies at a place and has a length, in bytes; None: all of it."""
        self.path = path
        self.rows: list[Any] = []
        self.bad = 0  # lines that are no JSON object
        self.changes = 0
        self._keep = keep or (lambda row, at, length: row)
        self._at, self._tail = 0, b""

    def look(self) -> None:
        """Take in what is new. Raises OSError where the file is there and cannot be read."""
        try:
            file = self.path.open("rb")
        except FileNotFoundError:
            self._begin_anew()
            return
        with file:
            if not self._goes_on(file):
                self._begin_anew()
                file.seek(0)
            new = file.read()
        whole = new[: new.rfind(b"\n") + 1]
        if not whole:
            return
        for line in whole.splitlines(keepends=True):
            self._take(line)
        self._tail = (self._tail + whole)[-TAIL:]
        self.changes += 1

    def _goes_on(self, file: BinaryIO) -> bool:
        """Whether what was read is still what stands there; `file` is then at its end."""
        begin = self._at - len(self._tail)
        file.seek(begin)
        return file.read(len(self._tail)) == self._tail

    def _begin_anew(self) -> None:
        if self._at:
            self.changes += 1
        self.rows, self.bad, self._at, self._tail = [], 0, 0, b""

    def _take(self, line: bytes) -> None:
        row = _object(line)
        if row is not None:
            self.rows.append(self._keep(row, self._at, len(line)))
        elif line.strip():
            self.bad += 1
        self._at += len(line)


def _object(line: bytes) -> Row | None:
    try:
        row = json.loads(line)
    except ValueError:  # UnicodeDecodeError too
        return None
    return row if isinstance(row, dict) else None


@dataclass(frozen=True)
class Brief:
    """Where a kept rollout lies in its file, and what it is found by."""

    at: int
    length: int
    stage: str
    step: int
    of: str  # training or heldout; "" in files of earlier versions
    outcome: float | None
    truncated: bool
    unread: bool  # a judgement without a score
    error: float | None  # the largest of the critic's |value - outcome|

    @staticmethod
    def made(row: Row, at: int, length: int) -> Brief:
        """Of a row of rollouts.jsonl, whatever is in it."""
        outcome = _number(row.get("outcome"))
        target = _number(row.get("critic_outcome", outcome))
        states = [state for state in row.get("states") or [] if isinstance(state, dict)]
        asked = [state for state in states if not state.get("unasked")]
        values = [v for v in (_number(state.get("value")) for state in asked) if v is not None]
        known = target is not None and bool(values)
        return Brief(
            at,
            length,
            str(row.get("stage")),
            int(_number(row.get("step")) or 0),
            str(row.get("of") or ""),
            outcome,
            bool(row.get("truncated")),
            any(state.get("value") is None for state in asked),
            max(abs(v - target) for v in values) if known and target is not None else None,
        )


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) else None


@dataclass
class Followed:
    """A run folder that is followed. Its methods may be called from several threads."""

    key: str  # in addresses
    path: Path
    error: str = ""  # why it cannot be shown
    _lock: threading.RLock = field(default_factory=threading.RLock)
    _looked: float = -1e9
    _data: RunData | None = None
    _version: tuple[Any, ...] = ()

    def __post_init__(self) -> None:
        self._logs = {name: Log(self.path / name) for name in (METRICS, EVALUATIONS, HISTORY)}
        self._rollouts = Log(self.path / ROLLOUTS, Brief.made)

    def data(self) -> RunData | None:
        """What is there now; None, and `error` says why, where it cannot be read."""
        with self._lock:
            if time.monotonic() - self._looked >= LOOK_S:
                self._looked = time.monotonic()
                try:
                    self._look()
                    self.error = ""
                except (OSError, GenacError) as error:
                    self.error = str(error)
                    self._data = None
            return self._data

    @property
    def version(self) -> str:
        """Changes with what plots and figures are made of."""
        self.data()
        return "-".join(map(str, self._version))

    def rollouts(self) -> list[Brief]:
        """Kept rollouts, oldest first."""
        with self._lock:
            self.data()
            return list(self._rollouts.rows)

    def rollout(self, brief: Brief) -> Row | None:
        """The row itself; None where the file was replaced meanwhile."""
        try:
            with (self.path / ROLLOUTS).open("rb") as file:
                file.seek(brief.at)
                return _object(file.read(brief.length))
        except OSError:
            return None

    def _look(self) -> None:
        for log in (*self._logs.values(), self._rollouts):
            log.look()
        recipe_file = self.path / "recipe.yaml"
        stamp = recipe_file.stat().st_mtime_ns if recipe_file.exists() else 0
        changes = [log.changes for log in self._logs.values()]
        version = (*changes, stamp)
        if self._data is not None and version == self._version:
            self._data.rollouts = self._rollouts.rows
            return
        logs = {**self._logs, ROLLOUTS: self._rollouts}
        self._data = RunData(
            self.path,
            RunFolder(self.path).resolved_recipe(),
            list(self._logs[METRICS].rows),
            latest_evaluations(self._logs[EVALUATIONS].rows),
            self._rollouts.rows,
            {name: log.bad for name, log in logs.items() if log.bad},
            attempts(self._logs[HISTORY].rows),
            RunFolder(self.path).told_of_data(),
        )
        self._version = version


def is_run(folder: Path) -> bool:
    """Whether a folder is a run's."""
    return any((folder / name).is_file() for name in SIGNS)


class Watched:
    """The run folders that are asked for; those that appear later are picked up."""

    def __init__(self, paths: Sequence[Path]) -> None:
        """Each a run folder, one that a run will make, or a folder of run folders. Raises InputError."""
        self.paths = list(paths)
        self._runs: dict[str, Followed] = {}
        self._known: dict[Path, str] = {}
        self._lock = threading.Lock()
        self._scanned = -1e9
        for path in self.paths:
            _need_place(path)

    def runs(self) -> dict[str, Followed]:
        """By key, in the order in which they are asked for."""
        with self._lock:
            if time.monotonic() - self._scanned >= SCAN_S:
                self._scanned = time.monotonic()
                for folder in self._found():
                    self._take(folder)
            return dict(self._runs)

    def waiting(self) -> list[Path]:
        """What is asked for and not there yet."""
        return [path for path in self.paths if not is_run(path) and not any(_runs_in(path))]

    def _found(self) -> Iterator[Path]:
        for path in self.paths:
            if is_run(path):
                yield path
            else:
                yield from sorted(_runs_in(path), key=lambda run: run.name)

    def _take(self, folder: Path) -> None:
        place = Path(os.path.realpath(folder))
        if place in self._known:
            return
        name = folder.name or place.name or "run"
        key, number = name, 1
        while key in self._runs:
            number += 1
            key = f"{name}-{number}"
        self._known[place] = key
        self._runs[key] = Followed(key, folder)


def _runs_in(path: Path) -> Iterator[Path]:
    try:
        children = list(path.iterdir()) if path.is_dir() else []
    except OSError:
        return
    yield from (child for child in children if child.is_dir() and is_run(child))


def _begins(folder: Path) -> bool:
    """Whether a run has made a folder and written nothing yet."""
    return (folder / "checkpoints").is_dir() and (folder / "logs").is_dir()


def _need_place(path: Path) -> None:
    """Raise InputError where nothing that is there can be, or become, a run folder."""
    way_out = "give run folders (runs/<name>), or the folder that they are in"
    if path.exists() and not path.is_dir():
        raise InputError("not a run folder, but a file", where=str(path), way_out=way_out)
    if not path.exists() and not path.absolute().parent.is_dir():
        raise InputError("no such folder, nor one that it could appear in", where=str(path), way_out=way_out)
    if not path.is_dir() or is_run(path) or _begins(path):
        return
    try:
        children = list(path.iterdir())
    except OSError as error:
        raise InputError(
            f"cannot be read: {error.strerror}", where=str(path), way_out="make it readable"
        ) from error
    if children and not any(is_run(child) or _begins(child) for child in children):
        raise InputError("no run folder, and none is in it", where=str(path), way_out=way_out)
