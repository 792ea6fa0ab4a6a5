"""The run folder: its files by name, JSON lines, and files that appear whole or not at all."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from genac_megatron.errors import GenacError, InputError

if TYPE_CHECKING:
    from genac_megatron.recipe.schema import Recipe

logger = logging.getLogger(__name__)

DATA = "data.json"  # what was told of the data when the run began: how much there is, what was left out
TEST = "test.json"  # what the test at the run's end gave
METRICS, EVALUATIONS, ROLLOUTS = "metrics.jsonl", "evaluations.jsonl", "rollouts.jsonl"
LOGS = (METRICS, EVALUATIONS, ROLLOUTS)


def jsonable(value: Any) -> Any:
    """Plain JSON data: arrays to lists, numpy and torch scalars to numbers, non-finite floats to None."""
    if isinstance(value, Mapping):
        return {str(k): jsonable(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(v) for v in value]
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if hasattr(value, "tolist"):
        return jsonable(value.tolist())
    return str(value)


def write_text_atomic(path: Path, text: str) -> None:
    """As `write_parts_atomic`, in UTF-8."""
    write_parts_atomic(path, [text.encode()])


def write_parts_atomic(path: Path, parts: Iterable[bytes | memoryview]) -> None:
    """Write so that a reader, or a crash, sees the old file or the new one, never a part."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    with _writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            file.writelines(parts)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise GenacError(
            f"cannot be written: {error.strerror or error}",
            where=str(path),
            way_out="free space or make it writable; --resume goes on from the newest checkpoint",
        ) from error


def write_json_atomic(path: Path, value: Any) -> None:
    """`jsonable(value)` as indented JSON, atomically."""
    write_text_atomic(path, json.dumps(jsonable(value), indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> dict[str, Any] | None:
    """The object of a JSON file; None where it is missing or holds none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def read_jsonl(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The file's objects in order, and how many lines are no JSON object (a write cut off by a crash)."""
    if not path.exists():
        return [], 0
    rows: list[dict[str, Any]] = []
    bad = 0
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                row = None
            if isinstance(row, dict):
                rows.append(row)
            elif line.strip():
                bad += 1
    return rows, bad


class RunFolder:
    """`runs/<name>/`: recipe.yaml, the three logs, checkpoints/, logs/, report/."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @property
    def recipe(self) -> Path:
        return self.path / "recipe.yaml"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def unique_name(self) -> str:
        """The folder's name, with what sets it apart from others of that name elsewhere."""
        digest = hashlib.sha256(os.fsencode(self.path.absolute())).hexdigest()
        return f"{self.path.name[:64]}-{digest[:8]}"

    def beside(self, kind: str, words: Sequence[str]) -> Path:
        """The folder of a command that works beside the run, for its heartbeats, logs and servers' files: a
        run that trains meanwhile has its own. words: the command's; another command has another folder.
        """
        digest = hashlib.sha256("\0".join(words).encode("utf-8", "surrogateescape")).hexdigest()
        return self.path / "evaluate" / f"{kind}-{digest[:8]}"

    @property
    def report(self) -> Path:
        return self.path / "report"

    def create(self) -> RunFolder:
        """Make the folder and its subfolders where they are missing."""
        for folder in (self.path, self.checkpoints, self.logs):
            folder.mkdir(parents=True, exist_ok=True)
        return self

    def rows(self, log: str) -> tuple[list[dict[str, Any]], int]:
        """The rows of one of LOGS, and how many of its lines could not be read."""
        return read_jsonl(self.path / log)

    def append(self, log: str, row: Mapping[str, Any]) -> None:
        """Append one object, flushed to the system before the call returns. It begins a line of its own, also
        behind one that was cut off.
        """
        path = self.path / log
        line = json.dumps(jsonable(row), allow_nan=False) + "\n"
        with _writing(path), path.open("a+b") as file:
            if file.seek(0, os.SEEK_END):
                file.seek(-1, os.SEEK_END)
                line = line if file.read(1) == b"\n" else "\n" + line
            file.write(line.encode())

    def resolved_recipe(self) -> dict[str, Any]:
        """recipe.yaml as plain data; empty where it is missing or no mapping. Raises InputError where it is
        damaged.
        """
        if not self.recipe.exists():
            return {}
        try:
            data = yaml.safe_load(self.recipe.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            what = " ".join(str(error).split())
            raise InputError(
                f"the resolved recipe cannot be read: {what}",
                where=str(self.recipe),
                way_out="put the file back as the run wrote it",
            ) from error
        return data if isinstance(data, dict) else {}

    def told_of_data(self) -> list[str]:
        """The lines of DATA; [] where it is missing or damaged."""
        told = (read_json(self.path / DATA) or {}).get("told")
        return [str(line) for line in told] if isinstance(told, list) else []

    def stage_names(self) -> list[str]:
        """The recipe's stage names in order."""
        stages = self.resolved_recipe().get("stages") or []
        return [str(s.get("name", s.get("kind", ""))) for s in stages if isinstance(s, dict)]

    def rewind(self, counts: Mapping[str, int] | None) -> dict[str, int]:
        """Make the logs end where training goes on, so that no step is logged twice; the rows of each.

        counts: by log, the rows that are kept: later ones are of steps that will be run again. A last line
        that a crash cut off goes. A log that is not counted is kept whole. None (a run from the start): logs
        that hold anything are set aside as `<log>.1`, `<log>.2` and so on.

        Raises InputError where METRICS has fewer rows.
        """
        if counts is None:
            for log in LOGS:
                set_aside(self.path / log)
            return dict.fromkeys(LOGS, 0)
        return {log: self._cut(log, counts.get(log)) for log in LOGS}

    def _cut(self, log: str, count: int | None) -> int:
        path = self.path / log
        rows, bad = read_jsonl(path)
        if count is None and rows:
            logger.warning("genac: warning: %s: an earlier version's checkpoint does not say its rows", path)
        count = len(rows) if count is None else count
        if len(rows) < count and log == METRICS:
            raise InputError(
                f"the checkpoint counts {count} rows, the file holds {len(rows)}",
                where=str(path),
                way_out="put the file back, or resume in a copy of the whole run folder",
            )
        if len(rows) < count:
            logger.warning("genac: warning: %s: %d of %d rows are gone", path, count - len(rows), count)
        if len(rows) > count or bad:
            write_text_atomic(path, "".join(json.dumps(row) + "\n" for row in rows[:count]))
        return min(len(rows), count)


def run_path(recipe: Recipe) -> Path:
    """The recipe's run folder."""
    return Path(recipe.runs) / recipe.name


def set_aside(path: Path) -> Path | None:
    """Rename a file or folder to its name with the first free number; None of a file with nothing in it."""
    if not path.exists() or (path.is_file() and path.stat().st_size == 0):
        return None
    number = 1
    while (aside := path.with_name(f"{path.name}.{number}")).exists():
        number += 1
    return path.replace(aside)
