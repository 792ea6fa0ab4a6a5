"""Figures of earlier runs: which of them stand for a cell of today's study."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from genac_megatron.cli import main
from genac_megatron.errors import InputError
from genac_megatron.studies.collect import records_of, scores_of
from genac_megatron.studies.command import _run
from genac_megatron.studies.digests import digests_of
from genac_megatron.studies.kept import kept_records, of_other_bases
from genac_megatron.studies.places import ENDED, STAMP, Places
from genac_megatron.studies.runner import tasks_of
from genac_megatron.studies.schema import cells_of, read_study
from genac_megatron.studies.standing import has_ended, stands_on

STUDY: dict[str, Any] = {
    "name": "tiny",
    "seeds": [1, 2],
    "base": {
        "actor": {"recipe": "sft.yaml"},
        "body-a": {"recipe": "sft.yaml", "set": ["size=7"], "start": {"actor": "actor"}},
        "body-b": {"recipe": "sft.yaml", "set": ["size=8"]},
    },
    "cells": {
        "a": {"recipe": "a.yaml", "start": {"critic": "body-a"}},
        "b": {"recipe": "a.yaml", "start": {"critic": "body-b"}, "set": ["steps=3"], "label": "called b"},
    },
    "banks": {"in": {"recipe": "sft.yaml", "actor": "actor", "options": ["--prompts", "4"]}},
}
RECIPES: dict[str, Any] = {
    "base.yaml": {"world": {"ranks": 2}, "lr": 0.1, "name": "base"},
    "sft.yaml": {"extends": "base.yaml", "size": 5},
    "a.yaml": {"extends": "base.yaml", "steps": 2},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, content in {**RECIPES, "study.yaml": STUDY}.items():
        (tmp_path / name).write_text(yaml.safe_dump(content))
    return tmp_path


def places(folder: Path, *overrides: str) -> Places:
    file = folder / "study.yaml"
    return Places(read_study(file), file, folder / "out", folder / "work", overrides=overrides)


def change(folder: Path, file: str, **content: Any) -> None:
    path = folder / file
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | content))


def written(folder: Path, *records: dict[str, Any]) -> None:
    (folder / "out").mkdir()
    (folder / "out" / "figures.json").write_text(json.dumps({"study": {}, "records": list(records)}))


def record(folder: Path, cell: str, seed: int, **figures: float) -> dict[str, Any]:
    figures = figures or {"in/mse": 0.1}
    made = {"cell": cell, "label": "old", "options": {}, "seed": seed, "figures": figures, "curve": []}
    return made | {"made_from": digests_of(places(folder)).records[cell]}


def begun(folder: Path, cell: str, seed: int) -> Path:
    run = folder / "work" / "tiny" / f"{cell}-s{seed}"
    (run / "report").mkdir(parents=True)
    stamp(run, digests_of(places(folder)).runs[cell])
    return run


def stamp(made: Path, digest: str) -> None:
    made.with_name(made.name + STAMP).write_text(digest + "\n")


def ended(run: Path) -> None:
    run.with_name(run.name + ENDED).touch()


@pytest.mark.parametrize(
    ("file", "content", "changed"),
    [
        ("a.yaml", {"steps": 4}, "a"),  # b sets its own
        ("base.yaml", {"lr": 0.2}, "ab"),
        ("sft.yaml", {"size": 6}, "ab"),  # the bank's actor
        ("study.yaml", {"set": ["lr=0.3"]}, "ab"),
        ("study.yaml", {"banks": {"in": STUDY["banks"]["in"] | {"options": ["--prompts", "9"]}}}, "ab"),
        ("study.yaml", {"base": {**STUDY["base"], "body-b": {"recipe": "sft.yaml"}}}, "b"),
        ("base.yaml", {"world": {"ranks": 1}, "name": "other", "runs": "elsewhere"}, ""),
        ("study.yaml", {"about": "more", "seeds": [1, 2, 3], "figures": ["in/mse"]}, ""),
    ],
)
def test_a_digest_knows_what_figures_come_from(
    folder: Path, file: str, content: dict[str, Any], changed: str
) -> None:
    before = digests_of(places(folder)).records
    assert before["a"] != before["b"]
    change(folder, file, **content)
    after = digests_of(places(folder)).records
    assert "".join(cell for cell in "ab" if before[cell] != after[cell]) == changed


def test_overrides_count_but_for_where_it_runs(folder: Path) -> None:
    before = digests_of(places(folder))
    assert digests_of(places(folder, "world.ranks=1", "observe.wandb.mode=off")) == before
    assert digests_of(places(folder, "lr=7")).runs["a"] != before.runs["a"]


def test_what_stands_in_figures_is_not_run_nor_what_it_alone_would_need(folder: Path) -> None:
    written(folder, *(record(folder, cell, seed) for cell, seed in [("a", 1), ("a", 2), ("b", 2)]))
    kept = kept_records(places(folder))
    assert set(kept) == {("a", 1), ("a", 2), ("b", 2)}
    keys = [task.key for task in tasks_of(places(folder), [1, 2], kept=kept)]
    assert keys == [
        "actor, seed 1",
        "body-b, seed 1",
        "bank in, seed 1",
        "b, seed 1",
        "b on the banks, seed 1",
    ]
    found = records_of(places(folder), [1, 2])
    assert [(r["cell"], r["seed"], r["label"]) for r in found] == [
        ("a", 1, "a"), ("a", 2, "a"), ("b", 2, "called b"),
    ]  # fmt: skip


def test_a_run_that_has_ended_counts_more_than_its_figures(folder: Path) -> None:
    """One that was stopped does not, should it have a report; nor do scores of an earlier run."""
    written(folder, record(folder, "a", 1), record(folder, "b", 1))
    run = begun(folder, "a", 1)
    (run / "report" / "summary.json").write_text("{}")
    assert set(kept_records(places(folder))) == {("a", 1), ("b", 1)}
    ended(run)
    assert set(kept_records(places(folder))) == {("b", 1)}
    *_, score = tasks_of(places(folder), [1], kept=[("b", 1)])
    assert score.key == "a on the banks, seed 1"
    seen = [score.done]
    (scores,) = score.makes
    scores.parent.mkdir(parents=True)
    scores.write_text("{}")
    metrics = run / "metrics.jsonl"
    metrics.write_text("")
    os.utime(metrics, (1, scores.stat().st_mtime - 10))
    stamp(folder / "work" / "tiny" / "bank-in-s1", digests_of(places(folder)).banks["in"])
    seen.append(score.done)
    os.utime(metrics, (1, scores.stat().st_mtime + 10))
    seen.append(score.done)
    assert seen == [False, True, False]


def trained(run: Path, loss: float, seconds: float = 1.0) -> None:
    row = {"step": 1, "actor/loss": loss, "actor/grad_norm": 2.0, "time/total_s": seconds}
    (run / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    ended(run)


def test_figures_of_other_base_runs_do_not_stand(folder: Path) -> None:
    """Another machine rounds otherwise: its actor is another one, and so are its rollouts."""
    actor = begun(folder, "actor", 1)
    trained(actor, 0.5)
    spec = next(cell.spec for cell in cells_of(read_study(folder / "study.yaml")) if cell.name == "a")
    here = stands_on(places(folder), spec, 1)
    assert list(here) == ["actor"]  # body-a is not there
    mine = record(folder, "a", 1) | {"stands_on": {**here, "body-a": "made elsewhere"}}
    theirs = record(folder, "b", 1) | {"stands_on": {"actor": "another"}}
    unknown = record(folder, "b", 2)  # of a version that did not say
    written(folder, mine, theirs, unknown, record(folder, "a", 2) | {"stands_on": {"actor": "another"}})
    assert set(kept_records(places(folder))) == {("a", 1), ("a", 2), ("b", 2)}  # seed 2: no base run is here
    assert of_other_bases(places(folder)) == [("b", 1)]
    trained(actor, 0.5, seconds=9.0)
    assert of_other_bases(places(folder)) == [("b", 1)]
    trained(actor, 0.5000000000000001)
    assert of_other_bases(places(folder)) == [("a", 1), ("b", 1)]


def test_a_table_does_not_mix_base_runs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained(begun(folder, "actor", 1), 0.5)
    written(folder, record(folder, "b", 1) | {"stands_on": {"actor": "another"}}, record(folder, "a", 1))
    (folder / "out").rename(folder / "tiny")
    before = (folder / "tiny" / "figures.json").read_text()
    places_of = ["--out", str(folder), "--work", str(folder / "work")]
    assert main(["study", str(folder / "study.yaml"), "--collect", *places_of]) == 2
    said = capsys.readouterr().err
    assert "b (seed 1)" in said
    assert "run them again" in said
    assert (folder / "tiny" / "figures.json").read_text() == before


def test_what_stands_on_other_base_runs_is_run_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which is known once a cell that was left has had them made."""
    there = {"stands_on": {"actor": "another"}}
    written(folder, *(record(folder, cell, 1) | there for cell in "ab"), record(folder, "a", 2) | there)
    asked: list[list[str]] = []

    def run_all(tasks: list[Any], *_: Any) -> None:
        asked.append([task.key for task in tasks if not task.done])
        for task in tasks:
            if task.ended is not None and not task.done:
                task.folder.mkdir(parents=True)
                stamp(task.folder, task.made_from)
                trained(task.folder, 0.5)

    monkeypatch.setattr("genac_megatron.studies.runner.run_all", run_all)
    _run(places(folder), [1, 2], None, Console(quiet=True), 1, again=False)
    assert "b, seed 2" in asked[0]
    assert not any(key in asked[0] for key in ("a, seed 1", "b, seed 1", "a, seed 2"))
    assert "a, seed 2" in asked[1]  # the actor of seed 2 was made, and is another one
    assert not any("seed 1" in key for key in asked[1])  # no base run of seed 1 is here
    assert len(asked) == 2


