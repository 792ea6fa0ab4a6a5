"""One role of a checkpoint, whatever layout wrote it, as a Hugging Face folder."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from genac_megatron.conversion.job import Conversion, Tell
from genac_megatron.conversion.safetensors_file import write_safetensors
from genac_megatron.conversion.stored import StoredWeights
from genac_megatron.conversion.units import Shard, Unit, units
from genac_megatron.models.hf_folder import INDEX, SINGLE
from genac_megatron.models.mapping import unshard
from genac_megatron.observe.runinfo import write_json_atomic


@dataclass
class ToHf(Conversion):
    """The conversion of a checkpoint's role to a Hugging Face folder. src: the checkpoint's tensors."""

    role: str

    @cached_property
    def stored(self) -> StoredWeights:
        return StoredWeights(self.src, self.role, self.shape)

    def dtypes(self) -> set[torch.dtype]:
        return {self.stored.entry(unit).properties.dtype for unit in units(self.shape)}

    def plan(self) -> dict[str, Any]:
        index = (self.src / ".metadata").stat()
        return {**super().plan(), "to": "hf", "written": index.st_mtime_ns, "role": self.role}

    def write(self, part: Path, shard: Shard, tell: Tell) -> dict[str, str]:
        """One safetensors file; which file holds which tensor."""
        file = self._file(shard)
        sizes = [pair for unit in shard.units for pair in unit.hf]
        write_safetensors(part / file, sizes, self.torch_dtype, self._tensors(shard, tell))
        return {name: file for name, _ in sizes}

    def _tensors(self, shard: Shard, tell: Tell) -> Iterator[tuple[str, Tensor]]:
        for unit in shard.units:
            whole = self._split(unit)
            for name, _ in unit.hf:
                yield name, whole.pop(name)
            tell(unit.numel * self.itemsize)

    def _split(self, unit: Unit) -> dict[str, Tensor]:
        return unshard(unit.rule, [self.stored.get(unit)], self.shape, unit.layer)

    def _file(self, shard: Shard) -> str:
        count = len(self.shards)
        return SINGLE if count == 1 else f"model-{shard.index + 1:05d}-of-{count:05d}.safetensors"

    def finish(self, part: Path, records: list[dict[str, str]]) -> None:
        if len(records) > 1:
            total = sum(shard.numel for shard in self.shards) * self.itemsize
            weight_map = {name: file for record in records for name, file in record.items()}
            write_json_atomic(part / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
        self.assets.write(part, self.shape, self.torch_dtype)
