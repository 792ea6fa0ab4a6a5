"""A rank that is killed where nobody looks after it, as under a scheduler that tracks no processes."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from genac_megatron.platform.network import spare_ports
from tests.faults.faulty import GONE_S, INJECT, LIMIT_S, ROLLOUT, ROOT, fault, outlived, write_recipe

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.mark.parametrize(
    ("asynchronous", "where", "step"),
    [("false", "save", 1), ("false", "rollout", 3), ("true", "before-shards", 2), ("true", "rollout", 3)],
)
def test_a_killed_rank_leaves_no_process(tmp_path: Path, asynchronous: str, where: str, step: int) -> None:
    """Megatron's writers among them, which look after nobody by themselves.

    Killed amid a save, or amid the rollout after one. There is no launcher, whose end of the rank's session
    would hide what is left.
    """
    stages = [{"kind": "ppo", "steps": 3, "rollout": ROLLOUT, "gate": {"action": "off"}}]
    write_recipe(tmp_path, stages=stages, checkpoint={"every": 1})
    note, mark = tmp_path / "done", str(uuid.uuid4())
    world = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(spare_ports(1)[0]),
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "0",
    }
    given = {"PYTHONPATH": f"{INJECT}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1", "FAULT_NOTE": str(note)}
    harm = fault(where, "kill", 0, step)
    command = [sys.executable, "-m", "genac_megatron", "run", "recipe.yaml"]
    with (tmp_path / "output").open("w+") as output:
        ranks = [
            subprocess.Popen(
                [*command, f"checkpoint.asynchronous={asynchronous}"], cwd=tmp_path,
                stdout=output, stderr=output, stdin=subprocess.DEVNULL, start_new_session=True,
                env={**os.environ, **given, **world, **harm, "RANK": str(rank), "FAULT_TEST": mark},
            )
            for rank in range(2)
        ]  # fmt: skip
        try:
            codes = [rank.wait(LIMIT_S) for rank in ranks]
            left = outlived(f"FAULT_TEST={mark}", GONE_S)
        finally:
            for rank in ranks:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(rank.pid, signal.SIGKILL)
    text = (tmp_path / "output").read_text()
    assert note.exists(), "the fault was not reached:\n" + text[-3000:]
    assert codes == [-9, 4], text[-3000:]
    assert left == [], text[-3000:]
