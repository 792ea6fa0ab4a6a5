"""Loading a checkpoint into roles, whatever layout saved it; and which folder is one."""

from __future__ import annotations

import dataclasses
import errno
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import extract_matching_values, merge
from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, ShardedBase, ShardedObject
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.api import CheckpointException

from genac_megatron.errors import InputError
from genac_megatron.models.families.base import Shape
from genac_megatron.models.hf_folder import read_tensor
from genac_megatron.models.peft_folder import PeftHeaders
from genac_megatron.observe.manifest import COMMON, WEIGHTS, read_manifest
from genac_megatron.platform.fp8 import remember
from genac_megatron.training.adapted import brings_base, check_adapter
from genac_megatron.training.agreement import agree, from_first, lost_peer
from genac_megatron.training.finite import need_sound
from genac_megatron.training.role import Role
from genac_megatron.training.sharding import OPTIMIZER, ROLES, Sharded, SharedReading, role_state

LATER_SIZES = {"value": False, "logit": False}  # of a Shape, which manifests of earlier versions lack
OF_RECIPE = (
    "max_lr",
    "min_lr",
    "betas",
    "eps",
)  # of a parameter group: a resumed run's recipe may change them
EXTRA = "._extra_state"


def load_checkpoint(path: Path, roles: Mapping[str, Role], *, optimizers: bool = False) -> None:
    """Weights of the given roles, or (inside a stage) the optimizers of those that train. Collective.

    roles: by their names in the checkpoint. The layout may differ from the one that saved. A scalar critic
    may take a language model's weights: it keeps its own head. An adapter takes an adapter of the same base;
    where that has moved, it comes with it. Raises InputError where it does not fit.
    """
    manifest = _load(path, roles, optimizers)
    for name, role in () if optimizers else roles.items():
        said = manifest.get("adapters", {}).get(name) or {}
        if role.owns_base and brings_base(said, role, roles):
            if said["base_in"] not in roles:  # it stood on another role's, and has one of its own here
                _load(path, {said["base_in"]: role}, False, base=True, moved=True)
            role.memory.move(said["moved"], said["merges"], by=role)


def load_base(path: Path, role: Role, name: str) -> None:
    """The whole model that an adapter stands beside: role `name` of a checkpoint. Collective; raises
    InputError.
    """
    _load(path, {name: role}, False, base=True)


def load_peft(path: Path, role: Role) -> None:
    """Begin an adapter with the one in a PEFT folder. Collective; raises InputError."""

    def load() -> None:
        folder = PeftHeaders(path)
        folder.check(role.shape)

        def get(projection: str) -> tuple[Tensor, Tensor]:
            a, b = (read_tensor(*folder.entry(projection, part)) for part in "AB")
            return a, b

        for part in (part for model in role.models for part in model.adapters.parts):
            part.take(get)
        role.refresh_master()
        need_sound(path, {role.name: role})

    agree(load)


def _load(
    path: Path, roles: Mapping[str, Role], optimizers: bool, *, base: bool = False, moved: bool = False
) -> dict[str, Any]:
    """The manifest. base: what adapters stand beside; moved: of an adapter there, once others were merged."""
    manifest, common = agree(
        lambda: _read_small(path, roles, optimizers, base, moved), partial(_unreadable, path)
    )
    said = manifest.get("adapters", {})
    bringing = {n for n, r in roles.items() if r.owns_base and (said.get(n) or {}).get("base_in") == n}
    chosen = {n: r for n, r in roles.items() if not optimizers or n in manifest["trained"]}
    bodies = {n for n, r in chosen.items() if r.shape.value and not manifest["roles"][n].get("value")}
    request = {
        name: _request(name, role, optimizers, head=name not in bodies, base=base, with_base=name in bringing)
        for name, role in chosen.items()
        if role.active
    }
    states = from_first(lambda: _saved_states(path))
    unsaved = {name: _take_unsaved(role, states) for name, role in request.items()}
    strategy = SharedReading(chosen, partial(_unreadable, path))
    try:
        loaded = dist_checkpointing.load({ROLES: request}, str(path / WEIGHTS), strategy).get(ROLES, {})
    except InputError:  # told to every rank by `strategy`
        raise
    except Exception as error:
        if lost_peer(error):
            raise
        raise _unreadable(path, error) from error
    for name, role in chosen.items():
        if role.active:
            whole = merge(merge(common[name], loaded.get(name, {})), unsaved[name])
            _put(role, whole, optimizers, common[name]["steps"], head=name not in bodies)
        elif not optimizers:
            role.serial += 1  # as refresh_master does on the role's ranks
    if not optimizers:
        agree(lambda: need_sound(path, chosen))
    return manifest


def _request(name: str, role: Role, optimizers: bool, *, head: bool, base: bool, with_base: bool) -> Sharded:
    """What this rank asks a checkpoint for: the role's weights, or its optimizer's states."""
    parts = {"base": base, "with_base": with_base}
    state = role_state(role, optimizer=optimizers, loading=True, head=head, saved_as=name, **parts)
    if optimizers:
        state = {OPTIMIZER: state[OPTIMIZER]}
    sharded: Sharded = extract_matching_values(state, lambda v: isinstance(v, ShardedBase))[0]
    return sharded


