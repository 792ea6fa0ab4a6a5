"""YAML documents that remember where each value stands: reading, inheritance, overrides. No torch.

A document is a tree of entries; each knows the file and line, or the override, that it comes from. YAML is
read by version 1.2's rules for plain scalars: `on`, `off`, `yes` and `no` are text, `1e-6` is a number.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from genac_megatron.errors import InputError

YAML = "correct it there; text with : # { or [ in it needs quotes"
# Keys whose value may be a path. One that begins with ./ or ../ is relative to the file that holds it.
PATH_KEYS = frozenset(
    {
        "hf",
        "tokenizer",
        "path",
        "heldout_path",
        "template",
        "name",
        "runs",
        "pass_rates",
        "chat_template",
        "checkpoint",
        "base",
        "peft",
    }
)


@dataclass
class Entry:
    """A value: a scalar, or a dict or list of entries; `where` is "file:line" or "override a.b=c"."""

    value: Any
    where: str


class _Loader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2's plain scalars."""


_Loader.yaml_implicit_resolvers = {}
_DIGITS = "[0-9][0-9_]*"
_EXPONENT = "[eE][-+]?[0-9]+"
_PLAIN = {  # tag: pattern, the characters it can begin with
    "bool": ("true|True|TRUE|false|False|FALSE", "tTfF"),
    "int": ("[-+]?(?:0|[1-9][0-9_]*)|0x[0-9a-fA-F]+", "-+0123456789"),
    "float": (
        rf"[-+]?(?:(?:\.[0-9]+|{_DIGITS}\.[0-9]*)(?:{_EXPONENT})?|{_DIGITS}{_EXPONENT}|\.(?:inf|Inf|INF))"
        r"|\.(?:nan|NaN|NAN)",
        "-+0123456789.",
    ),
    "null": ("|~|null|Null|NULL", "~nN"),
}
for _tag, (_pattern, _first) in _PLAIN.items():
    _firsts = [*_first, ""] if _tag == "null" else list(_first)
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _firsts)


def plain(entry: Entry) -> Any:
    """The document without its marks."""
    if isinstance(entry.value, dict):
        return {key: plain(child) for key, child in entry.value.items()}
    if isinstance(entry.value, list):
        return [plain(child) for child in entry.value]
    return entry.value


def parse(text: str, source: str, folder: Path, where: str = "") -> Entry:
    """One YAML document. `where` given: the place of everything in it; else "source:line".

    Relative paths (PATH_KEYS) become absolute against `folder`.
    Raises InputError: not YAML, a key twice in a block, a key that is not text.
    """
    try:
        node = _composed(text)
        if node is None:
            return Entry(None, where or f"{source}:1")
        return _entry(_Loader(""), node, source, folder, where)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = where or (f"{source}:{mark.line + 1}" if mark else source)
        raise InputError(f"not YAML: {error.problem or error.context}", where=place, way_out=YAML) from None
    except (yaml.YAMLError, ValueError) as error:
        what = str(error).splitlines()[0]
        raise InputError(f"not YAML: {what}", where=where or source, way_out=YAML) from None
    except RecursionError:
        raise InputError(
            "a block that contains itself", where=where or source, way_out="write it out, or less deep"
        ) from None


@functools.lru_cache(maxsize=256)  # a study reads the same few files for each of its runs
def _composed(text: str) -> yaml.Node | None:
    """The document's nodes, which nobody changes."""
    node: yaml.Node | None = _Loader(text).get_single_node()
    return node


def _entry(loader: _Loader, node: yaml.Node, source: str, folder: Path, where: str) -> Entry:
    place = where or f"{source}:{node.start_mark.line + 1}"
    if isinstance(node, yaml.SequenceNode):
        return Entry([_entry(loader, item, source, folder, where) for item in node.value], place)
    if not isinstance(node, yaml.MappingNode):
        return Entry(loader.construct_object(node), place)  # type: ignore[no-untyped-call]
    children: dict[str, Entry] = {}
    for key_node, value_node in node.value:
        key = key_node.value
        place_of_key = where or f"{source}:{key_node.start_mark.line + 1}"
        if not isinstance(key, str):
            raise InputError("a key must be text", where=place_of_key, way_out="write it as in key: value")
        if key in children:
            raise InputError(
                f"the key '{key}' is here twice",
                where=place_of_key,
                way_out=f"keep one; the first is at {children[key].where}",
            )
        child = _entry(loader, value_node, source, folder, where)
        if _holds_path(key, child.value) and child.value.startswith(("./", "../")):
            child.value = str((folder / child.value).resolve())
        # An error about a block names the line of its key, not of its first child.
        children[key] = Entry(child.value, place_of_key)
    return Entry(children, place)


def _holds_path(key: str, value: Any) -> bool:
    """Whether a value may be a path: `python` may be file.py:function, or an interpreter in a PATH."""
    return isinstance(value, str) and (key in PATH_KEYS or (key == "python" and ".py:" in value))


