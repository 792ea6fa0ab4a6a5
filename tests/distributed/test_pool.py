"""The pool itself: results by rank, failures with their place, recovery."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist

from tests.distributed.pool import RANKS, RankFailed


def total(rank: int, scale: int) -> tuple[int, float]:
    """(process id, sum of scale * rank over ranks)."""
    value = torch.tensor(float(scale * rank))
    dist.all_reduce(value)
    return os.getpid(), float(value)


def raise_on(rank: int, which: int) -> None:
    if rank == which:
        raise ValueError(f"wrong on {rank}")
    dist.barrier()


def sleep_on(rank: int, which: int) -> None:
    if rank == which:
        time.sleep(30)


def exit_on(rank: int, which: int) -> None:
    if rank == which:
        os._exit(7)
    dist.barrier()


def test_results_come_by_rank_from_processes_that_stay(pool: Any) -> None:
    first, second = pool.run(total, 1), pool.run(total, 2)
    assert [value for _, value in first] == [6.0] * RANKS
    assert [value for _, value in second] == [12.0] * RANKS
    assert [pid for pid, _ in first] == [pid for pid, _ in second]
    assert len({pid for pid, _ in first}) == RANKS


@pytest.mark.parametrize(
    ("case", "limit_s", "message"),
    [
        (raise_on, 60, r"rank 2: .*(\n.*)*raise_on(\n.*)*ValueError: wrong on 2"),
        (exit_on, 60, r"rank 2: the process died \(7\)"),
        (sleep_on, 2, r"rank 2: not done after 2 s, at(\n.*)*sleep_on"),
    ],
)
def test_a_failure_names_its_rank_and_place_and_the_pool_recovers(
    pool: Any, case: Any, limit_s: float, message: str
) -> None:
    pool.run(total, 1)
    with pytest.raises(RankFailed, match=message) as failure:
        pool.run(case, 2, timeout=limit_s)
    assert "test_a_failure_names_its_rank" in str(failure.value)
    assert pool.run(total, 1)[0][1] == 6.0


def leave_on(rank: int, which: int, note: str) -> None:
    if rank == which:
        left = subprocess.Popen(["sleep", "300"])
        Path(note).write_text(str(left.pid))
        os._exit(7)
    dist.barrier()


def test_what_a_lost_rank_has_started_ends_with_the_pool(pool: Any, tmp_path: Path) -> None:
    note = tmp_path / "pid"
    with pytest.raises(RankFailed, match="died"):
        pool.run(leave_on, 1, str(note), timeout=10)
    until = time.monotonic() + 10
    while _runs(int(note.read_text())) and time.monotonic() < until:
        time.sleep(0.05)
    assert not _runs(int(note.read_text()))


def _runs(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
