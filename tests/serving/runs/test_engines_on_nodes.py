"""Servers on several nodes of a world. Two nodes are one machine here: ranks are told as by torchrun."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from genac_megatron.platform.network import spare_ports
from genac_megatron.serving.sglang.server import PYTHON_VARIABLE
from tests.serving.runs.test_runs_on_servers import PPO, RECIPE, SERVERS, finish, gone, rows, wait_for
from tests.warm import Popen, command, environment

pytestmark = pytest.mark.skipif(
    PYTHON_VARIABLE not in os.environ,
    reason=f"{PYTHON_VARIABLE} is not set: `make test-serving` builds SGLang's environment and sets it",
)
PLACES = {"actor": {"engines": 2, "nodes": [0, 1]}, "critic": {"nodes": [1]}}
SPANNING = {"actor": {"tp": 2, "nnodes": 2, "nodes": [0, 1]}, "critic": {"nodes": [1]}}


def start_nodes(
    folder: Path, steps: int, places: dict[str, Any], first: dict[str, str] | None = None
) -> list[subprocess.Popen[str]]:
    """One rank on each of two nodes. first: more of the first one's environment."""
    roles = {n: {**r, "engine": {**SERVERS, **places[n]}} for n, r in RECIPE["roles"].items()}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({**RECIPE, "roles": roles, "stages": [{**PPO, "steps": steps}]}))
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(spare_ports(1)[0]), "WORLD_SIZE": "2"}
    logs = {"GENAC_LOGS": str(folder / "attempt")}
    return [
        Popen(
            command("run", str(path), f"runs={folder}"),
            cwd=folder,
            env=environment(**meeting, **logs, LOCAL_RANK="0", RANK=node, GROUP_RANK=node)
            | ((first or {}) if node == "0" else {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for node in "01"
    ]


def servers_of(folder: Path, node: int) -> dict[str, int]:
    """Name -> process id of what a node has noted beside the roles' models."""
    name = f"servers-node{node}.json" if node else "servers.json"
    noted = (folder / "run" / "serving").glob(f"*/{name}")
    return {server["name"]: server["pid"] for path in noted for server in json.loads(path.read_text())}


def ancestors(pid: int) -> list[int]:
    return [process.pid for process in psutil.Process(pid).parents()]


def test_each_node_starts_and_replaces_its_own_servers(tmp_path: Path) -> None:
    ranks = start_nodes(tmp_path, 4, PLACES)
    wait_for(lambda: any(row.get("kind") == "ppo" for row in rows(tmp_path)), ranks[0], "a first step")
    first, second = servers_of(tmp_path, 0), servers_of(tmp_path, 1)
    assert (sorted(first), sorted(second)) == (["actor/0"], ["actor/1", "critic/0"])
    for rank, servers in zip(ranks, (first, second), strict=True):
        assert all(rank.pid in ancestors(pid) for pid in servers.values())
    os.killpg(second["critic/0"], signal.SIGKILL)
    ends = [finish(rank) for rank in ranks]
    assert [code for code, _ in ends] == [0, 0], "\n".join(output for _, output in ends)
    steps = [row for row in rows(tmp_path) if "rollout/staleness" in row]
    assert [row["step"] for row in steps] == [1, 2, 3, 4]
    assert [row["publish/actor_version"] for row in steps] == [2, 3, 4, 5]
    assert max(row.get("serving/critic_restarts", 0) for row in steps) == 1
    after = servers_of(tmp_path, 1)
    assert after["critic/0"] != second["critic/0"]
    assert (after["actor/1"], servers_of(tmp_path, 0)) == (second["actor/1"], first)
    assert (tmp_path / "run" / "rollouts.jsonl").read_text().strip(), "rollouts are shown"
    logs = {path.name for path in (tmp_path / "attempt").glob("*.log")}
    assert {"actor-0.log", "actor-1.log", "critic-0.log", "zygote.log", "zygote-node1.log"} <= logs
    assert gone([*first.values(), *second.values(), *after.values()])


def test_a_node_that_the_world_lacks_is_told(tmp_path: Path) -> None:
    ends = [finish(rank) for rank in start_nodes(tmp_path, 1, {"actor": {"nodes": [2]}, "critic": {}})]
    assert [code for code, _ in ends] == [2, 2], ends
    assert "roles.actor.engine.nodes: servers are to start on nodes [2], and the world has 2" in ends[0][1]


def test_a_part_does_not_wait_for_a_node_that_cannot_start_its_own(tmp_path: Path) -> None:
    ends = [finish(rank) for rank in start_nodes(tmp_path, 1, SPANNING, {PYTHON_VARIABLE: "/nowhere"})]
    assert [code for code, _ in ends] == [2, 2], ends
    assert "/nowhere is no interpreter" in ends[0][1]
    assert "actor/0, part 1: its first part, on node 0, could not be started" in ends[0][1]


@pytest.mark.extended  # what it is made of: tests/serving/publication/test_over_nodes.py
def test_a_server_of_both_nodes_loses_a_part_and_is_replaced_whole(tmp_path: Path) -> None:
    ranks = start_nodes(tmp_path, 3, SPANNING)
    wait_for(lambda: any(row.get("kind") == "ppo" for row in rows(tmp_path)), ranks[0], "a first step")
    before = [servers_of(tmp_path, node)["actor/0"] for node in (0, 1)]
    os.killpg(before[1], signal.SIGKILL)
    ends = [finish(rank) for rank in ranks]
    assert [code for code, _ in ends] == [0, 0], "\n".join(output for _, output in ends)
    steps = [row for row in rows(tmp_path) if "rollout/staleness" in row]
    assert [row["step"] for row in steps] == [1, 2, 3]
    assert max(row.get("serving/actor_restarts", 0) for row in steps) == 1
    after = [servers_of(tmp_path, node)["actor/0"] for node in (0, 1)]
    assert not set(after) & set(before)
    logs = {path.name for path in (tmp_path / "attempt").glob("*.log")}
    assert {"actor-0.log", "actor-0-node1.log"} <= logs
    assert gone([*before, *after])
