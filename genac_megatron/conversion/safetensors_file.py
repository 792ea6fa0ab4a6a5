"""A safetensors file written tensor by tensor, so that no more than one of them is in memory.

The format is 8 bytes of header length, a JSON header with each tensor's dtype, shape and byte range, then
the tensors' bytes (https://github.com/huggingface/safetensors). The library itself writes a file at once.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from genac_megatron.models.sizes import Size

NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
ALIGN = 8


def write_safetensors(
    path: Path, sizes: Sequence[tuple[str, Size]], dtype: torch.dtype, tensors: Iterable[tuple[str, Tensor]]
) -> int:
    """Write `tensors`, which come in the order of `sizes` and in its shapes; the bytes of their data.

    Raises ValueError where a tensor is not the next one announced.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, size in sizes:
        begin, end = end, end + math.prod(size) * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(size), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGN)
    announced = iter(sizes)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in tensors:
            wanted = next(announced, None)
            if wanted != (name, tuple(tensor.shape)):
                raise ValueError(f"{name} {tuple(tensor.shape)} where {wanted} was announced")
            raw = tensor.to(dtype).contiguous().reshape(-1).view(torch.uint8)
            file.write(raw.numpy().data)
        if (left := next(announced, None)) is not None:
            raise ValueError(f"{left[0]} was announced and did not come")
        file.flush()
        os.fsync(file.fileno())
    return end
