"""What the preflight sees on this machine, and its verdict on reports of good and bad nodes."""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from genac_megatron.cluster import preflight, verdict
from genac_megatron.cluster.heartbeat import write
from genac_megatron.cluster.placement import Placement
from genac_megatron.errors import InputError
from genac_megatron.recipe.loader import load_recipe

ROOT = Path(__file__).resolve().parents[2]
GPU = {
    "index": "0", "name": "NVIDIA H100 80GB HBM3", "driver_version": "580.95", "memory.total": "81559",
    "memory.used": "4", "ecc.errors.uncorrected.volatile.total": "0",
}  # fmt: skip
PLACE = Placement(nodes=3, ranks_per_node=2, gpus_per_node=2, cpus_per_rank=1)
Reports = tuple[list[dict[str, Any]], list[dict[str, Any]]]


def reports() -> Reports:
    nodes = [
        {
            "node": f"n{i}", "rank": 2 * i, "host": f"n{i}", "interface": "ib0",
            "gpus": [dict(GPU), dict(GPU)], "versions": {"torch": "2.13.0", "nccl": "2.28.3"},
            "free_gib": {"runs": 900.0, "tmp": 9.0, "shm": 64.0},
            "busy_ports": [], "missing": [],
        }
        for i in range(3)
    ]  # fmt: skip
    ranks = [
        {"rank": r, "node": f"n{r // 2}", "state": "done", "seconds": 20.0, "right": True, "bus_gbs": 180.0,
         "clocks": [100.0 + i / 100 for i in range(6)] if r == 0 else [], "unseen": []}
        for r in range(6)
    ]  # fmt: skip
    return nodes, ranks


def judged(change: Callable[[Reports], object], least_gbs: float = 0.0) -> list[str]:
    found = copy.deepcopy(reports())
    change(found)
    return verdict.judge(PLACE, *found, least_gib=50.0, least_gbs=least_gbs, gpu_gib=79.6)


def test_good_nodes() -> None:
    assert judged(lambda found: None, least_gbs=150.0) == []
    assert "3 node(s), 6 rank(s), 6 GPU(s), all-reduce 180.00 GB/s over ib0" in verdict.summary(*reports())


def key(part: int, index: int, name: str, value: Any) -> Callable[[Reports], object]:
    return lambda found: found[part][index].__setitem__(name, value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (key(0, 1, "gpus", [dict(GPU)]), "n1: 1 GPU(s), wanted are 2"),
        (key(0, 1, "gpus", None), "n1: no nvidia-smi"),
        (key(0, 1, "gpus", "nvidia-smi did not answer in 20 s"), "n1: nvidia-smi did not answer in 20 s"),
        (key(0, 2, "gpus", [GPU, GPU | {"index": "1", "ecc.errors.uncorrected.volatile.total": "2"}]),
         "n2: GPU 1: 2 uncorrected ECC error(s)"),
        (key(0, 0, "gpus", [GPU, GPU | {"memory.used": "70000"}]),
         "n0: GPU 0: 70000 MiB in use by somebody else"),
        (key(0, 2, "gpus", [GPU, GPU | {"index": "1", "memory.total": "40960"}]),
         "n2: GPU 1: 40.0 GiB, the recipe is worked out for 79.6 (cluster.gpu)"),
        (key(0, 1, "gpus", [GPU | {"driver_version": "550.1"}] * 2), "n1: driver 550.1, elsewhere 580.95"),
        (key(0, 1, "versions", {"torch": "2.12.0", "nccl": "2.28.3"}), "n1: torch 2.12.0, elsewhere 2.13.0"),
        (key(0, 1, "versions", {"error": "ImportError: libcudart"}), "n1: versions: ImportError: libcudart"),
        (key(0, 1, "free_gib", {"runs": 3.0}), "n1: 3.00 GiB free in runs, wanted are 50"),
        (key(0, 1, "busy_ports", [10_040]), "n1: ports in use: 10040"),
        (key(0, 1, "missing", ["actor: no weights in m"]), "n1: actor: no weights in m"),
        (key(1, 0, "clocks", [100.0] * 4 + [130.0] * 2), "n2: its clock is +30.0 s off"),
        (key(1, 2, "unseen", [4, 5]), "n1: does not see the files of n2 in the run folder"),
        (key(1, 3, "right", False), "n1: rank 3: the all-reduce gave wrong numbers"),
        (key(1, 5, "error", "ValueError: late"), "n2: rank 5: all-reduce: ValueError: late"),
        (key(1, 5, "state", "before the all-reduce"), "n2: rank 5 hangs, before the all-reduce"),
    ],
)  # fmt: skip
def test_a_bad_node_is_named(change: Callable[[Reports], object], said: str) -> None:
    assert judged(change) == [said]


