"""The best weights of an earlier start stay, and a save that takes another's place leaves one whole."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from genac_megatron.errors import GenacError, InputError
from genac_megatron.observe.manifest import FORMAT, complete
from genac_megatron.recipe.judged import BestConfig
from genac_megatron.recipe.loader import load_recipe
from genac_megatron.stages.best import Best
from genac_megatron.stages.inputs import need_inputs
from genac_megatron.training.checkpoint import Checkpoints
from genac_megatron.training.layout import init_world
from tests.e2e.test_kept_runs import SMALL

FIGURE = {"figure": "eval/accuracy", "mode": "max"}


def write_best(run: Path, value: float) -> None:
    kept = run / "best" / "pg-00002"
    kept.mkdir(parents=True)
    state = {"best": {**FIGURE, "value": value}}
    manifest = {"format": FORMAT, "serial": 1, "roles": {}, "trained": [], "state": state}
    (kept / "manifest.json").write_text(json.dumps(manifest))


def begin(run: Path, *, fresh: bool) -> tuple[float | None, list[str]]:
    """What a run takes over as its best, and what it says."""
    init_world()
    said: list[str] = []
    best = Best(BestConfig.model_validate(FIGURE), run, Checkpoints(run / "checkpoints", 1, False), 60.0)
    it: Any = SimpleNamespace(progress=SimpleNamespace(note=said.append))
    best.begin(it, fresh=fresh)
    return best.value, said


def test_a_new_start_keeps_the_best_of_an_earlier_one(tmp_path: Path) -> None:
    """Also of a job that ended before its first checkpoint, which its scheduler begins again."""
    write_best(tmp_path, 0.5)
    assert begin(tmp_path, fresh=False) == (0.5, [])
    for number in (1, 2):
        value, (told,) = begin(tmp_path, fresh=True)
        assert value is None
        assert f"kept as {tmp_path}/best.{number}" in told
        assert [path.name for path in complete(tmp_path / f"best.{number}")] == ["pg-00002"]
        write_best(tmp_path, 0.6)
    (tmp_path / "none/best/.part-pg-00002").mkdir(parents=True)  # a save that was not finished
    assert begin(tmp_path / "none", fresh=True) == (None, [])
    assert not (tmp_path / "none/best").exists()


def test_a_run_does_not_begin_with_what_it_replaces(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({**SMALL, "checkpoint": {"best": FIGURE}, "runs": str(tmp_path / "runs")}))
    write_best(tmp_path / "runs/run", 0.5)
    begun = f"roles.actor.model.checkpoint={tmp_path}/runs/run/best"
    with pytest.raises(InputError, match=r"roles\.actor\.model\.checkpoint: .*is the run's own"):
        need_inputs(load_recipe(path, [begun]), resume=False, planning=False)
    for others in (["name=other"], ["checkpoint.best=null"]):
        need_inputs(load_recipe(path, [begun, *others]), resume=False, planning=False)


def test_a_save_in_anothers_place_leaves_one_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ended between giving the one name up and taking it again."""
    init_world()
    kept = Checkpoints(tmp_path, 1, False)
    kept.save("pg-00002", {}, {"which": 1})
    replace = os.replace

    def refuses(source: Path, target: Path) -> None:
        if Path(source).name.startswith(".part-") and Path(source).is_dir():
            raise OSError("ended here")
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", refuses)
        with pytest.raises(GenacError, match="ended here"):
            kept.save("pg-00002", {}, {"which": 2})
    newest = kept.newest()
    assert newest is not None
    assert newest[1]["state"] == {"which": 1}
    for which in (3, 4):  # what was left goes
        kept.save("pg-00002", {}, {"which": which})
        assert [path.name for path in complete(tmp_path)] == ["pg-00002"]
    newest = kept.newest()
    assert newest is not None
    assert newest[1]["state"] == {"which": 4}
