"""SGLang's servers in real jobs: some on each of two nodes, and none left, however the job ends."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from genac_megatron.serving.sglang.server import PYTHON_VARIABLE
from tests.slurm.cluster import Cluster
from tests.slurm.conftest import NODES, ROOT
from tests.slurm.test_jobs import AT_ONCE, LIMIT_S, Settings, ending, genac, gone, rank_pid, reached, until

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(
        PYTHON_VARIABLE not in os.environ,
        reason=f"{PYTHON_VARIABLE} is not set: `make test-slurm` builds SGLang's environment and sets it",
    ),
]
SERVERS = {
    "kind": "sglang", "dtype": "fp32", "max_batch": 16, "max_batch_tokens": 8192,
    "request_timeout_s": 200, "start_timeout_s": 400,
}  # fmt: skip
PLACES = {"actor": {"engines": 2, "nodes": [0, 1]}, "critic": {"nodes": [1]}}
LAYOUTS = {"actor": {}, "critic": {"pp": 2}}  # no tensor-parallel group over two nodes
TASK = {"kind": "state_tracking", "objects": 3, "min_swaps": 1, "max_swaps": 2}
RECIPE: dict[str, Any] = {
    "name": "run",
    "seed": 3,
    "world": {"ranks": 2, "timeout_s": 600},
    "cluster": {"ranks_per_node": 1, "cpus_per_rank": 1},
    "task": {**TASK, "train_size": 1000, "heldout_size": 8},
    "roles": {
        role: {
            "model": {
                "family": "qwen3",
                "tokenizer": "builtin:tiny",
                "shape": {"layers": 2, "hidden": 32, "ffn": 64, "heads": 2, "kv_heads": 2, "init_std": 0.1},
            },
            "layout": LAYOUTS[role],
            "training": {"dtype": "fp32", "tokens_per_microbatch": 1024},
            "engine": {**SERVERS, **PLACES[role]},
            "optimizer": {"lr": 1e-3},
        }
        for role in ("actor", "critic")
    },
    "judging": {"template": "brief", "max_new_tokens": 16, "states": {"max_states": 3, "min_segment": 4}},
    "evaluation": {"prompts": 2, "samples": 2},
    "checkpoint": {"every": 1},
    "observe": {"tensorboard": False, "plots": False},
    "stages": [
        {"kind": "ppo", "steps": 4, "eval_every": 0, "gate": {"action": "off"},
         "rollout": {"prompts": 4, "samples": 2, "max_new_tokens": 24}}
    ],
}  # fmt: skip
SAVED = "checkpoints/ppo-*/manifest.json"
NAMES = {"": ["actor/0"], "-node1": ["actor/1", "critic/0"]}


def noted(run: Path, suffix: str) -> dict[str, dict[str, Any]]:
    """Name -> what a node has noted of its servers, beside the roles' models."""
    found = run.glob(f"serving/*/servers{suffix}.json")
    return {row["name"]: row for path in found for row in json.loads(path.read_text())}


def checked_servers(run: Path) -> dict[str, int]:
    """Every server runs below its own node's rank, on a port of the job's; name -> process id."""
    pids, ports = {}, set()
    for rank, (suffix, names) in enumerate(NAMES.items()):
        servers = noted(run, suffix)
        assert sorted(servers) == names
        for name, row in servers.items():
            parents = [process.pid for process in psutil.Process(row["pid"]).parents()]
            assert rank_pid(run, rank) in parents, name
            pids[name] = int(row["pid"])
            ports.add(int(row["url"].rsplit(":", 1)[1]))
    assert len(ports) == 3
    assert max(ports) < 32_768, "below the ephemeral range"
    return pids


def running(pids: Iterable[int]) -> list[int]:
    """Those that have not ended; a zombie has."""
    there = [psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)]
    return [process.pid for process in there if process.status() != psutil.STATUS_ZOMBIE]


