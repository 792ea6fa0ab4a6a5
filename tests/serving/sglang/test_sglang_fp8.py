"""Weights in FP8 in SGLang's own model code: names, sizes and bytes are what it expects, and what it holds
is what the trainer says it must. Its kernels need a GPU: tests/gpu."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from genac_megatron.models.blockwise import in_blocks, scale_name, served_config
from genac_megatron.models.families.base import Shape
from genac_megatron.models.mapping import random_weights
from genac_megatron.models.quantize import quantize
from genac_megatron.models.registry import hf_config, shape_of
from genac_megatron.platform.network import spare_ports
from genac_megatron.publication.checksum import RankSums, differences, unpublished
from genac_megatron.publication.plan import Bucket, make_plan
from genac_megatron.publication.transport import elements, view_of
from genac_megatron.recipe.schema import ModelConfig
from genac_megatron.serving.sglang.by_value import by_value
from genac_megatron.serving.sglang.server import ServerSpec
from genac_megatron.training.layout import Layout
from tests.serving.zygote import AskingZygote

FOLDER = Path(__file__).parent
RANK = """
import sys
sys.path.insert(0, given["folder"])
import fp8_model
found = fp8_model.held(given["rank"], given["job"])
"""
SIZES: dict[str, Any] = {
    "layers": 2, "hidden": 256, "ffn": 512, "heads": 8, "kv_heads": 4, "head_dim": 64, "vocab": 130,
}  # fmt: skip
EXPERTS = {"experts": 4, "experts_per_token": 2, "expert_ffn": 256, "norm_topk": True}
CASES = [("qwen3", 1), ("qwen3_moe", 2)]
MORE = [("qwen2", 2), ("qwen3_moe", 1)]


def filled(bucket: Bucket, weights: Any) -> torch.Tensor:
    """The bucket's bytes, as a publication joins them."""
    flat = torch.zeros(bucket.nbytes(2), dtype=torch.uint8)
    places = bucket.places(torch.bfloat16)
    for item in bucket.items:
        for name, _ in item.hf:
            mine, tensor = view_of(flat, places[name]), weights(name).to(torch.bfloat16)
            if in_blocks(name):
                quantize(tensor, mine, view_of(flat, places[scale_name(name)]))
            else:
                mine.copy_(tensor)
    return flat


def model_of(family: str, folder: Path) -> tuple[Shape, list[Bucket], list[torch.Tensor]]:
    """Its folder, the buckets of a publication of random weights, and their bytes."""
    more = EXPERTS if family.endswith("moe") else {}
    given = {"family": family, "shape": SIZES | more | {"tie_embeddings": False}}
    shape = shape_of(ModelConfig.model_validate(given), SIZES["vocab"])
    folder.mkdir()
    config = served_config(hf_config(shape), "fp8")
    (folder / "config.json").write_text(json.dumps(config))
    plan = make_plan(shape, Layout("actor", 0, 1), 2, 600_000, fp8=True)
    weights = random_weights(shape, 7)
    flats = [filled(bucket, weights) for bucket in plan]
    lines = [
        by_value(flat, bucket.tensors, bucket.dtypes(torch.bfloat16))
        for bucket, flat in zip(plan, flats, strict=True)
    ]
    (folder / "payloads").write_text("\n".join(lines) + "\n")
    return shape, plan, flats


def said_by(zygote: AskingZygote, folder: Path, tp: int) -> list[dict[str, Any]]:
    """What every rank of an engine of `tp` says that got the folder's payloads."""
    ports = spare_ports(2)
    spec = ServerSpec("fp8/0", folder, ports[0], dtype="bf16", tp=tp, max_tokens=4096)
    job = {"tp": tp, "port": ports[1], "payloads": str(folder / "payloads"), "arguments": spec.arguments()}
    given = [{"rank": rank, "job": job, "folder": str(FOLDER)} for rank in range(tp)]
    return zygote.ask_all(RANK, given, spec.environment())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "tp"), [*CASES, *(pytest.param(*case, marks=pytest.mark.extended) for case in MORE)]
)
def test_sglangs_model_holds_what_was_published(
    family: str, tp: int, zygote: AskingZygote, tmp_path: Path
) -> None:
    folder = tmp_path / family
    shape, plan, flats = model_of(family, folder)
    said = said_by(zygote, folder, tp)
    assert len(said) == tp
    for rank, got in enumerate(said):
        wanted = RankSums(shape, tp, rank, "cpu")
        for bucket, flat in zip(plan, flats, strict=True):
            wanted.add(bucket, elements(bucket, flat, torch.bfloat16))
        assert differences(wanted.sums, got["sums"]) == []
        assert unpublished(wanted.sums, got["sums"]) == []
        quantized = {name for name, (dtype, _) in got["held"].items() if dtype == "torch.float8_e4m3fn"}
        layers = [f"model.layers.{n}." for n in range(SIZES["layers"])]
        mlp = ("mlp.experts.w13_weight", "mlp.experts.w2_weight") if shape.experts else (
            "mlp.gate_up_proj.weight", "mlp.down_proj.weight",
        )  # fmt: skip
        names = ("self_attn.qkv_proj.weight", "self_attn.o_proj.weight", *mlp)
        assert quantized == {layer + name for layer in layers for name in names}
        for name in quantized:
            assert got["held"][name.replace("weight", "weight_scale_inv")][0] == "torch.float32"
        # Where this fails, SGLang serves FP8 on a CPU: take serving_refusal(None) out, test a real server.
        assert "AMX" in got["refused"] or shape.experts, got["refused"]
        assert got["refused"]


def test_sglangs_llama_still_loses_the_scales(zygote: AskingZygote, tmp_path: Path) -> None:
    """Where this fails, SGLang loads them: let check_quantization (recipe/precision.py) pass Llama."""
    shape, plan, flats = model_of("llama", tmp_path / "llama")
    (got,) = said_by(zygote, tmp_path / "llama", 1)
    wanted = RankSums(shape, 1, 0, "cpu")
    for bucket, flat in zip(plan, flats, strict=True):
        wanted.add(bucket, elements(bucket, flat, torch.bfloat16))
    assert len(differences(wanted.sums, got["sums"])) == 4 * SIZES["layers"]
