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

from genac_megatron.conversion.assets import HF
from genac_megatron.conversion.job import Conversion, Tell
from genac_megatron.conversion.stored import Record, seal, write_units
from genac_megatron.conversion.units import Shard, Unit
from genac_megatron.models.hf_folder import FLOATS, HfFolder
from genac_megatron.models.mapping import shard as cut
from genac_megatron.models.sizes import hf_names
from genac_megatron.observe.manifest import COMMON, FORMAT, MANIFEST, WEIGHTS
from genac_megatron.observe.runinfo import write_json_atomic


@dataclass
class ToMegatron(Conversion):
    """The conversion of a Hugging Face folder to a checkpoint. src: the Hugging Face folder."""

    roles: tuple[str, ...]  # the checkpoint has these; their tensors are the same bytes

    @cached_property
    def folder(self) -> HfFolder:
        return HfFolder(self.src)

    def dtypes(self) -> set[torch.dtype]:
        return {FLOATS[self.folder.dtype(name)] for name in hf_names(self.shape)}

    def plan(self) -> dict[str, Any]:
        files = sorted(self.src.glob("*.safetensors"))
        found = [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]
        return {**super().plan(), "to": "megatron", "files": found, "roles": list(self.roles)}

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
