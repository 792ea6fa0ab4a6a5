"""Megatron-core on machines without CUDA: its modules are rewritten as they are loaded, and repaired.

Megatron-core names CUDA at about forty places of its training path (`torch.cuda.current_device()`,
`device="cuda"`, `.cuda()`, comparisons with "torch.cuda.FloatTensor"). The loader of this module rewrites
these names in `megatron.core.*` as the source is loaded: they then mean the CPU. torch itself stays as it is
and is first imported when megatron.core is; nothing costs time after the import.

The rewriting, by kind:
    torch.cuda                      -> facade.CPU_CUDA
    "cuda", f"cuda:{n}"             -> "cpu"
    x.cuda(...), x.pin_memory(...)  -> x.cpu()
    x.is_cuda                       -> x.is_cpu
    pin_memory=...                  -> pin_memory=False
    "torch.cuda.FloatTensor"        -> "torch.FloatTensor" (Tensor.type() comparisons)
"""

from __future__ import annotations

import ast
import hashlib
import importlib.machinery
import marshal
import os
import stat
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import CodeType, ModuleType

from genac_megatron.platform.without_cuda.repairs import REPAIRS

# Megatron imports it (a second of processor time) for logs that observe/sinks.py writes, and does without.
WANDB = "wandb"
_FACADE = "__cpu_cuda__"
_VERSION = sys.version.encode() + Path(__file__).read_bytes()  # another Python or rewriting, another cache


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


class Loader(importlib.machinery.SourceFileLoader):
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
        from genac_megatron.platform.without_cuda.facade import CPU_CUDA

        setattr(module, _FACADE, CPU_CUDA)
        with _without(WANDB):
            super().exec_module(module)
        repair = REPAIRS.get(module.__name__)
        if repair is not None:
            repair(module)


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
