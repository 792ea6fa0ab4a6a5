"""The studies that ship: every run of every one is a recipe that loads with what the study sets in it."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.published_models import write_place
from genac_megatron.cluster.placement import misfits
from genac_megatron.recipe.estimate import describe
from genac_megatron.recipe.loader import load_recipe
from genac_megatron.studies.runner import Places, tasks_of
from genac_megatron.studies.schema import read_study

FOLDER = Path(__file__).resolve().parents[2] / "recipes" / "studies"
STUDIES = sorted(FOLDER.glob("*.yaml"))


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_every_run_of_a_study_loads_and_fits(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_place(tmp_path)
    monkeypatch.chdir(tmp_path)
    tasks = tasks_of(Places(read_study(path), path, tmp_path, tmp_path), [1])
    assert len(tasks) >= 8
    for task in tasks:
        first = next(place for place, word in enumerate(task.command) if word.endswith(".yaml"))
        words = [word for word in task.command[first + 1 :] if "=" in word]
        recipe = load_recipe(Path(task.command[first]), words)
        assert "rank" in describe(recipe)
        if path.stem.endswith("_gpu"):
            assert misfits(recipe) == [], task.key


def test_each_study_for_a_cpu_has_one_for_gpus() -> None:
    names = {path.stem for path in STUDIES}
    for name in ("scaling", "conditioning", "anatomy", "joint"):
        assert {name, f"{name}_gpu"} <= names
