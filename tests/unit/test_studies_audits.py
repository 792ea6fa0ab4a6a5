"""Studies with audits of gradient estimators; areas under held-out accuracy; predictions beside figures."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from genac_megatron.cli import main
from genac_megatron.errors import InputError
from genac_megatron.evaluation.gradient_report import report_of
from genac_megatron.models.registry import shape_of
from genac_megatron.recipe.schema import ModelConfig, ModelShape
from genac_megatron.studies.audits import audit_records, audits_of_other_bases, kept_audits, markdown
from genac_megatron.studies.collect import curve, record_of
from genac_megatron.studies.digests import digests_of
from genac_megatron.studies.places import Places
from genac_megatron.studies.runner import _Running, all_tasks, tasks_of
from genac_megatron.studies.schema import Study, cells_of, read_study
from genac_megatron.studies.summary import area, areas, at_equal_cost
from genac_megatron.studies.summary import markdown as cells_markdown
from tests.unit.test_gradient_report import kept

STUDY: dict[str, Any] = {
    "name": "estimators",
    "seeds": [1, 2],
    "set": ["lr=1"],
    "base": {"actor": {"recipe": "sft.yaml"}, "critic": {"recipe": "gen.yaml", "start": {"actor": "actor"}}},
    "audits": {
        "short": {"recipe": "audit.yaml", "actor": "actor", "critic": "critic", "set": ["layers=2"],
                  "options": ["--batches", "4"], "predicted": {"exact-0": 3.3}},
        "free": {"recipe": "audit.yaml", "actor": "actor"},
    },
}  # fmt: skip


@pytest.fixture
def places(tmp_path: Path) -> Places:
    for name in ("sft.yaml", "gen.yaml", "audit.yaml"):
        (tmp_path / name).write_text("{layers: 1, lr: 2}\n")
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(STUDY, sort_keys=False))
    study = read_study(tmp_path / "study.yaml")
    return Places(study, tmp_path / "study.yaml", tmp_path / "out" / study.name, tmp_path / "work")


def finish(places: Places, name: str, seed: int, report: dict[str, Any]) -> None:
    """What the audit's command and the runner leave."""
    task = next(t for t in tasks_of(places, [seed], [name]) if t.key.startswith(f"audit {name}"))
    task.folder.mkdir(parents=True)
    (task.folder / "figures.json").write_text(json.dumps(report))
    task.folder.with_name(f"{task.folder.name}.made_from").write_text(task.made_from)


def test_an_audit_comes_after_the_runs_that_it_looks_at(places: Places) -> None:
    tasks = tasks_of(places, [1, 2])
    assert [task.key for task in tasks][:4] == [
        "actor, seed 1", "critic, seed 1", "audit short, seed 1", "audit free, seed 1",
    ]  # fmt: skip
    short = tasks[2]
    words = list(short.command)
    assert words[:2] == ["evaluate", "gradients"]
    assert words.index("lr=1") < words.index("layers=2")
    for option, base in (("--checkpoint", "actor"), ("--critic", "critic")):
        assert words[words.index(option) + 1] == str(places.run(base, 1))
        assert places.ended(base, 1) in short.needs
    assert "--scalar" not in words
    assert words[-2:] == ["--batches", "4"]
    assert "--critic" not in tasks[3].command
    assert [t.key for t in tasks_of(places, [1], ["free"])] == ["actor, seed 1", "audit free, seed 1"]
    assert tasks_of(places, [1], kept={("short", 1), ("free", 1)}) == [], "nothing is needed"


def test_done_audits_are_shown_and_kept_without_their_runs(places: Places, capsys: Any) -> None:
    report = report_of(*kept())
    finish(places, "short", 1, report)
    words = ["study", str(places.file), "--out", str(places.out.parent), "--work", str(places.work.parent)]
    assert main([*words, "--collect"]) == 0
    said = capsys.readouterr().out
    assert "## short" in said
    assert "3.30" in said, "what was predicted"
    assert (places.out / "estimators.png").stat().st_size > 5000
    again = Places(places.study, places.file, places.out, places.work.parent / "elsewhere")
    assert list(kept_audits(again)) == [("short", 1)]
    assert [t.key for t in tasks_of(again, [1], ["short"], kept_audits(again))] == []
    assert audit_records(again, [1])[0]["report"] == report
    assert main([*words[:-1], str(places.work.parent / "elsewhere"), "--dry-run"]) == 0
    assert "done  short, seed 1" in capsys.readouterr().out
    places.file.with_name("gen.yaml").write_text("{layers: 3}\n")  # its critic would be another
    changed = Places(places.study, places.file, places.out, again.work.parent / "third")
    assert not kept_audits(changed)


