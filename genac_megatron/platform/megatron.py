"""Megatron-core on machines without CUDA: an import hook, and repairs of a few upstream faults.

Megatron-core names CUDA at about forty places of its training path (`torch.cuda.current_device()`,
`device="cuda"`, `.cuda()`, comparisons with "torch.cuda.FloatTensor"). `install()` puts a finder before
Python's own that rewrites these names in `megatron.core.*` as the source is loaded: they then mean the CPU.
torch itself stays as it is and is first imported when megatron.core is; nothing costs time after the import,
and where CUDA is, the finder steps aside.

The rewriting, by kind:
    torch.cuda                      -> platform.cpu_cuda.CPU_CUDA
    "cuda", f"cuda:{n}"             -> "cpu"
    x.cuda(...), x.pin_memory(...)  -> x.cpu()
    x.is_cuda                       -> x.is_cpu
    pin_memory=...                  -> pin_memory=False
    "torch.cuda.FloatTensor"        -> "torch.FloatTensor" (Tensor.type() comparisons)
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.abc
import importlib.machinery
import importlib.util
import inspect
import marshal
import os
import pickle
import queue
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import CodeType, ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

PACKAGE = "megatron.core"
# Megatron imports it (a second of processor time) for logs that observe/sinks.py writes, and does without.
WANDB = "wandb"
_FACADE = "__cpu_cuda__"
SIZE = 8  # bytes of the number before an item of ResultsFile
_VERSION = sys.version.encode() + Path(__file__).read_bytes()  # another Python or rewriting, another cache


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


# --- the rewriting -------------------------------------------------------------------------------


class _ToCpu(ast.NodeTransformer):
    """Rewrites CUDA names of one module to CPU ones (see the module's docstring)."""

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        self.generic_visit(node)
        if node.attr == "cuda" and isinstance(node.value, ast.Name) and node.value.id == "torch":
            return ast.copy_location(ast.Name(_FACADE, node.ctx), node)
        if node.attr == "is_cuda":
            node.attr = "is_cpu"
        return node

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.AST | list[ast.stmt]:
        if node.module != "torch.cuda.nvtx":
            return node
        lines = (f"{a.asname or a.name} = {_FACADE}.nvtx.{a.name}" for a in node.names)
        return [ast.copy_location(ast.parse(line).body[0], node) for line in lines]

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        if isinstance(node.func, ast.Attribute) and node.func.attr in ("cuda", "pin_memory"):
            node.func.attr, node.args, node.keywords = "cpu", [], []
        return node

    def visit_keyword(self, node: ast.keyword) -> ast.AST:
        self.generic_visit(node)
        if node.arg == "pin_memory":
            node.value = ast.copy_location(ast.Constant(False), node.value)
        return node

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        if node.value == "cuda":
            node.value = "cpu"
        elif isinstance(node.value, str) and node.value.startswith("torch.cuda.") and "Tensor" in node.value:
            node.value = node.value.replace("torch.cuda.", "torch.")
        return node

    def visit_JoinedStr(self, node: ast.JoinedStr) -> ast.AST:
        first = node.values[0] if node.values else None
        if isinstance(first, ast.Constant) and first.value == "cuda:":
            return ast.copy_location(ast.Constant("cpu"), node)
        return self.generic_visit(node)


def to_cpu(source: bytes, path: str) -> CodeType:
    """Compile `source` with its CUDA names rewritten to CPU ones."""
    tree = ast.fix_missing_locations(_ToCpu().visit(ast.parse(source, path)))
    code: CodeType = compile(tree, path, "exec", dont_inherit=True)
    return code


class _Loader(importlib.machinery.SourceFileLoader):
    """Loads a module of megatron.core rewritten, from a cache of its own, and repairs it."""

    def get_code(self, fullname: str) -> CodeType | None:
        path = self.get_filename(fullname)
        source = self.get_data(path)
        if b"cuda" not in source and b"pin_memory" not in source:
            return super().get_code(fullname)
        cached = _cache_file(path, source)
        if cached is None:
            return to_cpu(source, path)
        with suppress(OSError, ValueError, EOFError, TypeError):
            kept: CodeType = marshal.loads(cached.read_bytes())
            return kept
        code = to_cpu(source, path)
        with suppress(OSError):
            part = cached.with_suffix(f".{os.getpid()}")
            part.write_bytes(marshal.dumps(code))
            part.replace(cached)
        return code

    def exec_module(self, module: ModuleType) -> None:
        from genac_megatron.platform.cpu_cuda import CPU_CUDA

        setattr(module, _FACADE, CPU_CUDA)
        with _without(WANDB):
            super().exec_module(module)
        repair = _REPAIRS.get(module.__name__)
        if repair is not None:
            repair(module)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds modules of megatron.core as Python would, and has `_Loader` load them."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if (fullname != PACKAGE and not fullname.startswith(PACKAGE + ".")) or _has_cuda():
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and type(spec.loader) is importlib.machinery.SourceFileLoader:
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


@contextmanager
def _without(name: str) -> Iterator[None]:
    """Meanwhile a package that nobody has imported yet cannot be."""
    hidden = name not in sys.modules
    if hidden:
        sys.modules[name] = None  # type: ignore[assignment]  # so that importing it is an ImportError
    try:
        yield
    finally:
        if hidden:
            del sys.modules[name]


def _cache_file(path: str, source: bytes) -> Path | None:
    """Where the rewritten code of this source is kept; None where no folder is safe to keep it in."""
    folder = _cache_folder()
    if folder is None:
        return None
    return folder / hashlib.sha256(_VERSION + path.encode() + b"\0" + source).hexdigest()


def _cache_folder() -> Path | None:
    """A folder that only this user can write: what is read from it is run as code."""
    root = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    for base in (Path(root), Path(tempfile.gettempdir())):
        folder = base / f"genac-megatron-{os.getuid()}"
        with suppress(OSError):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            seen = folder.lstat()
            private = not seen.st_mode & (stat.S_IRWXG | stat.S_IRWXO)
            if stat.S_ISDIR(seen.st_mode) and seen.st_uid == os.getuid() and private:
                return folder
    return None


# --- repairs of upstream faults ------------------------------------------------------------------


def _repair_random(module: Any) -> None:
    """`_set_cuda_rng_state` silently does nothing without CUDA: use torch's CPU generator.

    Megatron's tracker would keep and restore the state of a generator that does not exist, so dropout in
    recomputed layers would not repeat. Its warning that the CPU generator changed is then expected.
    """
    import torch

    def get_state(device: Any = None, clone: bool = False, graph_safe: bool = False) -> torch.Tensor:
        return torch.get_rng_state()

    def set_state(state: torch.Tensor, device: Any = -1, graph_safe: bool = False) -> None:
        torch.set_rng_state(state)

    module._get_cuda_rng_state, module._set_cuda_rng_state = get_state, set_state
    module.logging.getLogger(module.__name__).addFilter(
        lambda record: "CPU RNG state changed within GPU" not in record.getMessage()
    )


def _repair_jit(module: Any) -> None:
    """The jit fuser is torch.compile: without a C++ compiler it fails, and importing it takes seconds."""
    module.disable_jit_fuser()


def _repair_moe(module: Any) -> None:
    """Two faults without CUDA or Transformer Engine.

    1. 0.16 without Transformer Engine uses a name that it never binds (NameError in the router).
    2. What brings token counts from the GPU records a stream, and there is none.
    """
    if not hasattr(module, "te_general_gemm"):
        module.te_general_gemm = None

    def on_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.cpu().numpy() if as_numpy and hasattr(tensor, "numpy") else tensor

    module.maybe_move_tensor_to_cpu = on_cpu


def _repair_distributed_optimizer(module: Any) -> None:
    """Saving and loading a DistributedOptimizer over torch's Adam, four faults where there is no TE or apex.

    1. A sharded state dict asked for before the first step fails: there is no Adam state yet.
    2. Loading writes to leaves that require grad, outside of no_grad.
    3. Loading raises KeyError on `step`, which torch's Adam keeps per parameter.
    4. After a load all parameters share one `step` tensor, so that each step advances it many times. Silent.
    """
    import torch

    if module.HAVE_APEX_OR_TE:
        return
    optimizer = module.DistributedOptimizer
    stock_sharded, stock_load = optimizer.sharded_state_dict, optimizer.load_state_dict

    def sharded_state_dict(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not self.is_stub_optimizer:
            _fill_adam_state(self.optimizer)
        return stock_sharded(self, *args, **kwargs)

    @torch.no_grad()
    def set_states(self: Any, model_param: Any, tensors: dict[str, torch.Tensor]) -> None:
        group, index = self.model_param_group_index_map[model_param]
        main = self.optimizer.param_groups[group]["params"][index]
        targets = {**self.optimizer.state[main], "param": main}
        for name in targets.keys() & tensors.keys():
            targets[name].copy_(tensors[name])

    def load_state_dict(self: Any, *args: Any, **kwargs: Any) -> None:
        stock_load(self, *args, **kwargs)
        for state in self.optimizer.state.values():
            state["step"] = state["step"].clone()

    optimizer.sharded_state_dict = sharded_state_dict
    optimizer.load_state_dict = load_state_dict
    optimizer._set_main_param_and_optimizer_states = set_states


def _fill_adam_state(adam: torch.optim.Optimizer) -> None:
    """Give torch's Adam the zero state that it would make itself at its first step."""
    import torch

    for group in adam.param_groups:
        for parameter in group["params"]:
            if not adam.state[parameter]:
                adam.state[parameter] = {
                    "step": torch.zeros(()),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }


_REPAIRS: dict[str, Callable[[Any], None]] = {
    "megatron.core.jit": _repair_jit,
    "megatron.core.optimizer.distrib_optimizer": _repair_distributed_optimizer,
    "megatron.core.tensor_parallel.random": _repair_random,
    "megatron.core.transformer.moe.moe_utils": _repair_moe,
}


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
