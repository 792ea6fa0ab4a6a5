"""From a YAML file and overrides to a checked `Recipe`, and back. Imports no torch.

`extends: base.yaml` (or a list) inherits, relative to the file it stands in. `key.path=value` overrides.
Paths in a recipe that begin with ./ or ../ are relative to the file that holds them; all others are
absolute or relative to the current directory, as in a shell.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from genac_megatron.errors import InputError
from genac_megatron.recipe import document
from genac_megatron.recipe.document import Entry
from genac_megatron.recipe.rules import check
from genac_megatron.recipe.schema import Recipe

__all__ = ["check", "dump_recipe", "load_recipe"]

SHOWN_ERRORS = 5
SHOWN_VALUE = 60  # characters
WORDS = {  # of pydantic's kinds of errors; a kind that is not here keeps its own words
    "int": "must be a whole number",
    "float": "must be a number",
    "string": "must be text",
    "bool": "must be true or false",
    "list": "must be a list",
    "tuple": "must be a list",
    "model": "must be a block of keys",
    "dict": "must be a block of keys",
    "finite": "must be a finite number",
}
BOUNDS = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}
Location = Sequence[str | int]


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read, merge, override, validate and check a recipe.

    Raises InputError, naming file and line (or the override) and the nearest known key.
    """
    root = document.read(Path(path))
    for text in overrides:
        document.override(root, text)
    try:
        recipe = Recipe.model_validate(document.plain(root))
    except ValidationError as error:
        raise _explain(root, error) from None
    _no_true_numbers(root, recipe)
    check(recipe, lambda location: _find(root, location).where)
    return recipe


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML, every default written out; `load_recipe` reads it back to the same."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, width=100, allow_unicode=True)


def _no_true_numbers(entry: Entry, read: Any, path: str = "") -> None:
    """Python's True is 1, and pydantic takes it for one: raise InputError where a value is so read."""
    if isinstance(entry.value, bool) and isinstance(read, int | float) and not isinstance(read, bool):
        raise InputError(
            f"'{path}' must not be true or false (it is {entry.value!r})",
            where=entry.where,
            way_out=f"give it a value such as {read!r}",
        )
    if isinstance(entry.value, list) and isinstance(read, Sequence):
        children: Iterable[tuple[str, Entry, Any]] = (
            (str(i), child, one) for i, (child, one) in enumerate(zip(entry.value, read, strict=False))
        )
    elif isinstance(entry.value, dict):
        get = read.get if isinstance(read, Mapping) else lambda key: getattr(read, key, None)
        children = ((key, child, get(key)) for key, child in entry.value.items())
    else:
        return
    for key, child, one in children:
        _no_true_numbers(child, one, f"{path}.{key}".removeprefix("."))


def _explain(root: Entry, error: ValidationError) -> InputError:
    """One message for what pydantic found: the first fault in full, others on a line each."""
    found = [_explain_one(root, detail) for detail in error.errors(include_url=False)]
    first = found[0]
    also = [
        (f"{place}: " if place else "") + what + (f" ({way_out})" if way_out else "")
        for place, what, way_out in found[1:SHOWN_ERRORS]
    ]
    if len(found) > SHOWN_ERRORS:
        also.append(f"and {len(found) - SHOWN_ERRORS} more")
    return InputError("\n  ".join([first[1], *also]), where=first[0], way_out=first[2])


def _explain_one(root: Entry, detail: Any) -> tuple[str, str, str]:
    location: tuple[str | int, ...] = detail["loc"]
    entry, path = _find(root, location), _readable(root, location)
    kind, context = detail["type"], detail.get("ctx", {})
    if kind == "extra_forbidden":
        return entry.where, f"unknown key '{path}'", _nearest(str(location[-1]), _known_keys(location[:-1]))
    if kind == "missing":
        return entry.where, f"'{path}' is missing", "give it a value"
    if kind == "union_tag_not_found":
        return entry.where, f"'{path}' says no kind", f"add kind: one of {context.get('expected_tags', '')}"
    if kind == "union_tag_invalid":
        what = f"'{path}' has an unknown kind '{context.get('tag')}'"
        tags = [tag.strip(" '") for tag in str(context.get("expected_tags", "")).split(",")]
        return _find(root, (*location, "kind")).where, what, _nearest(str(context.get("tag")), tags)
    what, way_out = in_words(kind, context, str(detail["msg"]), detail["input"])
    instead = way_out or _instead(location, block=kind.startswith(("model", "dict")))
    return entry.where, f"'{path}' {what} (it is {_short(detail['input'])})", instead


