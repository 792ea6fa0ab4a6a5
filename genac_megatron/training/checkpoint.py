"""Checkpoints: all roles, complete, atomic, layout-free (Megatron's distributed checkpointing).

    checkpoints/ppo-00010/
        weights/         sharded tensors of every role, with optimizer states inside a stage
        common.pt        what is not a tensor shard: optimizer groups, schedules
        manifest.json    written last: what is in it, file by file, and the run's small state

A folder without a manifest is not a checkpoint (observe/manifest.py). It is written under a name that starts
with a dot and renamed when it is whole.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import errno
import logging
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import extract_matching_values
from megatron.core.dist_checkpointing.mapping import ShardedBase
from megatron.core.dist_checkpointing.utils import force_all_tensors_to_non_fp8
from torch.distributed.checkpoint.api import CheckpointException

from genac_megatron.errors import GenacError, on_all_ranks
from genac_megatron.observe.manifest import (
    COMMON,
    FORMAT,
    MANIFEST,
    PART,
    WEIGHTS,
    Survey,
    complete,
    files_of,
    read_manifest,
    survey,
)
from genac_megatron.observe.runinfo import write_json_atomic
from genac_megatron.platform.megatron import keep_write_errors, own_results_queue, save_options
from genac_megatron.training.adapted import adapted, saved_parameters
from genac_megatron.training.agreement import agree, gathered, lost_peer
from genac_megatron.training.finite import need_finite
from genac_megatron.training.loading import load_base, load_checkpoint, reason
from genac_megatron.training.role import Role
from genac_megatron.training.sharding import ROLES, Sharded, SharedWriting, role_state

__all__ = [
    "Checkpoints",
    "complete",
    "in_background",
    "load_base",
    "load_checkpoint",
    "remove_for_good",
]

logger = logging.getLogger(__name__)

BYTES_PER_PARAMETER = 4 + 12  # weights at most fp32, and fp32 master, first and second moment
SPARE_BYTES = 64 << 20
LATE_S = 10.0  # for writers that go on when one of them has failed
LITTLE_BYTES = 1 << 20  # a file system with less is full
POLL_S = 0.05  # between looks at writers in the background

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Pending:
    """A save whose shards are being written, and what makes it a checkpoint once they are."""

    part: Path
    seal: Callable[[], None]


def in_background(asked: bool | None) -> bool:
    """Whether checkpoints are written while training goes on, where a recipe leaves it open.

    They are on Linux. Elsewhere a process forked from one with threads may hang or crash: there the rank
    waits for its writers, so that it is seen at the save.
    """
    return sys.platform == "linux" if asked is None else asked


def _kill_writers(process: Any) -> None:
    """End what a writer has started (Megatron 0.16 forks a process per bucket): it would outlive it."""
    if process is None or process.pid is None:
        return
    with contextlib.suppress(psutil.Error):
        for one in psutil.Process(process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                one.kill()


def _let_go(request: Any) -> None:
    """Let tensors go that writers have their copies of: Megatron holds them until the save is completed, and
    asks no more then than how many files there are.
    """
    for files in request.async_fn_args:
        if isinstance(files, list):
            files[:] = [(path, key, ([], [])) for path, key, _ in files]


class Checkpoints:
    """A run's checkpoint folder. Every method but `newest` is collective.

    A failure that every rank knows of is raised on all. One rank may also fail alone, in what Megatron
    does on it between collectives: it raises at once and must end then, which brings the others out of
    theirs. limit_s: how long `wait` waits for writers in the background.
    """

    def __init__(self, folder: Path, keep: int, asynchronous: bool, limit_s: float = 600.0) -> None:
        self.folder, self.keep, self.asynchronous, self.limit_s = folder, keep, asynchronous, limit_s
        self._queue: Any = None
        self._pending: Pending | None = None

    # --- saving --------------------------------------------------------------------------------

    def save(
        self,
        name: str,
        roles: Mapping[str, Role],
        state: Mapping[str, Any],
        *,
        optimizers: bool = True,
        beside: Callable[[Path], None] | None = None,
    ) -> None:
        """Write checkpoint `name`. `state` is the run's small state, as plain JSON data.

        Not `optimizers`: the weights alone, also of roles that train. beside: writes more, on each rank, into
        the folder that it is given.

        Raises GenacError where it cannot be written, NotFinite where a weight or an optimizer's state is not
        finite; earlier checkpoints stay as they are.
        """
        self.wait()
        part, final = self.folder / f"{PART}{name}", self.folder / name
        rank = dist.get_rank()
        trained = sorted(n for n, role in roles.items() if optimizers and role.optimizer is not None)
        trained = sorted(set().union(*gathered(trained)))
        sharded, common = self._split(roles, trained)
        agree(lambda: need_finite(sharded))
        self._local(own_results_queue, part)
        self._local(lambda: self._prepare(part, roles, trained) if rank == 0 else None, part)
        if beside is not None:
            self._local(partial(beside, part), part)
        keep_write_errors()
        request = self._collective(
            lambda: dist_checkpointing.save(
                {ROLES: sharded},
                str(part / WEIGHTS),
                SharedWriting(roles),
                async_sharded_save=self.asynchronous,
                **save_options(),
            ),
            part,
        )
        said = {  # now: a base may move while a writer writes
            "roles": {name: dataclasses.asdict(role.shape) for name, role in roles.items()},
            "adapters": {name: found for name, role in roles.items() if (found := adapted(role, roles))},
            "trained": trained,
            "state": dict(state),
        }
        pending = Pending(part, lambda: _seal(part, final, common, said))
        if request is None:
            self._finish(pending)
        else:
            self._local(lambda: self._schedule(request), part)
            self._pending = pending

    def _prepare(self, part: Path, roles: Mapping[str, Role], trained: list[str]) -> None:
        shutil.rmtree(part, ignore_errors=True)
        (part / WEIGHTS).mkdir(parents=True)
        need = SPARE_BYTES + sum(
            saved_parameters(role) * (BYTES_PER_PARAMETER if name in trained else 4)
            for name, role in roles.items()
        )
        free = shutil.disk_usage(self.folder).free
        if free < need:
            raise OSError(errno.ENOSPC, f"{free / 2**30:.2f} GiB free, about {need / 2**30:.2f} GiB needed")

    def _split(self, roles: Mapping[str, Role], trained: list[str]) -> tuple[Sharded, Sharded]:
        """Shards on this rank; and, on rank 0, the rest of every role, from its first rank."""
        sharded: Sharded = {}
        common: Sharded = {}
        for name, role in roles.items():
            shards, rest = extract_matching_values(
                role_state(role, optimizer=name in trained, with_base=role.keeps_base),
                lambda v: isinstance(v, ShardedBase),
            )
            force_all_tensors_to_non_fp8(shards)  # a checkpoint is the same whatever weights are kept in
            if shards:
                sharded[name] = shards
            rest["steps"] = role.scheduler.num_steps if role.scheduler is not None else 0
            box = [rest]
            if dist.get_world_size() > 1:
                dist.broadcast_object_list(box, src=role.layout.first_rank)
            common[name] = copy.deepcopy(box[0])  # Adam counts its steps in place, while a writer writes
        return sharded, common

    def _schedule(self, request: Any) -> None:
        from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue

        if self._queue is None:
            self._queue = AsyncCallsQueue()
        self._queue.schedule_async_request(request)
        _let_go(request)

    def poll(self) -> bool:
        """Complete an asynchronous save that has ended on all ranks. Whether none is left. Once a step."""
        pending = self._pending
        if pending is None:
            return True
        queue = self._queue
        try:
            done = self._collective(lambda: queue.maybe_finalize_async_calls(blocking=False), pending.part)
        except GenacError:
            self._pending = None
            raise
        if done:
            self._pending = None
            self._finish(pending)
        return bool(done)

    def wait(self) -> None:
        """Complete the asynchronous save that is under way, if any. Raises GenacError after `limit_s`."""
        deadline = time.monotonic() + self.limit_s
        while (pending := self._pending) is not None and not self.poll():
            late = gathered((time.monotonic() > deadline, self._writing()))
            if late[0][0]:  # rank 0's clock, so that all decide alike
                self._drop()
                ranks = ", ".join(f"rank {rank}" for rank, (_, writing) in enumerate(late) if writing)
                what = f"its writer still writes after {self.limit_s:g} s ({ranks or 'no rank'})"
                raise on_all_ranks(self._failed(what, pending.part))
            time.sleep(POLL_S)

    def _writing(self) -> bool:
        """Whether this rank's writer runs."""
        return any(call.async_caller.process is not None and call.async_caller.process.is_alive()
                   for call in self._queue.async_calls)  # fmt: skip

    def _drop(self) -> None:
        """Give the save that is under way up; a writer that hangs would keep this process from ending."""
        for call in self._queue.async_calls:
            _kill_writers(call.async_caller.process)
            call.async_caller.close(abort=True)
        self._queue.async_calls.clear()
        self._pending = None

    def give_up(self) -> None:
        """Let a save under way go: this rank ends by itself, and without it none can be whole. Local."""
        if self._pending is not None:
            self._drop()

    def _finish(self, pending: Pending) -> None:
        self._local(pending.seal, pending.part)
        self._prune()

    def _local(self, act: Callable[[], T], part: Path) -> T:
        """Run `act`, which is local; if it failed on any rank, fail on all with the first rank's reason."""
        return agree(act, lambda error: self._failed(reason(error), part))

    def _collective(self, act: Callable[[], T], part: Path) -> T:
        """Run `act`, in which torch raises what fails on one rank as CheckpointException on all of them.

        Any other error is this rank's alone, while the others wait in a collective: no agreement is
        possible, and this rank's end is what they will notice.
        """
        try:
            return act()
        except CheckpointException as error:
            if error.failures:
                logger.error("rank %d: the checkpoint could not be written", dist.get_rank(), exc_info=True)
            # Rank 0, which coordinates, has the reasons; the others know only that there are some.
            reasons = [text for text in gathered(reason(error) if error.failures else "") if text]
            raise on_all_ranks(self._failed(reasons[0] if reasons else "unknown", part)) from error
        except Exception as error:
            if lost_peer(error):
                raise
            logger.error("rank %d: the checkpoint could not be written", dist.get_rank(), exc_info=True)
            raise self._failed(reason(error), part) from error

    def _failed(self, reason: str, part: Path) -> GenacError:
        full = "no space left" in reason.lower()
        if not full and _free(self.folder) < LITTLE_BYTES:  # torch's zip writer names no reason
            full, reason = True, f"no space left on the device ({reason})"
        if dist.get_rank() == 0:
            remove_for_good(part)
        return GenacError(
            f"the checkpoint {part.name.removeprefix(PART)} could not be written: {reason}",
            where=str(self.folder),
            way_out=("free space there" if full else "see the cause above")
            + ", then go on from the newest complete checkpoint with --resume",
        )

    def _prune(self) -> None:
        if dist.get_rank() == 0:
            for old in complete(self.folder)[: -self.keep]:
                shutil.rmtree(old, ignore_errors=True)
        _barrier()

    def newest(self) -> tuple[Path, dict[str, Any]] | None:
        """The newest complete checkpoint and its manifest."""
        found = complete(self.folder)
        return (found[-1], read_manifest(found[-1])) if found else None

    def survey(self) -> Survey:
        """What the folder holds, damaged and unfinished checkpoints included."""
        return survey(self.folder)


