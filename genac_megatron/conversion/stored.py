"""A checkpoint's tensors, read and written without a world, a GPU or a model.

Megatron stores a model under layout-free names with torch's distributed checkpoint: one tensor per
parameter, whole over tensor parallelism, all layers (and experts) stacked on leading axes, in pieces of any
cut. A stored tensor is therefore what the mapping calls the parameter of a single rank.
"""

from __future__ import annotations

import io
import json
import math
import os
import pickle
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.storage import WriteResult

from genac_megatron.conversion.units import Unit, stored_size, units
from genac_megatron.errors import InputError
from genac_megatron.models.families.base import Shape

# What Megatron writes beside the tensors: its own description of the format, and an empty common part.
ANOTHER = "take another checkpoint (genac inspect shows what one holds)"
FORMAT = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
COMMON = {"common_backend": "torch", "common_backend_version": 1}
# Modules whose extra state Transformer Engine or Megatron asks for; there is none in converted weights.
STATEFUL_LAYER = (
    "self_attention.linear_qkv", "self_attention.linear_proj", "self_attention.core_attention",
    "self_attention.q_layernorm", "self_attention.k_layernorm", "input_layernorm", "pre_mlp_layernorm",
    "mlp.linear_fc1", "mlp.linear_fc2",
)  # fmt: skip
STATEFUL_EXPERT = ("mlp.experts.experts.linear_fc1", "mlp.experts.experts.linear_fc2")
STATEFUL = ("decoder.final_layernorm", "output_layer")


def read_metadata(weights: Path) -> Metadata:
    """The index of a checkpoint's weights folder. Raises InputError."""
    try:
        return FileSystemReader(weights).read_metadata()
    except (OSError, EOFError, pickle.UnpicklingError, AttributeError) as error:
        raise InputError(
            f"the index of its tensors cannot be read ({error!r})",
            where=str(weights),
            way_out="give a whole checkpoint of this project",
        ) from error


class StoredWeights:
    """The weights of one role in a checkpoint, read parameter by parameter."""

    def __init__(self, weights: Path, role: str, shape: Shape) -> None:
        self.weights, self.role, self.shape = weights, role, shape
        self.metadata = read_metadata(weights)
        self._reader = FileSystemReader(weights)
        self._reader.set_up_storage_reader(self.metadata, is_coordinator=True)

    def entry(self, unit: Unit) -> TensorStorageMetadata:
        """What the index says about the tensor that holds a unit."""
        found = self.metadata.state_dict_metadata[self._key(unit)]
        assert isinstance(found, TensorStorageMetadata)
        return found

    def check(self) -> None:
        """Raise InputError naming the tensors that are missing, surplus or misshapen, and absent files."""
        faults = []
        wanted = {self._key(unit): unit for unit in units(self.shape)}
        for key, unit in wanted.items():
            entry = self.metadata.state_dict_metadata.get(key)
            if not isinstance(entry, TensorStorageMetadata):
                faults.append(f"missing tensor {key}")
            elif not _fits(tuple(entry.size), stored_size(unit, self.shape), unit.rule.padded):
                want = stored_size(unit, self.shape)
                faults.append(f"{key} has shape {tuple(entry.size)}, expected {want}")
        for key, entry in self.metadata.state_dict_metadata.items():
            mine = key.startswith(f"{self.role}.") and isinstance(entry, TensorStorageMetadata)
            if mine and key not in wanted:
                faults.append(f"surplus tensor {key}")
        files = {info.relative_path for info in self.metadata.storage_data.values()}
        faults += [f"missing file {file}" for file in files if not (self.weights / file).is_file()]
        if faults:
            more = f" and {len(faults) - 8} more" if len(faults) > 8 else ""
            raise InputError("; ".join(sorted(faults)[:8]) + more, where=str(self.weights), way_out=ANOTHER)

    def get(self, unit: Unit) -> Tensor:
        """A unit's parameter as a single rank would hold it. Raises InputError where it cannot be read."""
        key, entry = self._key(unit), self.entry(unit)
        lead = len(unit.at)
        wanted = ChunkStorageMetadata(
            offsets=torch.Size((*unit.at, *(0 for _ in unit.size))),
            sizes=torch.Size((*[1] * lead, *unit.size)),
        )
        return self._read(key, entry, wanted).view(unit.size)

    def _read(self, key: str, entry: TensorStorageMetadata, wanted: ChunkStorageMetadata) -> Tensor:
        """A piece of a stored tensor."""
        items = create_read_items_for_chunk_list(key, entry, [wanted])
        if sum(math.prod(item.lengths) for item in items) != math.prod(wanted.sizes):
            raise InputError(
                f"{key} is not whole: pieces are missing", where=str(self.weights), way_out=ANOTHER
            )
        tensor = torch.empty(wanted.sizes, dtype=entry.properties.dtype)
        try:
            self._reader.read_data(LoadPlan(items), _Into(tensor)).wait()
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, AssertionError, ValueError) as error:
            files = sorted({self.metadata.storage_data[item.storage_index].relative_path for item in items})
            raise InputError(
                f"{key} cannot be read: {str(error).splitlines()[0] if str(error) else type(error).__name__}",
                where=", ".join(str(self.weights / file) for file in files),
                way_out="the file is cut short or damaged: take another checkpoint",
            ) from error
        return tensor

    def whole(self, name: str) -> Tensor:
        """A tensor that is stored by itself, no unit of a model. Raises InputError as `get`."""
        key = f"{self.role}.{name}"
        entry = self.metadata.state_dict_metadata.get(key)
        if not isinstance(entry, TensorStorageMetadata):
            raise InputError(f"missing tensor {key}", where=str(self.weights), way_out=ANOTHER)
        return self._read(key, entry, ChunkStorageMetadata(torch.Size([0] * len(entry.size)), entry.size))

    def _key(self, unit: Unit) -> str:
        return f"{self.role}.{unit.rule.stored}"


