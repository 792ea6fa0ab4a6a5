"""Whole runs whose roles are served by real SGLang servers: versions, overlap, and servers that are lost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from genac_megatron.serving.sglang.server import PYTHON_VARIABLE
from tests.warm import Popen, command, environment

pytestmark = pytest.mark.skipif(
    PYTHON_VARIABLE not in os.environ,
    reason=f"{PYTHON_VARIABLE} is not set: `make test-serving` builds SGLang's environment and sets it",
)
LIMITS = {"request_timeout_s": 200, "start_timeout_s": 300}
SERVERS = {"kind": "sglang", "dtype": "fp32", "max_batch": 16, "max_batch_tokens": 8192, **LIMITS}
TASK = {"kind": "state_tracking", "objects": 3, "min_swaps": 1, "max_swaps": 2}
RECIPE: dict[str, Any] = {
    "name": "run",
    "seed": 3,
    "world": {"ranks": 2, "timeout_s": 400},
    "task": {**TASK, "train_size": 1000, "heldout_size": 8},
    "roles": {
        role: {
            "model": {
                "family": "qwen3",
                "tokenizer": "builtin:tiny",
                "shape": {"layers": 2, "hidden": 32, "ffn": 64, "heads": 2, "kv_heads": 2, "init_std": 0.1},
            },
            "layout": layout,
            "training": {"dtype": "fp32", "tokens_per_microbatch": 1024},
            "engine": SERVERS,
            "optimizer": {"lr": 1e-3},
        }
        for role, layout in (("actor", {"tp": 2}), ("critic", {"pp": 2}))
    },
    "judging": {"template": "brief", "max_new_tokens": 16, "states": {"max_states": 3, "min_segment": 4}},
    "evaluation": {"prompts": 2, "samples": 2},
    "checkpoint": {"every": 0},
    "observe": {"plots": False},
}
PPO = {"kind": "ppo", "eval_every": 0, "rollout": {"prompts": 4, "samples": 2, "max_new_tokens": 24},
       "gate": {"action": "off"}}  # fmt: skip


def start(folder: Path, stage: dict[str, Any], **changes: Any) -> subprocess.Popen[str]:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({**RECIPE, **changes, "stages": [{**PPO, **stage}]}))
    return Popen(
        command("run", str(path), f"runs={folder}"),
        cwd=folder,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    output, _ = process.communicate(timeout=500)
    return process.returncode, output


def rows(folder: Path) -> list[dict[str, Any]]:
    path = folder / "run" / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def server_pids(folder: Path) -> dict[str, int]:
    found = {}
    for path in (folder / "run" / "serving").glob("*/servers.json"):
        found |= {server["name"]: server["pid"] for server in json.loads(path.read_text())}
    return found


def wait_for(condition: Callable[[], Any], process: subprocess.Popen[str], what: str) -> None:
    until = time.monotonic() + 300
    while not condition():
        assert process.poll() is None, f"the run ended before {what}:\n{finish(process)[1]}"
        assert time.monotonic() < until, f"no {what} within 300 s"
        time.sleep(0.1)


def gone(pids: list[int]) -> bool:
    return not any(psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie" for pid in pids)


def test_one_step_ahead_both_versions_advance_and_what_older_weights_sampled_says_so(tmp_path: Path) -> None:
    roles = {
        "actor": {**RECIPE["roles"]["actor"], "publication": {"mode": "in_flight"}},
        "critic": {**RECIPE["roles"]["critic"], "publication": {"mode": "in_flight", "every": 2}},
    }
    run = start(tmp_path, {"steps": 5, "overlap": True}, roles=roles)
    code, output = finish(run)
    assert code == 0, output
    steps = [row for row in rows(tmp_path) if "rollout/staleness" in row]
    assert [row["publish/actor_version"] for row in steps] == [2, 3, 4, 5, 6]
    # The first row has the stage's first publication; its last step is published whatever the cadence.
    assert [row.get("publish/critic_version") for row in steps] == [1, 2, None, 3, 4]
    assert [row["publish/critic_behind"] for row in steps] == [0, 1, 0, 1, 0]
    assert steps[0]["rollout/staleness"] == 0
    assert {row["rollout/staleness"] for row in steps[1:]} == {1}
    assert "parity/actor_p99" in steps[0]
    assert all("drift/actor_p99" in row and "actor/tis_clip_share" in row for row in steps[1:])
    assert rows(tmp_path)[-1]["parity/actor_p99"] < 1e-4  # fp32 on both sides: rounding alone


@pytest.mark.extended  # test_engines_on_nodes.py kills the same server, beside others of two nodes
@pytest.mark.parametrize("overlap", [False, True])
def test_a_server_that_is_killed_is_replaced_and_no_sample_is_lost(tmp_path: Path, overlap: bool) -> None:
    run = start(tmp_path, {"steps": 4, "overlap": overlap})
    wait_for(lambda: any(row.get("kind") == "ppo" for row in rows(tmp_path)), run, "a first step")
    before = server_pids(tmp_path)
    os.killpg(before["critic/0"], signal.SIGKILL)
    code, output = finish(run)
    assert code == 0, output
    steps = [row for row in rows(tmp_path) if "rollout/staleness" in row]
    assert [row["step"] for row in steps] == [1, 2, 3, 4]
    assert max(row.get("serving/critic_restarts", 0) for row in steps) == 1
    shown = [json.loads(line) for line in (tmp_path / "run" / "rollouts.jsonl").read_text().splitlines()]
    assert shown
    assert gone(list((before | server_pids(tmp_path)).values()))


def test_a_server_that_gets_no_memory_ends_the_run_with_4_and_names_it_and_its_log(tmp_path: Path) -> None:
    """4 GiB of address space for each process, of which one that serves takes 1.7; a KV cache of 4 GB."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nulimit -v 4194304\nexec {os.environ[PYTHON_VARIABLE]} "$@"\n')
    python.chmod(0o700)
    limited = {**SERVERS, "python": str(python)}
    engines = {"actor": limited, "critic": {**limited, "max_batch_tokens": 8_000_000, "mem_fraction": 0.9}}
    roles = {name: {**role, "engine": engines[name]} for name, role in RECIPE["roles"].items()}
    run = start(tmp_path, {"steps": 1}, roles=roles)
    code, output = finish(run)
    assert code == 4, output
    assert output.count("genac: error") == 1
    assert "SGLang server critic/0: died at its start; its log ends:" in output
    assert "can't allocate memory" in output
    assert "critic-0.log" in output
    assert gone(list(server_pids(tmp_path).values()))


def test_beyond_the_budget_the_run_ends_with_4_and_names_the_server_and_its_log(tmp_path: Path) -> None:
    engine = {**SERVERS, "restarts": 0, "attempts": 2}
    roles = {name: {**role, "engine": engine} for name, role in RECIPE["roles"].items()}
    run = start(tmp_path, {"steps": 50}, roles=roles)
    wait_for(lambda: any(row.get("kind") == "ppo" for row in rows(tmp_path)), run, "a first step")
    pids = server_pids(tmp_path)
    os.killpg(pids["actor/0"], signal.SIGKILL)
    code, output = finish(run)
    assert code == 4, output
    assert "SGLang server actor/0" in output
    assert "engine.restarts" in output
    assert "its log ends" in output
    assert gone(list(pids.values()))
