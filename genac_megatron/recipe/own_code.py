"""Functions of the user's own that a recipe names: `path/to/file.py:function` or `package.module:function`.

A file is parsed, never imported, so that a recipe is checked without running what it names.
"""

from __future__ import annotations

import ast
import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from genac_megatron.errors import InputError

FORM = "write path/to/file.py:function, or package.module:function"
NEAR = 5  # names that a message lists


@dataclass(frozen=True)
class Named:
    """A function by its file, or by its module's name."""

    place: str
    function: str

    @property
    def in_file(self) -> bool:
        return self.place.endswith(".py")

    @property
    def path(self) -> Path:
        """Of a function `in_file`."""
        return Path(self.place).expanduser()

    def __str__(self) -> str:
        return f"{self.place}:{self.function}"


def parse_named(text: str, where: str = "") -> Named:
    """The function that `text` names. Raises InputError where it has another form."""
    place, _, function = text.rpartition(":")
    module = all(part.isidentifier() for part in place.split("."))
    if not function.isidentifier() or not (place.endswith(".py") or module):
        raise InputError(f"'{text}' names no function of a file or module", where=where, way_out=FORM)
    return Named(place, function)


def check_named(named: Named, where: str) -> None:
    """Raise InputError where the file is not there, is no Python or lacks the function.

    A module's function shows only when it is imported, before training begins.
    """
    if not named.in_file:
        return
    try:
        tree = ast.parse(named.path.read_bytes(), filename=named.place)
    except OSError as error:
        raise InputError(
            f"{named.place} cannot be read: {error.strerror}",
            where=where,
            way_out="a path that begins with ./ is relative to the recipe, others to the current directory",
        ) from error
    except (SyntaxError, ValueError) as error:  # ValueError: null bytes
        line = f":{error.lineno}" if isinstance(error, SyntaxError) and error.lineno else ""
        what = error.msg if isinstance(error, SyntaxError) else str(error)
        way_out = "correct the file: what it holds is imported when the run begins"
        raise InputError(f"not Python: {what}", where=f"{named.place}{line}", way_out=way_out) from error
    names = set(_bound(tree.body))
    if named.function not in names and "*" not in names:
        near = difflib.get_close_matches(named.function, names, n=1, cutoff=0.5)
        known = ", ".join(sorted(name for name in names if not name.startswith("_"))[:NEAR])
        raise InputError(
            f"{named.place} has no function '{named.function}'",
            where=where,
            way_out=f"did you mean {near[0]}?" if near else f"there is: {known or 'nothing'}",
        )


def _bound(body: list[ast.stmt]) -> Iterator[str]:
    """Names that a module's statements bind, those under an if, try or with among them."""
    for statement in body:
        match statement:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                yield name
            case ast.Assign(value=ast.Constant() | ast.Dict() | ast.Set()):
                pass  # no function
            case ast.Import(names=aliases) | ast.ImportFrom(names=aliases):
                yield from (alias.asname or alias.name.split(".")[0] for alias in aliases)
            case _:
                yield from (
                    node.id
                    for node in ast.walk(statement)
                    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
                )
                for part in ("body", "orelse", "finalbody"):
                    yield from _bound(getattr(statement, part, []))
                for handler in getattr(statement, "handlers", []):
                    yield from _bound(handler.body)
