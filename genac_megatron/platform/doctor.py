"""`genac doctor`: which versions are here, which of them fit together, what each missing part costs."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from genac_megatron.platform import raise_open_files
from genac_megatron.platform.fp8 import RECIPES, available, refusal

State = Literal["pass", "FAIL", "absent"]
IMPORT_LIMIT_S = 120.0
MANY_FILES = 4096  # two roles on eight servers each, with 128 requests in flight on each


@dataclass(frozen=True)
class Part:
    """A package: the versions that fit, from `least` on and below `below`, and what its absence costs."""

    name: str
    least: str
    below: str = ""
    needed: bool = True
    cost: str = "nothing runs"


MODELS = "no model can be read or built"
PARTS = (
    Part("torch", "2.11", "2.15"),
    Part("megatron-core", "0.16.1", "0.20"),
    Part("psutil", "5.9", cost="megatron-core needs it undeclared: a checkpoint save of 0.16 hangs"),
    Part("tqdm", "4.66", cost="megatron-core needs it undeclared: its import fails"),
    Part("einops", "0.8", cost="megatron-core needs it undeclared: its import fails"),
    Part("numpy", "2"),
    Part("transformers", "5.12.1", "6", cost=MODELS),
    Part("tokenizers", "0.22", cost=MODELS),
    Part("safetensors", "0.6", cost=MODELS),
    Part("jinja2", "3.1", cost="no chat template can be applied"),
    Part("pydantic", "2.12", "3", cost="no recipe can be read"),
    Part("pyyaml", "6", cost="no recipe can be read"),
    Part("rich", "14", cost="no progress display"),
    Part("datasets", "5.2", "6", needed=False, cost="tasks of kind datasets"),
    Part("math-verify", "0.9", "0.10", needed=False, cost="the verifier math"),
    Part("reasoning-gym", "0.1.25", "0.2", needed=False, cost="tasks of kind reasoning_gym"),
    Part("httpx", "0.28", "1", needed=False, cost="critic traces from an endpoint"),
    Part("matplotlib", "3.10", needed=False, cost="the report's plots"),
    Part("tensorboard", "2.20", needed=False, cost="observe.tensorboard"),
    Part("werkzeug", "3.1", "4", needed=False, cost="genac watch"),
    Part("wandb", "0.31", "0.40", needed=False, cost="observe.wandb"),
)
ENGINE = ("transformer-engine", "transformer-engine-torch", "transformer-engine-cu13")
EXTRA = (*ENGINE, "nvidia-cublas", "triton", "apex")


@dataclass(frozen=True)
class Facts:
    """What the machine shows; `judge` needs no more than this."""

    python: tuple[int, int, int]
    versions: Mapping[str, str]  # of installed packages, by name
    torch_error: str = ""  # why torch cannot be imported
    megatron_error: str = ""  # why megatron.core cannot be imported
    engine_error: str = ""  # why Transformer Engine cannot be imported
    cuda: str = ""  # the CUDA version that torch was built for
    gpus: tuple[str, ...] = ()
    capability: tuple[int, int] = (0, 0)  # of the first GPU
    nccl: str = ""
    gloo: bool = False
    apex_is_nvidia: bool = False
    triton_importable: bool = False
    sglang: str = ""
    files: int = 0  # that a process may open: the hard limit, which ranks raise theirs to
    machine: str = ""


@dataclass(frozen=True)
class Finding:
    """One line of the matrix."""

    part: str
    found: str
    state: State
    note: str = ""
    needed: bool = field(default=True, kw_only=True)


def numbers(version: str) -> tuple[int, ...]:
    """A version's release numbers, for comparing: "2.13.0+cpu" is (2, 13, 0)."""
    release = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(part) for part in release[0].split(".")) if release else ()


def doctor() -> tuple[str, bool]:
    """The version matrix as text, and whether everything that this machine needs is there."""
    facts = gather()
    findings = judge(facts)
    return render(facts, findings), all(f.state != "FAIL" for f in findings)


def judge(facts: Facts) -> list[Finding]:
    """What is right, wrong or absent. Nothing absent fails unless this machine cannot run without it."""
    findings = [_python(facts), *(_package(part, facts) for part in PARTS)]
    return [
        *findings,
        *_megatron(facts),
        *_communication(facts),
        *_engine(facts),
        _fp8(facts),
        _apex(facts),
        _adam(facts),
        _sglang(facts),
        _files(facts),
    ]


