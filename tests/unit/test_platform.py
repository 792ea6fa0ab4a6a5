"""The import hook: what it rewrites, what it leaves alone, where it does nothing."""

from __future__ import annotations

import gc
import multiprocessing
import os
import queue
import subprocess
import sys

import pytest

from genac_megatron import platform
from genac_megatron.platform.megatron import ResultsFile
from genac_megatron.platform.without_cuda.facade import CPU_CUDA
from genac_megatron.platform.without_cuda.hook import to_cpu


@pytest.mark.parametrize(
    ("source", "wanted"),
    [
        ("torch.cuda.current_device().type", "cpu"),
        ("torch.zeros(1, device='cuda').device.type", "cpu"),
        ("torch.zeros(1, device=f'cuda:{3}').device.type", "cpu"),
        ("torch.zeros(1).cuda(non_blocking=True).device.type", "cpu"),
        ("torch.zeros(1).pin_memory().is_cuda", True),  # "is it where the work is done?"
        ("torch.empty(1, pin_memory=True).is_pinned()", False),
        ("torch.zeros(1).type() == 'torch.cuda.FloatTensor'", True),
        ("torch.cuda.Stream().wait_stream(torch.cuda.current_stream())", None),
        ("torch.cuda.OutOfMemoryError.__name__", "OutOfMemoryError"),  # falls through to torch.cuda
    ],
)
def test_cuda_names_mean_the_cpu(source: str, wanted: object) -> None:
    names = {"__cpu_cuda__": CPU_CUDA}
    exec(to_cpu(f"import torch\nvalue = {source}".encode(), "<test>"), names)
    assert names["value"] == wanted


def _python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False
    )
    return done.stdout + done.stderr


def test_megatron_is_loaded_as_it_is_where_cuda_is() -> None:
    code = """
import importlib.util, sys, torch
torch.cuda.is_available = lambda: True
from genac_megatron.platform.megatron import install
plain = importlib.util.find_spec("megatron.core").loader
install()
found = importlib.util.find_spec("megatron.core").loader
read = [name for name in sys.modules if "without_cuda" in name]
print(type(plain) is type(found), type(found).__name__, read)
"""
    assert _python(code).split() == ["True", "SourceFileLoader", "[]"]


def test_installing_imports_no_torch() -> None:
    code = """
import sys
from genac_megatron.platform.megatron import install
install()
print('torch' in sys.modules)
"""
    assert _python(code).split() == ["False"]


@pytest.mark.skipif(platform.device().type == "cuda", reason="the hook is for machines without CUDA")
def test_the_hook_is_put_in_once_and_leaves_torch_alone_and_wandb_out_and_refuses_to_come_late() -> None:
    code = """
import sys, torch
from genac_megatron.platform.megatron import install
cuda = {name: value for name, value in vars(torch.cuda).items() if callable(value)}
sizes = [install() or len(sys.meta_path) for _ in range(2)]
import megatron.core.jit
same = all(getattr(torch.cuda, name) is value for name, value in cuda.items())
print(sizes[0] == sizes[1], same, megatron.core.jit.__cpu_cuda__ is not torch.cuda)
print("wandb" in sys.modules, megatron.core.timers.wandb)
import wandb  # which is there for who wants it
del sys.meta_path[0]
try:
    install()
except RuntimeError as error:
    print(error)
"""
    out = _python(code)
    assert out.startswith("True True True\nFalse None\n")
    assert "megatron.core was imported before" in out


def test_memory_is_counted_in_gib() -> None:
    held = bytearray(b"x") * (64 << 20)
    assert 0.05 < platform.rss_gib() <= platform.peak_rss_gib() + 0.01
    assert platform.peak_rss_gib() < 100
    del held


def test_results_come_from_forked_processes_in_order_and_whole() -> None:
    results, large = ResultsFile(), os.urandom(3_000_000)  # more than a pipe holds
    for item in ({0: [large]}, OSError(28, "no space"), []):
        child = multiprocessing.get_context("fork").Process(target=results.put, args=(item,))
        child.start()
        child.join()
    assert results.get_nowait() == {0: [large]}
    assert str(results.get_nowait()) == "[Errno 28] no space"
    assert results.get_nowait() == []
    with pytest.raises(queue.Empty):
        results.get_nowait()


@pytest.mark.parametrize("kept", [3, 8, 20])
def test_a_result_whose_writer_was_killed_amid_it_is_none(kept: int) -> None:
    results = ResultsFile()
    results.put(list(range(100)))
    os.ftruncate(results._file, kept)
    with pytest.raises(queue.Empty):
        results.get_nowait()


def test_imports_are_not_collected_and_what_they_made_is_never_looked_at_again() -> None:
    frozen = gc.get_freeze_count()
    with platform.uncollected():
        assert not gc.isenabled()
        made = [[n] for n in range(1000)]
    assert gc.isenabled()
    assert gc.get_freeze_count() >= frozen + len(made)
    gc.disable()
    try:
        with platform.uncollected():
            pass
        assert not gc.isenabled(), "as it was found"
    finally:
        gc.enable()
