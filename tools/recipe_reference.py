"""docs/reference.md, made from the recipe's schema: every key, its type, default and meaning.

    python -m tools.recipe_reference            write the page
    python -m tools.recipe_reference --check    exit code 2 where it is not what the schema gives

Types and defaults are pydantic's; a key's meaning is the comment beside it, or above it, in
genac_megatron/recipe/. What a key of a base class means holds where its comment is not given anew.
"""

from __future__ import annotations

import argparse
import inspect
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from genac_megatron.recipe.schema import Recipe

REPOSITORY = Path(__file__).resolve().parent.parent
PAGE = REPOSITORY / "docs" / "reference.md"
SHOWN_PLACES = 3
NAMES = {str: "text", int: "integer", float: "number", bool: "true or false", NoneType: "null", Any: "any"}
BOUNDS = (("ge", "≥"), ("gt", ">"), ("le", "≤"), ("lt", "<"))

HEAD = """# Reference: the keys of a recipe

Made from the schema by `make reference`; a test holds it to that. A recipe is one YAML, `genac run RECIPE
--resolved` prints it with every default. An unknown key is an error that names the nearest one.

## How values come together
- `extends: base.yaml`, or a list of files, each relative to the file that it stands in: mappings merge key by
  key; all else, lists too, is replaced. A mapping whose `kind` is another replaces its base whole.
- `key.path=value` on the command line comes last. Entries of a list go by index, name or kind:
  `stages.ppo.steps=5`.
- **A stage's block stands over the role's.** `optimizer`, `actor_optimizer` and `critic_optimizer` of a stage
  merge key by key with the role's `optimizer`: what is not written there is the role's, and where the role
  does not say it either, the default of this page. A source's `teacher` and `rollout` merge with its stage's
  in the same way (a `teacher` of another `kind` has nothing of the stage's). To have a default again, write
  it out; `null` where it is that. A source's `task` is a task of its own, whole. Every other block belongs to
  its stage alone.
- A role with `model.share` takes over the other role's `model`, and its `layout` where it has none; one with
  `engine.share` the other's `engine`, key by key under its own.
- A path that begins with `./` or `../` is relative to the file that it stands in; any other one is absolute
  or relative to the current directory.

"Required" means that there is no default. A default in *italics* says that the block is there with its own.
`NAME` stands for a name that you choose, `N` for a place in a list, `stages.ppo` for a stage of that kind."""


@dataclass
class Section:
    """A block of the recipe and where it may stand."""

    block: type[BaseModel]
    places: list[str] = field(default_factory=list)


def sections() -> list[Section]:
    """Every block, each once, in the order in which a recipe meets them."""
    found: dict[type[BaseModel], Section] = {}

    def walk(block: type[BaseModel], place: str) -> None:
        section = found.setdefault(block, Section(block))
        section.places.append(place)
        before = f"{place.partition(' ')[0]}." if place else ""
        for key, info in block.model_fields.items():
            for inner, suffix in _blocks_in(info.annotation):
                kind = kind_of(inner)
                if kind is not None and suffix == ".N":  # an override names a stage by its kind
                    suffix, kind = f".{kind}", None
                walk(inner, f"{before}{key}{suffix}" + (f" (kind: {kind})" if kind else ""))

    walk(Recipe, "")
    return list(found.values())


def _blocks_in(annotation: Any, suffix: str = "") -> Iterator[tuple[type[BaseModel], str]]:
    """The blocks that a key may hold, and what follows its name where they stand in a list or by a name."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation, suffix
        return
    many = {dict: ".NAME", list: ".N"}.get(get_origin(annotation), "")
    for argument in get_args(annotation):
        yield from _blocks_in(argument, suffix + many)


def kind_of(block: type[BaseModel]) -> str | None:
    """The `kind` that says which block it is; None where none has to."""
    info = block.model_fields.get("kind")
    return str(get_args(info.annotation)[0]) if info is not None and info.is_required() else None


# --- what the source says ------------------------------------------------------------------------


@dataclass
class Comments:
    """Of a block's source: what is said of its keys, and what is said before a key of all that follow."""

    of: dict[str, str] = field(default_factory=dict)
    before: dict[str, str] = field(default_factory=dict)


@cache
def comments(block: type[BaseModel]) -> Comments:
    """The comments beside and above the keys in the block's own source."""
    lines = inspect.getsource(block).splitlines()
    beside = {
        token.start[0]: token.string.lstrip("# ").strip()
        for token in tokenize.generate_tokens(io.StringIO(inspect.getsource(block)).readline)
        if token.type == tokenize.COMMENT
    }
    made = Comments()
    for key in inspect.get_annotations(block):
        first = next((n for n, text in enumerate(lines, 1) if re.match(rf"    {key}\s*:", text)), None)
        if first is None:  # an attribute that is no key
            continue
        last = first
        while last < len(lines) and lines[last].startswith((" " * 8, "    )")):
            last += 1
        above: list[str] = []
        line = first - 1
        while line in beside and lines[line - 1].lstrip().startswith("#"):
            above.insert(0, beside[line])
            line -= 1
        said = " ".join(above)
        if said.startswith("What follows"):
            made.before[key], said = said, ""
        words = [said, *(beside[n] for n in range(first, last + 1) if n in beside)]
        made.of[key] = " ".join(word for word in words if word)
    return made