def test_an_audit_of_other_base_runs_is_not_shown_beside_them(places: Places) -> None:
    finish(places, "short", 1, report_of(*kept()))
    record = audit_records(places, [1])[0] | {"stands_on": {"actor": "another"}}
    places.out.mkdir(parents=True)
    (places.out / "figures.json").write_text(json.dumps({"records": [], "audits": [record]}))
    other = Places(places.study, places.file, places.out, places.work.parent / "elsewhere")
    run = other.run("actor", 1)
    run.mkdir(parents=True)
    (run / "metrics.jsonl").write_text('{"actor/loss": 1.0}\n')
    other.ended("actor", 1).touch()
    run.with_name(f"{run.name}.made_from").write_text(
        next(t for t in tasks_of(places, [1]) if t.key == "actor, seed 1").made_from
    )
    assert not kept_audits(other)
    assert audits_of_other_bases(other) == [("short", 1)]


def ended_run(places: Places, name: str, loss: float) -> None:
    folder = places.run(name, 1)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text(json.dumps({"actor/loss": loss}) + "\n")
    places.ended(name, 1).touch()
    folder.with_name(f"{folder.name}.made_from").write_text(digests_of(places).runs[name])


def test_an_audit_or_run_that_began_with_other_base_runs_is_refused_by_name(
    places: Places, capsys: Any
) -> None:
    for name in ("actor", "critic"):
        ended_run(places, name, 1.0)
    finish(places, "short", 1, report_of(*kept()))
    made = {task.key: task for task in all_tasks(places, [1])}
    for key in ("audit short, seed 1", "critic, seed 1"):
        running = _Running(replace(made[key], command=("--help",)))  # as the runner starts it
        assert running.process.wait(120) == 0
    places.ended("critic", 1).touch()
    assert made["audit short, seed 1"].done
    assert tasks_of(places, [1])
    ended_run(places, "actor", 1.0)  # the same again
    assert tasks_of(places, [1])
    ended_run(places, "actor", 1.25)  # another
    with pytest.raises(InputError, match=r"critic-s1 \(actor\), audit-short-s1 \(actor\)") as caught:
        tasks_of(places, [1])
    assert "move them away" in str(caught.value)
    words = ["study", str(places.file), "--out", str(places.out.parent), "--work", str(places.work.parent)]
    assert main([*words, "--collect"]) == 2
    assert "audit-short-s1 (actor)" in capsys.readouterr().err
    with pytest.raises(InputError, match="audit-short-s1"):
        _Running(made["audit short, seed 1"])


