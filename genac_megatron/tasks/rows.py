"""Rows of data files as plain dicts, each with its place: JSON lines, JSON, CSV, TSV, Parquet, also gzipped.

Read here and not by `datasets` where a file is at hand: its builders guess types (an ISO date becomes a time,
"007" becomes 7) and do not say which line is broken.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from genac_megatron.errors import InputError

Row = dict[str, Any]
Located = tuple[str, Row]  # (file:line, or file and row where there are no lines; the row)

JSON_LINES = "each line is one JSON object, in UTF-8"
BOM = b"\xef\xbb\xbf"
UTF16 = (b"\xff\xfe", b"\xfe\xff")
GZIP, LFS = b"\x1f\x8b", b"version https://git-lfs"
LONGEST_NUMBER = 4000  # digits; Python reads no integer beyond 4,300, so a longer one stays text
ROWS_AT_ONCE = 4096  # of Arrow data, that are Python's at a time
LONGEST_CELL = 1 << 30  # characters of a cell of CSV


@dataclass(frozen=True)
class _Form:
    """How a text's lines are a table. Cells of both forms may be quoted, as pandas and `datasets` have it."""

    name: str
    parted_by: str
    sign: str


TABLES = {".csv": _Form("CSV", "commas", ","), ".tsv": _Form("TSV", "tabs", "\t")}


def read_rows(path: str | Path, way_out: str = JSON_LINES) -> list[Located]:
    """`iter_rows`, all of them."""
    return list(iter_rows(path, way_out))


def iter_rows(path: str | Path, way_out: str = JSON_LINES) -> Iterator[Located]:
    """The rows of a file one by one, by its ending (.jsonl, .json, .csv, .tsv, .parquet, perhaps with .gz).

    A name with another ending is read as JSON lines; a file that begins with a list is one JSON array,
    whatever its name. `way_out`: of what is no JSON object. Raises InputError that names the file, and the
    line.
    """
    file = Path(path).expanduser()
    name = file.name.lower().removesuffix(".gz")
    if name.endswith(".parquet"):
        return _parquet(file)
    if name.endswith((".arrow", ".zip", ".zst", ".bz2", ".xz", ".xlsx", ".pkl")):
        raise InputError(
            f"a {file.suffix} file is not read", where=str(path), way_out=f"give one of {', '.join(READERS)}"
        )
    data = _bytes(file, str(path))
    if name.endswith(tuple(TABLES)):
        return _table(data, str(path), TABLES[name[-4:]])
    if data[:256].lstrip()[:1] == b"[":
        return _json_array(data, str(path))
    return json_lines(data, str(path), way_out)


READERS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")  # endings that `read_rows` knows


def json_lines(data: bytes, path: str, way_out: str = JSON_LINES) -> Iterator[Located]:
    """The objects of JSON lines; blank lines are left out. Raises InputError naming `path` and the line."""
    # Not splitlines(), which also cuts at U+2028 and others that a JSON string may hold.
    for number, line in enumerate(data.split(b"\n"), 1):
        if line.strip():
            where = f"{path}:{number}"
            yield where, _object(_parsed(line, where, way_out), where, way_out)


def as_row(row: Any) -> Any:
    """A row of Arrow data as it was meant: a field of a nested struct that is null was not there."""
    if isinstance(row, dict):
        return {key: _present(value) for key, value in row.items()}
    return row


def _present(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _present(part) for key, part in value.items() if part is not None}
    if isinstance(value, list):
        return [_present(part) for part in value]
    return value


def _bytes(file: Path, path: str) -> bytes:
    try:
        data = file.read_bytes()
        if data.startswith(GZIP) or (data and file.suffix.lower() == ".gz"):
            data = gzip.decompress(data)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        way_out = "the file is cut short, broken or no gzip archive: fetch it again"
        raise InputError(f"cannot be read: {error}", where=path, way_out=way_out) from error
    except IsADirectoryError as error:
        raise InputError(
            "cannot be read: it is a folder",
            where=path,
            way_out="name a file; folders are read by kind: datasets (name: FOLDER)",
        ) from error
    except OSError as error:
        raise InputError(
            f"cannot be read: {error.strerror or error}",
            where=path,
            way_out="give a file that is there and that you may read",
        ) from error
    if data.startswith(LFS):
        raise _pointer(path)
    if data.startswith(UTF16):
        raise InputError("cannot be read: it is in UTF-16", where=path, way_out="save it as UTF-8")
    return data.removeprefix(BOM)


def _pointer(path: str) -> InputError:
    return InputError("is a pointer of Git LFS, not the file", where=path, way_out="fetch it: git lfs pull")


def _integer(text: str) -> int | str:
    return int(text) if len(text) <= LONGEST_NUMBER else text


def _parsed(text: bytes, where: str, way_out: str) -> Any:
    try:
        return json.loads(text.decode("utf-8"), parse_int=_integer, object_pairs_hook=_pairs)
    except UnicodeDecodeError as error:
        raise InputError(f"not UTF-8: {error.reason}", where=where, way_out=way_out) from error
    except json.JSONDecodeError as error:
        what = f"not JSON: {error.msg} at column {error.colno}"
        raise InputError(what, where=where, way_out=way_out) from error
    except RecursionError as error:
        raise InputError("not read: nested too deeply", where=where, way_out=way_out) from error
    except _Twice as error:
        raise InputError(str(error), where=where, way_out="keep one of them") from error