def test_the_figures_of_a_run_that_was_removed_stand(folder: Path) -> None:
    """Whoever removes its folder leaves the markers beside it."""
    written(folder, record(folder, "a", 1))
    run = begun(folder, "a", 1)
    ended(run)
    assert kept_records(places(folder)) == {}
    shutil.rmtree(run)
    assert set(kept_records(places(folder))) == {("a", 1)}


def test_scores_of_another_bank_or_run_are_nobodys_figures(folder: Path) -> None:
    run = begun(folder, "a", 1)
    (run / "metrics.jsonl").write_text("")
    bank = folder / "work" / "tiny" / "bank-in-s1"
    scores = bank / "scores" / "a" / "scores.json"
    scores.parent.mkdir(parents=True)
    scores.write_text('{"figures": {"mse": {"value": 0.25}, "bias": 0.5}}')
    stamp(bank, digests_of(places(folder)).banks["in"])
    assert scores_of(places(folder), "in", "a", 1) == {"in/mse": 0.25, "in/bias": 0.5}
    os.utime(run / "metrics.jsonl", (1, scores.stat().st_mtime + 10))
    assert scores_of(places(folder), "in", "a", 1) == {}
    os.utime(run / "metrics.jsonl", (1, 1))
    change(folder, "study.yaml", banks={"in": STUDY["banks"]["in"] | {"options": ["--prompts", "9"]}})
    assert scores_of(places(folder), "in", "a", 1) == {}


