"""A flat bucket as a handle to memory of this machine, for SGLang's `/update_weights_from_tensor`.

What the server unpickles is serving/sglang/by_value.py's; here the tensor in it is a handle (shared memory
for host tensors, CUDA IPC for device tensors). Torch's own sharing by file descriptor is of no use: the
descriptor's authentication fails and kills the server.
"""

from __future__ import annotations

import base64
import io
import os
import socket
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import Tensor
from torch.multiprocessing import reductions

from genac_megatron.models.sizes import Size
from genac_megatron.platform import socket_folder
from genac_megatron.serving.sglang.by_value import as_bytes, metadata

MANAGER = len("/torch-shm-dir-XXXXXX/manager.sock")  # of torch_shm_manager, below TMPDIR
_DEVICE = 6  # of rebuild_cuda_tensor's arguments: the device's index, which differs between processes


def by_handle(
    flat: Tensor, tensors: Sequence[tuple[str, Size]], dtypes: Sequence[torch.dtype] | None = None
) -> str:
    """A handle to the bucket's memory, in base64, for one reader.

    flat, dtypes: as for `by_value`. `flat` must stay as it is until that reader has answered. Host memory
    must be `shared_buffer`'s.
    """
    buffer = io.BytesIO()
    content = {"flattened_tensor": as_bytes(flat), "metadata": metadata(tensors, dtypes or flat.dtype)}
    _HandlePickler(buffer).dump(content)
    return base64.b64encode(buffer.getvalue()).decode()


def shared_buffer(nbytes: int) -> Tensor:
    """uint8 [nbytes] in shared memory that another process of this user can map by name.

    The file is removed with the last tensor on it here, or at this process's end; a reader that has
    it mapped keeps the memory. (Torch would remove it with the last one of all processes, and aborts one that
    finds it gone. So torch counts one user more than there is.)
    """
    with _short_tmpdir():
        storage = torch.UntypedStorage._new_using_filename_cpu(max(nbytes, 1))
    _, handle, _ = storage._share_filename_cpu_()
    storage._shared_incref()
    weakref.finalize(storage, Path(f"/dev/shm{os.fsdecode(handle)}").unlink, missing_ok=True)
    return torch.empty(0, dtype=torch.uint8).set_(storage)[:nbytes]  # type: ignore[call-overload,no-any-return,unused-ignore]


@contextmanager
def _short_tmpdir() -> Iterator[None]:
    """Torch's first shared buffer starts a process that listens on a socket below TMPDIR, as it is now.

    Where the path is too long for a socket, that process ends with "Invalid argument".
    """
    real, folder = os.environ.get("TMPDIR"), socket_folder(MANAGER)
    if real is None or folder == os.path.abspath(real):
        yield
        return
    os.environ["TMPDIR"] = folder
    try:
        yield
    finally:
        os.environ["TMPDIR"] = real


def on_this_machine(url: str) -> bool:
    """Whether the host of `url` is one of this machine's addresses: one can listen on those alone."""
    host = urlsplit(url).hostname or "localhost"
    try:
        found = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)
    except OSError:
        return False
    for family, kind, protocol, _, address in found:
        with socket.socket(family, kind, protocol) as probe:
            try:
                probe.bind(address)
            except OSError:
                continue
            return True
    return False


class _HandlePickler(ForkingPickler):  # type: ignore[type-arg,unused-ignore]
    """Pickles tensors as handles: named shared memory, or CUDA IPC with the device by its UUID."""

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_cuda:
            rebuild, args = reductions.reduce_tensor(value)
            uuid = str(torch.cuda.get_device_properties(value.device).uuid)
            return rebuild, (*args[:_DEVICE], uuid, *args[_DEVICE + 1 :])
        if isinstance(value, torch.UntypedStorage):
            shared = value._share_filename_cpu_()
            value._shared_incref()  # the reader takes this reference over
            return reductions.rebuild_storage_filename, (type(value), *shared)
        return NotImplemented