class _Twice(Exception):
    """A key that an object has twice: nobody knows which value is meant."""


def _pairs(pairs: list[tuple[str, Any]]) -> Row:
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        raise _Twice(f"the key {next(n for n in names if names.count(n) > 1)!r} stands twice in an object")
    return row


def _object(row: Any, where: str, way_out: str) -> Row:
    if not isinstance(row, dict):
        raise InputError(f"a {type(row).__name__}, not an object", where=where, way_out=way_out)
    return row


def _json_array(data: bytes, path: str) -> Iterator[Located]:
    way_out = "the file is one JSON array of objects, or one object a line"
    for number, row in enumerate(_parsed(data, path, way_out), 1):
        where = f"{path}, item {number}"
        yield where, _object(row, where, way_out)


def _table(data: bytes, path: str, form: _Form) -> Iterator[Located]:
    """Every cell is text, as it stands. The line is the row's first."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise InputError(
            f"not UTF-8: {error.reason}", where=f"{path}:{line}", way_out="save it as UTF-8"
        ) from error
    csv.field_size_limit(LONGEST_CELL)
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=form.sign, strict=True)
    begins = _guarded(lambda: (reader.fieldnames, reader.line_num)[1], path, 1, form) + 1
    reader.fieldnames = _columns(reader.fieldnames or (), path, form)
    while (row := _guarded(lambda: next(reader, None), path, begins, form)) is not None:
        where = f"{path}:{begins}"
        if None in row:
            raise InputError(
                f"{len(row[None])} cells more than the header has columns",  # type: ignore[call-overload]
                where=where,
                way_out=f"put text with {form.parted_by} or line ends in double quotes",
            )
        yield where, {str(key): cell for key, cell in row.items()}
        begins = reader.line_num + 1


def _columns(header: Sequence[str], path: str, form: _Form) -> list[str]:
    """The names of a table's columns, without the blanks around them."""
    names = [name.strip() for name in header]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        what = f"two columns are called {twice!r}"
        raise InputError(what, where=f"{path}:1", way_out="rename one of them")
    if len(names) == 1 and any(sign in names[0] for sign in ",;\t|"):
        what = f"one column, called {names[0]!r}"
        raise InputError(what, where=f"{path}:1", way_out=f"part the columns by {form.parted_by}")
    return names


def _guarded(act: Callable[[], Any], path: str, line: int, form: _Form) -> Any:
    """What `act` gives, which reads the row that begins at `line`."""
    try:
        return act()
    except csv.Error as error:
        where = f"{path}:{line}"
        way_out = 'double quotes in a cell are written twice: "" (and see that each is closed)'
        raise InputError(f"not {form.name}: {error}", where=where, way_out=way_out) from error


def _parquet(file: Path) -> Iterator[Located]:
    import pyarrow
    import pyarrow.parquet

    try:
        with file.open("rb") as opened:
            if opened.read(len(LFS)) == LFS:
                raise _pointer(str(file))
        table = pyarrow.parquet.read_table(file)
        schema, batches = table.schema, table.to_batches(max_chunksize=ROWS_AT_ONCE)
        rows = (row for batch in batches for row in batch.to_pylist())
        shorten = shortener(schema)
        for number, row in enumerate(rows):
            yield f"{file}, row {number}", as_row(shorten(row))
    except (OSError, pyarrow.ArrowException) as error:
        what = error.strerror if isinstance(error, OSError) and error.strerror else str(error).splitlines()[0]
        raise InputError(
            f"cannot be read: {what}", where=str(file), way_out="give a whole parquet file: fetch it again"
        ) from error
    except UnicodeDecodeError as error:
        raise InputError(
            f"a column of text holds what is not UTF-8: {error.reason}",
            where=str(file),
            way_out="write its texts as UTF-8",
        ) from error


def shortener(schema: Any) -> Callable[[Row], Row]:
    """What makes a row's numbers of half and single precision those that were meant: 0.1, and not
    0.10000000149011612.

    schema: pyarrow's, of the rows.
    """
    narrow = {field.name: field.type for field in schema if _is_narrow(field.type)}
    if not narrow:
        return lambda row: row
    return lambda row: {
        key: _shortest(value, narrow[key]) if key in narrow else value for key, value in row.items()
    }


def _inner(kind: Any) -> list[Any]:
    return [kind.field(n) for n in range(kind.num_fields)]


def _is_narrow(kind: Any) -> bool:
    if str(kind) in ("float", "halffloat"):
        return True
    return any(_is_narrow(field.type) for field in _inner(kind))


def _shortest(value: Any, kind: Any) -> Any:
    import numpy

    if isinstance(value, float):
        single = {"float": numpy.float32, "halffloat": numpy.float16}.get(str(kind))
        return value if single is None else float(str(single(value)))
    fields = _inner(kind)
    if isinstance(value, dict):
        kinds = {field.name: field.type for field in fields}
        return {key: _shortest(part, kinds[key]) for key, part in value.items()}
    if isinstance(value, list) and len(fields) == 1:
        return [_shortest(part, fields[0].type) for part in value]
    return value
