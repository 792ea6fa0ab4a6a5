"""Imports run one way: a room leans on those below it (docs/architecture.md)."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "genac_megatron"
# The recipe's blocks are words that all rooms speak, apart from its rules, estimates and loader.
WORDS = {
    *("block", "schema", "stages", "tasks", "training", "algorithms"),
    *("own_code", "document", "over", "data", "sharing", "servers", "pipeline"),
}
# Lowest first. Rooms of one line do not import each other.
LEVELS = (
    ("errors",),
    ("dtypes", "links", "launch", "escaping", "metrics", "platform"),
    ("words",),
    ("records", "algorithms"),
    ("observe",),
    ("models",),
    ("training",),
    ("serving",),
    ("publication",),
    ("tasks",),
    ("critic",),
    ("recipe",),
    ("cluster",),
    ("stages",),
    ("evaluation", "conversion"),
    ("tracing",),
    ("studies",),
    ("library",),
    ("cli",),
)
RANK = {room: rank for rank, level in enumerate(LEVELS) for room in level}
# What still goes upward, by file: each line is a debt, and one that is paid must leave this list.
KNOWN = {
    "cluster/job.py": {"stages"},  # what a resume must have in common with the run before
    "evaluation/score.py": {"tracing"},  # who is asked about a file of problems
    "models/build.py": {"training"},  # a layout's numbers, and log-probs as the model's output
    "observe/report_page.py": {"recipe"},  # what of a role trains, in words
    "serving/sglang/fleet.py": {"recipe"},  # a server's share of its GPU
    "serving/sglang/loading.py": {"publication"},  # tensors by value
}


def room_of(parts: list[str]) -> str:
    """The room of a module, by its path below the package."""
    room = parts[0]
    if room == "recipe" and len(parts) > 1 and parts[1].removesuffix(".py") in WORDS:
        return "words"
    return room.removesuffix(".py")


def imported(tree: ast.AST) -> Iterator[list[str]]:
    """Modules of the package that a file imports, wherever in it, as their paths below the package."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            first, *rest = name.split(".")
            if first == PACKAGE.name and rest and rest[0] in RANK:
                yield rest


def upward() -> dict[str, set[str]]:
    """By file, the rooms that it imports and that are not below its own."""
    found: dict[str, set[str]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        own = path.relative_to(PACKAGE)
        room = room_of(list(own.parts))
        if room in ("__init__", "__main__"):
            continue
        assert room in RANK, f"{room} is a new room: give it its level"
        for parts in imported(ast.parse(path.read_text(encoding="utf-8"))):
            other = room_of(parts)
            if other != room and RANK[other] >= RANK[room]:
                found.setdefault(own.as_posix(), set()).add(other)
    return found


def test_imports_run_one_way() -> None:
    found = upward()
    new = {path: rooms - KNOWN.get(path, set()) for path, rooms in found.items()}
    assert {path: rooms for path, rooms in new.items() if rooms} == {}, "these import a room above their own"
    paid = {path: rooms - found.get(path, set()) for path, rooms in KNOWN.items()}
    assert {path: rooms for path, rooms in paid.items() if rooms} == {}, "no debt any more: take it off KNOWN"


def test_the_rule_sees_what_it_is_to_see() -> None:
    tree = ast.parse(
        "def f():\n    from genac_megatron.recipe.schema import Recipe\nimport genac_megatron.stages.ppo"
    )
    assert sorted(map(room_of, imported(tree))) == ["stages", "words"]