@pytest.fixture
def submit(cluster: Cluster, settings: Settings, tmp_path: Path) -> Callable[..., int]:
    """Submits the recipe's job of so many steps; its environment by name."""
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    script = str(ROOT / "slurm" / "genac_ppo.sh")
    served = settings | {PYTHON_VARIABLE: os.environ[PYTHON_VARIABLE], "RECIPE": "recipe.yaml"}

    def submitted(steps: int, **environ: str) -> int:
        given = {**served, **environ}
        return cluster.submit(*NODES, script, f"stages.ppo.steps={steps}", cwd=tmp_path, **given)

    return submitted


def a_checkpoint(run: Path, over: Callable[[], str]) -> None:
    until(lambda: bool(list(run.glob(SAVED))), "a checkpoint of the first job", over=over)


def test_servers_on_both_nodes_and_none_left_behind(
    cluster: Cluster, submit: Callable[..., int], tmp_path: Path, output: Callable[[], str]
) -> None:
    """kill -9 of the job's head: Slurm ends its steps, with the ranks go their servers. The same job again
    goes on to the end, two steps later: ranks step on until Slurm ends them."""
    run, killed = tmp_path / "runs" / "run", submit(500)
    a_checkpoint(run, ending(cluster, killed, output))
    pids = checked_servers(run)
    shells = [p for p in psutil.process_iter() if p.pid in _batch_shells(killed)]
    assert len(shells) == 1
    shells[0].kill()
    assert cluster.wait(killed, LIMIT_S)["JobState"] == "FAILED"
    gone(killed)
    assert not running(pids.values())
    last = max(int(path.parent.name.rpartition("-")[2]) for path in run.glob(SAVED)) + 2
    again = submit(last, **AT_ONCE)
    seen = cluster.wait(again, LIMIT_S)
    assert (seen["JobState"], seen["ExitCode"]) == ("COMPLETED", "0:0"), output()
    gone(again)
    assert "resuming after ppo" in output()
    assert reached(run, "ppo", last)
    _check_end(run, last, {f"{killed}-r0": ("preflight", "trainer"), f"{again}-r0": ("trainer",)})
    done = genac("status", str(run), cwd=tmp_path, environ=cluster.environ)
    assert (done.returncode, done.stdout.count(": done,")) == (0, 2), done.stdout


@pytest.mark.extended  # killed ranks in jobs: test_jobs; servers that lose their rank: test_sglang_faults
def test_the_servers_of_a_killed_rank_go_with_it(
    cluster: Cluster, submit: Callable[..., int], tmp_path: Path, output: Callable[[], str]
) -> None:
    """The second node's rank is killed: code 4, and no server is left on either node."""
    run, killed = tmp_path / "runs" / "run", submit(500, **AT_ONCE)
    a_checkpoint(run, ending(cluster, killed, output))
    pids = checked_servers(run)
    os.kill(rank_pid(run, 1), signal.SIGKILL)
    seen = cluster.wait(killed, LIMIT_S)
    assert (seen["JobState"], seen["ExitCode"]) == ("FAILED", "4:0"), output()
    gone(killed)
    assert not running(pids.values())


def _check_end(run: Path, last: int, attempts: dict[str, tuple[str, ...]]) -> None:
    summary = json.loads((run / "report" / "summary.json").read_text())
    assert summary["publish/actor_version"] >= last
    assert summary["publish/critic_version"] >= last
    assert summary["parity/logp_p99"] < 1e-3  # fp32 on both sides: rounding alone
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [row["step"] for row in rows if row["stage"] == "ppo" and "rollout/staleness" in row]
    assert steps == list(range(1, last + 1))
    for attempt, parts in attempts.items():
        logs = {path.name for path in (run / "logs" / attempt).iterdir()}
        for step in parts:
            found = sorted(name.split("-")[1] for name in logs if name.startswith(f"{step}-node"))
            assert found == ["node0", "node1"]
        assert {"actor-0.log", "actor-1.log", "critic-0.log", "zygote.log", "zygote-node1.log"} <= logs


def _batch_shells(job: int) -> set[int]:
    """The job's batch script: the process that Slurm's daemon started, no rank and no helper of one."""
    found = set()
    for process in psutil.process_iter(["name", "cmdline"]):
        words = process.info["cmdline"] or []
        if f"job{job:05d}/slurm_script" in " ".join(words) and process.parent().name() == "slurmstepd":
            found.add(process.pid)
    return found
