"""Checkpoints: all roles, complete, atomic, layout-free (Megatron's distributed checkpointing).

    checkpoints/ppo-00010/
        weights/         sharded tensors of every role, with optimizer states inside a stage
        common.pt        what is not a tensor shard: optimizer groups, schedules
        manifest.json    written last: what is in it, and the run's small state

A folder without a manifest is not a checkpoint. It is written under a name that starts with a dot and
renamed when it is whole.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import extract_matching_values, merge
from megatron.core.dist_checkpointing.mapping import ShardedBase
from megatron.core.dist_checkpointing.utils import add_prefix_for_sharding
from torch.distributed.checkpoint.api import CheckpointException

from genac_megatron.errors import GenacError, InputError
from genac_megatron.models.families.base import Shape
from genac_megatron.models.sizes import parameters
from genac_megatron.observe.runinfo import write_json_atomic
from genac_megatron.platform.megatron import save_options
from genac_megatron.training.role import Role

logger = logging.getLogger(__name__)

FORMAT = 1
PART = ".part-"
MANIFEST, COMMON, WEIGHTS = "manifest.json", "common.pt", "weights"
BYTES_PER_PARAMETER = 4 + 12  # weights at most fp32, and fp32 master, first and second moment
SPARE_BYTES = 64 << 20

Sharded = dict[str, Any]


def role_state(role: Role, *, optimizer: bool, loading: bool = False) -> Sharded:
    """The sharded state of a role on this rank; empty outside its block."""
    if not role.active:
        return {}
    metadata = {"distrib_optim_sharding_type": "fully_reshardable", "dp_cp_group": role.groups.dp_cp}
    models: Sharded = {}
    for index, model in enumerate(role.models):
        models[f"model{index}"] = model.sharded_state_dict(metadata=dict(metadata))
        add_prefix_for_sharding(models[f"model{index}"], f"{role.name}.")
    if not optimizer or role.optimizer is None:
        return models
    merged: Sharded = {}
    for model in models.values():
        merged |= model
    state = models if len(models) > 1 else merged
    return {
        **models,
        "optimizer": role.optimizer.sharded_state_dict(state, is_loading=loading, metadata=dict(metadata)),
    }


class Checkpoints:
    """A run's checkpoint folder. Every method but `newest` is collective."""

    def __init__(self, folder: Path, keep: int, asynchronous: bool) -> None:
        self.folder, self.keep, self.asynchronous = folder, keep, asynchronous
        self._queue: Any = None
        self._finish: list[Callable[[], None]] = []

    # --- saving --------------------------------------------------------------------------------

    def save(self, name: str, roles: Mapping[str, Role], state: Mapping[str, Any]) -> None:
        """Write checkpoint `name`. `state` is the run's small state, as plain JSON data.

        Raises GenacError where it cannot be written; earlier checkpoints stay as they are.
        """
        self.wait()
        part, final = self.folder / f"{PART}{name}", self.folder / name
        rank = dist.get_rank()
        trained = sorted(n for n, role in roles.items() if role.optimizer is not None)
        trained = sorted(set().union(*_gathered(trained)))
        self._agree(lambda: self._prepare(part, roles, trained) if rank == 0 else None, part)
        sharded, common = self._split(roles, trained)
        request = self._agree(
            lambda: dist_checkpointing.save(
                {"roles": sharded},
                str(part / WEIGHTS),
                async_sharded_save=self.asynchronous,
                **save_options(),
            ),
            part,
        )

        def finish() -> None:
            self._agree(lambda: _seal(part, final, common, trained, roles, state), part)
            self._prune()

        if request is None:
            finish()
        else:
            self._schedule(request, finish)

    def _prepare(self, part: Path, roles: Mapping[str, Role], trained: list[str]) -> None:
        shutil.rmtree(part, ignore_errors=True)
        (part / WEIGHTS).mkdir(parents=True)
        need = SPARE_BYTES + sum(
            parameters(role.shape) * (BYTES_PER_PARAMETER if name in trained else 4)
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
                role_state(role, optimizer=name in trained), lambda v: isinstance(v, ShardedBase)
            )
            if shards:
                sharded[name] = shards
            rest["steps"] = role.scheduler.num_steps if role.scheduler is not None else 0
            box = [rest]
            if dist.get_world_size() > 1:
                dist.broadcast_object_list(box, src=role.layout.first_rank)
            common[name] = box[0]
        return sharded, common

    def _schedule(self, request: Any, finish: Callable[[], None]) -> None:
        from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue

        if self._queue is None:
            self._queue = AsyncCallsQueue()
        self._queue.schedule_async_request(request)
        self._finish.append(finish)

    def poll(self) -> None:
        """Complete an asynchronous save that has ended. Call it once a step."""
        if self._finish and self._queue.maybe_finalize_async_calls(blocking=False):
            self._finish.pop(0)()

    def wait(self) -> None:
        """Complete the asynchronous save that is under way, if any."""
        if self._finish:
            self._queue.maybe_finalize_async_calls(blocking=True)
            self._finish.pop(0)()

    def _agree(self, act: Callable[[], Any], part: Path) -> Any:
        """Run `act`; if it failed on any rank, fail on all with the first rank's reason."""
        result, failure = None, ""
        try:
            result = act()
        except (Exception, CheckpointException) as error:
            logger.debug("checkpoint step failed on this rank", exc_info=True)
            failure = f"{type(error).__name__}: {error}"
            if isinstance(error, OSError) and error.errno == errno.ENOSPC:
                failure = f"no space left on the device ({error.strerror or error})"
        failures = [text for text in _gathered(failure) if text]
        if failures:
            if dist.get_rank() == 0:
                shutil.rmtree(part, ignore_errors=True)
            full = "no space left" in failures[0].lower()
            raise GenacError(
                f"the checkpoint could not be written: {failures[0]}",
                where=str(self.folder),
                way_out=("free space there" if full else "see the cause above")
                + ", then go on from the newest complete checkpoint with --resume",
            )
        return result

    def _prune(self) -> None:
        if dist.get_rank() == 0:
            for old in complete(self.folder)[: -self.keep]:
                shutil.rmtree(old, ignore_errors=True)
        _barrier()

    def newest(self) -> tuple[Path, dict[str, Any]] | None:
        """The newest complete checkpoint and its manifest."""
        found = complete(self.folder)
        return (found[-1], read_manifest(found[-1])) if found else None


