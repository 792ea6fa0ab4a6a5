"""Names that become folders and files: of the run, of stages and roles."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence

from genac_megatron.errors import InputError
from genac_megatron.recipe.schema import Recipe

NO_TEXT = ("Cc", "Cs", "Zl", "Zp")  # control characters, half characters, line and paragraph ends
LONGEST = 200  # bytes; file systems allow 255, and files have more in their names than the stage's


def check_names(recipe: Recipe, where: Callable[[Sequence[str | int]], str]) -> None:
    """Raise InputError where a name is not one that a folder or file can have. `where`: of a key."""
    if recipe.name.startswith("/"):  # also what ./ and ../ have become
        raise InputError(
            f"the run's name is a path, {recipe.name[:LONGEST]!r}",
            where=where(("name",)),
            way_out="give it a plain name; `runs` is the folder that it lies in, and may be anywhere",
        )
    for part in recipe.name.split("/"):
        if why := _wrong_with(part):
            raise InputError(
                f"the run's name {recipe.name[:LONGEST]!r} {why}",
                where=where(("name",)),
                way_out="name a folder below `runs` (a/b is one in another), which may be anywhere",
            )
    names: list[tuple[tuple[str | int, ...], str]] = [(("roles", name), name) for name in recipe.roles]
    names += [(("stages", index, "name"), stage.name) for index, stage in enumerate(recipe.stages)]
    for place, name in names:
        if why := "has a slash" if "/" in name else _wrong_with(name):
            raise InputError(
                f"the name {name[:LONGEST]!r} {why}", where=where(place), way_out="a name like sft-actor"
            )
        if name.startswith("."):
            raise InputError(
                f"the name {name!r} begins with a dot, as what is no checkpoint yet does",
                where=where(place),
                way_out="a name like sft-actor",
            )


def _wrong_with(name: str) -> str:
    """Why a file cannot have this name; "" where it can."""
    if name in ("", ".", ".."):
        return "names no folder of its own" if name else "has an empty part"
    if any(unicodedata.category(letter) in NO_TEXT for letter in name):
        return "has a line break or another control character"
    if len(name.encode("utf-8")) > LONGEST:
        return f"is longer than {LONGEST} bytes"
    return ""
