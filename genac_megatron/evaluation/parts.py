"""Long work in a folder, piece by piece, so that a killed command goes on where it was.

    FOLDER/
        plan.json        what the work is: the same command must say the same to go on
        parts/*.jsonl    one row per finished piece; every process appends to a file of its own
        NAME.jsonl       all rows in order, written once the last piece is done; parts/ goes then
        manifest.json    written last: a folder without it is unfinished

A piece's row depends on the plan alone, so which process made it, and when, changes nothing.
Lone surrogates, which no file can hold, are replaced in rows.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from genac_megatron.errors import GenacError, InputError
from genac_megatron.observe.lock import LOCK, FolderLock
from genac_megatron.observe.runinfo import jsonable, read_jsonl, write_json_atomic, write_text_atomic

PLAN, MANIFEST, PARTS = "plan.json", "manifest.json", "parts"
SURROGATES = re.compile("[\ud800-\udfff]")
Row = dict[str, Any]
Key = tuple[int, ...]


class Parts:
    """The rows of one piece of work, by `keys`: the fields, all integers, that name a row. `other`: what whom
    the folder is refused to can do.

    `begin` and `finish` are for one process, which holds the folder in between; `append` for each.
    """

    def __init__(
        self, folder: Path, name: str, keys: tuple[str, ...], other: str = "name a new folder"
    ) -> None:
        self.folder, self.name, self.keys, self.other = folder, name, keys, other
        self._file: Path | None = None
        self._lock: FolderLock | None = None

    @property
    def rows_file(self) -> Path:
        return self.folder / self.name

    @property
    def complete(self) -> bool:
        """Whether the work is done."""
        return (self.folder / MANIFEST).exists()

    def begin(self, plan: Mapping[str, Any]) -> dict[Key, Row]:
        """The rows that are there already, by key. Raises InputError where the folder holds other work, or
        finished work that is damaged, or another process works in it."""
        if not self.complete:
            self._hold()
        wanted = jsonable(plan)
        if (self.folder / PLAN).exists():
            self._compare(self._plan_there(), wanted)
        elif self.folder.exists() and any(path.name != LOCK for path in self.folder.iterdir()):
            raise InputError("the folder holds something else", where=str(self.folder), way_out=self.other)
        else:
            write_json_atomic(self.folder / PLAN, wanted)
        if self.complete:
            return self._by_key(self.read()[1])
        return self._so_far()

    def so_far(self) -> list[Row]:
        """The rows of unfinished work, for who only reads them."""
        return list(self._so_far().values())

    def _so_far(self) -> dict[Key, Row]:
        files = sorted((self.folder / PARTS).glob("*.jsonl"))
        return self._by_key(row for file in files for row in read_jsonl(file)[0])

    def _hold(self) -> None:
        if self._lock is None:
            lock = FolderLock(self.folder, "the evaluation", other=self.other)
            lock.acquire()  # until `finish`, or this process ends
            self._lock = lock

    def whole(self, plan: Mapping[str, Any], keys: Iterable[Key]) -> list[Row]:
        """The rows of all planned keys, in their order, as they are on the disk: what `finish` is given.

        Raises InputError as `begin` does, and where the rows there are not exactly the planned ones.
        """
        found, planned = self.begin(plan), list(keys)
        missing = [key for key in planned if key not in found]
        if missing:
            raise InputError(
                f"{len(missing)} of {len(planned)} rows are not there, the first: {self._named(missing[0])}",
                where=str(self.folder),
                way_out="give a folder that all nodes share; where it is one, the same command goes on from "
                "here",
            )
        surplus = sorted(found.keys() - set(planned))
        if surplus:
            raise InputError(
                f"rows are there that were not planned: {len(surplus)}, the first: {self._named(surplus[0])}",
                where=str(self.folder),
                way_out=self.other,
            )
        return [found[key] for key in planned]

    def append(self, rows: Iterable[Mapping[str, Any]], rank: int) -> None:
        """Keep finished rows, on the disk before the call returns. Raises GenacError where it cannot."""
        text = "".join(_line(row) for row in rows)
        try:
            if self._file is None:  # never one that a killed process may have left with half a line
                (self.folder / PARTS).mkdir(parents=True, exist_ok=True)
                number = len(list((self.folder / PARTS).glob(f"{rank:05d}-*.jsonl")))
                self._file = self.folder / PARTS / f"{rank:05d}-{number:03d}.jsonl"
            with self._file.open("a", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise GenacError(
                f"cannot be written: {error.strerror or error}",
                where=str(self._file or self.folder),
                way_out="free space or make it writable; the same command goes on from here",
            ) from error

    def finish(self, rows: Iterable[Row], manifest: Mapping[str, Any]) -> None:
        """Write all rows (see `whole`), then the manifest; the parts go."""
        if self._lock is not None:
            self._lock.check()
        text = "".join(_line(row) for row in rows)
        write_text_atomic(self.rows_file, text)
        digest = hashlib.sha256(text.encode("utf-8")).hexdigest()
        write_json_atomic(self.folder / MANIFEST, {**manifest, "sha256": digest})
        shutil.rmtree(self.folder / PARTS, ignore_errors=True)
        self.release()

    def release(self) -> None:
        """Let the folder go."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def read(self) -> tuple[Row, list[Row]]:
        """(manifest, rows) of finished work. Raises InputError where there is none, or it is damaged."""
        path = self.folder / MANIFEST
        if not path.exists():
            begun = (self.folder / PLAN).exists()
            raise InputError(
                "it is unfinished" if begun else f"there is no {MANIFEST}",
                where=str(self.folder),
                way_out="run the command that made it again" if begun else "give a folder that was built",
            )
        manifest = _object(path)
        if manifest is None:
            raise self._damaged(f"{MANIFEST} cannot be read")
        try:
            data = self.rows_file.read_bytes()
        except OSError as error:
            raise self._damaged(f"{self.name} cannot be read: {error.strerror}") from error
        if hashlib.sha256(data).hexdigest() != manifest.get("sha256"):
            raise self._damaged(f"{self.name} is not the file that its manifest names")
        return manifest, [json.loads(line) for line in data.decode("utf-8").split("\n") if line]

    def clear(self) -> None:
        """Forget the work, the manifest first: a half-cleared folder is unfinished."""
        self._hold()
        for name in (MANIFEST, self.name):
            (self.folder / name).unlink(missing_ok=True)
        shutil.rmtree(self.folder / PARTS, ignore_errors=True)
        (self.folder / PLAN).unlink(missing_ok=True)

    def _plan_there(self) -> Row:
        found = _object(self.folder / PLAN)
        if found is None:
            raise InputError(f"{PLAN} cannot be read", where=str(self.folder), way_out=self.other)
        return found

    def _damaged(self, what: str) -> InputError:
        again = f"remove {self.name} and {MANIFEST} there, and the command that made them makes them again"
        return InputError(what, where=str(self.folder), way_out=f"restore it; or {again}")

    def _named(self, key: Key) -> str:
        return ", ".join(f"{name} {number}" for name, number in zip(self.keys, key, strict=True))

    def _by_key(self, rows: Iterable[Row]) -> dict[Key, Row]:
        return {tuple(row[key] for key in self.keys): row for row in rows}

    def _compare(self, found: Row, wanted: Row) -> None:
        different = [key for key in sorted({*found, *wanted}) if found.get(key) != wanted.get(key)]
        if different and not set(different) & found.keys():
            raise InputError(
                f"another version of GenAC-Megatron began this work: its plan says nothing of "
                f"{', '.join(different)}",
                where=str(self.folder),
                way_out=f"{self.other}; what is finished can be used as it is",
            )
        if different:
            key = different[0]
            there, here = _apart(found.get(key), wanted.get(key))
            raise InputError(
                f"the folder holds work with another {', '.join(different)} "
                f"({key}: {_short(there)} there, {_short(here)} here)",
                where=str(self.folder),
                way_out=f"go on with the command that began it, or {self.other}",
            )


def _object(path: Path) -> Row | None:
    """The JSON object of a file; None where it holds none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _line(row: Mapping[str, Any]) -> str:
    text = json.dumps(jsonable(row), allow_nan=False, ensure_ascii=False)
    return SURROGATES.sub("\ufffd", text) + "\n"


def _apart(there: Any, here: Any) -> tuple[Any, Any]:
    """Of two objects what differs alone; other values as they are."""
    if not isinstance(there, dict) or not isinstance(here, dict):
        return there, here
    names = [name for name in sorted({*there, *here}) if there.get(name) != here.get(name)]
    return {name: there.get(name) for name in names}, {name: here.get(name) for name in names}


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
