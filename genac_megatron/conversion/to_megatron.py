"""A Hugging Face folder as a checkpoint that roles start from, at any layout."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from genac_megatron.conversion.assets import HF, Assets
from genac_megatron.conversion.job import Tell
from genac_megatron.conversion.stored import Record, seal, write_units
from genac_megatron.conversion.units import Shard, Unit, shards, units
from genac_megatron.dtypes import DTYPES
from genac_megatron.errors import InputError
from genac_megatron.models.families.base import Shape
from genac_megatron.models.hf_folder import FLOATS, HfFolder
from genac_megatron.models.mapping import shard as cut
from genac_megatron.models.sizes import hf_names
from genac_megatron.observe.runinfo import write_json_atomic

WEIGHTS = (
    "weights"  # as in training.checkpoint, which is too heavy to import in every worker; a test compares
)


@dataclass
class ToMegatron:
    """The conversion of a Hugging Face folder to a checkpoint (see job.Conversion)."""

    src: Path
    roles: tuple[str, ...]  # the checkpoint has these; their tensors are the same bytes
    shape: Shape
    dst: Path
    dtype: str  # keep, or one of DTYPES
    max_shard_bytes: int
    assets: Assets

    @cached_property
    def folder(self) -> HfFolder:
        return HfFolder(self.src)

    @cached_property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of every tensor that is written. Raises InputError where the folder's differ."""
        if self.dtype != "keep":
            return DTYPES[self.dtype]
        found = {self.folder.dtype(name) for name in hf_names(self.shape)}
        if len(found) > 1:
            raise InputError(
                f"its tensors have several dtypes ({', '.join(sorted(found))})",
                where=str(self.src),
                way_out="choose one with --dtype",
            )
        return FLOATS[found.pop()]

    @property
    def itemsize(self) -> int:
        return self.torch_dtype.itemsize

    @cached_property
    def shards(self) -> tuple[Shard, ...]:
        return shards(units(self.shape), self.itemsize, self.max_shard_bytes)

    def plan(self) -> dict[str, Any]:
        files = sorted(self.src.glob("*.safetensors"))
        return {
            "to": "megatron",
            "from": str(self.src.absolute()),
            "files": [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files],
            "roles": list(self.roles),
            "dtype": str(self.torch_dtype),
            "max_shard_bytes": self.max_shard_bytes,
        }

    def write(self, part: Path, shard: Shard, tell: Tell) -> list[dict[str, Any]]:
        """One file of stored tensors; its records."""
        weights = part / WEIGHTS
        weights.mkdir(exist_ok=True)
        records = write_units(weights / f"__0_{shard.index}.distcp", self._tensors(shard, tell), self.shape)
        return [dataclasses.asdict(record) for record in records]

    def _tensors(self, shard: Shard, tell: Tell) -> Iterator[tuple[Unit, Tensor]]:
        for unit in shard.units:
            yield unit, self._fused(unit)
            tell(unit.numel * self.itemsize)

    def _fused(self, unit: Unit) -> Tensor:
        tensors = [self.folder.get(name) for name, _ in unit.hf]
        return cut(unit.rule, tensors, self.shape, 0, 1).to(self.torch_dtype)

    def finish(self, part: Path, records: list[list[dict[str, Any]]]) -> None:
        from genac_megatron.training.checkpoint import COMMON, FORMAT, MANIFEST

        placed = [Record(**record) for shard in records for record in shard]
        seal(part / WEIGHTS, self.roles, placed, self.torch_dtype, self.shape)
        torch.save({role: {"steps": 0} for role in self.roles}, part / COMMON)
        (part / HF).mkdir(exist_ok=True)
        self.assets.write(part / HF, self.shape, self.torch_dtype)
        manifest = {
            "format": FORMAT,
            "serial": 1,
            "roles": {role: dataclasses.asdict(self.shape) for role in self.roles},
            "trained": [],
            "state": {},
            "converted": {"from": str(self.src.absolute()), "dtype": str(self.torch_dtype)},
        }
        write_json_atomic(part / MANIFEST, manifest)
