"""What the GPU benchmarks share: the machine, arguments, timing, children of their own, results."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform as python_platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import cpu_model, table

RESULTS = Path(__file__).resolve().parents[1] / "results" / "gpu"
PACKAGES = (
    "torch",
    "megatron-core",
    "transformer-engine",
    "transformer-engine-cu13",
    "nvidia-cublas",
    "nvidia-cudnn-cu13",
    "transformers",
)
# Dense tensor-core peaks in TFLOP/s from NVIDIA's data sheets, BF16 and FP8, without sparsity.
PEAKS = {
    "A100": (312.0, None),
    "H100 PCIe": (756.0, 1513.0),
    "H100 NVL": (835.0, 1671.0),
    "H100": (989.4, 1978.9),
    "H200": (989.4, 1978.9),
    "B200": (2250.0, 4500.0),
}
CHILD_LIMIT_S = 1800.0


def parser(text: str | None) -> argparse.ArgumentParser:
    """--tiny and --out; the rest is each benchmark's own."""
    made = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--tiny", action="store_true", help="tiny shapes, on a CPU too; figures say nothing")
    made.add_argument("--out", type=Path, help=f"folder of the results (default {RESULTS.name}/; tiny: none)")
    return made


def need_gpu(tiny: bool) -> None:
    """End with code 2 where there is no GPU and the run is no try."""
    if not (tiny or torch.cuda.is_available()):
        print("no CUDA device here\n  way out: run it on a GPU machine, or with --tiny to try it", flush=True)
        raise SystemExit(2)


def gpu_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "none (CPU, a try)"


def peak_tflops(fp8: bool) -> float | None:
    """The peak of this GPU's tensor cores, None where it is not in the table."""
    name = gpu_name()
    for known in sorted(PEAKS, key=len, reverse=True):
        if all(word in name for word in known.split()):
            return PEAKS[known][1 if fp8 else 0]
    return None


def versions() -> dict[str, str]:
    found = {"python": python_platform.python_version(), "cuda": torch.version.cuda or "-"}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    if torch.cuda.is_available():
        found["driver"] = _driver()
    return found


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return "-"
    return (done.stdout.strip().splitlines() or ["-"])[0]


def report(name: str, options: argparse.Namespace, rows: list[dict[str, Any]], goals: list[str]) -> None:
    """The table and the goals' verdicts; and results/gpu/<name>.json, where the run is no mere try."""
    print(table(rows))
    print("\n".join(goals))
    folder = options.out or (None if options.tiny else RESULTS)
    if folder is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    record = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "gpu": gpu_name(),
        "versions": versions(),
        "machine": {"cpu": cpu_model(), "cores": os.cpu_count()},
        "settings": {key: str(value) for key, value in vars(options).items()},
        "rows": rows,
        "goals": goals,
    }
    path = folder / f"{name}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    print("written", path)


def verdict(what: str, found: float | None, goal: float, *, at_least: bool) -> str:
    """A goal and whether it was met."""
    if found is None:
        return f"{what}: not measured (goal {'>=' if at_least else '<='} {goal})"
    met = found >= goal if at_least else found <= goal
    return f"{what}: {found:.3g} (goal {'>=' if at_least else '<='} {goal}: {'met' if met else 'missed'})"


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(act: Callable[[], Any]) -> float:
    """Wall seconds of a piece of work, the device's included."""
    synchronize()
    began = time.perf_counter()
    act()
    synchronize()
    return time.perf_counter() - began


def median(act: Callable[[], Any], times: int, warm: int = 1) -> float:
    for _ in range(warm):
        act()
    return statistics.median(seconds(act) for _ in range(times))


def child(module: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Run a variant in a process of its own, with memory of its own: its last line is JSON.

    Raises SystemExit with the end of its output where it fails.
    """
    command = [sys.executable, "-W", "ignore", "-m", module, "--variant", json.dumps(arguments)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=CHILD_LIMIT_S)
    except subprocess.TimeoutExpired:
        raise SystemExit(f"{arguments} took more than {CHILD_LIMIT_S:.0f} s") from None
    if done.returncode:
        raise SystemExit(f"{arguments} ended with code {done.returncode}:\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found
