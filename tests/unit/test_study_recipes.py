"""The studies that ship: every run of every one is a recipe that loads with what the study sets in it."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.published_models import write_place
from genac_megatron.algorithms.baselines.sp3o import trained_places
from genac_megatron.cluster.placement import misfits
from genac_megatron.critic.states import cut_states
from genac_megatron.recipe.algorithms import RegressionConfig, WithScalarCritic
from genac_megatron.recipe.estimate import describe
from genac_megatron.recipe.loader import load_recipe
from genac_megatron.recipe.schema import PolicyStage, Recipe, SftStage, ValueStage
from genac_megatron.records import Completion, Rollout
from genac_megatron.studies.places import Places
from genac_megatron.studies.runner import tasks_of
from genac_megatron.studies.schema import read_study
from genac_megatron.tasks import make_task
from genac_megatron.tasks.tokenizer import load_tokenizer

FOLDER = Path(__file__).resolve().parents[2] / "recipes" / "studies"
STUDIES = sorted(FOLDER.glob("*.yaml"))


def recipes_of(path: Path, folder: Path) -> Iterator[tuple[str, Recipe]]:
    """Every run's name and recipe of a study."""
    for task in tasks_of(Places(read_study(path), path, folder, folder), [1]):
        first = next(place for place, word in enumerate(task.command) if word.endswith(".yaml"))
        words = [word for word in task.command[first + 1 :] if "=" in word]
        yield task.key, load_recipe(Path(task.command[first]), words)


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_every_run_of_a_study_loads_and_fits(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_place(tmp_path)
    monkeypatch.chdir(tmp_path)
    recipes = list(recipes_of(path, tmp_path))
    assert len(recipes) >= 8
    for key, recipe in recipes:
        assert "rank" in describe(recipe)
        assert all(0.0 in value.at for value in chosen_places(recipe)), f"{key} leaves the prompt out"
        if path.stem.endswith("_gpu"):
            assert misfits(recipe) == [], key


def test_each_study_for_a_cpu_has_one_for_gpus() -> None:
    names = {path.stem for path in STUDIES}
    for name in ("scaling", "conditioning", "anatomy", "joint", "estimators", "long_few", "ood"):
        assert {name, f"{name}_gpu"} <= names


@pytest.mark.parametrize("study", ["adapters", "adapters_long"])
def test_adapters_of_a_study_stand_beside_its_base_runs(study: str, tmp_path: Path) -> None:
    """Whole roles begin with base runs, adapters stand beside one; a critic is pre-trained once a seed."""
    found = {
        key.partition(",")[0]: recipe.roles for key, recipe in recipes_of(FOLDER / f"{study}.yaml", tmp_path)
    }

    def run(name: str) -> str:
        return str(tmp_path / study / f"{name}-s1")

    assert found["actor"]["actor"].model.checkpoint == run("writer")
    for name, roles in found.items():
        for role, config in roles.items():
            adapter, model = config.training.adapter, config.model
            if adapter is not None:
                assert model.base == run("actor"), (name, role)
                assert model.base_role == ("actor" if role == "critic" and not model.share else None)
            elif name not in ("writer", "actor"):
                bare = name == "judge_full" and role == "critic"  # SFT copies the actor's weights
                assert model.base is None
                assert (model.checkpoint is None) == bare, (name, role)
    critics = {name: roles["critic"] for name, roles in found.items() if "critic" in roles}
    for name in ("critic_r32", "both_r32", "moving_r32"):
        assert critics[name].model.checkpoint == run("judge_r32")
        assert critics[name].training.adapter == critics["judge_r32"].training.adapter
    shared = [name for name, critic in critics.items() if critic.model.share]
    assert {"both_r32", "moving_r32"} <= {*shared} <= {"both_r8", "both_r32", "moving_r32"}
    moves = {name: roles["actor"].training.adapter for name, roles in found.items()}
    assert [name for name, adapter in moves.items() if adapter and adapter.merge_every] == ["moving_r32"]


@pytest.mark.parametrize("name", ["long_few", "long_few_single", "chain_long"])
def test_a_critic_of_exact_values_goes_on_learning_them(name: str, tmp_path: Path) -> None:
    found = dict(recipes_of(FOLDER / f"{name}.yaml", tmp_path))
    stage = found["vc_ppo_exact, seed 1"].stages[0]
    assert isinstance(stage, PolicyStage)
    assert isinstance(stage.algorithm, WithScalarCritic)
    assert (stage.algorithm.kind, stage.algorithm.value.target) == ("vc_ppo", "exact")
    plain = found["vc_ppo_slow, seed 1"].stages[0]
    assert isinstance(plain, PolicyStage)
    assert stage.rollout == plain.rollout


def test_nothing_is_predicted_of_chains_by_the_model_of_swaps() -> None:
    told = {name: read_study(FOLDER / f"{name}.yaml").predicted for name in ("chain_long", "long_few_single")}
    assert {*told["chain_long"]["actor/area_less_reference"]} == {"genac_lam0", "genac", "reinforce_pp"}
    assert {*told["long_few_single"]["actor/area_less_reference"]} == {"oracle", "genac_lam0", "genac"}


@pytest.mark.parametrize("name", ["scaling_chain", "ood_chain", "chain_long"])
def test_sft_on_chains_ends_above_the_tasks_own_entropy(name: str, tmp_path: Path) -> None:
    bases = {
        key: recipe.stages[0]
        for key, recipe in recipes_of(FOLDER / f"{name}.yaml", tmp_path)
        if key.startswith(("actor,", "body-"))
    }
    assert bases
    for stage in bases.values():
        assert isinstance(stage, SftStage)
        assert stage.heldout is not None
        assert (stage.heldout.target, stage.heldout.metric, stage.gate.action) == (0.12, "loss", "warn")


def chosen_places(recipe: Recipe) -> list[RegressionConfig]:
    """What says where a scalar critic's value is trained, where that is not everywhere."""
    found: list[RegressionConfig] = []
    for stage in recipe.stages:
        if isinstance(stage, ValueStage):
            found.append(stage.value)
        if isinstance(stage, PolicyStage) and isinstance(stage.algorithm, WithScalarCritic):
            found.append(stage.algorithm.value)
    return [value for value in found if value.at]


def demonstrated(recipe: Recipe) -> list[list[int]]:
    """The cuts of responses to the recipe's task, with the response's length as the last figure of each."""
    tokenizer, rng = load_tokenizer("builtin:tiny"), random.Random(1)
    task = make_task(recipe.task, tokenizer, 1)
    assert task.teacher is not None
    found = []
    for index in range(48):
        prompt = task.prompt("train", index)
        ids = tuple(tokenizer.encode(task.teacher.demonstrate(prompt, rng), add_special_tokens=False))
        rollout = Rollout(prompt, 0, Completion(ids, (-0.5,) * len(ids), "stop"), "")
        states = cut_states(rollout, tokenizer, recipe.judging.states)
        found.append([*(state.cut for state in states), len(ids)])
    return found


@pytest.mark.parametrize("name", ["scaling", "scaling_chain", "joint"])
def test_a_critic_is_asked_about_no_state_that_it_is_never_taught(name: str, tmp_path: Path) -> None:
    """Places of training, as cuts, cover every index that a bank or an evaluation asks about."""
    looked: set[str] = set()
    for key, recipe in recipes_of(FOLDER / f"{name}.yaml", tmp_path):
        for value in chosen_places(recipe):
            same = f"{value} {recipe.judging.states} {recipe.task}"
            if same in looked:
                continue
            looked.add(same)
            taught, asked = set(), set()
            for *cuts, length in demonstrated(recipe):
                asked |= set(range(len(cuts)))
                taught |= {cuts.index(place) for place in trained_places(length, value.at, cuts)}
            assert asked - taught == set(), key
    assert looked
