"""A Hugging Face model folder's safetensors, read tensor by tensor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from genac_megatron.errors import InputError
from genac_megatron.models.hf_headers import FLOAT_NAMES, INDEX, SINGLE, Header, HfHeaders

__all__ = ["FLOATS", "INDEX", "SINGLE", "HfFolder", "read_tensor"]

FLOATS = dict(zip(FLOAT_NAMES, (torch.float32, torch.bfloat16, torch.float16), strict=True))


class HfFolder(HfHeaders):
    """The weights of a folder. Opening reads headers only."""

    def get(self, name: str) -> Tensor:
        """The whole tensor `name`, on the CPU, in the file's dtype. Raises InputError."""
        header, entry = self.entry(name)
        return read_tensor(header, name, entry)


def read_tensor(header: Header, name: str, entry: Mapping[str, Any]) -> Tensor:
    """A tensor of a file, on the CPU, in the file's dtype. Raises InputError."""
    if entry["dtype"] not in FLOATS:
        raise InputError(
            f"tensor {name} is {entry['dtype']}, not one of {', '.join(FLOATS)}",
            where=str(header.path),
            way_out="save the folder in bf16 or fp32",
        )
    begin, end = entry["data_offsets"]
    raw = torch.empty(end - begin, dtype=torch.uint8)
    try:
        with header.path.open("rb") as file:
            file.seek(header.begin + begin)
            if file.readinto(raw.numpy().data) != end - begin:
                raise OSError("cut short")
    except OSError as error:
        raise InputError(
            f"tensor {name}: {error}", where=str(header.path), way_out="fetch it again"
        ) from error
    return raw.view(FLOATS[entry["dtype"]]).view(entry["shape"])
