"""Accuracy per precision: loss and gradient-norm curves against fp32, and log-probs' mismatch with engines.

Each precision trains the same random model on the same sequences in a process of its own: fp32 and BF16 with
torch's layers, BF16 and every FP8 recipe that this GPU has with Transformer Engine's. Columns, each beside
its band: the mean difference from fp32's loss curve (of the first loss) and from its gradient norms (of their
mean), the mean difference of log-probs of the same tokens before training, and the p99 of |trainer - engine|
over what an engine samples with the trainer's weights as they are and in FP8 (`engine.quantization`), the
trainer's precision on one side, BF16 (fp32: fp32) on the other. The engine is the embedded one, so FP8 there
is the rounding of weights alone, without that of SGLang's activations.
On a CPU (--tiny): torch's layers in fp32 and BF16, really.
Run: python -m benchmarks.gpu.accuracy
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
from typing import Any

import torch

from benchmarks.gpu.common import child, need_gpu, parser, report, verdict
from genac_megatron import platform
from genac_megatron.algorithms.losses import make_sft_loss
from genac_megatron.models.mapping import load_hf_into, random_weights
from genac_megatron.models.registry import hf_config, shape_of
from genac_megatron.platform.fp8 import RECIPES, refusal_here
from genac_megatron.publication.publisher import Publisher
from genac_megatron.recipe.schema import EngineConfig, ObserveConfig, RoleConfig
from genac_megatron.records import Request, Sample, SamplingParams
from genac_megatron.serving.embedded import EmbeddedEngine
from genac_megatron.stages.parity import engine_sample, parity_figures
from genac_megatron.training.layout import Layout, close_world, init_world
from genac_megatron.training.role import Role

# Sides are multiples of 128, the blocks of FP8; heads of 64, which cuDNN's kernels have.
SHAPE: dict[str, Any] = {
    "layers": 12, "hidden": 768, "ffn": 2048, "heads": 12, "kv_heads": 4, "head_dim": 64, "vocab": 8192,
    "init_std": 0.03,
}  # fmt: skip
TINY = SHAPE | {"layers": 2, "hidden": 128, "ffn": 256, "heads": 2, "kv_heads": 2, "vocab": 512}
# Bands, set before anything ran on a GPU. On a CPU, BF16 with torch's layers differs from fp32 by 2.3e-4 of
# the loss, 8.4e-4 of the gradient norm and 0.008 in a log-prob; other kernels get a few times that. E4M3
# keeps 4 bits of a number where BF16 keeps 8: its bands are some 15 times as wide.
BANDS = {  # of the loss, of the gradient norm, of a log-prob
    "fp32": (0.0, 0.0, 0.0),
    "bf16": (0.002, 0.01, 0.02),
    "fp8": (0.03, 0.15, 0.15),
}
PROMPTS, NEW = 16, 32


def precisions(tiny: bool) -> dict[str, dict[str, Any]]:
    """What can run here, fp32 first."""
    found: dict[str, dict[str, Any]] = {
        "fp32, torch": {"dtype": "fp32", "specs": "torch"},
        "bf16, torch": {"dtype": "bf16", "specs": "torch"},
    }
    if tiny or not platform.has_te():
        return found
    found["bf16, te"] = {"dtype": "bf16", "specs": "te"}
    for recipe in RECIPES:
        if reason := refusal_here(recipe):
            print(f"left out: {reason}", flush=True)
        else:
            found[f"fp8 {recipe}"] = {"dtype": "bf16", "specs": "te", "fp8": recipe}
    return found


def make_samples(count: int, seed: int, vocab: int) -> list[Sample]:
    """Sequences in which the next token mostly follows from the last, so that there is something to learn."""
    rng = random.Random(seed)
    samples = []
    for _ in range(count):
        tokens = [rng.randrange(vocab)]
        for _ in range(rng.randint(60, 200)):
            tokens.append((tokens[-1] * 5 + 7) % vocab if rng.random() < 0.8 else rng.randrange(vocab))
        samples.append(Sample(tokens, 1))
    total = sum(sample.trained for sample in samples)
    for sample in samples:
        sample.fields = {"weights": [1 / total] * sample.trained}
    return samples


def make_role(shape: dict[str, Any], training: dict[str, Any]) -> Role:
    config = RoleConfig.model_validate(
        {
            "model": {"family": "qwen3", "shape": shape, "tokenizer": "none"},
            "training": {"tokens_per_microbatch": 2048, "logprob_chunk": 512, **training},
            "optimizer": {"lr": 1e-3, "weight_decay": 0.0, "eps": 1e-6},
        }
    )
    layout = Layout.from_config("actor", config.layout, 1)
    sizes = shape_of(config.model, shape["vocab"])
    role = Role("actor", config, sizes, layout, layout.groups())
    load_hf_into(role.models, layout, sizes, random_weights(sizes, 1))
    return role


def mismatch(role: Role, *, fp8: bool) -> float:
    """p99 of |trainer - engine| over tokens that an embedded engine samples with the role's weights."""
    config = EngineConfig(dtype=role.config.training.dtype, quantization="fp8" if fp8 else "off")
    engine = EmbeddedEngine(hf_config(role.shape), config, platform.device())
    publisher = Publisher(role, [engine], fp8=fp8)
    publisher.publish(1)

    async def sample() -> list[Sample]:
        prompts = [tuple(s.tokens[:8]) for s in make_samples(PROMPTS, 3, role.shape.vocab)]
        requests = [
            Request(ids, SamplingParams(NEW, 1.0), seed=n, key=f"{n}") for n, ids in enumerate(prompts)
        ]
        done = await asyncio.gather(*(engine.complete(request) for request in requests))
        return [engine_sample(ids, completion) for ids, completion in zip(prompts, done, strict=True)]

    samples = asyncio.run(sample())
    publisher.close()
    engine.close()
    return parity_figures("actor", samples, role.logprobs(samples))["parity/actor_p99"]


