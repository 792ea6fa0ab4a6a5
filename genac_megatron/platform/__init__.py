"""What differs by machine: device, torch.distributed backend, versions, memory. Imports torch lazily."""

from __future__ import annotations

import functools
import gc
import importlib.metadata
import os
import resource
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from genac_megatron.errors import InputError

if TYPE_CHECKING:
    import torch

GIB = 1024.0**3
SOCKET_PATH = 107  # bytes that a Unix socket's path may have (unix(7))
SHORT_FOLDERS = (
    "/tmp",
    "/var/tmp",
    "/dev/shm",
)  # for sockets where TMPDIR, often a job's scratch, is too long
FILES = 65_536  # as many as anybody needs; a limit without end makes some programs slow


@contextmanager
def uncollected() -> Iterator[None]:
    """For imports: without garbage collection, and what is there afterwards is never looked at again.

    torch, Megatron and transformers make a million objects that stay. To look through them takes a fifth of
    their import, and afterwards half a second at every full collection.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if enabled:
            gc.enable()


def device() -> torch.device:
    """Where this rank's tensors live: its GPU (LOCAL_RANK) where CUDA is, else the CPU."""
    import torch

    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    return torch.device("cpu")


def backend() -> str:
    """The torch.distributed backend that fits `device()`: "nccl" or "gloo"."""
    return "nccl" if device().type == "cuda" else "gloo"


def synchronize() -> None:
    """Wait for what this process's GPU is doing, where there is one."""
    import torch

    if device().type == "cuda":
        torch.cuda.synchronize()


def empty_cache() -> None:
    """Give the GPU the memory back that torch keeps for later, so that other processes can have it.

    After a training pass, before a server on the same GPU takes its own again.
    """
    import torch

    if device().type == "cuda":
        torch.cuda.empty_cache()


def gpu_bytes() -> float:
    """All memory of this rank's GPU. Not run on a GPU."""
    import torch

    return float(torch.cuda.get_device_properties(device()).total_memory)


def gpu_names() -> list[str]:
    """The GPUs that this process sees, by name."""
    import torch

    count = torch.cuda.device_count() if device().type == "cuda" else 0
    return [torch.cuda.get_device_name(i) for i in range(count)]


@functools.cache
def megatron_version() -> tuple[int, int]:
    """(major, minor) of the installed megatron-core. Raises PackageNotFoundError where it is missing."""
    major, minor, *_ = importlib.metadata.version("megatron-core").split(".")
    return int(major), int(minor)


@functools.cache
def has_te() -> bool:
    """Whether Transformer Engine can be used: there is a GPU and the package imports."""
    if device().type != "cuda":
        return False
    try:
        import transformer_engine.pytorch  # noqa: F401
    except (ImportError, OSError):  # OSError: a library whose CUDA symbols are missing
        return False
    return True


def socket_folder(below: int) -> str:
    """Where sockets may lie whose paths have `below` bytes after the folder's: TMPDIR, or a short one.

    Raises InputError where there is none that can be written to.
    """
    room = SOCKET_PATH - below
    why = []
    for folder in dict.fromkeys((os.path.abspath(tempfile.gettempdir()), *SHORT_FOLDERS)):
        if (size := len(os.fsencode(folder))) > room:
            why.append(f"{folder} has {size} bytes, {room} are left for it")
        elif os.access(folder, os.W_OK | os.X_OK):
            return folder
        else:
            why.append(f"{folder} cannot be written to")
    raise InputError(
        f"no folder for sockets, whose paths have at most {SOCKET_PATH} bytes: {'; '.join(why)}",
        where="TMPDIR",
        way_out="export TMPDIR, a short path that can be written to",
    )


def raise_open_files() -> int:
    """Let this process, and those that it starts, open as many files as it may; how many.

    A connection is one.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = FILES if hard == resource.RLIM_INFINITY else min(hard, FILES)
    if soft == resource.RLIM_INFINITY or soft >= most:
        return FILES if soft == resource.RLIM_INFINITY else soft
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    except (OSError, ValueError):  # not allowed in some containers
        return soft
    return most


def rss_gib() -> float:
    """This process's resident memory now, in GiB."""
    import psutil

    return float(psutil.Process().memory_info().rss) / GIB


def peak_rss_gib() -> float:
    """This process's highest resident memory so far, in GiB."""
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB
