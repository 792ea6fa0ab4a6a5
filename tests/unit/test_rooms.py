"""Imports run one way: a room leans on those below it (docs/architecture.md)."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "genac_megatron"
# The recipe's blocks are words that all rooms speak, apart from its rules, estimates and loader.
WORDS = {
    *("block", "schema", "stages", "tasks", "environments", "training", "algorithms"),
    *("own_code", "document", "over", "data", "judged", "share", "sharing", "servers", "pipeline"),
}
# Of observe: what every room writes to. The rest of it is the report, which reads a run and its recipe.
LOGS = {
    *("history", "lock", "manifest", "metrics", "origin", "profile", "progress", "runinfo", "sinks"),
    *("timer", "voice"),
}
# Lowest first. Rooms of one line do not import each other.
LEVELS = (
    ("errors",),
    ("dtypes", "compact", "links", "launch", "escaping", "metrics", "platform"),
    ("words",),
    ("records", "algorithms"),
    ("observe",),
    ("models",),
    ("training",),
    ("serving",),
    ("publication",),
    ("tasks",),
    ("environments",),
    ("critic",),
    ("recipe",),
    ("report",),
    ("cluster",),
    ("stages",),
    ("evaluation", "conversion"),
    ("tracing", "watch"),
    ("studies",),
    ("library",),
    ("cli",),
)
RANK = {room: rank for rank, level in enumerate(LEVELS) for room in level}


def room_of(parts: list[str]) -> str:
    """The room of a module, by its path below the package."""
    room = parts[0]
    if room == "recipe" and len(parts) > 1 and parts[1].removesuffix(".py") in WORDS:
        return "words"
    if room == "observe" and len(parts) > 1 and parts[1].removesuffix(".py") not in LOGS:
        return "report"
    return room.removesuffix(".py")


@functools.cache
def parsed(path: Path) -> ast.AST:
    return ast.parse(path.read_text(encoding="utf-8"))


def at_once(tree: ast.AST) -> Iterator[ast.AST]:
    """Every node but those of functions and of `if TYPE_CHECKING`."""
    yield tree
    types = isinstance(tree, ast.If) and isinstance(tree.test, ast.Name) and tree.test.id == "TYPE_CHECKING"
    if not types and not isinstance(tree, ast.FunctionDef | ast.AsyncFunctionDef):
        for child in ast.iter_child_nodes(tree):
            yield from at_once(child)


def imported(tree: ast.AST, *, later: bool = True) -> Iterator[list[str]]:
    """Modules of the package that a file imports, as their paths below it; later: wherever in the file."""
    for node in ast.walk(tree) if later else at_once(tree):
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
        for parts in imported(parsed(path)):
            other = room_of(parts)
            if other != room and RANK[other] >= RANK[room]:
                found.setdefault(own.as_posix(), set()).add(other)
    return found


def test_imports_run_one_way() -> None:
    assert upward() == {}, "these import a room above their own"


def leans_on(*, later: bool) -> dict[str, set[str]]:
    """By file, the files of the package that it imports; later: in functions and for types alone, too."""
    files = {path.relative_to(PACKAGE).with_suffix("").as_posix(): path for path in PACKAGE.rglob("*.py")}
    found = {}
    for name, path in files.items():
        parts = imported(parsed(path), later=later)
        paths = {"/".join(one) for rest in parts for one in (rest, rest[:-1])}
        found[name] = (paths & files.keys()) - {name}
    return found


def test_no_files_import_each_other_in_a_circle() -> None:
    TopologicalSorter(leans_on(later=False)).prepare()  # CycleError names the circle
    studies = {name: leans for name, leans in leans_on(later=True).items() if name.startswith("studies/")}
    TopologicalSorter(studies).prepare()


def test_the_rule_sees_what_it_is_to_see() -> None:
    tree = ast.parse(
        "def f():\n    from genac_megatron.recipe.schema import Recipe\nimport genac_megatron.stages.ppo"
    )
    assert sorted(map(room_of, imported(tree))) == ["stages", "words"]
