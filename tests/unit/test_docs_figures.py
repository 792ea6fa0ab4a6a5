"""The glossary of figures has every name that the code logs, and no other."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

from genac_megatron.algorithms.losses import WEIGHTED
from genac_megatron.errors import EXIT_FAILED, EXIT_GATE, EXIT_INPUT, EXIT_LOST, EXIT_OK, EXIT_REQUEUE
from genac_megatron.metrics import critic_figures
from genac_megatron.observe.report_data import read_run, summarise
from genac_megatron.publication.sequence import FIGURE
from genac_megatron.stages.accuracy import BLEND
from tests.unit.fabricated_run import fabricate

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "figures.md").read_text(encoding="utf-8")
GROUPS = (
    *(
        "actor",
        "critic",
        "rollout",
        "reward",
        "source_outcome",
        "source_share",
        "verify",
        "judge",
        "advantage",
    ),
    *("parity", "drift", "publish", "serving", "time", "tokens", "unique", "memory", "eval", "heldout"),
    *("suite", "test", "best", "environment", "queue"),
)
SUMMARY = (*GROUPS, "share", "metrics", "gate", "report", "run")
PLACEHOLDER = r"ROLE|PHASE|SUITE|SOURCE|PART|KIND|STEP|KEY|FIGURE|K|\.\.\."
# Loops of tests and studies log under these words too, which are no figures of a run.
NOT_LOGGED = {"actor/0", "actor/end", "actor/gain", "actor/start"}


def documented(page: str) -> set[str]:
    """The names in code marks in the first cell of a table's row, and after it those with a slash."""
    rows = [line.split("|")[1:-1] for line in page.splitlines() if line.startswith("| `")]
    first = {name for row in rows for name in re.findall(r"`([^`]+)`", row[0])}
    return first | {name for row in rows for name in re.findall(r"`(\w+/[^`]+)`", row[2])}


NAMES = documented(PAGE)
PATTERNS = [
    re.compile("".join(r"[\w.*-]+" if i % 2 else re.escape(part) for i, part in enumerate(parts)) + "$")
    for parts in (re.split(f"({PLACEHOLDER})", name) for name in NAMES)
]


def known(name: str) -> bool:
    return any(pattern.match(name) for pattern in PATTERNS)


def _name(node: ast.expr) -> str | None:
    """A string's text, * for what is put into it."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if not isinstance(node, ast.JoinedStr):
        return None
    return "".join(str(v.value) if isinstance(v, ast.Constant) else "*" for v in node.values)


@cache
def strings(*rooms: str) -> frozenset[str]:
    """Every string of these rooms' code, * for what is put into it."""
    names = set()
    for room in rooms:
        for file in (ROOT / "genac_megatron" / room).glob("*.py"):
            nodes = list(ast.walk(ast.parse(file.read_text(encoding="utf-8"))))
            parts = {id(part) for node in nodes if isinstance(node, ast.JoinedStr) for part in node.values}
            found = (_name(node) for node in nodes if isinstance(node, ast.expr) and id(node) not in parts)
            names |= {name for name in found if name}
    return frozenset(names)


def logged() -> set[str]:
    """What stages log as group/name."""
    form = rf"({'|'.join(GROUPS)}|\*)/[\w*]*[a-z]{{2}}[\w*]*"
    return {name for name in strings("stages") if re.fullmatch(form, name)} - NOT_LOGGED


def phases(folder: str) -> set[str]:
    text = "\n".join(file.read_text(encoding="utf-8") for file in (ROOT / folder).glob("*.py"))
    return set(re.findall(r'phase\(\s*"([a-z_]+)"', text))


def test_every_name_that_stages_log_is_in_the_glossary() -> None:
    assert len(logged()) > 60
    somewhere = {
        name: [name.replace("*", group, 1) for group in GROUPS] if name.startswith("*/") else [name]
        for name in logged()
    }
    assert {name for name, names in somewhere.items() if not any(map(known, names))} == set()


def test_so_are_what_losses_and_evaluations_give() -> None:
    figures = critic_figures([0.5, 1.0], [0.0, 1.0], ["a", "b"], [0, 0])
    for name in {*figures, *BLEND, *WEIGHTED} - {"masked_low_share"}:
        assert known(name) or known(f"actor/{name}"), name


def test_and_all_of_a_summary(tmp_path: Path) -> None:
    summary = summarise(read_run(fabricate(tmp_path / "run")))
    missing = {name for name in summary if not known(re.sub(r"_(low|high)$", "", name))}
    assert missing == set()
    assert {name.split("/")[0] for name in summary} <= set(SUMMARY)


def test_the_glossary_has_no_name_that_the_code_has_not() -> None:
    """Each is a string of the code, or what a string with parts put in can become; or its last part is."""
    said = strings("stages", "observe", "algorithms", "training", "publication", "evaluation", ".")
    made = [
        re.compile(".+".join(map(re.escape, text.split("*"))) + "$")
        for text in said
        if "*" in text and "/" in text and re.search("[a-z]", text.partition("/")[2])
    ]
    for name in NAMES:
        plain = re.sub(PLACEHOLDER, "x", name)
        last = plain.rpartition("/")[2].removeprefix("x_")
        assert plain in said or last in said or any(one.match(plain) for one in made), name


def test_every_phase_is_told() -> None:
    told = PAGE[PAGE.index("Phases: ") :]
    for phase in phases("genac_megatron/stages") - {"gradients", "sample"}:  # of `genac evaluate gradient`
        assert f"`{phase}`" in told, phase
    steps = PAGE[PAGE.index("Steps of a publication") :]
    for step in {FIGURE.get(name, name) for name in phases("genac_megatron/publication")}:
        assert f"`{step}`" in steps.splitlines()[0], step


def test_every_exit_code_has_a_row() -> None:
    rows = (ROOT / "docs" / "exit-codes.md").read_text(encoding="utf-8")
    for code in (EXIT_OK, EXIT_FAILED, EXIT_INPUT, EXIT_GATE, EXIT_LOST, EXIT_REQUEUE, 130):
        assert f"\n| {code} | " in rows
