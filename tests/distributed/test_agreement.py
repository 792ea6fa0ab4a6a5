"""Failing together, and deciding by rank 0."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from genac_megatron.platform.network import spare_ports
from tests.distributed.pool import RANKS

ROOT = Path(__file__).resolve().parents[2]


def fail_case(rank: int, failing: dict[int, str]) -> tuple[str, str, bool, int]:
    """Kind and text of the error that this rank ends with; ranks in `failing` fail in that way."""
    from genac_megatron.errors import GenacError, InputError
    from genac_megatron.training.agreement import agree, gathered

    def act() -> int:
        match failing.get(rank):
            case "input":
                raise InputError(f"bad on {rank}", where="there", way_out="mend it")
            case "same":
                raise InputError("bad everywhere", where="there", way_out="mend it")
            case "bug":
                raise KeyError(rank)
        return rank

    try:
        result = agree(act)
    except GenacError as error:
        told = (type(error).__name__, str(error), error.agreed)
    else:
        told = ("", str(result), False)
    return (*told, sum(gathered(1)))  # collectives go on in step


@pytest.mark.parametrize("failing", [{2: "input"}, {0: "input"}, dict.fromkeys(range(RANKS), "same")])
def test_the_first_ranks_error_is_raised_on_all(pool: Any, failing: dict[int, str]) -> None:
    """Once, where several ranks fail alike."""
    said = "bad everywhere" if "same" in failing.values() else f"bad on {min(failing)}"
    wanted = ("InputError", f"there: {said}\n  way out: mend it", True, RANKS)
    assert pool.run(fail_case, failing) == [wanted] * RANKS


def test_other_ranks_errors_are_not_lost(pool: Any) -> None:
    told = "there: bad on 1\n  also on rank 2: there: bad on 2\n  also on rank 3: rank 3: KeyError: 3"
    wanted = ("InputError", f"{told}\n  way out: mend it", True, RANKS)
    assert pool.run(fail_case, {1: "input", 2: "input", 3: "bug"}) == [wanted] * RANKS


def test_what_nobody_foresaw_names_its_rank(pool: Any) -> None:
    assert pool.run(fail_case, {3: "bug"}) == [("GenacError", "rank 3: KeyError: 3", True, RANKS)] * RANKS


def test_without_a_failure_each_rank_keeps_its_own_result(pool: Any) -> None:
    assert pool.run(fail_case, {}) == [("", str(rank), False, RANKS) for rank in range(RANKS)]


def begin_case(rank: int, folder: str, recipe: str, resume: bool) -> Any:
    """Where a run begins that finds its checkpoints in a folder of each rank's own."""
    from genac_megatron.errors import GenacError
    from genac_megatron.recipe.loader import load_recipe
    from genac_megatron.stages.pipeline import where_to_begin
    from genac_megatron.training.agreement import from_first
    from genac_megatron.training.checkpoint import Checkpoints

    checkpoints = Checkpoints(Path(folder) / f"view{rank}", keep=2, asynchronous=False)
    try:
        return from_first(lambda: where_to_begin(load_recipe(recipe), checkpoints, resume))
    except GenacError as error:
        return str(error)


def write_view(folder: Path, recipe: str, steps: list[int]) -> None:
    from genac_megatron.recipe.loader import load_recipe
    from genac_megatron.recipe.resume import fingerprint
    from genac_megatron.training.checkpoint import FORMAT

    state = {"recipe": fingerprint(load_recipe(recipe))}
    for step in steps:
        path = folder / f"ppo-{step:05d}"
        path.mkdir(parents=True)
        manifest = {"format": FORMAT, "serial": step, "roles": {}, "trained": []}
        manifest["state"] = {**state, "position": ["ppo", step]}
        (path / "manifest.json").write_text(json.dumps(manifest))


def test_rank_0_decides_what_all_resume_from(pool: Any, tmp_path: Path) -> None:
    """Others see an older state of the file system, or one that rank 0 does not see yet."""
    recipe = str(Path(__file__).resolve().parents[2] / "recipes" / "quickstart.yaml")
    for rank, steps in enumerate(([2, 4], [2], [], [2, 4, 6])):
        write_view(tmp_path / f"view{rank}", recipe, steps)
    found = pool.run(begin_case, str(tmp_path), recipe, True)
    assert {path for path, _ in found} == {tmp_path / "view0" / "ppo-00004"}
    assert {manifest["serial"] for _, manifest in found} == {4}
    for message in pool.run(begin_case, str(tmp_path), recipe, False):
        assert "holds checkpoints of an earlier run" in message


GONE = """
import json, os, signal
from datetime import timedelta
import torch, torch.distributed as dist
from genac_megatron.training.agreement import lost_peer
dist.init_process_group("gloo", timeout=timedelta(seconds=60))
dist.barrier()
if dist.get_rank() == 0:
    os.kill(os.getpid(), signal.SIGKILL)
found = {}
store = dist.distributed_c10d._get_default_store()
acts = {
    "all-reduce": lambda: dist.all_reduce(torch.ones(4)),
    "objects": lambda: dist.all_gather_object([None, None], 3),
    "wait": lambda: store.get("nothing"),
    "new group": lambda: dist.new_group([0, 1]),
}
for name, act in acts.items():
    try:
        act()
    except Exception as error:
        found[name] = (lost_peer(error), str(error))
print(json.dumps(found))
"""


def test_what_is_said_where_the_first_rank_is_gone_is_a_lost_peer() -> None:
    """It holds the store too, so that its end is told in other words than a peer's."""
    given = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(spare_ports(1)[0]), "WORLD_SIZE": "2"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", GONE], stdout=subprocess.PIPE, text=True,
            env={**os.environ, **given, "RANK": str(rank), "PYTHONPATH": str(ROOT)},
        )
        for rank in range(2)
    ]  # fmt: skip
    _, said = (rank.communicate(timeout=200)[0] for rank in ranks)
    assert [rank.returncode for rank in ranks] == [-9, 0]
    found = json.loads(said)
    assert sorted(found) == ["all-reduce", "new group", "objects", "wait"], "each of them failed"
    assert all(lost for lost, _ in found.values()), found