def _python(facts: Facts) -> Finding:
    found = ".".join(map(str, facts.python))
    fits = facts.python[:2] in ((3, 11), (3, 12))
    return Finding("python", found, "pass" if fits else "FAIL", "" if fits else "install Python 3.11 or 3.12")


def _package(part: Part, facts: Facts) -> Finding:
    found = facts.versions.get(part.name, "")
    if not found:
        state: State = "FAIL" if part.needed else "absent"
        return Finding(part.name, "-", state, f"costs: {part.cost}", needed=part.needed)
    error = {"torch": facts.torch_error, "megatron-core": facts.megatron_error}.get(part.name, "")
    if error:
        return Finding(part.name, found, "FAIL", f"it cannot be imported: {error}")
    fits = numbers(found) >= numbers(part.least)
    fits = fits and (not part.below or numbers(found) < numbers(part.below))
    wanted = f"at least {part.least}" + (f", below {part.below}" if part.below else "")
    return Finding(part.name, found, "pass" if fits else "FAIL", "" if fits else f"wanted: {wanted}")


def _megatron(facts: Facts) -> list[Finding]:
    version = facts.versions.get("megatron-core", "")
    if numbers(version) >= (0, 17) and not facts.triton_importable:
        note = "megatron-core 0.17 and later import it: pip install --no-deps triton"
        return [Finding("triton", "-", "FAIL", note)]
    return []


def _communication(facts: Facts) -> list[Finding]:
    findings = [
        Finding(
            "gloo",
            "yes" if facts.gloo else "-",
            "pass" if facts.gloo else "FAIL",
            "" if facts.gloo else "this torch has no gloo: take another build",
        )
    ]
    if not facts.gpus:
        note = "no GPU: training and engines run on the CPU"
        return [*findings, Finding("CUDA", facts.cuda or "-", "absent", note, needed=False)]
    findings.append(Finding("CUDA", facts.cuda, "pass", f"{len(facts.gpus)} x {facts.gpus[0]}"))
    nccl = Finding(
        "NCCL",
        facts.nccl or "-",
        "pass" if facts.nccl else "FAIL",
        "" if facts.nccl else "GPUs cannot talk: take torch's CUDA build",
    )
    return [*findings, nccl]


def _engine(facts: Facts) -> list[Finding]:
    """Transformer Engine, and whether the cuBLAS beside it is one that it can load."""
    version = next((facts.versions[name] for name in ENGINE if name in facts.versions), "")
    name = "transformer-engine"
    if not version:
        cost = "costs: fp8 and the fused GPU layers; torch's layers are used"
        return [Finding(name, "-", "absent", cost, needed=False)]
    cublas = facts.versions.get("nvidia-cublas", "")
    trapped = numbers(version) >= (2, 13) and bool(cublas) and numbers(cublas) < (13, 2)
    way_out = "pip install --no-deps nvidia-cublas==13.2.2.2, or Transformer Engine 2.12.0"
    findings = []
    if facts.engine_error:
        note = f"it cannot be imported: {facts.engine_error}" + (f"; {way_out}" if trapped else "")
        findings.append(Finding(name, version, "FAIL", note))
    elif numbers(version) < (2, 14):
        findings.append(Finding(name, version, "pass", "before 2.14 gradient clipping is slow"))
    else:
        findings.append(Finding(name, version, "pass"))
    if cublas:
        note = f"Transformer Engine {version} needs at least 13.2: {way_out}" if trapped else ""
        findings.append(Finding("nvidia-cublas", cublas, "FAIL" if trapped else "pass", note))
    return findings


def _apex(facts: Facts) -> Finding:
    version = facts.versions.get("apex", "")
    if version and not facts.apex_is_nvidia:
        note = "an unrelated package by that name, not NVIDIA's: pip uninstall apex"
        return Finding("apex", version, "FAIL", note)
    if not version:
        note = "not needed, Transformer Engine has its parts; never install the one of the Python index"
        return Finding("apex", "-", "absent", note, needed=False)
    return Finding("apex", version, "pass")


def _has_engine(facts: Facts) -> bool:
    return any(name in facts.versions for name in ENGINE) and not facts.engine_error


def _fp8(facts: Facts) -> Finding:
    """The recipes of training.fp8 that this machine has, and why not the others."""
    if not _has_engine(facts) or not facts.gpus:
        lacks = "a GPU" if _has_engine(facts) else "Transformer Engine"
        return Finding(
            "fp8", "-", "absent", f"needs {lacks}: recipes that ask for it are refused", needed=False
        )
    found = available(facts.capability, facts.cuda)
    reasons = (refusal(recipe, facts.capability, facts.cuda) for recipe in RECIPES)
    return Finding("fp8", ", ".join(found) or "-", "pass", "; ".join(filter(None, reasons)), needed=False)


