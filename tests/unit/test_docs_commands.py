"""Commands of the docs exist: their grammar, recipes, overrides, targets, scripts. Dry runs are run."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from genac_megatron.cli import _parsed, main
from genac_megatron.recipe.loader import load_recipe

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = [*sorted((DOCS / "howto").glob("*.md")), DOCS / "install.md", DOCS / "contributing.md"]
ALL = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
NAMED = re.compile(r"# file: (\S+)\n")
SHAPE = {"layers": 2, "hidden": 32, "ffn": 64, "heads": 2, "kv_heads": 2}


def blocks(page: Path) -> list[tuple[str, str]]:
    """(language, text) of a page's code blocks."""
    return BLOCK.findall(page.read_text(encoding="utf-8"))


def commands(page: Path) -> list[list[str]]:
    """The words of each command of a page's shell blocks."""
    lines = [line for kind, text in blocks(page) if kind == "sh" for line in text.splitlines()]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def make_files(page: Path, folder: Path) -> None:
    """Write what the page's blocks name as files; of models only the folder's name is known."""
    for _, text in blocks(page):
        if named := NAMED.match(text):
            model = f"{{family: qwen3, tokenizer: 'builtin:tiny', shape: {SHAPE}}}"
            body = text[named.end() :].replace("{hf: model}", model)
            (folder / named[1]).write_text(body, encoding="utf-8")


def check(words: list[str], folder: Path) -> None:
    """One command: that it would be understood, and that what it names is there."""
    head, *rest = words
    if head == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        assert {word for word in rest if "=" not in word} <= set(targets)
    elif head == "genac":
        try:
            options = _parsed(rest)
        except SystemExit as error:
            pytest.fail(f"genac {' '.join(rest)}: exit code {error.code}")
        given = Path(getattr(options, "recipe", None) or getattr(options, "file", None) or ROOT)
        there = next((place for at in (folder, ROOT) if (place := at / given).exists()), None)
        assert there is not None, f"no such file: {given}"
        if options.command == "run" and options.dry_run:
            assert main(["run", str(there), *options.overrides, "--dry-run"]) == 0, words
        elif options.command == "run":
            load_recipe(there, options.overrides)
    elif head.startswith("tools/"):
        assert (ROOT / head).is_file()
    else:
        assert head.partition("=")[0] in ("PYTHONPATH", "sbatch"), words


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_are_understood(page: Path, tmp_path: Path) -> None:
    make_files(page, tmp_path)
    for words in commands(page):
        check(words, tmp_path)


def test_a_command_that_is_none_is_told(tmp_path: Path) -> None:
    for words in (["genac", "fly"], ["make", "coffee"], ["genac", "run", "nowhere.yaml"], ["tools/none.sh"]):
        with pytest.raises((AssertionError, pytest.fail.Exception)):
            check(words, tmp_path)


def test_a_file_has_its_name_on_one_page_alone() -> None:
    """Who follows two pages in one folder overwrites nothing."""
    on: dict[str, set[str]] = {}
    for page in ALL:
        for name in [named[1] for _, text in blocks(page) if (named := NAMED.match(text))]:
            on.setdefault(name, set()).add(page.name)
    assert {name: pages for name, pages in on.items() if len(pages) > 1} == {}
    assert len(on) > 8


def test_links_between_pages_lead_somewhere() -> None:
    for page in ALL:
        text = BLOCK.sub("", page.read_text(encoding="utf-8"))
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            if not target.startswith(("http", "#")):
                assert (page.parent / target.partition("#")[0]).exists(), f"{page.name}: {target}"


def test_the_index_has_every_page() -> None:
    index = (DOCS / "README.md").read_text(encoding="utf-8")
    for page in DOCS.rglob("*.md"):
        name = page.relative_to(DOCS).as_posix()
        assert name == "README.md" or name in index, name


def test_options_stand_before_between_and_behind_overrides(capsys: pytest.CaptureFixture[str]) -> None:
    wanted = ("r.yaml", ["seed=2", "a.b=-1"], "gpu", "30")
    for line in (
        "--partition gpu --time 30 r.yaml seed=2 a.b=-1",
        "r.yaml --partition gpu seed=2 --time=30 a.b=-1",
        "r.yaml seed=2 a.b=-1 --time 30 --partition=gpu",
        "--time=30 r.yaml --partition gpu -- seed=2 a.b=-1",
    ):
        found = _parsed(["slurm", *line.split()])
        assert (found.recipe, found.overrides, found.partition, str(found.time)) == wanted, line
    for wrong in (["run", "r.yaml", "--no-such", "seed=2"], ["doctor", "seed=2"]):
        with pytest.raises(SystemExit) as ended:
            _parsed(wrong)
        assert ended.value.code == 2
        assert "unrecognized arguments" in capsys.readouterr().err
