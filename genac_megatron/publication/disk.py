"""By way of a folder that trainer and servers share: the last resort, where nothing else connects them.

Each source writes its buckets as safetensors files; then the servers load the folder. It is an ordinary
Hugging Face folder while it is there, and is removed once all servers have loaded it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from genac_megatron.errors import GenacError
from genac_megatron.models.blockwise import served_config
from genac_megatron.models.registry import hf_config
from genac_megatron.models.sizes import Size
from genac_megatron.publication.fleet import FleetTransport
from genac_megatron.publication.sequence import place
from genac_megatron.publication.transport import Parcel
from genac_megatron.recipe.schema import PublicationConfig
from genac_megatron.serving.sglang.fleet import Endpoint
from genac_megatron.training.role import Role

SAFETENSORS_DTYPE = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float8_e4m3fn: "F8_E4M3"}
ALIGNMENT = 8  # of the data in a safetensors file


class Disk(FleetTransport):
    """folder: where the folders of versions are made, one at a time."""

    session = False
    on_device = False
    in_turn = False  # each source writes files of its own

    def __init__(
        self, role: Role, endpoints: Sequence[Endpoint], config: PublicationConfig, folder: Path
    ) -> None:
        super().__init__(role, endpoints, config)
        self.folder = folder
        self._files: dict[str, str] = {}

    def join_servers(self, sources: Sequence[int]) -> None:
        self._files = {}

    def begin(self, version: int) -> None:
        if dist.get_rank() == self.leader:
            _empty(self.folder)
        super().begin(version)

    def deliver(self, parcel: Parcel) -> None:
        assert parcel.flat is not None
        name = f"model-{parcel.index + 1:05d}-of-{parcel.count:05d}.safetensors"
        try:
            bucket = parcel.bucket
            write_safetensors(self.folder / name, parcel.flat, bucket.tensors, bucket.dtypes(self.wire))
        except OSError as error:
            raise GenacError(
                f"{self.folder / name}: {error.strerror}",
                where=place(self.role.name, parcel.version, "send", f"{parcel.index + 1} of {parcel.count}"),
                way_out="publication.folder must be writable, with room for the whole model",
            ) from error
        self._files |= {tensor: name for tensor, _ in parcel.bucket.tensors}

    def close(self, version: int) -> None:
        files = {name: file for part in self.gathered(self._files) for name, file in part.items()}
        self.agree(lambda: self._load(files) if dist.get_rank() == self.leader else None)
        super().close(version)
        if dist.get_rank() == self.leader:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _load(self, files: dict[str, str]) -> None:
        index = {"metadata": {}, "weight_map": files}
        (self.folder / "model.safetensors.index.json").write_text(json.dumps(index))
        config = served_config(hf_config(self.role.shape), self.role.config.engine.quantization)
        (self.folder / "config.json").write_text(json.dumps(config))
        folder = str(self.folder.absolute())
        self.steps.phase(
            "send", lambda server: server.update_from_disk(folder, flush=False, limit_s=self.config.send_s)
        )


def _empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def write_safetensors(
    path: Path,
    flat: Tensor,
    tensors: Sequence[tuple[str, Size]],
    dtypes: Sequence[torch.dtype] | None = None,
) -> None:
    """A flat bucket as a safetensors file, without copying it: a header, then the bytes as they are.

    flat: elements of one type, or the bytes of tensors of several `dtypes`.
    """
    header: dict[str, object] = {}
    at = 0
    for (name, size), dtype in zip(tensors, dtypes or [flat.dtype] * len(tensors), strict=True):
        end = at + torch.Size(size).numel() * dtype.itemsize
        header[name] = {
            "dtype": SAFETENSORS_DTYPE[dtype],
            "shape": list(size),
            "data_offsets": [at, end],
        }
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.write(flat.detach().cpu().view(torch.uint8).numpy().data)
