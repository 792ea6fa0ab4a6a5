"""What is in a checkpoint: roles and their shapes, stage and step, tensors, the layout that wrote it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from genac_megatron.conversion.stored import read_metadata
from genac_megatron.errors import InputError
from genac_megatron.observe.runinfo import RunFolder
from genac_megatron.training.checkpoint import WEIGHTS, read_manifest

GIB = 1 << 30
LAYOUT = ("first_rank", "count", "tp", "pp", "vpp", "cp", "ep")


def inspect(path: Path, role: str | None = None) -> dict[str, Any]:
    """The checkpoint as plain data; `role` alone where one is given. Raises InputError."""
    manifest = read_manifest(path)
    index = read_metadata(path / WEIGHTS).state_dict_metadata
    roles = [role] if role else list(manifest["roles"])
    if role and role not in manifest["roles"]:
        raise InputError(
            f"it holds no role {role}, only {', '.join(sorted(manifest['roles']))}",
            where=str(path),
            way_out="name one of them with --role",
        )
    recipe = RunFolder(path.absolute().parent.parent).resolved_recipe().get("roles") or {}
    state = manifest.get("state") or {}
    at = state.get("position")
    return {
        "path": str(path),
        "stage": at[0] if at else None,
        "step": at[1] if at else None,
        "converted": manifest.get("converted"),
        "trained": manifest["trained"],
        "files_bytes": sum(file.stat().st_size for file in (path / WEIGHTS).iterdir()),
        "roles": {name: _role(name, manifest["roles"][name], index, recipe) for name in roles},
    }


def _role(name: str, shape: Any, index: Mapping[str, Any], recipe: Mapping[str, Any]) -> dict[str, Any]:
    tensors: dict[str, dict[str, Any]] = {
        key.removeprefix(f"{name}."): {
            "size": list(entry.size),
            "dtype": str(entry.properties.dtype).removeprefix("torch."),
            "pieces": len(entry.chunks),
        }
        for key, entry in index.items()
        if key.startswith(f"{name}.") and isinstance(entry, TensorStorageMetadata)
    }
    optimizer = [
        entry
        for key, entry in index.items()
        if key.startswith("optimizer.") and f".{name}." in key and isinstance(entry, TensorStorageMetadata)
    ]
    layout = (recipe.get(name) or {}).get("layout") or {}
    return {
        "shape": shape,
        "written_by": {key: layout[key] for key in LAYOUT if layout.get(key) not in (None, 0, 1)} or None,
        "parameters": sum(math.prod(t["size"]) for t in tensors.values()),
        "optimizer_tensors": len(optimizer),
        "optimizer_bytes": sum(math.prod(e.size) * e.properties.dtype.itemsize for e in optimizer),
        "tensors": tensors,
    }


def describe(found: Mapping[str, Any]) -> str:
    """`inspect`'s result as text."""
    place = f"stage {found['stage']}, step {found['step']}" if found["stage"] else "no stage"
    if found["converted"]:
        place = f"converted from {found['converted']['from']}"
    lines = [f"{found['path']}: {place}; {found['files_bytes'] / GIB:.3f} GiB"]
    for name, role in found["roles"].items():
        shape = ", ".join(f"{key} {value}" for key, value in role["shape"].items() if value is not None)
        layout = role["written_by"]
        wrote = "; written by " + " ".join(f"{k}={v}" for k, v in layout.items()) if layout else ""
        lines += ["", f"{name}: {role['parameters']:,} stored values{wrote}", f"  {shape}"]
        if role["optimizer_tensors"]:
            gib = role["optimizer_bytes"] / GIB
            lines.append(f"  with optimizer states: {role['optimizer_tensors']} tensors, {gib:.3f} GiB")
        width = max(map(len, role["tensors"]), default=0)
        for key, tensor in role["tensors"].items():
            size = " x ".join(map(str, tensor["size"]))
            lines.append(f"  {key.ljust(width)}  {tensor['dtype']:9}{size}  in {tensor['pieces']}")
    return "\n".join(lines)