def test_several_seeds_are_shown_by_their_mean(places: Places) -> None:
    reports = [report_of(*kept(seed)) for seed in (0, 1, 2)]
    records = [{"audit": "short", "seed": s, "report": r} for s, r in enumerate(reports)]
    text = markdown(places.study, records)
    assert "Mean over 3 seeds" in text
    row = next(line for line in text.splitlines() if line.startswith("| rloo "))
    assert "1.000 ± 0.000" in row
    assert "of 3" in next(line for line in text.splitlines() if line.startswith("| exact-1-raw"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"audits": {"x": {"recipe": "a", "actor": "nobody"}}}, "nobody"),
        ({"audits": {"x": {"recipe": "a", "actor": "actor", "scalar": "value"}}}, "value"),
        ({"audits": {"actor": {"recipe": "a", "actor": "actor"}}}, "both called actor"),
        ({"predicted": {"actor/end": {"genac": 0.1}}}, "genac"),
    ],
)
def test_a_name_of_nothing_is_refused(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    (tmp_path / "study.yaml").write_text(yaml.safe_dump({**STUDY, **change}))
    with pytest.raises(InputError, match=said):
        read_study(tmp_path / "study.yaml")


# --- areas ---------------------------------------------------------------------------------------


def test_an_area_is_the_mean_of_straight_lines() -> None:
    points = [
        {"steps": 0.0, "accuracy": 0.2},
        {"steps": 10.0, "accuracy": 0.4},
        {"steps": 30.0, "accuracy": 0.6},
    ]
    assert area(points) == pytest.approx((10 * 0.3 + 20 * 0.5) / 30)
    assert area(points, until=10.0) == pytest.approx(0.3)
    assert area(points, until=20.0) == pytest.approx((10 * 0.3 + 10 * 0.45) / 20)
    assert math.isnan(area(points, until=31.0))
    assert math.isnan(area(points[:1]))
    assert math.isnan(area(points, "flops"))


def run(cell: str, first: float, step: float, rates: list[float]) -> dict[str, Any]:
    points = [
        {"steps": float(i), "accuracy": rate, "flops": first + step * i, "decoded": 1.0 + i}
        for i, rate in enumerate(rates)
    ]
    return {"cell": cell, "label": cell, "options": {}, "seed": 1, "figures": {}, "curve": points}


def test_areas_at_equal_cost_with_and_without_what_came_before() -> None:
    """The dear one spends 4 before its first step; the cheap one ends at 2."""
    cheap, dear = run("cheap", 0.0, 1.0, [0.2, 0.4, 0.6]), run("dear", 4.0, 1.0, [0.2, 0.8, 1.0])
    found = areas([cheap, dear])
    assert found["cheap", 1]["actor/area"] == pytest.approx(0.4)
    assert found["dear", 1]["actor/area"] == pytest.approx(0.7)
    assert found["cheap", 1]["actor/area_flops"] == pytest.approx(0.4)
    assert found["dear", 1]["actor/area_flops"] == pytest.approx(0.2), "not yet begun"
    assert found["dear", 1]["actor/area_flops_alone"] == pytest.approx(0.7)
    study = Study.model_validate(
        {"name": "x", "seeds": [1], "reference": "cheap", "differences": ["actor/area"],
         "figures": ["actor/area"], "predicted": {"actor/area_less_reference": {"dear": 0.25}}}
    )  # fmt: skip
    lines = cells_markdown(study, [cheap, dear]).splitlines()
    row = dict(zip(*([cell.strip() for cell in lines[i].split("|")] for i in (0, 3)), strict=True))
    assert row["actor/area_less_reference"] == "0.300"
    assert row["predicted"] == "+0.250"


def test_what_a_critics_base_run_had_spent_is_in_the_curve() -> None:
    sizes = ModelShape(layers=1, hidden=8, ffn=16, heads=2, kv_heads=2)
    shapes = {"actor": shape_of(ModelConfig(family="qwen3", shape=sizes), 11)}
    rows = [{"stage": "ppo", "step": 1, "tokens/rollout": 5.0, "time/total_s": 1.0}]
    evaluations = [
        {"kind": "ppo", "stage": "ppo", "step": step, "actor": {"accuracy": 0.5}} for step in (0, 1)
    ]
    alone = curve(rows, evaluations, shapes)
    later = curve(rows, evaluations, shapes, {"flops": 7.0, "decoded": 3.0})
    assert [point["decoded"] for point in alone] == [0.0, 5.0]
    assert [point["decoded"] for point in later] == [3.0, 8.0]
    assert later[1]["flops"] == alone[1]["flops"] + 7.0
    assert later[1]["seconds"] == alone[1]["seconds"]
    assert "flops_shared" not in later[1], "the base runs do not say"
    whole = curve(rows, evaluations, shapes, {"flops": 7.0, "flops_shared": 5.0})
    shared = curve([row | {"unique/rollout_prompt": 1.0} for row in rows], evaluations, shapes)
    assert whole[1]["flops_shared"] == shared[1]["flops_shared"] + 5.0
    assert [{*point} for point in curve(rows, evaluations, shapes, None)] == [{"steps", "accuracy"}] * 2


def test_what_does_not_say_its_cost_decides_nothing_wherever_it_stands() -> None:
    runs = [run("dear", 4.0, 1.0, [0.2, 0.8, 1.0]), run("cheap", 0.0, 1.0, [0.2, 0.4, 0.6])]
    gone = run("gone", 0.0, 1.0, [0.2, 0.4, 0.6])
    for point in gone["curve"]:
        del point["flops"]
    gone["missing"] = ["body"]
    nan = run("nan", 0.0, math.nan, [0.2, 0.4, 0.6])
    for order in (0, 1, 2):
        records = [*runs[:order], gone, nan, *runs[order:]]
        found = areas(records)
        assert found["cheap", 1]["actor/area_flops"] == pytest.approx(0.4)
        assert found["dear", 1]["actor/area_flops_alone"] == pytest.approx(0.7)
        assert math.isnan(found["gone", 1]["actor/area_flops"])
        assert found["gone", 1]["actor/area"] == pytest.approx(0.4)
        assert set(at_equal_cost(records)) == {("cheap", 1), ("dear", 1)}
    text = cells_markdown(Study.model_validate({"name": "x", "seeds": [1]}), [*runs, gone])
    assert "gone (body)" in text


def test_a_difference_says_how_many_pairs_it_has() -> None:
    def end(cell: str, seed: int) -> dict[str, Any]:
        figures = {"actor/end": 0.1 * seed}
        return {
            "cell": cell, "label": cell, "options": {}, "seed": seed, "figures": figures, "curve": []
        }  # fmt: skip

    study = Study.model_validate({"name": "x", "seeds": [1, 2, 3], "reference": "a"})
    records = [end("a", 1), end("a", 2), end("b", 1), end("b", 2), end("b", 3)]
    lines = cells_markdown(study, records).splitlines()
    row = dict(zip(*([cell.strip() for cell in lines[i].split("|")] for i in (0, 3)), strict=True))
    assert row["actor/end_less_reference"] == "0.000 ± 0.000 (2 of 3)"


def test_a_critics_own_chain_of_base_runs_is_in_its_cost_and_a_missing_one_is_named(tmp_path: Path) -> None:
    """reasoner starts from body and from the actor: what the actor spent is everybody's."""
    sizes = {"layers": 1, "hidden": 8, "ffn": 16, "heads": 2, "kv_heads": 2}
    role = {"model": {"family": "qwen3", "shape": sizes, "tokenizer": "builtin:tiny"}}
    content = {
        "name": "x",
        "task": {"kind": "state_tracking", "objects": 3, "min_swaps": 1, "max_swaps": 2},
        "roles": {"actor": role, "critic": role},
        "stages": [{"kind": "sft", "role": "critic", "data": "demonstrations"}],
    }
    (tmp_path / "sft.yaml").write_text(yaml.safe_dump(content))
    study = {
        "name": "chain",
        "seeds": [1],
        "base": {
            "actor": {"recipe": "sft.yaml"},
            "body": {"recipe": "sft.yaml", "set": ["seed=2"]},
            "reasoner": {"recipe": "sft.yaml", "start": {"actor": "actor", "critic": "body"}},
        },
        "cells": {"c": {"recipe": "sft.yaml", "start": {"actor": "actor", "critic": "reasoner"}}},
    }
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    here = Places(
        read_study(tmp_path / "study.yaml"), tmp_path / "study.yaml", tmp_path / "out", tmp_path / "work"
    )
    rows = {"actor": 1.0, "body": 10.0, "reasoner": 100.0, "c": 1000.0}
    for name, tokens in rows.items():
        folder = here.run(name, 1)
        folder.mkdir(parents=True)
        row = {"stage": "ppo", "step": 1, "tokens/judge": tokens, "time/total_s": 1.0}
        (folder / "metrics.jsonl").write_text(json.dumps(row) + "\n")
        told = {"kind": "ppo", "stage": "ppo", "step": 1, "actor": {"accuracy": 0.5}}
        (folder / "evaluations.jsonl").write_text(json.dumps(told) + "\n")
        (folder / "recipe.yaml").write_text(yaml.safe_dump(content))
        here.ended(name, 1).touch()
        folder.with_name(f"{folder.name}.made_from").write_text(digests_of(here).runs[name])
    cell = cells_of(here.study)[0]
    assert record_of(here, cell, 1)["curve"][0]["decoded"] == 1110.0
    here.ended("body", 1).unlink()
    record = record_of(here, cell, 1)
    assert record["missing"] == ["body"]
    assert record["curve"] == [{"steps": 1.0, "accuracy": 0.5}]
