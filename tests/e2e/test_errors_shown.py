"""What a person sees when something goes wrong on one rank: every error once, by the rank that has it.

Ranks are real processes under the real launcher. Rank 1 starts in a folder of its own, as a node with
another view of the file system would.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.warm import run

GOOD = "".join(f'{{"question": "1+{n}?", "answer": "{n + 1}"}}\n' for n in range(3))
BAD = GOOD + '{"question": \n'

LAUNCH = """
import sys
from genac_megatron.launch import Launcher
sys.exit(Launcher([sys.executable, "-c", sys.argv[1]], 2, 1, grace_s=20.0).run())
"""
RANK = """
import os, sys
rank = int(os.environ["RANK"])
os.chdir(f"view{rank}")
from genac_megatron import cli
%s
sys.exit(cli.main(["run", "recipe.yaml"]))
"""


def recipe() -> dict[str, Any]:
    shape = {"layers": 2, "hidden": 16, "ffn": 32, "heads": 2, "kv_heads": 2}
    model = {"family": "qwen3", "tokenizer": "builtin:tiny", "shape": shape}
    role = {"model": model, "training": {"dtype": "fp32"}, "engine": {"dtype": "fp32"}}
    return {
        "name": "run",
        "world": {"ranks": 2, "timeout_s": 120},
        "task": {"kind": "jsonl", "path": "data.jsonl", "verifier": "exact", "heldout_size": 1},
        "roles": {"actor": role, "critic": role},
        "stages": [
            {
                "kind": "ppo",
                "steps": 1,
                "rollout": {"prompts": 2, "samples": 2, "max_new_tokens": 8},
                "gate": {"action": "off"},
            }
        ],
        "observe": {"tensorboard": False, "plots": False},
    }


def play(folder: Path, data: tuple[str, str], fault: str = "") -> subprocess.CompletedProcess[str]:
    """Two ranks, each with its own data.jsonl; `fault` runs before `genac`."""
    for rank in range(2):
        view = folder / f"view{rank}"
        view.mkdir()
        (view / "recipe.yaml").write_text(yaml.safe_dump(recipe()))
        if data[rank]:
            (view / "data.jsonl").write_text(data[rank])
    return run([sys.executable, "-c", LAUNCH, RANK % fault], cwd=folder)


@pytest.mark.parametrize("bad", [0, 1])
def test_an_error_that_ranks_agree_on_is_said_once(tmp_path: Path, bad: int) -> None:
    """The task is made on every rank; where one cannot, all learn why, and rank 0 tells."""
    data = [GOOD, GOOD]
    data[bad] = BAD
    done = play(tmp_path, (data[0], data[1]))
    assert done.returncode == 2, done.stderr[-3000:]
    assert done.stderr.count("genac: error") == 1, done.stderr
    assert "data.jsonl:4" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_error_before_the_world_is_said_by_its_rank(tmp_path: Path) -> None:
    """Rank 0 waits for a rank that never comes, until the launcher ends it."""
    done = play(tmp_path, (GOOD, ""))
    assert done.returncode == 2, done.stderr[-3000:]
    assert done.stderr.count("genac: error: rank 1: ") == 1, done.stderr
    assert "there is no file data.jsonl" in done.stderr


ALONE = """
import genac_megatron.errors
def fail(*_):
    raise {error}
if rank == {rank}:
    def broken(recipe, world, stop, *, resume, origin):
        import torch.distributed as dist
        fail()
else:
    def broken(recipe, world, stop, *, resume, origin):
        import torch.distributed as dist
        dist.barrier()
real = cli._rank
def _rank(recipe, *rest):
    from genac_megatron.platform.megatron import install
    install()
    from genac_megatron.stages import pipeline
    pipeline.run_recipe = broken
    return real(recipe, *rest)
cli._rank = _rank
"""


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("error", ['genac_megatron.errors.InputError("no such thing")', 'KeyError("thing")'])
def test_an_error_on_one_rank_alone_names_it(tmp_path: Path, rank: int, error: str) -> None:
    """The other rank, inside a collective, sees its peer leave at once and says so."""
    done = play(tmp_path, (GOOD, GOOD), ALONE.format(rank=rank, error=error))
    if "InputError" in error:
        assert done.returncode == 2, done.stderr
        assert done.stderr.count(f"genac: error: rank {rank}: no such thing") == 1, done.stderr
    else:
        assert done.returncode == 1, done.stderr
        assert done.stderr.count(f"genac: unexpected error on rank {rank}") == 1, done.stderr
        assert done.stderr.count("KeyError: 'thing'") == 1, done.stderr
    assert done.stderr.count(f"genac: error: rank {1 - rank}: a peer was lost") == 1, done.stderr