def run_variant(given: dict[str, Any]) -> dict[str, Any]:
    """One precision in this process: its curves, log-probs before training, and mismatches."""
    torch.set_num_threads(1)
    init_world()
    shape, steps = given["shape"], given["steps"]
    role = make_role(shape, given["training"])
    fixed = make_samples(12, 5, shape["vocab"])
    logprobs = [value for row in role.logprobs(fixed) for value in row]
    gaps = [mismatch(role, fp8=fp8) for fp8 in (False, True)]
    role.begin_stage(None, steps)
    results = [
        role.train_step(make_samples(given["batch"], 100 + step, shape["vocab"]), make_sft_loss())
        for step in range(steps)
    ]
    close_world()
    return {
        "losses": [r.stats["loss"] for r in results],
        "norms": [r.stats["grad_norm"] for r in results],
        "logprobs": logprobs,
        "gaps": gaps,
    }


def mean_difference(found: list[float], wanted: list[float]) -> float:
    return sum(abs(x - y) for x, y in zip(found, wanted, strict=True)) / len(wanted)


def row_of(name: str, found: dict[str, Any], reference: dict[str, Any]) -> dict[str, Any]:
    """Differences from fp32, and mismatches with engines."""
    norms = reference["norms"]
    return {
        "precision": name,
        "first loss": round(found["losses"][0], 4),
        "last loss": round(found["losses"][-1], 4),
        "loss": round(mean_difference(found["losses"], reference["losses"]) / reference["losses"][0], 6),
        "grad norm": round(mean_difference(found["norms"], norms) / (sum(norms) / len(norms)), 5),
        "log-prob": round(mean_difference(found["logprobs"], reference["logprobs"]), 5),
        "engine p99": float(f"{found['gaps'][0]:.3g}"),
        "fp8 engine p99": float(f"{found['gaps'][1]:.3g}"),
    }


def goals(rows: list[dict[str, Any]]) -> list[str]:
    """Each figure beside its band; mismatches beside the alarms of a run."""
    alarms, lines = ObserveConfig(), []
    for row in rows:
        name = row["precision"]
        kind = name.split()[0].rstrip(",")
        for what, band in zip(("loss", "grad norm", "log-prob"), BANDS[kind], strict=True):
            lines.append(verdict(f"{name}: {what}, from fp32", row[what], band, at_least=False))
        plain = alarms.parity_alarm_fp8 if kind == "fp8" else alarms.parity_alarm
        lines.append(verdict(f"{name}: engine p99", row["engine p99"], plain, at_least=False))
        lines.append(
            verdict(f"{name}: fp8 engine p99", row["fp8 engine p99"], alarms.parity_alarm_fp8, at_least=False)
        )
    return lines


def main(arguments: list[str] | None = None) -> None:
    grammar = parser(__doc__)
    grammar.add_argument("--variant", help=argparse.SUPPRESS)
    grammar.add_argument("--steps", type=int, default=60)
    grammar.add_argument("--batch", type=int, default=48, help="sequences of a step")
    options = grammar.parse_args(arguments)
    if options.variant:
        print(json.dumps(run_variant(json.loads(options.variant))))
        return
    need_gpu(options.tiny)
    if options.tiny:
        options.steps, options.batch = 8, 8
    given = {"shape": TINY if options.tiny else SHAPE, "steps": options.steps, "batch": options.batch}
    rows: list[dict[str, Any]] = []
    reference: dict[str, Any] = {}
    curves: dict[str, Any] = {}
    for name, training in precisions(options.tiny).items():
        found = child("benchmarks.gpu.accuracy", given | {"training": training})
        reference = reference or found
        curves[name] = {"losses": found["losses"], "norms": found["norms"]}
        rows.append(row_of(name, found, reference))
    options.curves = json.dumps(curves)  # into the results' settings
    report("accuracy", options, rows, goals(rows))


if __name__ == "__main__":
    main()