def _adam(facts: Facts) -> Finding:
    """Which Adam megatron-core takes: it tries Transformer Engine, then apex, then torch."""
    if _has_engine(facts):
        return Finding("fused Adam", "transformer-engine", "pass")
    if facts.apex_is_nvidia:
        return Finding("fused Adam", "apex", "pass")
    return Finding("fused Adam", "-", "absent", "torch's AdamW steps instead", needed=False)


def _sglang(facts: Facts) -> Finding:
    if not facts.sglang:
        note = "has an environment of its own; engines are embedded ones"
        return Finding("sglang", "-", "absent", note, needed=False)
    note = "it is in the trainer's environment, which it does not share pins with"
    return Finding("sglang", facts.sglang, "pass", note, needed=False)


def _files(facts: Facts) -> Finding:
    """Every request to a server is an open file of its rank."""
    few = 0 < facts.files < MANY_FILES
    note = f"below {MANY_FILES} ranks send fewer requests at a time: raise the hard limit (ulimit -Hn)"
    return Finding("open files", str(facts.files or "-"), "pass", note if few else "", needed=False)


def render(facts: Facts, findings: list[Finding]) -> str:
    """The findings as a table, and a closing line."""
    wide = max(len(f.part) for f in findings)
    middle = max(len(f.found) for f in findings)
    lines = [facts.machine] if facts.machine else []
    lines += [f"{f.state:<7} {f.part:<{wide}}  {f.found:<{middle}}  {f.note}".rstrip() for f in findings]
    failed = [f.part for f in findings if f.state == "FAIL"]
    if failed:
        lines.append(f"FAIL: {', '.join(failed)}")
    else:
        lines.append("pass: this machine has what it needs")
    return "\n".join(lines) + "\n"


def gather() -> Facts:
    """Look at this machine. Imports torch; Megatron-core and Transformer Engine in processes of their own."""
    versions = {}
    for name in (*(part.name for part in PARTS), *EXTRA, "sglang"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    torch_facts = _torch_facts()
    has_engine = any(name in versions for name in ENGINE)
    return Facts(
        python=sys.version_info[:3],
        versions=versions,
        megatron_error=_import_error("megatron.core") if "megatron-core" in versions else "",
        engine_error=_import_error("transformer_engine.pytorch") if has_engine else "",
        apex_is_nvidia=_apex_is_nvidia(),
        triton_importable=importlib.util.find_spec("triton") is not None,
        sglang=versions.get("sglang", ""),
        files=raise_open_files(),
        machine=f"{platform.platform()}, {os.cpu_count()} cores{_memory()}",
        **torch_facts,  # type: ignore[arg-type]
    )


def _torch_facts() -> dict[str, object]:
    try:
        import torch
        import torch.distributed as dist
    except (ImportError, OSError, ValueError) as error:
        return {"torch_error": str(error).strip().splitlines()[-1]}
    gpus: tuple[str, ...] = ()
    capability, nccl = (0, 0), ""
    if torch.cuda.is_available():
        gpus = tuple(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
        capability = torch.cuda.get_device_capability(0)
        if dist.is_nccl_available():
            nccl = ".".join(map(str, torch.cuda.nccl.version()))
    return {
        "cuda": torch.version.cuda or "",
        "gpus": gpus,
        "capability": capability,
        "nccl": nccl,
        "gloo": dist.is_gloo_available(),
    }


def _import_error(module: str) -> str:
    """Why a module cannot be imported, "" where it can. In a process of its own: a library may abort."""
    code = f"import gc; gc.disable(); import {module}"  # a fifth faster
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=IMPORT_LIMIT_S
        )
    except subprocess.TimeoutExpired:
        return f"its import took more than {IMPORT_LIMIT_S:.0f} s"
    if not done.returncode:
        return ""
    return (done.stderr.strip().splitlines() or [f"its import ended with code {done.returncode}"])[-1]


def _apex_is_nvidia() -> bool:
    spec = importlib.util.find_spec("apex")
    folders = spec.submodule_search_locations if spec else None
    return any((Path(folder) / "multi_tensor_apply").is_dir() for folder in folders or ())


def _memory() -> str:
    pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    return f", {pages * size / 2**30:.0f} GiB of memory"