def meaning(block: type[BaseModel], key: str) -> str:
    """What is said of a key in the block's source, or in that of the base which says something; of a block
    that it holds, what this one says of itself.
    """
    for base in block.__mro__:
        if issubclass(base, BaseModel) and (said := comments(base).of.get(key)):
            return re.sub(r"\bNone\b", "null", said)
    if key == "kind" and kind_of(block):
        return "which block this is"
    inner = [one for one, _ in _blocks_in(block.model_fields[key].annotation)]
    if not inner:
        return ""
    said = _doc(inner[0]) if len(inner) == 1 else ""
    return re.split(r"(?<=\.)\s", said)[0].rstrip(".") or "a block: see there"


def _doc(block: type[BaseModel]) -> str:
    """What a block says of itself, paragraph by paragraph."""
    said = inspect.cleandoc(block.__dict__.get("__doc__") or "")
    return "\n\n".join(" ".join(text.split()) for text in said.split("\n\n"))


# --- types and defaults --------------------------------------------------------------------------


def type_of(info: FieldInfo) -> str:
    """A key's type in words, with bounds and links to blocks."""
    return _with_bounds(_type(info.annotation), info.metadata)


def _type(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        bounds: list[Any] = []
        for one in arguments[1:]:
            bounds += one.metadata if isinstance(one, FieldInfo) else [one]
        return _with_bounds(_type(arguments[0]), bounds)
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys(_type(argument) for argument in arguments))
    if origin is list:
        return f"list of {_type(arguments[0])}"
    if origin is tuple:
        return f"pair of {_type(arguments[0])}"
    if origin is dict:
        return f"mapping of names to {_type(arguments[1])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return f"[{annotation.__name__}](#{annotation.__name__.lower()})"
    return NAMES.get(annotation, getattr(annotation, "__name__", str(annotation)))


def _with_bounds(words: str, metadata: list[Any]) -> str:
    said = [
        f"{sign} {_yaml(getattr(one, name)).removesuffix('.0')}"
        for one in metadata
        for name, sign in BOUNDS
        if getattr(one, name, None) is not None
    ]
    if any(getattr(one, "min_length", None) for one in metadata):
        said.append("not empty")
    return f"{words} ({', '.join(said)})" if said else words


def default_of(info: FieldInfo) -> str:
    """A key's default as YAML has it."""
    if info.is_required():
        return "required"
    value = info.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        return "*its own*"
    return f"`{_yaml(value)}`"


def _yaml(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return str(value).lower().replace("none", "null")
    if isinstance(value, str):
        return value or '""'
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_yaml, value))}]"
    return str(value)


# --- the page ------------------------------------------------------------------------------------


def page() -> str:
    """The whole page."""
    found = sections()
    files: dict[str, list[Section]] = {}
    for section in found:
        files.setdefault(Path(inspect.getfile(section.block)).name, []).append(section)
    contents = [
        f"- `genac_megatron/recipe/{name}`: "
        + ", ".join(_type(section.block) for section in sorted(listed, key=lambda one: one.block.__name__))
        for name, listed in files.items()
    ]
    return (
        "\n\n".join(
            [HEAD, "## The blocks, by file", "\n".join(contents), *(_section(section) for section in found)]
        )
        + "\n"
    )


def _section(section: Section) -> str:
    block = section.block
    parts = [f"## {block.__name__}"]
    places = [f"`{place}`" for place in dict.fromkeys(section.places) if place]
    if places:
        more = f" and {len(places) - SHOWN_PLACES} further places" if len(places) > SHOWN_PLACES else ""
        parts.append(f"Stands at {', '.join(places[:SHOWN_PLACES])}{more}.")
    if said := _doc(block):
        parts.append(said)
    rows = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for key, info in block.model_fields.items():
        if note := comments(block).before.get(key):
            rows.append(f"| | | | *{_cell(note)}* |")
        cells = (f"`{key}`", type_of(info), default_of(info), meaning(block, key))
        rows.append("| " + " | ".join(map(_cell, cells)) + " |")
    return "\n\n".join([*parts, "\n".join(rows)])


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def main() -> int:
    """Write the page, or say whether it is what the schema gives."""
    parser = argparse.ArgumentParser(description="docs/reference.md, made from the recipe's schema")
    parser.add_argument("--check", action="store_true", help="write nothing")
    if not parser.parse_args().check:
        PAGE.write_text(page(), encoding="utf-8")
        return 0
    if PAGE.is_file() and PAGE.read_text(encoding="utf-8") == page():
        return 0
    print("docs/reference.md is not what the schema gives: make reference", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
