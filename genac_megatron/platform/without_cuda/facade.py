"""What `torch.cuda` means inside megatron.core on a machine without CUDA (hook.py)."""

from __future__ import annotations

import contextlib
import os
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import torch

_CPU = torch.device("cpu")
_PAGE = os.sysconf("SC_PAGE_SIZE")


class _Stream:
    """A stream or event. CPU work happens in program order, so waiting and recording do nothing."""

    device, cuda_stream = _CPU, 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def record_event(self, event: Any = None) -> Any:
        return event or _Stream()

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: Any) -> float:
        return 0.0

    def __getattr__(self, name: str) -> Any:  # wait_stream, wait_event, synchronize, record, ...
        if name.startswith("__"):
            raise AttributeError(name)
        return _nothing

    @staticmethod
    def priority_range() -> tuple[int, int]:
        return 0, 0


class _Properties:
    """What torch.cuda.get_device_properties tells of the machine."""

    multi_processor_count, major, minor = 1, 0, 0
    total_memory: ClassVar[int] = _PAGE * os.sysconf("SC_PHYS_PAGES")


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None


def _no_context(*args: Any, **kwargs: Any) -> contextlib.nullcontext[None]:
    return contextlib.nullcontext()


class _CpuCuda(ModuleType):
    """A stand-in for the module torch.cuda; what it does not define comes from torch.cuda."""

    Stream = Event = ExternalStream = _Stream
    nvtx = SimpleNamespace(range_push=_nothing, range_pop=_nothing, mark=_nothing, range=_no_context)
    stream = device = staticmethod(_no_context)
    synchronize = empty_cache = set_device = set_stream = staticmethod(_nothing)
    reset_peak_memory_stats = staticmethod(_nothing)
    manual_seed = staticmethod(torch.manual_seed)

    @staticmethod
    def current_device() -> torch.device:
        return _CPU

    @staticmethod
    def device_count() -> int:
        return 1

    @staticmethod
    def current_stream(*args: Any) -> _Stream:
        return _Stream()

    default_stream = current_stream

    @staticmethod
    def is_current_stream_capturing() -> bool:
        return False

    @staticmethod
    def memory_allocated(*args: Any) -> int:
        return 0

    max_memory_allocated = memory_reserved = memory_allocated

    @staticmethod
    def get_rng_state(*args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.get_rng_state()

    @staticmethod
    def set_rng_state(state: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        torch.set_rng_state(state)

    @staticmethod
    def get_device_capability(*args: Any) -> tuple[int, int]:
        return 0, 0

    @staticmethod
    def get_device_properties(*args: Any) -> type[_Properties]:
        return _Properties

    @staticmethod
    def mem_get_info(*args: Any) -> tuple[int, int]:
        """(free, total) bytes of the machine's memory."""
        return _PAGE * os.sysconf("SC_AVPHYS_PAGES"), _Properties.total_memory

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cuda, name)


CPU_CUDA = _CpuCuda(f"{__name__}.CPU_CUDA")
