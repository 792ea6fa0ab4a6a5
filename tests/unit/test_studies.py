"""Studies: which runs a file means, what a run has cost, and what the table says."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from matplotlib.axes import Axes

from genac_megatron.cli import main
from genac_megatron.errors import InputError
from genac_megatron.models.registry import shape_of
from genac_megatron.models.sizes import adapter_parameters, attention_parameters, parameters
from genac_megatron.observe.lock import _began as began
from genac_megatron.observe.lock import held
from genac_megatron.recipe.schema import AdapterConfig, ModelConfig, ModelShape, TrainingConfig
from genac_megatron.studies import plots
from genac_megatron.studies.collect import curve
from genac_megatron.studies.cost import multiplied, spent, total, weights_of
from genac_megatron.studies.places import Places
from genac_megatron.studies.plots import draw_all
from genac_megatron.studies.runner import tasks_of
from genac_megatron.studies.schema import Bank, Study, bases_of, cells_of, read_study, swept
from genac_megatron.studies.summary import at_equal_cost, best_cells, markdown, mean

STUDY: dict[str, Any] = {
    "name": "scaling",
    "seeds": [1, 2],
    "base": {
        "actor": {"recipe": "sft.yaml"},
        "body": {"recipe": "body.yaml", "over": ["size"], "start": {"actor": "actor"}},
    },
    "axes": {
        "size": {"s": {"set": ["layers=1"]}, "m": {"set": ["layers=2"]}},
        "critic": {
            "generative": {"recipe": "gen.yaml", "start": {"critic": "body-{size}"}},
            "dense-1": {"recipe": "value.yaml", "set": ["lr=1"], "label": "dense"},
            "dense-2": {"recipe": "value.yaml", "set": ["lr=2"], "label": "dense"},
        },
    },
}


@pytest.fixture
def recipes(tmp_path: Path) -> None:
    """The files that STUDY names: what its runs are made from."""
    for name in ("sft.yaml", "body.yaml", "gen.yaml", "value.yaml"):
        (tmp_path / name).write_text("{layers: 1, lr: 2}\n")


def both_started(study: dict[str, Any]) -> dict[str, Any]:
    """Every critic starts from a body, so that all base runs are needed."""
    axes = {**study["axes"], "critic": {n: {"start": {"critic": "body-{size}"}} | one
                                        for n, one in study["axes"]["critic"].items()}}  # fmt: skip
    return {**study, "axes": axes}


def shape(tie: bool) -> Any:
    sizes = ModelShape(layers=1, hidden=8, ffn=16, heads=2, kv_heads=2, tie_embeddings=tie)
    return shape_of(ModelConfig(family="qwen3", shape=sizes), 11)


def test_axes_are_combined_and_options_of_a_label_compete() -> None:
    study = Study.model_validate(STUDY)
    cells = {cell.name: cell for cell in cells_of(study)}
    assert set(cells) == {f"{s}-{c}" for s in "sm" for c in ("generative", "dense-1", "dense-2")}
    assert cells["m-dense-2"].spec.set == ["layers=2", "lr=2"]
    assert cells["m-dense-2"].label == cells["m-dense-1"].label == "m-dense"
    assert cells["s-generative"].spec.start == {"critic": "body-s"}
    assert [name for name, _ in bases_of(study)] == ["actor", "body-s", "body-m"]


@pytest.mark.usefixtures("recipes")
def test_every_run_comes_after_what_it_starts_from(tmp_path: Path) -> None:
    bank = {"recipe": "sft.yaml", "actor": "actor"}
    banks = {"banks": {"in": bank, "ood": {**bank, "p_bar_of": "in"}}}
    study = Study.model_validate(both_started({**STUDY, **banks}))
    tasks = tasks_of(Places(study, tmp_path / "study.yaml", tmp_path / "out", tmp_path / "work"), [1, 2])
    keys = [task.key for task in tasks]
    assert len(keys) == len(set(keys)) == 2 * (3 + 2 + 6 * 2)
    for task in tasks:
        for word in task.command:
            if "model.checkpoint=" in word:
                name, _, seed = Path(word.split("=")[1]).name.rpartition("-s")
                assert keys.index(f"{name}, seed {seed}") < keys.index(task.key)
                assert tmp_path / "work" / "scaling" / f"{name}-s{seed}.ended" in task.needs
    for place, task in enumerate(tasks):
        assert set(task.needs) <= {path for before in tasks[:place] for path in before.makes}
        if "--name" in task.command:  # scores need both banks and the critic, which is loaded once
            assert (len(task.needs), len(task.makes)) == (3, 2)
        if "--p-bar-of" in task.command:
            assert len(task.needs) == 2


@pytest.mark.usefixtures("recipes")
def test_some_cells_alone(tmp_path: Path) -> None:
    places = Places(Study.model_validate(STUDY), tmp_path / "study.yaml", tmp_path, tmp_path)
    keys = [task.key for task in tasks_of(places, [1], ["s-generative"])]
    assert keys == ["actor, seed 1", "body-s, seed 1", "s-generative, seed 1"], "with what they need alone"
    with pytest.raises(InputError, match="genac"):
        tasks_of(places, [1], ["genac"])


@pytest.mark.usefixtures("recipes")
def test_a_study_can_stand_on_another_with_settings_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "first.yaml").write_text(yaml.safe_dump(STUDY))
    axes = {"critic": {"generative": {"set": ["lr=9"]}, "dense-1": None}}
    own = {"extends": "first.yaml", "name": "second", "set": ["task.kind=x"], "seeds": [7], "axes": axes}
    path = tmp_path / "second.yaml"
    path.write_text(yaml.safe_dump(own))
    study = read_study(path)
    assert (study.name, study.seeds) == ("second", [7])
    assert set(study.axes["critic"]) == {"generative", "dense-2"}
    changed = study.axes["critic"]["generative"]
    assert (changed.recipe, changed.set, changed.start) == ("gen.yaml", ["lr=9"], {"critic": "body-{size}"})
    assert study.axes["size"] == read_study(tmp_path / "first.yaml").axes["size"]
    banked = study.model_copy(update={"banks": {"in": Bank(recipe="sft.yaml", actor="actor", set=["b=1"])}})
    for task in tasks_of(Places(banked, path, tmp_path, tmp_path), [7]):
        words = list(task.command)
        own_words = [word for word in words if word.startswith(("layers=", "lr=", "b="))]
        assert all(words.index("task.kind=x") < words.index(word) for word in own_words)


@pytest.mark.usefixtures("recipes")
def test_overrides_of_the_command_line_come_last(tmp_path: Path) -> None:
    study = Study.model_validate({**STUDY, "banks": {"in": {"recipe": "sft.yaml", "actor": "actor"}}})
    places = Places(study, tmp_path / "s.yaml", tmp_path, tmp_path, overrides=["lr=7", "world.ranks=1"])
    for task in tasks_of(places, [1]):
        settings = [word for word in task.command if word.startswith(("lr=", "world."))]
        assert settings[-2:] == ["lr=7", "world.ranks=1"], task.key


@pytest.mark.parametrize("name", ["self.yaml", "../other.yaml", "none.yaml"])
def test_a_study_that_stands_on_none_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "self.yaml").write_text(yaml.safe_dump({"extends": name}))
    with pytest.raises(InputError, match=Path(name).name):
        read_study(tmp_path / "self.yaml")


def test_a_start_that_is_no_base_is_named(tmp_path: Path) -> None:
    study = Study.model_validate(
        {"name": "x", "cells": {"a": {"recipe": "a.yaml", "start": {"actor": "nobody"}}}}
    )
    with pytest.raises(InputError, match="nobody"):
        cells_of(study)
    path = tmp_path / "study.yaml"
    path.write_text("name: x\nsedes: [1]\n")
    with pytest.raises(InputError, match="sedes"):
        read_study(path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"base": {"actor": {"recipe": "a", "start": {"actor": "body"}}, "body": {"recipe": "a"}}}, "body"),
        ({"base": {"actor": {"recipe": "a", "over": ["sise"]}}}, "sise"),
        ({"base": {"actor": {"recipe": "a", "start": {"critic": "body-{critic}"}}}}, "body-{critic}"),
        ({"banks": {"in": {"recipe": "a", "actor": "body"}}}, "body"),
        ({"banks": {"in": {"recipe": "a", "actor": "actor", "p_bar_of": "out"}}}, "out"),
        ({"banks": {"in": {"recipe": "a", "actor": "actor", "states_from": "out"}}}, "out"),
        ({"reference": "l-dense"}, "l-dense"),
        ({"lines": [{"figure": "in/mse", "x": "width", "lines": "critic"}]}, "width"),
        ({"cells": {"actor": {"recipe": "a"}}}, "both called actor"),
    ],
)  # fmt: skip
def test_a_name_of_nothing_is_refused_with_what_there_is(
    tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(STUDY))
    assert read_study(path).name == "scaling"
    path.write_text(yaml.safe_dump({**STUDY, **change}))
    with pytest.raises(InputError, match=said) as caught:
        read_study(path)
    assert "way out" in str(caught.value)


def test_a_sweep_that_is_not_run_names_no_best(tmp_path: Path, recipes: None, capsys: Any) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump({**STUDY, "sweep_seeds": [1]}, sort_keys=False))
    words = ["study", str(path), "--seeds", "2", "--out", str(tmp_path), "--work", str(tmp_path / "work")]
    assert main(words) == 2
    said = capsys.readouterr().err
    assert "of s-dense-1, s-dense-2, m-dense-1, m-dense-2\n" in said
    assert "begin with --seeds 1" in said


def test_flops_are_two_per_weight_forward_and_six_in_training() -> None:
    shapes = {"actor": shape(True), "critic": shape(False)}
    assert multiplied(shapes["actor"]) == parameters(shapes["actor"])
    assert multiplied(shapes["critic"]) == parameters(shapes["critic"]) - 11 * 8
    row = {"tokens/rollout": 3.0, "tokens/judge": 5.0, "tokens/actor_train": 7.0, "tokens/evaluate": 99.0,
           "time/total_s": 4.0, "time/evaluate_s": 1.5}  # fmt: skip
    found = spent(row, shapes)
    actor, critic = multiplied(shapes["actor"]), multiplied(shapes["critic"])
    assert found == {
        "tokens": 15.0,
        "flops": 3 * 2 * actor + 5 * 2 * critic + 7 * 6 * actor,
        "flops_shared": 3 * 2 * actor + 5 * 2 * critic + 7 * 6 * actor,
        "seconds": 2.5,
    }


def test_frozen_attention_has_no_gradients_of_its_own_weights() -> None:
    """In training alone, and of that role alone."""
    shapes = {"actor": shape(True), "critic": shape(True)}
    row = {"tokens/actor_train": 7.0, "tokens/critic_train": 11.0, "tokens/value": 3.0}
    weights = {"critic": weights_of(TrainingConfig(frozen_attention=True), shapes["critic"])}
    whole, frozen = spent(row, shapes), spent(row, shapes, weights)
    assert (
        whole["flops"] - frozen["flops"]
        == 11 * 2 * attention_parameters(shapes["critic"], 1, shapes["critic"].layers)
        > 0
    )
    assert total([row, row], shapes, weights)["flops"] == 2 * frozen["flops"]


def test_an_adapters_step_costs_two_thirds_and_its_own_parameters() -> None:
    """Engines have it merged, and its base is the reference, without it."""
    shapes = {"actor": shape(True)}
    adapter = AdapterConfig(rank=2, targets=["q_proj", "down_proj"])
    weights = {"actor": weights_of(TrainingConfig(adapter=adapter), shapes["actor"])}
    count, own = (
        multiplied(shapes["actor"]),
        adapter_parameters(shapes["actor"], adapter, 1, shapes["actor"].layers),
    )
    for key, each, beside in (
        ("tokens/actor_train", 4 * count, 6 * own),
        ("tokens/actor_old", 2 * count, 2 * own),
        ("tokens/rollout", 2 * count, 0),
        ("tokens/reference", 2 * count, 0),
    ):
        assert spent({key: 7.0}, shapes, weights)["flops"] == 7 * (each + beside), key


def test_a_prefix_that_prompts_share_is_billed_once_and_as_often_as_it_was_read() -> None:
    shapes = {"actor": shape(True), "critic": shape(False)}
    actor, critic = multiplied(shapes["actor"]), multiplied(shapes["critic"])
    row = {"tokens/rollout_prompt": 40.0, "unique/rollout_prompt": 10.0, "tokens/judge_prompt": 100.0,
           "unique/judge_prompt": 30.0, "tokens/judge": 5.0}  # fmt: skip
    found = spent(row, shapes)
    assert found["tokens"] == 145.0
    assert found["flops"] == 40 * 2 * actor + 105 * 2 * critic
    assert found["flops_shared"] == 10 * 2 * actor + 35 * 2 * critic
    earlier = {key: value for key, value in row.items() if not key.startswith("unique")}
    assert "flops_shared" not in spent(earlier, shapes), "rows of earlier versions do not say"
    assert "flops_shared" not in total([row, earlier], shapes)
    assert total([row, row], shapes)["flops_shared"] == 2 * found["flops_shared"]
    trained = row | {"tokens/critic_train": 60.0}
    assert spent(trained, shapes)["flops_shared"] - found["flops_shared"] == 60 * 6 * critic, (
        "all were computed"
    )
    shared = spent(trained | {"unique/critic_train": 20.0}, shapes)
    assert shared["flops_shared"] - found["flops_shared"] == 20 * 6 * critic
    assert shared["flops"] - found["flops"] == 20 * 6 * critic, "no engine's cache has a part in it"
    assert shared["tokens"] - found["tokens"] == 20.0
    assert total([], shapes) == {"tokens": 0.0, "flops": 0.0, "seconds": 0.0, "flops_shared": 0.0}


def test_the_trainers_forward_passes_count_what_they_computed() -> None:
    shapes = {role: shape(True) for role in ("actor", "critic", "reference")}
    each = 2 * multiplied(shapes["actor"])
    for phase in ("value", "reference", "actor_old", "moved"):
        row = {f"tokens/{phase}": 50.0}
        assert spent(row, shapes)["flops"] == 50 * each
        found = spent(row | {f"unique/{phase}": 30.0}, shapes)
        assert found == {"tokens": 30.0, "flops": 30 * each, "flops_shared": 30 * each, "seconds": 0.0}


def test_a_curve_counts_what_was_spent_before_each_evaluation() -> None:
    shapes = {"actor": shape(True), "critic": shape(True)}
    rows = [
        {"stage": "value", "step": 1, "tokens/value": 10.0},
        {"stage": "ppo", "step": 1, "tokens/rollout": 1.0},
        {"stage": "ppo", "step": 2, "tokens/rollout": 2.0},
        {"stage": "ppo", "step": 3, "tokens/rollout": 4.0},
    ]
    evaluations = [
        {"stage": "ppo", "kind": "policy", "step": s, "actor": {"accuracy": a}}
        for s, a in ((0, 0.5), (2, 0.6))
    ]
    points = curve(rows, evaluations, shapes)
    assert [p["tokens"] for p in points] == [10.0, 13.0]
    assert [p["steps"] for p in points] == [0.0, 2.0]


def record(cell: str, label: str, seed: int, **figures: float) -> dict[str, Any]:
    return {"cell": cell, "label": label, "options": {}, "seed": seed, "figures": figures, "curve": []}


def test_the_best_of_a_label_is_chosen_by_its_mean_over_seeds() -> None:
    records = [
        record("dense-1", "dense", 1, **{"critic/brier": 0.1}),
        record("dense-1", "dense", 2, **{"critic/brier": 0.5}),
        record("dense-2", "dense", 1, **{"critic/brier": 0.2}),
        record("dense-2", "dense", 2, **{"critic/brier": 0.2}),
        record("gen", "gen", 1),
    ]
    best = best_cells(Study.model_validate(STUDY), records)
    assert [r["cell"] for r in best["dense"]] == ["dense-2"] * 2
    assert [r["cell"] for r in best["gen"]] == ["gen"]


def test_a_sweep_is_decided_by_its_own_seeds() -> None:
    study = Study.model_validate({**STUDY, "sweep_seeds": [1], "seeds": [1, 2]})
    records = [
        record("s-dense-1", "s-dense", 1, **{"critic/brier": 0.2}),
        record("s-dense-2", "s-dense", 1, **{"critic/brier": 0.1}),
        record("s-dense-2", "s-dense", 2, **{"critic/brier": 0.4}),
    ]
    assert [r["seed"] for r in best_cells(study, records)["s-dense"]] == [1, 2]
    assert swept(study, [1, 2]) == ([1], [2])
    assert swept(study, [2]) == ([], [2])
    later = [
        record("s-dense-1", "s-dense", 2, **{"critic/brier": 0.5}),
        record("s-dense-2", "s-dense", 2, **{"critic/brier": 0.1}),
    ]
    (best,) = best_cells(study, later)["s-dense"]
    assert best["cell"] == "s-dense-2", "without the sweep's seed, by those that there are"


def test_accuracy_at_equal_cost_lies_between_two_evaluations() -> None:
    cheap, dear = record("cheap", "cheap", 1), record("dear", "dear", 1)
    cheap["curve"] = [{"flops": 0.0, "accuracy": 0.5}, {"flops": 10.0, "accuracy": 0.7}]
    dear["curve"] = [{"flops": 5.0, "accuracy": 0.5}, {"flops": 25.0, "accuracy": 0.9}]
    late = record("late", "late", 1)
    late["curve"] = [{"flops": 11.0, "accuracy": 0.5}, {"flops": 25.0, "accuracy": 0.9}]
    found = at_equal_cost([cheap, dear, late])
    assert found["cheap", 1] == pytest.approx(0.7)
    assert found["dear", 1] == pytest.approx(0.6)
    assert math.isnan(found["late", 1])


def test_intervals_are_students() -> None:
    found = mean([1.0, 2.0, 3.0])
    assert found.value == 2.0
    assert found.half == pytest.approx(4.303 / math.sqrt(3))  # deviation 1, two degrees of freedom
    assert str(mean([0.5])) == "0.500"
    assert str(mean([])) == "–"


def test_the_table_compares_seed_by_seed() -> None:
    study = Study.model_validate({"name": "joint", "cells": {}, "reference": "genac"})
    records = [
        record("genac", "genac", 1, **{"actor/end": 0.8}),
        record("genac", "genac", 2, **{"actor/end": 0.6}),
        record("grpo", "grpo", 1, **{"actor/end": 0.7}),
        record("grpo", "grpo", 2, **{"actor/end": 0.5}),
    ]
    text = markdown(study, records)
    assert "-0.100 ± 0.000" in text


def test_the_table_shows_flops_with_and_without_a_prefix_cache_where_both_are_known() -> None:
    study = Study.model_validate({"name": "joint", "cells": {}, "figures": ["step/flops", "cost/tokens"]})
    both = {"step/flops": 30.0, "step/flops_shared": 20.0}
    head = markdown(study, [record("genac", "genac", 1, **both)]).splitlines()[0]
    assert [cell.strip() for cell in head.split("|")][-3:-1] == ["step/flops", "step/flops_shared"]
    before = markdown(study, [record("genac", "genac", 1, **{"step/flops": 30.0})]).splitlines()[0]
    assert "flops_shared" not in before


def test_figures_are_compared_and_drawn_cell_by_cell(tmp_path: Path) -> None:
    figures = ["later/mse", "none/such"]
    study = Study.model_validate(
        {"name": "icc", "seeds": [1, 2], "reference": "on", "differences": figures, "dots": figures}
    )
    records = [
        record(cell, cell, seed, **{"later/mse": worth + seed / 100})
        for cell, worth in (("on", 0.01), ("off", 0.06))
        for seed in (1, 2)
    ]
    text = markdown(study, records)
    assert "later/mse_less_reference" in text
    assert "0.050 ± 0.000" in text, "what seeds have in common is not in the interval"
    assert "none/such" not in text
    (path,) = draw_all(study, records, tmp_path)
    assert path.name == "figures.png"
    assert path.stat().st_size > 5000


def test_a_line_of_fewer_seeds_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = Study.model_validate({"name": "joint", "seeds": [1, 2], "curves": [{"x": "steps"}]})
    shown: list[Axes] = []
    monkeypatch.setattr(plots, "_legend", shown.append)
    records = [record(cell, cell, seed) for cell, seed in (("ppo", 1), ("ppo", 2), ("grpo", 1))]
    curve = [{"steps": step, "accuracy": 0.5} for step in (0, 5)]
    draw_all(study, [{**one, "curve": curve} for one in records], tmp_path)
    (axes,) = shown
    assert axes.get_title(loc="left").startswith("mean over 2 seeds")
    assert axes.get_legend_handles_labels()[1] == ["ppo", "grpo, 1 seed"]


def test_a_study_that_is_under_way_is_not_begun_again(
    tmp_path: Path, recipes: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """The file says that this process's parent runs it, which lives."""
    file, work = tmp_path / "study.yaml", tmp_path / "work"
    file.write_text(yaml.safe_dump(STUDY))
    with held(work / "scaling", "the study"):
        (path,) = (work / "scaling/.lock").glob("*.json")
        holder, parent = json.loads(path.read_text()), os.getppid()
        path.write_text(json.dumps({**holder, "pid": parent, "began": began(parent)}))
        assert main(["study", str(file), "--work", str(work), "--out", str(tmp_path / "out")]) == 2
    assert f"the study is under way: process {parent}" in capsys.readouterr().err
    assert not list(work.glob("scaling/*.made_from"))