def read(path: Path, chain: tuple[Path, ...] = ()) -> Entry:
    """A recipe file with everything it extends merged under it; `chain` is who extends it.

    Raises InputError: a missing or unreadable file, a circle of `extends`, not a mapping.
    """
    real = path.resolve()
    if real in chain:
        circle = " -> ".join(str(p.name) for p in (*chain[chain.index(real) :], real))
        raise InputError(
            f"recipes extend each other in a circle: {circle}",
            where=str(path),
            way_out="take one `extends` out",
        )
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        way_out = "give a recipe's YAML file" if isinstance(error, OSError) else "save it as UTF-8"
        raise InputError(f"cannot read the recipe: {reason}", where=str(path), way_out=way_out) from None
    own = parse(text, str(path), path.parent)
    if not isinstance(own.value, dict):
        raise InputError(
            "a recipe is a mapping of keys to values",
            where=own.where,
            way_out="write keys such as name:, roles:, task: and stages: (recipes/quickstart.yaml)",
        )
    extends = own.value.pop("extends", None)
    if extends is None:
        return own
    listed = extends.value if isinstance(extends.value, list) else [extends]
    merged = Entry({}, own.where)
    for base in listed:
        if not isinstance(base.value, str):
            raise InputError(
                "`extends` is a path or a list of paths", where=base.where, way_out="extends: ./other.yaml"
            )
        target = path.parent / base.value
        if not target.is_file():
            raise InputError(
                f"extends {base.value}, and there is no such file",
                where=base.where,
                way_out="the path is relative to the file it stands in",
            )
        merged = merge(merged, read(target, (*chain, real)))
    return merge(merged, own)


def files(path: Path) -> dict[str, str]:
    """The text of a recipe file that `read` has read, and of all that it extends."""
    text = path.read_text(encoding="utf-8")
    found = {str(path): text}
    extends = plain(parse(text, str(path), path.parent)).get("extends") or []
    for base in extends if isinstance(extends, list) else [extends]:
        found |= files(path.parent / base)
    return found


def merge(base: Entry, over: Entry) -> Entry:
    """`over` on top of `base`: mappings merge key by key, all else is replaced, lists too.

    A mapping that changes its `kind` replaces its base: the keys of one kind mean nothing to another.
    """
    if not (isinstance(base.value, dict) and isinstance(over.value, dict)):
        return over
    kind, old_kind = over.value.get("kind"), base.value.get("kind")
    if kind and old_kind and kind.value != old_kind.value:
        return over
    children = dict(base.value)
    for key, child in over.value.items():
        children[key] = merge(children[key], child) if key in children else child
    return Entry(children, over.where)


def override(document: Entry, text: str) -> None:
    """Set one value in place: "a.b.2.c=value", the value in YAML. A list takes an index, or an entry's name
    or kind ("stages.ppo.steps=5"). Raises InputError: no "=", no such index, a scalar on the way.
    """
    where = f"override {text}"
    path, equals, value = text.partition("=")
    parts = [part.strip() for part in path.split(".")]
    if not equals or not all(parts):
        raise InputError("not an override", where=where, way_out="write key.path=value")
    target = document
    for done, part in enumerate(parts[:-1], 1):
        if isinstance(target.value, list):
            target = target.value[_position(target.value, part, parts[:done], where)]
        else:
            target = _block(target, parts[: done - 1], where).setdefault(part, Entry(None, where))
    entry = parse(value, where, Path.cwd(), where)
    last = parts[-1]
    if _holds_path(last, entry.value) and entry.value.startswith(("./", "../")):
        entry.value = str((Path.cwd() / entry.value).resolve())
    if isinstance(target.value, list):
        target.value[_position(target.value, last, parts, where)] = entry
    else:
        _block(target, parts[:-1], where)[last] = entry


def _block(target: Entry, path: Sequence[str], where: str) -> dict[str, Entry]:
    if target.value is None:
        target.value = {}
    if not isinstance(target.value, dict):
        raise InputError(
            f"{'.'.join(path)} is a value, not a block with keys",
            where=where,
            way_out=f"set it by {'.'.join(path)}=..., or name a key of a block (docs/reference.md)",
        )
    return target.value


def _position(items: list[Entry], part: str, path: Sequence[str], where: str) -> int:
    if part.isdecimal() and int(part) < len(items):
        return int(part)
    for key in ("name", "kind"):
        found = [
            i
            for i, item in enumerate(items)
            if isinstance(item.value, dict) and key in item.value and item.value[key].value == part
        ]
        if len(found) == 1:
            return found[0]
    raise InputError(
        f"{'.'.join(path)}: the list has no such entry",
        where=where,
        way_out=f"an index from 0 to {len(items) - 1}, or the name or kind of one entry",
    )
