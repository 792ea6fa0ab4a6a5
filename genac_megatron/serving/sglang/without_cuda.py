"""Fills what PyPI's SGLang imports and a machine without CUDA lacks: standard library, torch and sglang only.

In the serving environment, by boot.py alone. SGLang's behaviour is as it was, but that the files in which
weights are sent stay mapped (`keep_mapped`) and a paused server does not spin (`rest_while_paused`).
"""

from __future__ import annotations

import gc
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import os
import pkgutil
import sys
import types
from collections.abc import Callable
from typing import Any

MAPPED = 8  # two files of each of four pipeline stages
IMPORTED_ONCE = (  # what a server's processes import, the table of models included
    "entrypoints.http_server",
    "managers.scheduler",
    "managers.detokenizer_manager",
    "models.registry",
)
MODELS = ("llama", "qwen2", "qwen3", "qwen3_moe")  # files of sglang/srt/models that our families need
LORA = ("layers", "backend.torch_backend")  # files of sglang/srt/lora that pin memory on a CPU too
PINNING = ("tensor", "zeros", "empty")  # what they ask for with `pin_memory`
PAUSED = ("_record_scheduler_state_for_paused_engine", "maybe_sleep_on_idle")  # of SGLang's scheduler
CPU_ENVIRONMENT = {
    "SGLANG_USE_CPU_ENGINE": "1",  # take the CPU layers though there is no CUDA to be absent
    "TORCHDYNAMO_DISABLE": "1",  # else tensor parallelism compiles for 20 s, and hangs after a fork
    "OMP_NUM_THREADS": "1",
    "SGLANG_NCCL_SO_PATH": "no-nccl-on-a-cpu",  # a CUDA build of torch brings one, and ranks would try it
}


class Kernels(types.ModuleType):
    """Stands for triton: its decorators do nothing, its types are empty classes, no kernel ever runs."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__path__: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        whole = f"{self.__name__}.{name}"
        made = type(name, (), {"__init__": _ignore}) if name[0].isupper() else Kernels(whole)
        setattr(self, name, made)
        return made

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        plain = len(args) == 1 and callable(args[0]) and not kwargs  # @jit, as against @jit(...)
        return args[0] if plain else lambda function: function

    def __getitem__(self, key: Any) -> Kernels:
        return self

    def _itself(self, other: Any) -> Kernels:  # annotations: tl.constexpr | None
        return self

    __or__ = __ror__ = __mul__ = __rmul__ = _itself


def _ignore(self: object, *args: Any, **kwargs: Any) -> None:
    """An __init__ that takes anything."""


class Absent(types.ModuleType):
    """Stands for sgl_kernel: what is imported from it raises when called."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def missing(*args: Any, **kwargs: Any) -> None:
            raise NotImplementedError(f"{self.__name__}.{name} needs a GPU")

        return missing


class StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """The last finder: a package that is really installed is found before it."""

    packages: dict[str, type[types.ModuleType]] = {"triton": Kernels, "sgl_kernel": Absent}

    def find_spec(self, name: str, path: object = None, target: object = None) -> Any:
        kind = self.packages.get(name.partition(".")[0])
        if kind is None or (kind is Absent and "." in name):  # SGLang can do without sgl_kernel's submodules
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=kind is Kernels)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        kind = self.packages[spec.name.partition(".")[0]]
        parent, _, leaf = spec.name.rpartition(".")
        already = vars(sys.modules[parent]).get(leaf) if parent in sys.modules else None
        made = already if isinstance(already, kind) else kind(spec.name)
        if spec.name == "triton":
            vars(made).update(
                __version__="3.8.0",
                cdiv=lambda a, b: -(-a // b),
                next_power_of_2=lambda n: 1 << max(0, n - 1).bit_length(),
            )
        return made

    def exec_module(self, module: types.ModuleType) -> None:
        """There is nothing to run."""


class Unpinned(types.ModuleType):
    """Stands for torch in a module that asks for pinned host memory: here it gets plain memory."""

    def __init__(self, torch: types.ModuleType) -> None:
        super().__init__(torch.__name__)
        self._torch = torch

    def __getattr__(self, name: str) -> Any:
        made = found = getattr(self._torch, name)
        if name in PINNING:

            def made(*args: Any, **kwargs: Any) -> Any:
                kwargs.pop("pin_memory", None)
                return found(*args, **kwargs)

        setattr(self, name, made)
        return made


def fill_gaps() -> list[str]:
    """Fill what SGLang imports and a machine without CUDA lacks; the names of the gaps that were there.

    - triton, sgl_kernel: kernels are defined or named at import, none is called. Gone once SGLang imports
      them only where it uses them, or where the packages are installed (a CUDA build of torch brings triton).
    - torchvision: its PyPI build is linked against CUDA, so its library never loads, and its import fails on
      naming the library's operators nms and qnms. Gone where torch's build is torchvision's.
    - allocator: the host memory allocator of the routed-experts capturer knows no device "cpu" (it would pin
      memory). Gone once SGLang's table has one.
    - pinned: adapters (LORA) put small tensors in pinned host memory, which torch refuses where there is no
      accelerator. Gone once SGLang asks whether there is one, or torch pins nothing then.

    And `spawn` as the start method of SGLang's processes: each would import SGLang again, half a minute on
    two cores. Forked ones inherit it; nothing of torch has run by then. Not a gap, only faster.
    """
    import multiprocessing

    import torch

    gaps = [name for name in StandIns.packages if importlib.util.find_spec(name) is None]
    sys.meta_path.append(StandIns())
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        gaps.append("torchvision")
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        for operator in ("nms", "qnms"):
            torch.library.define(
                f"torchvision::{operator}", "(Tensor dets, Tensor scores, float t) -> Tensor"
            )
    from sglang.srt.mem_cache.pool_host import common  # type: ignore[import-not-found,unused-ignore]

    if "cpu" not in common.ALLOC_MEMORY_FUNCS:
        gaps.append("allocator")
        common.ALLOC_MEMORY_FUNCS["cpu"] = lambda size, dtype, *_, **__: torch.empty(size, dtype=dtype)
    try:
        torch.zeros(1).pin_memory()
    except RuntimeError:
        gaps.append("pinned")
        torch.Tensor.pin_memory = lambda self, *_: self  # type: ignore[method-assign,assignment]
        for module in LORA:
            vars(importlib.import_module(f"sglang.srt.lora.{module}"))["torch"] = Unpinned(torch)
    real: Callable[..., None] = multiprocessing.set_start_method
    multiprocessing.set_start_method = lambda method, force=False: real("fork", force=force)  # type: ignore[assignment]
    return gaps


def keep_mapped() -> None:
    """Keep the memory mapped in which a trainer on this machine sends weights.

    Torch maps a handle's file anew each time and lets it go with the tensor: faulting its pages in and out
    costs half of what copying them does. A trainer sends every publication in the same few files, and removes
    them itself (publication/payload.py). What it has removed is let go when the next handle comes.
    """
    from torch.multiprocessing import reductions

    map_file = reductions.rebuild_storage_filename
    kept: dict[bytes, Any] = {}

    def map_once(cls: Any, manager: bytes, handle: bytes, size: int, dtype: Any = None) -> Any:
        for old in [old for old in kept if not os.path.exists(f"/dev/shm{os.fsdecode(old)}")]:
            del kept[old]
        storage = map_file(cls, manager, handle, size, dtype)  # finds what is mapped by its handle
        kept.pop(handle, None)
        kept[handle] = storage
        while len(kept) > MAPPED:
            del kept[next(iter(kept))]
        return storage

    reductions.rebuild_storage_filename = map_once


def rest_while_paused() -> None:
    """Let a paused server wait for its next request as an idle one does (`--sleep-on-idle`).

    SGLang's loop spins while its engine is paused: a core of each server, all through a publication, which
    trainers on the same cores then lack.
    """
    from sglang.srt.managers.scheduler import Scheduler  # type: ignore[import-not-found,unused-ignore]

    each_turn, rest = (getattr(Scheduler, name, None) for name in PAUSED)
    if each_turn is None or rest is None:
        return  # of another version: it spins, and works

    def turn_and_rest(self: Any) -> None:
        each_turn(self)
        rest(self)

    setattr(Scheduler, PAUSED[0], turn_and_rest)


def other_models() -> list[str]:
    """SGLang's models that no family of ours has: some 250 files, a good part of its import."""
    found = importlib.util.find_spec("sglang")
    folders = [f"{place}/srt/models" for place in (found and found.submodule_search_locations) or ()]
    return [module.name for module in pkgutil.iter_modules(folders) if module.name not in MODELS]


def prepare() -> None:
    """Fill the gaps and import SGLang once; servers that are forked from here need not."""
    for name, value in CPU_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("SGLANG_DISABLED_MODEL_ARCHS", ",".join(other_models()))
    gc.disable()  # what an import makes stays
    fill_gaps()
    keep_mapped()
    for module in IMPORTED_ONCE:
        importlib.import_module(f"sglang.srt.{module}")
    rest_while_paused()
    gc.enable()
