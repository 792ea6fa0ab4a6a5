"""Log-probs and entropies at a vocabulary of 152k: time and memory, forward and backward, of one GPU.

Ours (models/logprobs.py: chunk by chunk, no whole logits), dense (float32 log_softmax of whole logits), and
the libraries' fused forms: Megatron's jit-fused cross-entropy and Transformer Engine's Triton one, which take
whole logits and give no entropy, and torch's linear_cross_entropy, which gives a mean alone. Memory is the
peak above hidden states and weight, less the two gradients that every variant returns. Each runs in a process
of its own. Run: python -m benchmarks.gpu.logprobs
"""

from __future__ import annotations

import argparse
import json
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.common import child, median, need_gpu, parser, report, verdict
from benchmarks.logprobs import LogProbs, dense, ours
from genac_megatron import platform
from genac_megatron.platform.megatron import install
from genac_megatron.publication.memory import PeakMemory

MIB = 2**20
MEMORY_GOAL = 0.1  # of dense's, beyond the gradients


def dense_entropy(hidden_TH: Tensor, weight_VH: Tensor, labels_T: Tensor) -> Tensor:
    logp_TV = (hidden_TH @ weight_VH.T).float().log_softmax(-1)
    logp_T = logp_TV.gather(1, labels_T[:, None]).squeeze(1)
    return logp_T - 0.01 * (logp_TV.exp() * logp_TV).sum(-1)


def megatron_fused(hidden_TH: Tensor, weight_VH: Tensor, labels_T: Tensor) -> Tensor:
    from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy

    from genac_megatron.training.layout import Layout

    groups: Any = Layout("logprobs", 0, 1).groups()
    logits_T1V = (hidden_TH @ weight_VH.T)[:, None]
    lost_T1: Tensor = fused_vocab_parallel_cross_entropy(logits_T1V, labels_T[:, None], groups.tp)
    return -lost_T1.squeeze(1)


def te_fused(hidden_TH: Tensor, weight_VH: Tensor, labels_T: Tensor) -> Tensor:
    from transformer_engine.pytorch.cross_entropy import parallel_cross_entropy

    logits_T1V = (hidden_TH @ weight_VH.T)[:, None]
    lost_T1: Tensor = parallel_cross_entropy(logits_T1V, labels_T[:, None], 0.0, False, None)
    return -lost_T1.squeeze(1)


def torch_chunked(hidden_TH: Tensor, weight_VH: Tensor, labels_T: Tensor) -> Tensor:
    options = F.LinearCrossEntropyOptions() if hasattr(F, "LinearCrossEntropyOptions") else None
    options = options or torch.nn.LinearCrossEntropyOptions()
    return -F.linear_cross_entropy(hidden_TH, weight_VH, labels_T, reduction="mean", options=options)


def variants() -> dict[str, LogProbs]:
    """What can run here."""
    found: dict[str, LogProbs] = {
        "dense log_softmax": dense,
        "dense, entropy": dense_entropy,
        "ours, chunk 1024": ours(1024),
        "ours, chunk 4096": ours(4096),
        "ours, chunk 1024, entropy": ours(1024, with_entropy=True),
        "megatron fused": megatron_fused,
    }
    if hasattr(F, "linear_cross_entropy"):
        found["torch linear_cross_entropy (mean)"] = torch_chunked
    if platform.has_te():
        found["transformer engine fused"] = te_fused
    return found


def run_variant(given: dict[str, Any]) -> dict[str, Any]:
    """One variant: seconds of a forward and backward pass, and its peak memory."""
    install()
    from genac_megatron.training.layout import close_world, init_world

    torch.set_num_threads(1)
    init_world()
    device, dtype = platform.device(), getattr(torch, given["dtype"])
    torch.manual_seed(0)
    hidden_TH = torch.randn(given["count"], given["hidden"], device=device).to(dtype).requires_grad_()
    weight_VH = torch.randn(given["vocab"], given["hidden"], device=device, dtype=dtype)
    weight_VH = (weight_VH / math.sqrt(given["hidden"])).requires_grad_()
    labels_T = torch.randint(given["vocab"], (given["count"],), device=device)
    run = variants()[given["name"]]

    def once() -> float:
        hidden_TH.grad = weight_VH.grad = None
        logp_T = run(hidden_TH, weight_VH, labels_T)
        logp_T.mean().backward()
        return float(logp_T.mean())

    took = median(once, given["repeats"], warm=1 if given["tiny"] else 3)
    hidden_TH.grad = weight_VH.grad = None
    with PeakMemory() as memory:
        mean = once()
    close_world()
    gradients = sum(x.numel() * x.element_size() for x in (hidden_TH, weight_VH))
    peak = memory.device if device.type == "cuda" else memory.host
    return {"ms": 1000 * took, "beyond_MiB": (peak - gradients) / MIB, "mean_logp": mean}


def measure(options: argparse.Namespace, dtype: str) -> list[dict[str, Any]]:
    given = {
        "vocab": options.vocab,
        "hidden": options.hidden,
        "count": options.count,
        "dtype": dtype,
        "repeats": options.repeats,
        "tiny": options.tiny,
    }
    rows = []
    for name in variants():
        found = child("benchmarks.gpu.logprobs", given | {"name": name})
        rows.append(
            {
                "variant": name,
                "dtype": dtype,
                "ms": round(found["ms"], 2),
                "beyond_gradients_MiB": round(found["beyond_MiB"]),
                "mean_logp": round(found["mean_logp"], 5),
            }
        )
    first = rows[0]
    for row in rows:
        row["times dense"] = round(row["ms"] / first["ms"], 2)
    return rows


def main(arguments: list[str] | None = None) -> None:
    grammar = parser(__doc__)
    grammar.add_argument("--variant", help=argparse.SUPPRESS)
    grammar.add_argument("--vocab", type=int, default=151_936)
    grammar.add_argument("--hidden", type=int, default=2048)
    grammar.add_argument("--count", type=int, default=8192, help="tokens")
    grammar.add_argument("--repeats", type=int, default=10)
    options = grammar.parse_args(arguments)
    if options.variant:
        print(json.dumps(run_variant(json.loads(options.variant))))
        return
    need_gpu(options.tiny)
    if options.tiny:
        options.vocab, options.hidden, options.count, options.repeats = 512, 32, 64, 1
    rows = []
    for dtype in ["float32"] if options.tiny else ["bfloat16", "float32"]:
        rows += measure(options, dtype)
    by = {(row["variant"], row["dtype"]): row for row in rows}
    name = "float32" if options.tiny else "bfloat16"
    share = by["ours, chunk 1024", name]["beyond_gradients_MiB"] / max(
        1, by["dense log_softmax", name]["beyond_gradients_MiB"]
    )
    what = "memory beyond the gradients, chunk 1024 over dense"
    report("logprobs", options, rows, [verdict(what, share, MEMORY_GOAL, at_least=False)])


if __name__ == "__main__":
    main()
