"""A conversion, shard by shard: resumable, over processes or ranks, into a folder that appears whole.

DST.part/ holds what is done: plan.json says of what conversion, done/<shard>.json that a shard's file is
whole. The same command goes on where an earlier one stopped. Ranks share nothing but this folder: each writes
its own shards, and the first waits for the others', adds what is small and gives the folder its name.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from genac_megatron.conversion.assets import Assets
from genac_megatron.conversion.units import Shard, shards, units
from genac_megatron.dtypes import DTYPES
from genac_megatron.errors import InputError, PeerLost, StopRequested
from genac_megatron.launch import end_with
from genac_megatron.models.families.base import Shape
from genac_megatron.observe.lock import LOCK, held
from genac_megatron.observe.progress import format_duration
from genac_megatron.observe.runinfo import write_json_atomic
from genac_megatron.stages.stopping import StopFlag

AGAIN = "run the same command again: it goes on where it stopped"
SPARE_BYTES = 16 << 20
POLL_S = 0.2
TOLD_S = 2.0  # between lines of progress
GIB = 1 << 30

Tell = Callable[[int], None]  # takes bytes that were written


@dataclass
class Conversion(ABC):
    """What is converted and how; it travels to worker processes."""

    src: Path  # the folder that holds the weights
    shape: Shape
    dst: Path
    dtype: str  # keep, or one of DTYPES
    max_shard_bytes: int
    assets: Assets

    @cached_property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of every tensor that is written. Raises InputError where the source's differ."""
        if self.dtype != "keep":
            return DTYPES[self.dtype]
        found = self.dtypes()
        if len(found) > 1:
            raise InputError(
                f"its tensors have several dtypes ({', '.join(sorted(map(str, found)))})",
                where=str(self.src),
                way_out="choose one with --dtype",
            )
        return found.pop()

    @property
    def itemsize(self) -> int:
        return self.torch_dtype.itemsize

    @cached_property
    def shards(self) -> tuple[Shard, ...]:
        return shards(units(self.shape), self.itemsize, self.max_shard_bytes)

    def plan(self) -> dict[str, Any]:
        """What makes two conversions the same one: source, options."""
        return {
            "from": str(self.src.absolute()),
            "dtype": str(self.torch_dtype),
            "max_shard_bytes": self.max_shard_bytes,
            "shards": len(self.shards),
        }

    @abstractmethod
    def dtypes(self) -> set[torch.dtype]:
        """The dtypes of the source's tensors."""

    @abstractmethod
    def write(self, part: Path, shard: Shard, tell: Tell) -> Any:
        """Write a shard's file whole; what the index needs to know about it, as plain data."""

    @abstractmethod
    def finish(self, part: Path, records: list[Any]) -> None:
        """Add the index and everything small, from all shards' records in order."""


@dataclass
class Meter:
    """Progress in bytes, on stderr."""

    total: int
    done: int = 0
    enabled: bool = True
    began: float = field(default_factory=time.monotonic)
    _told: float = 0.0
    _first: int = -1

    def __call__(self, written: int) -> None:
        if self._first < 0:
            self._first = self.done
        self.done += written
        now = time.monotonic()
        if self.enabled and (now - self._told > TOLD_S or self.done >= self.total):
            self._told = now
            rate = (self.done - self._first) / max(now - self.began, 1e-6)
            left = format_duration((self.total - self.done) / max(rate, 1.0))
            text = (
                f"{self.done / GIB:.2f} of {self.total / GIB:.2f} GiB · {rate / 2**20:.0f} MiB/s · eta {left}"
            )
            print(f"convert: {text}", file=sys.stderr, flush=True)


def convert(
    job: Conversion,
    *,
    workers: int = 1,
    rank: int = 0,
    ranks: int = 1,
    limit_s: float = 600.0,
    quiet: bool = False,
    stop: StopFlag | None = None,
) -> None:
    """Run a conversion, or this rank's part of it; rank 0 returns when the folder has its name.

    limit_s: how long rank 0 waits for another rank's next shard. stop: looked at between shards.
    Raises InputError, PeerLost, StopRequested.
    """
    part = job.dst.with_name(job.dst.name + ".part")
    stop = stop or StopFlag()
    if rank > 0 and job.dst.exists():
        return  # the first rank found everything done, or says what is wrong
    _begin(job, part)
    lock = held(part, "the conversion", other="name another folder", name=f".rank{rank}{LOCK}")
    with lock, _full_disk(part):
        missing = [s for s in job.shards[rank::ranks] if not _record(part, s).exists()]
        _check_space(job, part, missing)
        done = sum(s.numel for s in job.shards[rank::ranks]) - sum(s.numel for s in missing)
        meter = Meter((done + sum(s.numel for s in missing)) * job.itemsize, done * job.itemsize)
        meter.enabled = not quiet and rank == 0
        if workers > 1 and len(missing) > 1:
            _in_processes(job, part, missing, workers, meter, stop)
        else:
            for shard in missing:
                _stop_if_asked(job, part, stop)
                _write(job, part, shard, meter)
        if rank == 0:
            _await(job, part, limit_s, stop)
            _finish(job, part)


