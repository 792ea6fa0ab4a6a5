"""Megatron-core as it needs to be here: the door to what stands in for CUDA, and repairs of upstream faults.

Where CUDA is, megatron.core is loaded as it is and nothing of `without_cuda/` is read.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import inspect
import os
import pickle
import queue
import sys
import tempfile
from collections.abc import Sequence
from types import ModuleType
from typing import Any

PACKAGE = "megatron.core"
SIZE = 8  # bytes of the number before an item of ResultsFile


def install() -> None:
    """Prepare `megatron.core` for this machine; call it before megatron.core is imported.

    May be called any number of times, and imports no torch. Raises RuntimeError where megatron.core was
    imported without it on a machine without CUDA.
    """
    if any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return
    if PACKAGE in sys.modules and not _has_cuda():
        raise RuntimeError("megatron.core was imported before genac_megatron.platform.megatron.install()")
    sys.meta_path.insert(0, _Finder())


@functools.cache
def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


class _Finder(importlib.abc.MetaPathFinder):
    """Finds modules of megatron.core as Python would; without CUDA `without_cuda` loads them."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if (fullname != PACKAGE and not fullname.startswith(PACKAGE + ".")) or _has_cuda():
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and type(spec.loader) is importlib.machinery.SourceFileLoader:
            from genac_megatron.platform.without_cuda.hook import Loader

            spec.loader = Loader(spec.loader.name, spec.loader.path)
        return spec


def keep_write_errors() -> None:
    """Let the reason of a shard that could not be written through: 0.19 says the class of its error alone.

    Its writer returns the error where the caller expects results; raised instead, its words are kept. In
    0.16 the results go another way, and nothing changes. Call it before a save, any number of times.
    """
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    real = FileSystemWriterAsync.write_preloaded_data
    if getattr(real, "keeps_errors", False):
        return

    @functools.wraps(real)
    def write(*args: Any, **kwargs: Any) -> Any:
        output = real(*args, **kwargs)
        if isinstance(output, tuple) and isinstance(output[1], Exception):
            raise output[1]
        return output

    write.keeps_errors = True  # type: ignore[attr-defined]
    FileSystemWriterAsync.write_preloaded_data = staticmethod(write)


class ResultsFile:
    """What a save's writers hand back, in memory that this process and those it forks share.

    The part of multiprocessing's Queue that a save uses. Upstream asks a manager for one (0.16.1, 0.19.2), a
    process that imports torch again to hold a few kilobytes, and that outlives a killed rank.
    """

    def __init__(self) -> None:
        self._file = os.memfd_create("results") if hasattr(os, "memfd_create") else _nameless_file()
        self._taken = 0

    def __del__(self) -> None:
        os.close(self._file)

    def put(self, item: Any) -> None:
        """From a process that this one has forked, one at a time."""
        data = pickle.dumps(item)
        view, at = memoryview(len(data).to_bytes(SIZE, "little") + data), os.fstat(self._file).st_size
        while view:
            written = os.pwrite(self._file, view, at)
            view, at = view[written:], at + written

    def get_nowait(self) -> Any:
        """The next item. Raises queue.Empty where there is none, or its writer was killed amid it."""
        held = os.fstat(self._file).st_size - self._taken - SIZE
        size = int.from_bytes(os.pread(self._file, SIZE, self._taken), "little")
        if held < max(size, 1):
            raise queue.Empty
        data = b""
        while len(data) < size:
            data += os.pread(self._file, size - len(data), self._taken + SIZE + len(data))
        self._taken += SIZE + size
        return pickle.loads(data)


def _nameless_file() -> int:
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def own_results_queue() -> None:
    """Have the next save collect its writers' results in a new ResultsFile. Call it before each."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    filesystem_async._results_queue = ResultsFile()


def save_options() -> dict[str, Any]:
    """Arguments of `dist_checkpointing.save` that only some versions have.

    From 0.17 an asynchronous save would ask for nvidia-resiliency-ext, which is on no CPU machine.
    """
    from megatron.core import dist_checkpointing

    known = inspect.signature(dist_checkpointing.save).parameters
    return {"async_strategy": "mcore"} if "async_strategy" in known else {}
