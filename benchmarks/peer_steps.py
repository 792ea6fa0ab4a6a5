"""What others measured of a GRPO step on H100s, and what scale_model's formulas say of the same step.

The measured steps are NeMo-RL's, of its performance summary (v0.4, DGX-H100, BF16, Megatron-core and vLLM on
the same GPUs, on policy, OpenMathInstruct-2), which gives model, GPUs, layout, batch and lengths. A check of
what scale_model assumes (class Assumed), not a race: nothing of ours has run on a GPU. Training and
generation take turns there, so a step is their sum:

  rollout   as scale_model's, on G / tp servers, KV cache in 0.6 of a GPU's 80 GB less the weights
  tail      the longest response alone, as far as it is more than that
  logprobs  the old policy's and the reference's, a forward pass each
  train     one pass over all responses; a pipeline's bubble by micro-batches of one sequence
  optimizer once per update; publish: all weights once
A response's trained tokens are the summary's tokens per second, times seconds and GPUs, over responses; its
prompt is what that is more than its generated mean.

Run: python -m benchmarks.peer_steps
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.machine import save, table
from benchmarks.published_models import MODELS
from benchmarks.scale_model import (
    BF16,
    NODE,
    Assumed,
    Measured,
    active_parameters,
    bubble,
    decode_s,
    reduce_s,
    train_flops,
)
from genac_megatron.models.families.base import Shape
from genac_megatron.models.registry import shape_from_hf
from genac_megatron.models.sizes import parameters, stage_parameters

SOURCE = "https://github.com/NVIDIA-NeMo/RL/blob/r0.4.0/docs/about/performance-summary.md"
GPU_BYTES, SERVED = 80e9, 0.6  # of a GPU, and the share of it that vLLM is given there


@dataclass(frozen=True)
class Published:
    """A row of the summary: layouts, tokens and seconds as it states them."""

    model: str
    gpus: int
    responses: int  # a step's
    update: int  # responses of one update
    generated: float  # mean tokens of a response
    limit: int  # of a whole sequence
    serve_tp: int
    tp: int
    cp: int
    ep: int
    pp: int
    speed: float  # trained tokens / s / GPU
    seconds: float

    @property
    def trained(self) -> float:
        """Mean tokens of a response with its prompt."""
        return self.speed * self.seconds * self.gpus / self.responses


ROWS = (
    Published("Llama-3.1-8B", 16, 2048, 512, 1060, 4096, 1, 1, 1, 1, 2, 1562, 97.7),
    Published("Qwen3-32B", 32, 2048, 512, 3206, 4096, 4, 4, 1, 1, 4, 540, 393),
    Published("Qwen3-30B-A3B", 32, 2048, 512, 3154, 4096, 4, 2, 1, 8, 1, 925, 225),
)


def on_paper(row: Published, assumed: Assumed, measured: Measured) -> dict[str, float]:
    """Seconds of the row's step by part, by the formulas of scale_model."""
    shape = shape_from_hf(MODELS[row.model])
    tokens, tp = row.responses * row.trained, row.serve_tp
    speed = row.gpus * assumed.peak * assumed.mfu
    dp = row.gpus // (row.tp * row.cp * row.pp)
    updates = row.responses / row.update
    piped = 1 - bubble(row.pp, 1, row.update / dp)
    forward = train_flops(shape, tokens, row.trained, "none") / 3 / speed / piped
    weights = stage_parameters(shape, row.tp, row.pp, 0, row.ep)
    band = assumed.nvlink if row.tp * dp <= NODE else assumed.fabric
    rollout, last = _served(row, shape, assumed)
    prefill = 2 * active_parameters(shape) * row.responses * (row.trained - row.generated) / speed
    return {
        "rollout": rollout + prefill,
        "tail": max(0.0, last - rollout),
        "logprobs": 2 * forward,
        "train": 3 * forward,
        "optimizer": updates * reduce_s(weights, dp, band, assumed.latency),
        "publish": BF16 * parameters(shape) / min(assumed.nvlink, assumed.fabric) / measured.copy / tp,
    }


def _served(row: Published, shape: Shape, assumed: Assumed) -> tuple[float, float]:
    """Seconds of decoding with all servers busy, and of the longest response alone."""
    tp = row.serve_tp
    share = row.responses * tp / row.gpus
    kept = SERVED * GPU_BYTES * tp - BF16 * parameters(shape)
    fits = kept / (2 * shape.layers * shape.kv_size * BF16) / row.trained
    together = max(1.0, min(share, fits))
    # A sequence is half written on average.
    each = decode_s(shape, tp, together, row.trained - row.generated / 2, assumed)
    alone = row.limit * decode_s(shape, tp, 1, row.limit / 2, assumed)
    return max(1.0, share / together) * row.generated * each, alone


def rows_of(assumed: Assumed, measured: Measured) -> list[dict[str, Any]]:
    """A row per published step: seconds measured, on paper, and of the latter's parts."""
    rows = []
    for row in ROWS:
        parts = on_paper(row, assumed, measured)
        total = sum(parts.values())
        said = {"measured s": row.seconds, "on paper s": round(total, 1)}
        rounded = {key: round(value, 1) for key, value in parts.items()}
        ratio = {"measured / paper": round(row.seconds / total, 2)}
        rows.append({"model": row.model, "gpus": row.gpus} | said | ratio | rounded)
    return rows


def main() -> None:
    assumed, measured = Assumed(), Measured.read()
    rows = rows_of(assumed, measured)
    print(table(rows))
    settings = {"source": SOURCE, "rows": [asdict(row) for row in ROWS], **asdict(assumed)}
    print(save("peer_steps", settings, rows))


if __name__ == "__main__":
    main()