def _fits(found: tuple[int, ...], wanted: tuple[int, ...], padded: bool) -> bool:
    """Whether a stored size is the wanted one; where it is padded it may have more rows."""
    return found == wanted or (padded and found[1:] == wanted[1:] and found[0] > wanted[0])


class _Into(LoadPlanner):
    """Reads pieces into one tensor."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def set_up_planner(self, *args: Any, **kwargs: Any) -> None: ...

    def create_local_plan(self) -> LoadPlan:
        raise NotImplementedError

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        raise NotImplementedError

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        raise NotImplementedError

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        raise NotImplementedError

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        spans = zip(read_item.dest_offsets, read_item.lengths, strict=True)
        return self.tensor[tuple(slice(begin, begin + length) for begin, length in spans)]

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None: ...


# --- writing -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Record:
    """Where a unit was written: plain data, kept as JSON while a conversion is under way."""

    key: str
    at: list[int]
    size: list[int]  # of the unit
    whole: list[int]  # of the stored tensor
    file: str
    begin: int
    length: int


def write_units(path: Path, parts: Iterable[tuple[Unit, Tensor]], shape: Shape) -> list[Record]:
    """Write units to one file of a weights folder, in the form that torch's reader expects."""
    records = []
    with path.open("wb") as file, _without_checksums():
        for unit, tensor in parts:
            begin = file.tell()
            torch.save(tensor.view(*[1] * len(unit.at), *unit.size), file)
            whole = list(stored_size(unit, shape))
            place = file.name.rpartition(os.sep)[2], begin, file.tell() - begin
            records.append(Record(unit.rule.stored, list(unit.at), list(unit.size), whole, *place))
        file.flush()
        os.fsync(file.fileno())
    return records


@contextmanager
def _without_checksums() -> Iterator[None]:
    """torch never reads the zip checksums that it writes; making them takes longer than writing."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


def seal(
    weights: Path, roles: Sequence[str], records: Sequence[Record], dtype: torch.dtype, shape: Shape
) -> None:
    """Write the index over all records, once for each role: their tensors are the same bytes."""
    blob = "__0_state.distcp"
    with (weights / blob).open("wb") as file:
        torch.save([None], file)
        length = file.tell()
    entries: dict[str, Any] = {}
    results: list[WriteResult] = []
    for role in roles:
        for record in records:
            key, lead = f"{role}.{record.key}", len(record.at)
            offsets = torch.Size((*record.at, *(0 for _ in record.size)))
            entry = entries.setdefault(
                key, TensorStorageMetadata(TensorProperties(dtype=dtype), torch.Size(record.whole), [])
            )
            entry.chunks.append(ChunkStorageMetadata(offsets, torch.Size((*[1] * lead, *record.size))))
            info = _StorageInfo(record.file, record.begin, record.length)
            results.append(WriteResult(MetadataIndex(key, offsets), record.length, info))
        for key in _extra_states(role, shape):
            entries[key] = BytesStorageMetadata()
            results.append(WriteResult(MetadataIndex(key), length, _StorageInfo(blob, 0, length)))
    FileSystemWriter(weights).finish(Metadata(entries), [results])
    torch.save({}, weights / "common.pt")
    (weights / "metadata.json").write_text(json.dumps(FORMAT | COMMON))


def _extra_states(role: str, shape: Shape) -> list[str]:
    """Keys of the extra states that a model may ask for, whatever its layer specs."""
    layers, experts = shape.layers, shape.experts or 0
    keys = [f"{role}.{name}._extra_state/shard_0_1" for name in STATEFUL]
    for layer in range(layers):
        keys += [f"{role}.decoder.layers.{x}._extra_state/shard_{layer}_{layers}" for x in STATEFUL_LAYER]
        for expert in range(experts):
            place = f"{layer}.{expert}_{layers}.{experts}"
            keys += [f"{role}.decoder.layers.{x}._extra_state/shard_{place}" for x in STATEFUL_EXPERT]
    return keys
