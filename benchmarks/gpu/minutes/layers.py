"""Transformer Engine's layers against torch's, and every FP8 recipe over some steps."""

from __future__ import annotations

from functools import partial
from typing import Any

from benchmarks.gpu.minutes.rows import Figures, Step
from genac_megatron.training.layout import init_world
from tests.gpu import gpu_cases as cases

FAMILIES = ("llama", "qwen2", "qwen3")
# Of SmolLM2-135M.
SMOL: dict[str, Any] = {
    "layers": 30, "hidden": 576, "ffn": 1536, "heads": 9, "kv_heads": 3, "head_dim": 64, "vocab": 49_152,
    "tie_embeddings": True, "rope_theta": 1e5, "norm_eps": 1e-5, "init_std": 0.04,
}  # fmt: skip
TINY_SMOL = SMOL | {
    "layers": 2, "hidden": 64, "ffn": 128, "heads": 4, "kv_heads": 2, "head_dim": 16, "vocab": 512,
}  # fmt: skip
RECIPES: dict[str, dict[str, Any]] = {
    "bf16": {},
    "tensorwise": {"fp8": "tensorwise"},
    "blockwise": {"fp8": "blockwise"},
    "delayed": {"fp8": "delayed"},
    "tensorwise, parameters in FP8": {"fp8": "tensorwise", "fp8_param": True},
    "blockwise, parameters in FP8": {"fp8": "blockwise", "fp8_param": True},
}


def smol(tiny: bool) -> dict[str, Any]:
    return TINY_SMOL if tiny else SMOL


def parity(step: Step) -> bool:
    """BF16 log-probs of packed sequences against fp32 with torch's layers; three steps of a real shape."""
    kinds = ("torch",) if step.tiny else ("torch", "te")
    families = [(family, partial(family_parity, family, kinds)) for family in FAMILIES]
    return step.each([*families, ("SmolLM2's shape, 3 steps", partial(real_shape, kinds, step.tiny))])


def family_parity(family: str, kinds: tuple[str, ...]) -> Figures:
    init_world()
    wanted = cases.flat_logprobs(cases.make_role(family, dtype="fp32", specs="torch"))
    figures: Figures = {"tokens": len(wanted)}
    for kind in kinds:
        found = cases.flat_logprobs(cases.make_role(family, dtype="bf16", specs=kind))
        figures[f"bf16_{kind}_mean"] = round(cases.mean(found, wanted), 6)
        figures[f"bf16_{kind}_largest"] = round(cases.largest(found, wanted), 5)
    return figures


def real_shape(kinds: tuple[str, ...], tiny: bool) -> Figures:
    """Forward, backward and optimizer of 30 layers, by both kinds of layers."""
    init_world()
    figures: Figures = {}
    for kind in kinds:
        losses, norms = cases.curve(3, dtype="bf16", specs=kind, sizes=smol(tiny))
        figures[kind] = {"loss": [round(x, 5) for x in losses], "norm": [round(x, 5) for x in norms]}
    return figures


def fp8(step: Step) -> bool:
    """Curves of each recipe from fp32's (bands: benchmarks/gpu/accuracy.py)."""
    steps = 2 if step.tiny else 20
    reference: dict[str, Any] = {}
    recipes = {"bf16": {}} if step.tiny else RECIPES
    specs = "torch" if step.tiny else "te"
    given = {name: {"dtype": "bf16", "specs": specs, **more} for name, more in recipes.items()}
    return step.each([(name, partial(from_fp32, reference, steps, g)) for name, g in given.items()])


def from_fp32(reference: dict[str, Any], steps: int, training: dict[str, Any]) -> Figures:
    init_world()
    plain = {"dtype": "fp32", "specs": "torch"}
    if not reference:
        reference["curve"] = cases.curve(steps, **plain)
        reference["logprobs"] = cases.flat_logprobs(cases.make_role(**plain))
    losses, norms = cases.curve(steps, **training)
    wanted, wanted_norms = reference["curve"]
    found = cases.flat_logprobs(cases.make_role(**training))
    return {
        "loss_from_fp32": round(cases.mean(losses, wanted) / wanted[0], 6),
        "norm_from_fp32": round(cases.mean(norms, wanted_norms) * steps / sum(wanted_norms), 5),
        "logp_from_fp32": round(cases.mean(found, reference["logprobs"]), 5),
        "first": round(losses[0], 4),
        "last": round(losses[-1], 4),
    }