def load_checkpoint(path: Path, roles: Mapping[str, Role], *, optimizers: bool = False) -> None:
    """Weights of the given roles, or (inside a stage) the optimizers of those that train. Collective.

    The layout may differ from the one that saved. Raises InputError where it does not fit.
    """
    manifest = read_manifest(path)
    if missing := sorted(set(roles) - set(manifest["roles"])):
        raise InputError(f"it holds no role {', '.join(missing)}", where=str(path))
    for name, role in roles.items():
        _check_shape(path, name, manifest["roles"][name], role.shape)
    common = torch.load(path / COMMON, map_location="cpu", weights_only=False)
    chosen = {n: r for n, r in roles.items() if not optimizers or n in manifest["trained"]}
    request = {
        name: extract_matching_values(
            role_state(role, optimizer=optimizers, loading=True), lambda v: isinstance(v, ShardedBase)
        )[0]
        for name, role in chosen.items()
        if role.active
    }
    try:
        loaded = dist_checkpointing.load({"roles": request}, str(path / WEIGHTS)).get("roles", {})
    except (Exception, CheckpointException) as error:
        reason = str(error).strip().splitlines()[-1] if str(error).strip() else ""
        raise InputError(
            f"it cannot be read into this model: {type(error).__name__}: {reason}",
            where=str(path / WEIGHTS),
            way_out="resume with the recipe that made it, or remove this checkpoint to use the one before",
        ) from error
    for name, role in chosen.items():
        if role.active:
            _put(role, merge(common[name], loaded[name]), optimizers, common[name]["steps"])


def _check_shape(path: Path, name: str, saved: Mapping[str, Any], shape: Shape) -> None:
    """Raises InputError naming every size in which a saved role differs from the recipe's."""
    wanted = dataclasses.asdict(shape)
    different = [f"{k} {saved.get(k)} (the recipe: {v})" for k, v in wanted.items() if saved.get(k) != v]
    if different:
        raise InputError(
            f"its {name} is another model: {', '.join(different)}",
            where=str(path),
            way_out="use the recipe that made the checkpoint",
        )


def find_checkpoint(path: Path) -> Path:
    """`path` itself where it is a checkpoint, else the newest complete one of a run folder."""
    if (path / MANIFEST).exists():
        return path
    found = complete(path / "checkpoints") or complete(path)
    if not found:
        raise InputError(
            "no complete checkpoint there",
            where=str(path),
            way_out="give a run folder, or one checkpoint of it",
        )
    return found[-1]


def _put(role: Role, state: Sharded, optimizers: bool, steps: int) -> None:
    if optimizers:
        role.optimizer.load_state_dict(state["optimizer"])
        if steps:
            role.scheduler.step(increment=steps)
        return
    for index, model in enumerate(role.models):
        model.load_state_dict(state[f"model{index}"], strict=True)
    role.refresh_master()


def complete(folder: Path) -> list[Path]:
    """The folder's complete checkpoints, oldest first."""
    found = [p.parent for p in folder.glob(f"*/{MANIFEST}") if not p.parent.name.startswith(".")]
    return sorted(found, key=lambda path: read_manifest(path)["serial"])


def read_manifest(path: Path) -> dict[str, Any]:
    """A checkpoint's manifest. Raises InputError where it is unreadable or of another format."""
    try:
        manifest: dict[str, Any] = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise InputError(
            f"the manifest cannot be read: {error}", where=str(path / MANIFEST), way_out="remove this folder"
        ) from error
    if manifest.get("format") != FORMAT:
        raise InputError(
            f"format {manifest.get('format')!r}, this version reads {FORMAT}", where=str(path / MANIFEST)
        )
    return manifest


def _seal(
    part: Path,
    final: Path,
    common: Sharded,
    trained: list[str],
    roles: Mapping[str, Role],
    state: Mapping[str, Any],
) -> None:
    """Rank 0 adds what is not sharded, the manifest last, and gives the folder its name."""
    if dist.get_rank() != 0:
        return
    torch.save(common, part / COMMON)
    earlier = complete(final.parent)
    serial = read_manifest(earlier[-1])["serial"] + 1 if earlier else 1
    manifest = {
        "format": FORMAT,
        "serial": serial,
        "roles": {name: dataclasses.asdict(role.shape) for name, role in roles.items()},
        "trained": trained,
        "state": dict(state),
    }
    write_json_atomic(part / MANIFEST, manifest)
    if final.exists():
        shutil.rmtree(final)
    os.replace(part, final)


def _gathered(value: Any) -> list[Any]:
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, value)
    return parts


def _barrier() -> None:
    if dist.get_world_size() > 1:
        dist.barrier()
