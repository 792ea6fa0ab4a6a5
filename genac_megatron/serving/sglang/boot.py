"""Starts SGLang's own server, in the serving environment: standard library and sglang only.

    python boot.py serve PARENT ARGS...     one server; ARGS are those of `sglang serve`
    python boot.py zygote PARENT            for a CPU: import SGLang once, fork one server per line of stdin

PARENT is the process id of the launcher, -1 for none: when it is gone, the server and all its processes end.
It is polled: PR_SET_PDEATHSIG fires when the launcher's *thread* ends, and a pipe stays open in whatever the
launcher forked. A zygote's line is a JSON object with `args`, `log` (a path) and `env` (more variables); the
answer is a line with the server's process id, which is also its process group. The key that clients must
show comes in the variable GENAC_SERVER_KEY, as command lines are public; the hardware threads that it runs
on come in GENAC_SERVER_CORES, "0,1,2".

Without a GPU (`--device cpu`) PyPI's SGLang runs on its own torch-native layers, once `fill_gaps` has filled
what it imports and a CPU machine lacks. Its behaviour is as it was, but that the files in which weights are
sent stay mapped (`keep_mapped`) and a paused server does not spin (`rest_while_paused`). On a GPU nothing is
filled.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import itertools
import json
import os
import pkgutil
import signal
import sys
import tempfile
import threading
import time
import types
from collections.abc import Callable, Sequence
from typing import Any

PARENT_POLL_S = 0.5
MAPPED = 8  # two files of each of four pipeline stages
SHARED = "/dev/shm/sgl"  # how SGLang's shared memory is called: sgl_shm_mq_..., sglang_loads_...
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
KEY = "GENAC_SERVER_KEY"
CORES = "GENAC_SERVER_CORES"
CPU_ENVIRONMENT = {
    "SGLANG_USE_CPU_ENGINE": "1",  # take the CPU layers though there is no CUDA to be absent
    "TORCHDYNAMO_DISABLE": "1",  # else tensor parallelism compiles for 20 s, and hangs after a fork
    "OMP_NUM_THREADS": "1",
    "SGLANG_NCCL_SO_PATH": "no-nccl-on-a-cpu",  # a CUDA build of torch brings one, and ranks would try it
}
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",  # model folders are local
    "SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION": "0",  # /health answers at once; /health_generate generates
    # Its GPUs may hold unlike parts of the trainer: the share goes by the one with least room.
    "SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK": "0",
}


# --- import gaps on a machine without CUDA -----------------------------------------------------------


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


def prepare_cpu() -> None:
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


# --- servers -----------------------------------------------------------------------------------------


def group_members(group: int) -> list[int]:
    """The processes of a group that have not ended."""
    found = []
    for entry in os.scandir("/proc"):
        if not entry.name.isdecimal():
            continue
        try:
            with open(f"{entry.path}/stat") as file:
                fields = file.read().rpartition(")")[2].split()
        except OSError:  # it has ended meanwhile
            continue
        ended = fields[0] in "ZX" and int(fields[17]) <= 1  # its threads may outlive it, files still open
        if int(fields[2]) == group and not ended:
            found.append(int(entry.name))
    return found


def shared_files(pids: Sequence[int]) -> set[str]:
    """SGLang's shared-memory files that these processes have mapped: a killed server leaves them behind."""
    found = set()
    for pid in pids:
        with contextlib.suppress(OSError), open(f"/proc/{pid}/maps") as file:
            paths = (line.split(maxsplit=5)[-1].rstrip("\n") for line in file if SHARED in line)
            found |= {path for path in paths if path.startswith(SHARED) and os.path.exists(path)}
    return found


def follow(parent: int) -> None:
    """End this process's group once `parent` is no longer its parent."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(PARENT_POLL_S)
        print(
            f"boot: process {parent}, which started this server, is gone: ending", file=sys.stderr, flush=True
        )
        for path in shared_files(group_members(os.getpgrp())):
            with contextlib.suppress(OSError):
                os.unlink(path)
        os.killpg(0, signal.SIGKILL)

    if parent > 0:
        threading.Thread(target=watch, name="follow-parent", daemon=True).start()


def take_cores() -> None:
    """Run on the hardware threads that the launcher named, as all that this process starts from now on."""
    named = os.environ.pop(CORES, "")
    if not named:
        return
    try:
        os.sched_setaffinity(0, map(int, named.split(",")))
    except OSError as error:  # a cgroup that has changed: better slow than not at all
        print(f"boot: warning: no cores {named}: {error}", file=sys.stderr, flush=True)
    held = ",".join(map(str, sorted(os.sched_getaffinity(0))))
    print(f"boot: this server runs on cores {held}", file=sys.stderr, flush=True)


def serve(arguments: Sequence[str]) -> None:
    """Run one server until it ends. Its own processes end with it."""
    from sglang.launch_server import run_server
    from sglang.srt.server_args import prepare_server_args
    from sglang.srt.utils import kill_process_tree

    key = os.environ.pop(KEY, "")
    try:
        run_server(prepare_server_args([*arguments, *(["--api-key", key] if key else [])]))
    finally:
        kill_process_tree(os.getpid(), include_parent=False)


def zygote(parent: int) -> None:
    """Fork a server per line of stdin until it closes; then, or when `parent` is gone, all end."""
    prepare_cpu()
    gc.collect()
    gc.freeze()  # SGLang collects garbage at every flush on a CPU: over all that is imported it takes 0.3 s
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps them
    print(json.dumps({"ready": os.getpid()}), flush=True)
    for line in _lines(parent):
        asked = json.loads(line)
        me = os.getpid()
        pid = os.fork()
        if pid == 0:
            _become_server(asked, me)
        with contextlib.suppress(OSError):  # the child does so too: whichever comes first
            os.setpgid(pid, pid)
        print(json.dumps({"pid": pid}), flush=True)


def _lines(parent: int) -> Any:
    """Lines of stdin, for as long as it is open and `parent` lives. A thread would not survive the forks."""
    import select

    pending = b""
    while parent <= 0 or os.getppid() == parent:
        if not select.select([0], [], [], PARENT_POLL_S)[0]:
            continue
        got = os.read(0, 65536)
        if not got:
            return
        *whole, pending = (pending + got).split(b"\n")
        yield from whole


def _become_server(asked: dict[str, Any], parent: int) -> None:
    """In the forked process: take leave of the zygote's group and files, and never return."""
    code = 1
    try:
        os.setpgid(0, 0)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        log = os.open(asked["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        for stream, target in enumerate((os.open(os.devnull, os.O_RDONLY), log, log)):
            os.dup2(target, stream)
        os.environ.update(asked["env"])
        take_cores()
        tempfile.tempdir = None  # it was asked for before TMPDIR came
        follow(parent)
        serve(asked["args"])
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(code)


def main(arguments: Sequence[str]) -> int:
    mode, parent, *rest = arguments
    os.environ.update(ENVIRONMENT)
    if mode == "zygote":
        zygote(int(parent))
        os._exit(0)  # at once: its servers end when it is gone
    take_cores()
    follow(int(parent))
    if "cpu" in (after for option, after in itertools.pairwise(rest) if option == "--device"):
        prepare_cpu()
    serve(rest)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
