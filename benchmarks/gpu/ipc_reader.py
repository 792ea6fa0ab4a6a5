"""A process that reads buckets by handle and copies them out, as an engine does, without being one.

Lines on stdin: a bucket's payload (publication/payload.py: by_handle), in base64. For each it opens the
handle, copies the bucket into a buffer of its own, and answers with its seconds on stdout. SGLang's
allow-list and its mapping of a GPU's UUID to a device are left to SGLang; here any payload is opened.
"""

from __future__ import annotations

import base64
import io
import pickle
import sys
import time
from typing import Any

import torch
from torch.multiprocessing import reductions

_DEVICE = 6  # of rebuild_cuda_tensor's arguments


def _rebuild_cuda_tensor(*arguments: Any) -> torch.Tensor:
    """As torch's, the device named by its UUID."""
    uuid = arguments[_DEVICE]
    devices = range(torch.cuda.device_count())
    index = next(i for i in devices if str(torch.cuda.get_device_properties(i).uuid) == uuid)
    tensor: torch.Tensor = reductions.rebuild_cuda_tensor(
        *arguments[:_DEVICE], index, *arguments[_DEVICE + 1 :]
    )
    return tensor


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name == "rebuild_cuda_tensor":
            return _rebuild_cuda_tensor
        return super().find_class(module, name)


def main() -> None:
    target: torch.Tensor | None = None
    for line in sys.stdin:
        began = time.perf_counter()
        flat = _Reader(io.BytesIO(base64.b64decode(line))).load()["flattened_tensor"]
        if target is None or target.numel() < flat.numel():
            target = torch.empty_like(flat)
        target[: flat.numel()].copy_(flat)
        if flat.is_cuda:
            torch.cuda.synchronize(flat.device)
        total = int(flat.view(torch.uint8)[:: max(1, flat.numel() // 64)].to(torch.int64).sum())
        del flat
        print(time.perf_counter() - began, total, flush=True)


if __name__ == "__main__":
    main()