def remove_for_good(folder: Path, limit_s: float = LATE_S) -> None:
    """Remove a folder that others may be writing into: again, until it is gone. Best effort."""
    give_up = time.monotonic() + limit_s
    shutil.rmtree(folder, ignore_errors=True)
    while folder.exists() and time.monotonic() < give_up:
        time.sleep(0.05)
        shutil.rmtree(folder, ignore_errors=True)


def _seal(part: Path, final: Path, common: Sharded, said: Mapping[str, Any]) -> None:
    """Rank 0 adds what is not sharded, the manifest last, and gives the folder its name."""
    if dist.get_rank() != 0:
        return
    torch.save(common, part / COMMON)
    earlier = complete(final.parent)
    serial = read_manifest(earlier[-1])["serial"] + 1 if earlier else 1
    manifest = {"format": FORMAT, "serial": serial, **said, "files": files_of(part)}
    write_json_atomic(part / MANIFEST, manifest)
    if not final.exists():
        os.replace(part, final)
        return
    before = final.with_name(f"{final.name}.before")  # a checkpoint too, where a kill comes in between
    shutil.rmtree(before, ignore_errors=True)
    os.replace(final, before)
    os.replace(part, final)
    shutil.rmtree(before)


def _free(folder: Path) -> float:
    """Free bytes of its file system; infinite where it does not say."""
    try:
        return float(shutil.disk_usage(folder).free)
    except OSError:
        return math.inf


def _barrier() -> None:
    if dist.get_world_size() > 1:
        dist.barrier()
