"""Memory and time of log-probs forward and backward: ours, dense, and torch's own chunked loss.

Each variant runs in a process of its own; memory is the rise of that process's peak resident set
over what it holds with inputs and weight in place. Seconds are of processor time, which a busy
machine disturbs little (with one thread they are the wall time of an idle one). All variants must
return the two gradients, so "beyond gradients" is what a variant costs on top of them.
Run: python -m benchmarks.logprobs
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.machine import save, table
from genac_megatron.models.logprobs import vocab_parallel_logprobs

MIB = 2**20
LogProbs = Callable[[Tensor, Tensor, Tensor], Tensor]


def ours(chunk: int, with_entropy: bool = False) -> LogProbs:
    def run(hidden_TH: Tensor, weight_VH: Tensor, labels_T: Tensor) -> Tensor:
        logp_T, entropy_T = vocab_parallel_logprobs(
            hidden_TH,
            weight_VH,
            labels_T,
            tp_group=None,
            chunk=chunk,
            vocab=len(weight_VH),
            with_entropy=with_entropy,
        )
        return logp_T if entropy_T is None else logp_T + 0.01 * entropy_T

    return run


def dense(hidden_TH: Tensor, weight_VH: Tensor, labels_T: Tensor) -> Tensor:
    logp_TV = (hidden_TH @ weight_VH.T).float().log_softmax(-1)
    return logp_TV.gather(1, labels_T[:, None]).squeeze(1)


def torch_chunked(hidden_TH: Tensor, weight_VH: Tensor, labels_T: Tensor) -> Tensor:
    """The mean alone, which makes the gradients in its forward: on a CPU much faster than one per token."""
    options = torch.nn.LinearCrossEntropyOptions()
    return -F.linear_cross_entropy(hidden_TH, weight_VH, labels_T, reduction="mean", options=options)


VARIANTS: dict[str, LogProbs] = {
    "dense log_softmax": dense,
    "ours, chunk 1024": ours(1024),
    "ours, chunk 256": ours(256),
    "ours, chunk 256, entropy": ours(256, with_entropy=True),
}
if hasattr(F, "linear_cross_entropy"):  # torch 2.13 has it
    VARIANTS["torch linear_cross_entropy (mean)"] = torch_chunked


def resident(key: str) -> float:
    """VmRSS or VmHWM (its high-water mark) of this process, MiB."""
    found = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found.group(1)) / 1024


def child(options: argparse.Namespace) -> None:
    """Run one variant once and print its figures as JSON."""
    torch.set_num_threads(options.threads)
    dtype = getattr(torch, options.dtype)
    torch.manual_seed(0)
    hidden_TH = torch.randn(options.tokens, options.hidden).to(dtype).requires_grad_()
    scale = 1 / math.sqrt(options.hidden)
    weight_VH = torch.empty(options.vocab, options.hidden, dtype=dtype).normal_(std=scale).requires_grad_()
    labels_T = torch.randint(options.vocab, (options.tokens,))
    run = VARIANTS[options.variant]
    run(hidden_TH[:8].detach().requires_grad_(), weight_VH[:64].detach(), labels_T[:8] % 64).sum().backward()

    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
    before = resident("VmRSS")
    began = time.process_time()
    logp_T = run(hidden_TH, weight_VH, labels_T)
    middle = time.process_time()
    logp_T.mean().backward()
    ended = time.process_time()
    rise = resident("VmHWM") - before
    gradients = sum(x.numel() * x.element_size() for x in (hidden_TH, weight_VH)) / MIB
    figures = {
        "forward_s": round(middle - began, 2),
        "backward_s": round(ended - middle, 2),
        "cpu_s": round(ended - began, 2),
        "peak_rise_MiB": round(rise),
        "beyond_gradients_MiB": round(rise - gradients),
        "mean_logp": round(logp_T.mean().item(), 5),
    }
    print(json.dumps(figures))


def measure(variant: str, dtype: str, arguments: list[str], threads: int) -> dict[str, Any]:
    command = [
        sys.executable,
        "-m",
        "benchmarks.logprobs",
        *arguments,
        "--variant",
        variant,
        "--dtype",
        dtype,
    ]
    done = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": str(threads)},
    )
    return {"variant": variant, "dtype": dtype} | json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: both")
    parser.add_argument("--variant", choices=list(VARIANTS), help="run this one here and print JSON")
    options = parser.parse_args()
    if options.variant:
        child(options)
        return
    settings = {name: getattr(options, name) for name in ("vocab", "hidden", "tokens", "threads")}
    arguments = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
    for dtype in [options.dtype] if options.dtype else ["float32", "bfloat16"]:
        rows: list[dict[str, Any]] = []
        for variant in VARIANTS:
            rows.append(measure(variant, dtype, arguments, options.threads))
            path = save(f"logprobs-{dtype}", settings, rows)  # after each, as the whole takes minutes
            print(json.dumps(rows[-1]), flush=True)
        print(table(rows))
        print("written", path.name)


if __name__ == "__main__":
    main()
