"""Saves that fail: on every rank alike, on one rank alone, in the background; nobody waits for long."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.cases import make_role, role_config

ROOT = Path(__file__).resolve().parents[2]
STATE = {"at": {"step": 2}, "position": ["ppo", 2]}
FULL = "[Errno 28] No space left on device"


def roles_of(world: int) -> dict[str, Any]:
    role = make_role("actor", role_config(layout={"count": world, "tp": 2}), world)
    role.begin_stage(None, 10)
    return {"actor": role}


def full_disk(only: int | None) -> None:
    """Writing a shard fails on rank `only` (None: on all), as on a full file system.

    A real one would need a mount; the error is raised in the writer's process, where the real one would be.
    """
    import torch.distributed as dist
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    def fail(*_: Any, **__: Any) -> Any:
        raise OSError(28, "No space left on device")

    if only in (None, dist.get_rank()):
        filesystem_async._write_item = fail


def background_case(rank: int, folder: str, asynchronous: bool, only: int | None) -> Any:
    """A save whose shards cannot be written, and one more after that; messages, records, what is there."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    from genac_megatron.errors import GenacError
    from genac_megatron.training.checkpoint import Checkpoints

    roles, real = roles_of(4), filesystem_async._write_item
    checkpoints = Checkpoints(Path(folder), keep=2, asynchronous=asynchronous)
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    logging.getLogger("genac_megatron").addHandler(handler)
    full_disk(only)
    try:
        checkpoints.save("ppo-00002", roles, STATE)
        checkpoints.wait()
        raised = None
    except GenacError as error:
        raised = error
    finally:
        filesystem_async._write_item = real
        logging.getLogger("genac_megatron").removeHandler(handler)
    checkpoints.poll()  # what failed is not finished later
    checkpoints.save("ppo-00004", roles, STATE)
    checkpoints.wait()
    told = [record.exc_text or str(record.exc_info) for record in records if record.levelname == "ERROR"]
    return raised and (str(raised), raised.agreed), told, sorted(p.name for p in Path(folder).iterdir())


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("only", [None, 1], ids=["everywhere", "one-rank"])
def test_a_shard_that_cannot_be_written_fails_on_all_ranks(
    pool: Any, tmp_path: Path, asynchronous: bool, only: int | None
) -> None:
    results = pool.run(background_case, str(tmp_path), asynchronous, only)
    for raised, _, left in results:
        assert raised is not None
        message, agreed = raised
        assert agreed
        assert FULL in message
        assert "Traceback" not in message
        assert "CheckpointException" not in message
        assert "free space there" in message
        assert left == ["ppo-00004"]
    assert any("Worker failure" in text for _, told, _ in results for text in told), "the log has it all"


def late_case(rank: int, folder: str) -> str:
    """A writer that hangs on one rank, as on a file system that does not answer."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    from genac_megatron.errors import GenacError
    from genac_megatron.training.checkpoint import Checkpoints

    roles, real = roles_of(4), filesystem_async._write_item
    checkpoints = Checkpoints(Path(folder), keep=2, asynchronous=True, limit_s=2.0)

    def hang(*_: Any, **__: Any) -> Any:
        time.sleep(20)

    if rank == 1:
        filesystem_async._write_item = hang
    try:
        checkpoints.save("ppo-00002", roles, STATE)
        checkpoints.poll()
        checkpoints.wait()
    except GenacError as error:
        return str(error)
    finally:
        filesystem_async._write_item = real
    return "nothing was raised"


def test_a_writer_that_hangs_is_not_waited_for(pool: Any, tmp_path: Path) -> None:
    began = time.monotonic()
    for message in pool.run(late_case, str(tmp_path)):
        assert "ppo-00002" in message
        assert "2 s" in message
        assert "rank 1" in message
    pool.close()  # what the other ranks' writers said still lies in Megatron's queue: such a run is over
    assert time.monotonic() - began < 60


ALONE = """
import os, sys, time
from pathlib import Path
from genac_megatron import cli
from genac_megatron.platform.megatron import install
install()
from genac_megatron.stages import pipeline

def run_recipe(recipe, world, stop, *, resume, origin):
    from genac_megatron.training import checkpoint
    from tests.distributed.test_checkpoint_faults import STATE, roles_of
    roles = roles_of(2)
    real = checkpoint.dist_checkpointing.save
    def save(state, folder, *strategies, **options):
        if world.rank == 0:  # as where what Megatron writes on rank 0 alone cannot be written
            raise IsADirectoryError(21, "Is a directory", "common.pt")
        return real(state, folder, *strategies, **options)
    checkpoint.dist_checkpointing.save = save
    checkpoint.Checkpoints(Path("checkpoints"), keep=2, asynchronous=False).save("ppo-00002", roles, STATE)

pipeline.run_recipe = run_recipe
if __name__ == "__main__":  # Megatron's manager of write results is spawned, which imports this again
    sys.exit(cli.main(["run", sys.argv[1]]))
"""
LAUNCH = """
import sys
from genac_megatron.launch import Launcher
sys.exit(Launcher([sys.executable, *sys.argv[1:]], 2, 1, grace_s=30.0).run())
"""


def test_a_rank_that_fails_alone_leaves_at_once(tmp_path: Path) -> None:
    """Outside what torch guards: the others learn it from its end, long before the collective's limit."""
    (tmp_path / "alone.py").write_text(ALONE)
    environ = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    recipe = ROOT / "recipes" / "quickstart.yaml"
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", LAUNCH, "alone.py", str(recipe)], cwd=tmp_path, capture_output=True, text=True,
        timeout=400, env={**environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 1, done.stderr[-3000:]
    assert time.monotonic() - began < 300, "half of the collectives' limit of 600 s"
    assert done.stderr.count("genac: error: rank 0: ") == 1, done.stderr
    assert "Is a directory" in done.stderr
    assert done.stderr.count("genac: error: rank 1: a peer was lost") == 1, done.stderr
