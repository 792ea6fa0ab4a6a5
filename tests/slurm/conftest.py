"""A Slurm cluster per test session, and a recipe of two ranks on two nodes of it."""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster
from tools.slurm_packages import missing

ROOT = Path(__file__).resolve().parents[2]
RECIPE = """\
extends: {root}/recipes/cluster/smoke.yaml
name: run
world: {{ranks: 2}}
cluster: {{ranks_per_node: 1, cpus_per_rank: 1, time_limit: "02:00:00"}}
observe: {{tensorboard: false, plots: false, wandb: {{mode: offline}}}}
"""
# Where the stages before PPO are not the point: random weights will do.
SHORT = """\
stages:
  - {{kind: ppo, steps: {steps}, gate: {{action: "off"}},
     rollout: {{prompts: 8, samples: 2, max_new_tokens: 16}}}}
"""
NODES = ("--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1", "--gpus-per-node=0")


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    if absent := missing():
        pytest.skip(f"no Slurm here, {', '.join(absent)} missing: install slurm-wlm and munge")
    folder = Path(tempfile.mkdtemp(prefix="genac-slurm-"))  # pytest's own are too long for munge's socket
    one = Cluster(folder)
    try:
        yield one.start()
    finally:
        one.stop()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def settings() -> dict[str, str]:
    """What a user of this cluster would write into slurm/settings.sh."""
    return {"GENAC_PYTHON": sys.executable, "GENAC_MIN_FREE_GIB": "0.05", "OMP_NUM_THREADS": "1"}


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(root=ROOT))
    return path


@pytest.fixture
def short(recipe: Path) -> Callable[[int], None]:
    """Leaves of the recipe PPO alone, of so many steps."""

    def write(steps: int) -> None:
        recipe.write_text(RECIPE.format(root=ROOT) + SHORT.format(steps=steps))

    return write


@pytest.fixture
def output(tmp_path: Path) -> Callable[[], str]:
    """What jobs submitted from tmp_path have written to their stdout."""
    return lambda: "".join(path.read_text() for path in sorted(tmp_path.glob("*.out")))