def _saved_states(path: Path) -> set[str]:
    """Which layers' extra states a checkpoint has: FP8's scales and histories, or nothing."""
    try:
        keys = FileSystemReader(path / WEIGHTS).read_metadata().state_dict_metadata
    except Exception as error:
        raise _unreadable(path, error) from error
    return {key for key in keys if EXTRA in key}


def _take_unsaved(role: Sharded, saved: set[str]) -> Sharded:
    """Take out of a request what no layer of the checkpoint's model kept; the same places, with None.

    Transformer Engine's norms and attention have such a state where torch's have none.
    """
    unsaved: Sharded = {}
    for part, tensors in role.items():
        if not part.startswith("model"):
            continue
        missing = [
            key
            for key, item in tensors.items()
            if isinstance(item, ShardedObject) and item.unique_key not in saved
        ]
        unsaved[part] = {key: None for key in missing if tensors.pop(key) is not None}
    return unsaved


def _read_small(
    path: Path, roles: Mapping[str, Role], optimizers: bool, base: bool, moved: bool
) -> tuple[dict[str, Any], Sharded]:
    """The manifest and what is not sharded. Raises InputError where `roles` are not what it holds."""
    manifest = read_manifest(path)
    if missing := sorted(set(roles) - set(manifest["roles"])):
        raise InputError(
            f"it holds no role {', '.join(missing)}",
            where=str(path),
            way_out=f"there are: {', '.join(sorted(manifest['roles'])) or 'none'}; name another checkpoint",
        )
    for name, role in roles.items():
        _check_shape(path, name, manifest["roles"][name], role.shape, body=not optimizers)
        if not moved:
            check_adapter(path, name, manifest.get("adapters", {}).get(name), role, roles, base=base)
    return manifest, torch.load(path / COMMON, map_location="cpu", weights_only=False)


def _unreadable(path: Path, error: BaseException) -> InputError:
    return InputError(
        f"it cannot be read into this model: {reason(error)}",
        where=str(path / WEIGHTS),
        way_out="resume with the recipe that made it, or remove this checkpoint to use the one before",
    )


def reason(error: BaseException) -> str:
    """The last line of the innermost error: what torch and its writers wrap is what a person can mend.

    An operating system's error comes before what was made of it, and what was tried before it.
    """
    chain = [error]
    while True:
        if isinstance(error, CheckpointException) and error.failures:
            error = next(iter(error.failures.values()))[0]
        elif (inner := error.__cause__ or error.__context__) is not None:
            error = inner
        else:
            break
        chain.append(error)
    error = next((one for one in reversed(chain) if isinstance(one, OSError)), error)
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"no space left on the device ({error.strerror})"
    lines = str(error).strip().splitlines()
    name = "" if isinstance(error, OSError) else f"{type(error).__name__}: "
    return f"{name}{lines[-1]}" if lines else type(error).__name__


def _check_shape(path: Path, name: str, saved: Mapping[str, Any], shape: Shape, *, body: bool) -> None:
    """Raises InputError naming every size in which a saved role differs from the recipe's.

    body: a scalar critic's head may be new.
    """
    wanted = dataclasses.asdict(shape)
    saved = {**LATER_SIZES, **saved}
    if body and shape.value and not saved["value"]:
        saved |= {"value": True, "tie": False, "logit": shape.logit}
    different = [f"{k} {saved.get(k)} (the recipe: {v})" for k, v in wanted.items() if saved.get(k) != v]
    if different:
        raise InputError(
            f"its {name} is another model: {', '.join(different)}",
            where=str(path),
            way_out="use the recipe that made the checkpoint",
        )


def _with_own(saved: Any, own: Any) -> Any:
    """`saved` with what each rank has of its own in its place: the numbers of the parameters in a group."""
    if isinstance(saved, LocalNonpersistentObject):
        return own
    if isinstance(saved, dict):
        return {k: _with_own(v, own.get(k)) if isinstance(own, dict) else v for k, v in saved.items()}
    if isinstance(saved, list) and isinstance(own, list) and len(saved) == len(own):
        return [_with_own(x, y) for x, y in zip(saved, own, strict=True)]
    return saved


def _groups(saved: Any) -> Iterator[dict[str, Any]]:
    """The parameter groups of an optimizer's state, which holds one optimizer or several."""
    if isinstance(saved, dict):
        for key, value in saved.items():
            yield from value if key == "param_groups" else _groups(value)
    elif isinstance(saved, list):
        for value in saved:
            yield from _groups(value)


def _put(role: Role, state: Sharded, optimizers: bool, steps: int, *, head: bool) -> None:
    if optimizers:
        group = role.optimizer.param_groups[0]  # what groups differ in is none of these
        own = {key: group[key] for key in OF_RECIPE if key in group}
        saved = _with_own(state["optimizer"], role.optimizer.state_dict())
        for group in _groups(saved):
            group.update(own)  # Megatron 0.19 finds a saved group by its learning rates
        role.optimizer.load_state_dict(saved)
        if steps:
            role.scheduler.step(increment=steps)
        return
    for index, model in enumerate(role.models):
        tensors = state[f"model{index}"]
        model.load_state_dict(tensors, strict=head and role.config.training.adapter is None)
        for name, parameter in model.named_parameters():
            if name in tensors:
                remember(parameter, tensors[name])
    role.refresh_master()
