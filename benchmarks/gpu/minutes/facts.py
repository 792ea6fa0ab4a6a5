"""Which machine, which packages, whether Transformer Engine and SGLang run at all, and the doctor."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.gpu.common import versions
from benchmarks.gpu.minutes.rows import Figures, Step, beside
from genac_megatron.recipe.share import CONTEXT_GIB

SERVE_PYTHON = "GENAC_SERVE_PYTHON"  # serving.sglang.server's, which imports more than facts may need
BOOT = Path(__file__).resolve().parents[3] / "genac_megatron" / "serving" / "sglang" / "boot.py"
LIMIT_S, TRY_LIMIT_S = 45.0, 900.0  # of a child: on a GPU, and in a try on a busy CPU
SIDE = 8192  # of the square matrices that are multiplied
COPIED = 2 << 30  # bytes
ON_A_GPU = (
    "import torch, sglang, sgl_kernel, transformers; from sgl_kernel import rmsnorm\n"
    "x = torch.randn(4, 576, device='cuda', dtype=torch.bfloat16)\n"
    "w = torch.ones(576, device='cuda', dtype=torch.bfloat16)\n"
    "y, z = rmsnorm(x, w, 1e-5), torch.nn.functional.rms_norm(x, (576,), w, 1e-5)\n"
    "print('sglang', sglang.__version__, 'transformers', transformers.__version__, "
    "'error', (y - z).float().abs().max().item())"
)
ON_A_CPU = (  # PyPI's SGLang imports what a CPU lacks: as our servers there begin
    "import sys; sys.path.insert(0, sys.argv[1]); import without_cuda; without_cuda.prepare()\n"
    "import sglang, transformers as t; print('sglang', sglang.__version__, 'transformers', t.__version__)"
)


def run(step: Step) -> bool:
    """Everything that takes seconds and decides what the other steps mean."""
    cases = [("packages", packages), ("machine", machine), ("gpu", gpu), ("transformer engine", te)]
    if step.tiny:
        cases = cases[:2]
    return step.each([*cases, ("sglang", lambda: sglang(step.tiny)), ("doctor", lambda: doctor(step.tiny))])


def packages() -> Figures:
    names = ("CUDA_HOME", "NVTE_CUDA_INCLUDE_DIR")
    return {**versions(), **{name.lower(): os.environ.get(name, "-") for name in names}}


def machine() -> Figures:
    from shutil import which

    tools = {tool: which(tool) or "-" for tool in ("nvcc", "gcc", "g++", "ninja")}
    shm = os.statvfs("/dev/shm")
    gib = 2**30
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory / gib, 1),
        "dev_shm_gib": round(shm.f_bavail * shm.f_frsize / gib, 1),
        "numa_nodes": len(list(Path("/sys/devices/system/node").glob("node[0-9]*"))),
        **tools,
    }


def gpu() -> Figures:
    """Its name, and what a plain product and a plain copy get: what other figures are held against."""
    found = torch.cuda.get_device_properties(0)
    torch.zeros(1, device="cuda")
    free, total = torch.cuda.mem_get_info()
    context = (total - free - torch.cuda.memory_reserved()) / 2**30  # nobody else is on the GPU yet
    a = torch.randn(SIDE, SIDE, device="cuda", dtype=torch.bfloat16)
    b = torch.randn_like(a)
    source = torch.empty(COPIED, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    product, copy = _device_s(lambda: a @ b), _device_s(lambda: target.copy_(source))
    return {
        "name": found.name,
        "total_gib": round(found.total_memory / 2**30, 1),
        "free_gib": round(torch.cuda.mem_get_info()[0] / 2**30, 1),
        "context_gib": beside(CONTEXT_GIB, context),
        "capability": ".".join(map(str, torch.cuda.get_device_capability())),
        "bf16_tflops": round(2 * SIDE**3 / product / 1e12, 1),
        "copy_tb_s": round(2 * COPIED / copy / 1e12, 2),  # read and written
    }


def _device_s(act: object, times: int = 10) -> float:
    assert callable(act)
    for _ in range(3):
        act()
    began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    began.record()
    for _ in range(times):
        act()
    ended.record()
    ended.synchronize()
    return began.elapsed_time(ended) / times / 1e3


def te() -> Figures:
    """One linear layer, forward and backward, in BF16 and each recipe; its distance from torch's."""
    import transformer_engine.pytorch as engine
    from transformer_engine.common import recipe as recipes

    x = torch.randn(128, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    layer = engine.Linear(256, 512, params_dtype=torch.bfloat16)
    wanted = torch.nn.functional.linear(x, layer.weight, layer.bias).float()
    tried = {
        "bf16": None,
        "tensorwise": recipes.Float8CurrentScaling(),
        "blockwise": recipes.Float8BlockScaling(),
        "delayed": recipes.DelayedScaling(),
    }
    found: Figures = {}
    for name, recipe in tried.items():
        try:
            with engine.fp8_autocast(enabled=recipe is not None, fp8_recipe=recipe):
                y = layer(x)
            y.float().pow(2).mean().backward()
            torch.cuda.synchronize()
            found[name] = round(((y - wanted).float().norm() / wanted.norm()).item(), 5)
        except Exception as error:  # one recipe that fails says nothing of the others
            found[name] = f"{type(error).__name__}: {str(error)[-300:]}"
    return {"linear_error": found}


def sglang(tiny: bool) -> Figures:
    """The servers' environment: its imports, and one of its kernels against torch's."""
    if SERVE_PYTHON not in os.environ:
        raise RuntimeError(f"{SERVE_PYTHON} is not set: tools/gpu_setup.sh prints it, or --bundles FOLDER")
    program = ON_A_CPU if tiny else ON_A_GPU
    command = [os.environ[SERVE_PYTHON], "-W", "ignore", "-c", program, str(BOOT.parent)]
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    limit = _limit(tiny)
    done = subprocess.run(command, capture_output=True, text=True, timeout=limit, env=environ)
    if done.returncode:
        raise RuntimeError(done.stderr[-1200:])
    return {"said": done.stdout.strip().splitlines()[-1]}


def doctor(tiny: bool) -> Figures:
    command = [sys.executable, "-W", "ignore", "-m", "genac_megatron", "doctor"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_limit(tiny))
    print(done.stdout, done.stderr)
    lines = (done.stdout + done.stderr).splitlines()
    return {
        "rc": done.returncode,
        "fail": [line for line in lines if line.startswith("FAIL")],
        "fp8": [line for line in lines if " fp8 " in line],
    }


def _limit(tiny: bool) -> float:
    return TRY_LIMIT_S if tiny else LIMIT_S