def in_words(kind: str, context: Mapping[str, Any], message: str, value: Any) -> tuple[str, str]:
    """What a value must be and the way out, for one of pydantic's errors."""
    if kind == "literal_error":
        known = [word.strip(" '") for word in re.split(r", | or ", str(context.get("expected", "")))]
        near = difflib.get_close_matches(str(value), known, n=1, cutoff=0.6)
        what = f"must be one of {', '.join(known)}" if len(known) > 1 else f"must be {known[0]}"
        return what, f"did you mean '{near[0]}'?" if near else ""
    if bounds := [f"{word} {context[key]}" for key, word in BOUNDS.items() if key in context]:
        return f"must be {' and '.join(bounds)}", ""
    if "min_length" in context or "max_length" in context:
        few = "min_length" in context
        count = context["min_length" if few else "max_length"]
        return (
            f"must have {'at least' if few else 'at most'} {count} {'entry' if count == 1 else 'entries'}",
            "",
        )
    first = kind.split("_")[0]
    if first in WORDS and kind != "model_attributes":
        return WORDS[first], ""
    if kind == "string_pattern_mismatch":
        return f"must be of the form {context.get('pattern')}", ""
    if kind == "value_error":
        said = str(context.get("error", message)).removeprefix("Value error, ")
        return (said if said.startswith("must ") else f"is wrong: {said}"), ""
    message = message[:1].lower() + message[1:]
    return f"is wrong: {message.removeprefix('input ')}", ""


def _instead(location: Location, *, block: bool) -> str:
    """What to do about a value that is none for its key. block: it should be a block of keys."""
    blocks, field = _blocks_at(location)
    if block and blocks:
        kinds = [kind for one in blocks for kind in _kinds(one)]
        known = sorted({key for one in blocks for key in one.model_fields})
        return f"begin it with kind: one of {', '.join(kinds)}" if kinds else f"its keys: {', '.join(known)}"
    if field is None or field.is_required():
        return "docs/reference.md has what it may be"
    default = field.get_default(call_default_factory=True)
    if default is None or isinstance(default, BaseModel):
        return "write such a value, or leave the key out (docs/reference.md)"
    return f"write such a value, or leave the key out (docs/reference.md; default {json.dumps(default)})"


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= SHOWN_VALUE else f"{text[:SHOWN_VALUE]}..."


def _child(entry: Entry, part: str | int) -> Entry | None:
    if isinstance(entry.value, dict):
        return entry.value.get(part)
    if isinstance(entry.value, list) and isinstance(part, int) and part < len(entry.value):
        child: Entry = entry.value[part]
        return child
    return None


def _find(root: Entry, location: Location) -> Entry:
    """The entry at a location, or the innermost one around it. Tags of unions in it are passed by."""
    entry = root
    for part in location:
        entry = _child(entry, part) or entry
    return entry


def _readable(root: Entry, location: Location) -> str:
    """The location as an override would write it: without the tags that pydantic puts in for unions."""
    entry, parts = root, []
    for number, part in enumerate(location):
        child = _child(entry, part)
        if child is not None or number == len(location) - 1:
            parts.append(str(part))
        entry = child or entry
    return ".".join(parts)


def _nearest(word: str, known: Iterable[str]) -> str:
    known = sorted(known)
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"did you mean '{near[0]}'?" if near else f"known here: {', '.join(known)}"


def _known_keys(location: Location) -> set[str]:
    """The keys that the schema knows in the block at a location."""
    return {key for block in _blocks_at(location)[0] for key in block.model_fields}


def _blocks_at(location: Location) -> tuple[list[type[BaseModel]], FieldInfo | None]:
    """The blocks that a location may be, and its field; of an entry of a list or dict, that of the whole."""
    blocks: list[type[BaseModel]] = [Recipe]
    field: FieldInfo | None = None
    for part in location:
        if isinstance(part, int):
            continue
        fields = [block.model_fields[part] for block in blocks if part in block.model_fields]
        if fields:
            field = fields[0]
            blocks = [found for one in fields for found in _blocks_in(one.annotation)]
        else:  # the tag of a union, or the free key of a dict
            tagged = [block for block in blocks if part in _kinds(block)]
            blocks = tagged or blocks
    return blocks, field


def _blocks_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for argument in get_args(annotation) for found in _blocks_in(argument)]


def _kinds(block: type[BaseModel]) -> tuple[Any, ...]:
    return get_args(block.model_fields["kind"].annotation) if "kind" in block.model_fields else ()