UUIDS = ("GPU-8932f937-d72c", "GPU-0f3c55a1-1111", "GPU-77777777-2222", "GPU-99999999-3333")


@pytest.mark.parametrize(
    ("visible", "ours"),
    [
        (None, [0, 1, 2, 3]),
        (("3", "1"), [1, 3]),
        ((UUIDS[2], "GPU-0f3c"), [1, 2]),
        (("MIG-74c6a31a-fde5",), []),
        ((), []),
    ],
)
def test_gpus_of_other_jobs_are_not_judged(visible: tuple[str, ...] | None, ours: list[int]) -> None:
    """Where no cgroup hides them nvidia-smi shows the GPUs of all jobs of a node."""
    rows = [GPU | {"index": str(n), "uuid": uuid, "memory.used": "70000"} for n, uuid in enumerate(UUIDS)]
    shown = preflight.with_job(rows, visible)
    assert len(shown) == 4
    said = [f"n0: GPU {n}: 70000 MiB in use by somebody else" for n in ours]
    assert judged(key(0, 0, "gpus", shown)) == said


def test_a_slow_fabric_is_told() -> None:
    assert judged(key(1, 0, "bus_gbs", 11.0), least_gbs=100.0) == [
        "all nodes: all-reduce at 11.0 GB/s, wanted are 100.0"
    ]


def test_a_node_that_never_came_is_the_cause_of_all_else(monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(found: Reports) -> None:
        del found[0][2], found[1][4:]
        for rank in found[1]:
            rank["error"] = "timeout"

    monkeypatch.setenv("GENAC_NODE_NAMES", "n0 n1 n2")
    assert judged(lost) == ["n2: 2 rank(s) did not start"]


def test_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One rank alone: it looks at its node, leaves its reports, and they are judged fit."""
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE", "SLURM_STEP_ID", "SLURM_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GENAC_MIN_FREE_GIB", "0.01")
    recipe = load_recipe(ROOT / "recipes/cluster/smoke.yaml", ["world.ranks=1"])
    assert preflight.preflight(recipe, tmp_path / "reports") == 0
    node = next((tmp_path / "reports").glob("node-*.json"))
    assert '"torch"' in node.read_text()
    assert verdict.judge_folder(recipe, tmp_path / "reports") == 0


def test_an_unfit_node_ends_with_its_name(tmp_path: Path) -> None:
    recipe = load_recipe(ROOT / "recipes/cluster/smoke.yaml", ["world.ranks=2"])
    nodes, ranks = reports()
    write(tmp_path / "node-n0.json", nodes[0] | {"missing": ["no data"]})
    for rank in ranks[:2]:
        write(tmp_path / f"rank-{rank['rank']}.json", rank)
    with pytest.raises(InputError, match=r"n0: no data(?s:.*)--exclude"):
        verdict.judge_folder(recipe, tmp_path)


def test_a_data_set_in_the_cache_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_DATASETS_CACHE", "HF_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    task = ["task={kind: datasets, name: openai/gsm8k, verifier: math}", "stages=[{kind: ppo}]"]
    recipe = load_recipe(ROOT / "recipes/cluster/smoke.yaml", task)
    assert "gsm8k" in preflight.missing_inputs(recipe)[0]
    os.makedirs(tmp_path / "hub" / "datasets--openai--gsm8k")
    assert preflight.missing_inputs(recipe) == []
    more = ["evaluation.suites=[math500, rg:chain_sum]", "task.decontaminate={against: [amc23, math500]}"]
    told = preflight.missing_inputs(load_recipe(ROOT / "recipes/cluster/smoke.yaml", [*task, *more]))
    assert [line.split()[2] for line in told] == ["HuggingFaceH4/MATH-500", "math-ai/amc23"]


def test_a_serving_node_without_sglang_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GENAC_SERVE_PYTHON", raising=False)
    given = ["world.timeout_s=1000", "roles.actor.engine={kind: sglang, nodes: [1]}"]
    recipe = load_recipe(ROOT / "recipes/cluster/smoke.yaml", given)
    assert preflight.missing_inputs(recipe, 0) == []
    told = preflight.missing_inputs(recipe, 1)
    assert len(told) == 1
    assert told[0].startswith("actor: the interpreter of SGLang's environment is not known: ")
    monkeypatch.setenv("GENAC_SERVE_PYTHON", sys.executable)
    assert preflight.missing_inputs(recipe, 1) == []
