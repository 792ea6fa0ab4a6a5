"""A flat bucket in the body of a request, as SGLang's `/update_weights_from_tensor` takes it. No SGLang here.

The server unpickles `{"flattened_tensor": uint8 tensor, "metadata": [...]}` with an allow-list. Of a
metadata entry it reads attributes only, so a SimpleNamespace serves.
"""

from __future__ import annotations

import base64
import pickle
from collections.abc import Sequence
from types import SimpleNamespace

import torch
from torch import Tensor

from genac_megatron.models.sizes import Size


def metadata(
    tensors: Sequence[tuple[str, Size]], dtypes: torch.dtype | Sequence[torch.dtype]
) -> list[SimpleNamespace]:
    """Where each tensor is in the flat bucket, in bytes. dtypes: of all of them, or of each."""
    entries = []
    at = 0
    each = [dtypes] * len(tensors) if isinstance(dtypes, torch.dtype) else dtypes
    for (name, size), dtype in zip(tensors, each, strict=True):
        count = torch.Size(size).numel() * dtype.itemsize
        entries.append(
            SimpleNamespace(
                name=name,
                shape=torch.Size(size),
                dtype=dtype,
                start_idx=at,
                end_idx=at + count,
                numel=count,
            )
        )
        at += count
    return entries


def by_value(
    flat: Tensor, tensors: Sequence[tuple[str, Size]], dtypes: Sequence[torch.dtype] | None = None
) -> str:
    """The bucket itself, in base64: for servers that do not share this machine's memory.

    flat: its elements, or the bytes of tensors of several `dtypes`.
    """
    content = {
        "flattened_tensor": as_bytes(flat).clone(),
        "metadata": metadata(tensors, dtypes or flat.dtype),
    }
    return base64.b64encode(pickle.dumps(content)).decode()


def as_bytes(flat: Tensor) -> Tensor:
    """uint8 [nbytes], the same memory."""
    return flat.detach().view(torch.uint8)