def _begin(job: Conversion, part: Path) -> None:
    """Make the folder, or make sure that it is the same conversion's."""
    if job.dst.exists():
        raise InputError("exists already", where=str(job.dst), way_out="remove it, or name another folder")
    plan = job.plan()
    path = part / "plan.json"
    if not path.exists():
        (part / "done").mkdir(parents=True, exist_ok=True)
        write_json_atomic(path, plan)
        return
    found = json.loads(path.read_text())
    different = sorted(key for key in plan.keys() | found.keys() if plan.get(key) != found.get(key))
    if different:
        shown = ", ".join(f"{key}: {found.get(key)} then, {plan.get(key)} now" for key in different)
        raise InputError(f"another conversion was begun here ({shown})", where=str(part), way_out="remove it")


@contextmanager
def _full_disk(part: Path) -> Iterator[None]:
    """Say what a disk without room, or one that cannot be written, means for the conversion."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        what = "no space left" if full else f"cannot be written: {error.strerror or error}"
        raise InputError(what, where=str(error.filename or part), way_out=f"mend it and {AGAIN}") from error


def _check_space(job: Conversion, part: Path, missing: list[Shard]) -> None:
    need = sum(s.numel for s in missing) * job.itemsize + SPARE_BYTES
    free = shutil.disk_usage(part).free
    if free < need:
        raise InputError(
            f"no space left: {free / GIB:.2f} GiB free, about {need / GIB:.2f} GiB needed",
            where=str(part),
            way_out=f"free space there and {AGAIN}",
        )


def _record(part: Path, shard: Shard) -> Path:
    return part / "done" / f"{shard.index:05d}.json"


def _write(job: Conversion, part: Path, shard: Shard, tell: Tell) -> None:
    write_json_atomic(_record(part, shard), job.write(part, shard, tell))


def _stop_if_asked(job: Conversion, part: Path, stop: StopFlag) -> None:
    if stop.asked:
        done = sum(_record(part, shard).exists() for shard in job.shards)
        raise StopRequested(f"stopped as asked after {done} of {len(job.shards)} shards", way_out=AGAIN)


def _in_processes(
    job: Conversion, part: Path, missing: list[Shard], workers: int, meter: Meter, stop: StopFlag
) -> None:
    count = min(workers, len(missing))
    with ProcessPoolExecutor(count, get_context("spawn"), end_with, (os.getpid(),)) as pool:
        waiting = {pool.submit(_write, job, part, shard, _silent): shard for shard in missing}
        try:
            for future in as_completed(waiting):
                future.result()
                meter(waiting[future].numel * job.itemsize)
                if stop.asked:
                    break
        except BrokenProcessPool as error:
            raise InputError("a worker process was killed", where=str(part), way_out=AGAIN) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
    _stop_if_asked(job, part, stop)


def _silent(written: int) -> None:
    """Workers say nothing: the process that started them does."""


def _await(job: Conversion, part: Path, limit_s: float, stop: StopFlag) -> None:
    """Wait until every rank's shards are there."""
    seen, since = -1, time.monotonic()
    while missing := [s for s in job.shards if not _record(part, s).exists()]:
        _stop_if_asked(job, part, stop)
        if len(missing) != seen:
            seen, since = len(missing), time.monotonic()
        if time.monotonic() - since > limit_s:
            shown = ", ".join(str(s.index) for s in missing[:8])
            raise PeerLost(
                f"waited {limit_s:g} s for shards {shown} of other ranks", where=str(part), way_out=AGAIN
            )
        time.sleep(POLL_S)


def _finish(job: Conversion, part: Path) -> None:
    records = [json.loads(_record(part, shard).read_text()) for shard in job.shards]
    job.finish(part, records)
    shutil.rmtree(part / "done")
    (part / "plan.json").unlink()
    for lock in part.glob(f".rank*{LOCK}"):
        shutil.rmtree(lock, ignore_errors=True)
    for left in part.glob("rank*.lock"):  # of an earlier version
        left.unlink()
    os.replace(part, job.dst)