def test_a_run_of_an_edited_recipe_is_not_taken_for_its_own(folder: Path) -> None:
    """Nor one of which nothing says what it was made from; what the edit does not touch goes on."""
    for cell in "ab":
        ended(begun(folder, cell, 1))
    change(folder, "a.yaml", steps=4)  # b sets its own
    with pytest.raises(InputError, match=r"from what: a-s1\n") as caught:
        tasks_of(places(folder), [1])
    assert "move them away" in str(caught.value)
    assert [cell for cell in "ab" if has_ended(places(folder), cell, 1)] == ["b"]
    (folder / "work" / "tiny" / f"b-s1{STAMP}").unlink()
    with pytest.raises(InputError, match="a-s1, b-s1"):
        tasks_of(places(folder), [1])


def test_a_file_counts_by_what_is_in_it(folder: Path) -> None:
    template = folder / "critic.txt"
    template.write_text("How likely?")
    change(folder, "a.yaml", template="./critic.txt")
    before = digests_of(places(folder)).runs
    (folder / "elsewhere").mkdir()
    moved = shutil.copytree(folder, folder.with_name(folder.name + "-clone"))
    assert digests_of(places(moved)).runs == before
    template.write_text("How good?")
    after = digests_of(places(folder)).runs
    assert {cell for cell in "ab" if before[cell] != after[cell]} == {"a", "b"}


def test_a_bank_knows_the_banks_that_it_looks_at(folder: Path) -> None:
    banks = {"in": STUDY["banks"]["in"], "later": STUDY["banks"]["in"] | {"states_from": "in"}}
    change(folder, "study.yaml", banks=banks)
    before = digests_of(places(folder))
    change(folder, "study.yaml", banks=banks | {"in": banks["in"] | {"options": ["--prompts", "9"]}})
    after = digests_of(places(folder))
    assert before.runs == after.runs
    assert all(before.banks[name] != after.banks[name] for name in banks)


def test_figures_of_other_seeds_stay_where_some_are_asked_for(folder: Path) -> None:
    written(folder, *(record(folder, "a", seed, **{"in/mse": seed / 10}) for seed in (1, 2, 7)))
    (folder / "out").rename(folder / "tiny")
    path = str(folder / "study.yaml")
    assert main(["study", path, "--collect", "--seeds", "1", "--out", str(folder)]) == 0
    left = json.loads((folder / "tiny" / "figures.json").read_text())
    assert [r["seed"] for r in left["records"]] == left["study"]["seeds"] == [1, 2, 7]


def test_records_of_another_recipe_or_without_their_banks_do_not_stand(folder: Path) -> None:
    unmarked = record(folder, "b", 1)
    del unmarked["made_from"]
    gone = record(folder, "a", 1) | {"cell": "gone"}
    written(folder, record(folder, "a", 1), record(folder, "a", 2, **{"critic/brier": 0.1}), unmarked, gone)
    assert set(kept_records(places(folder))) == {("a", 1)}
    change(folder, "a.yaml", steps=5)
    assert kept_records(places(folder)) == {}


@pytest.mark.parametrize("text", ["[", "{}", '{"records": [1]}', '{"records": [{}]}'])
def test_figures_that_cannot_be_read_are_named(folder: Path, text: str) -> None:
    (folder / "out").mkdir()
    (folder / "out" / "figures.json").write_text(text)
    with pytest.raises(InputError, match=r"figures\.json"):
        kept_records(places(folder))
