"""Weights in blocks of FP8: every element as the formula says, cut and whole alike, buckets without gaps."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from genac_megatron.models import quantize as module
from genac_megatron.models.blockwise import BLOCK, in_blocks, scale_name, scale_size
from genac_megatron.models.families.base import Shape
from genac_megatron.models.mapping import shard, unshard
from genac_megatron.models.quantize import FP8, dequantize, quantize
from genac_megatron.models.registry import rules
from genac_megatron.models.sizes import cut_between_blocks, hf_names
from genac_megatron.publication.plan import Bucket, make_plan
from genac_megatron.publication.transport import named, view_of
from genac_megatron.serving.sglang.by_value import metadata
from genac_megatron.training.layout import Layout

SIDES = st.integers(1, 300)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16])
# All finite numbers of float8_e4m3fn: sign, 4 bits of exponent (bias 7), 3 of mantissa; 0x7f is NaN.
E4M3 = sorted(
    {
        sign * (mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))
        for sign in (1, -1)
        for exponent in range(16)
        for mantissa in range(8)
        if (exponent, mantissa) != (15, 7)
    }
)


def weight_of(rows: int, columns: int, seed: int, spread: int, dtype: torch.dtype) -> Tensor:
    """Random numbers whose magnitudes differ by up to 2^spread between blocks and elements."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, columns, generator=generator)
    powers = torch.randint(-spread, spread + 1, (rows, columns), generator=generator)
    return torch.ldexp(values, powers).to(dtype)


def nearest(x: float) -> float:
    """Of the two nearest e4m3 numbers the nearer one; between two alike, that of the even mantissa."""
    import bisect

    at = bisect.bisect_left(E4M3, x)
    low, high = E4M3[max(0, at - 1)], E4M3[min(at, len(E4M3) - 1)]
    if abs(x - low) != abs(high - x):
        return low if abs(x - low) < abs(high - x) else high
    return low if E4M3.index(low) % 2 == E4M3.index(0.0) % 2 else high


def by_the_formula(weight: Tensor) -> tuple[list[list[float]], list[list[float]]]:
    """q and s of every block, one element at a time, in Python's floats."""
    rows, columns = weight.shape
    down, across = scale_size((rows, columns))
    values = weight.double().tolist()
    scales = [[1.0] * across for _ in range(down)]
    for i in range(down):
        for j in range(across):
            block = [
                abs(values[r][c])
                for r in range(i * BLOCK, min(rows, (i + 1) * BLOCK))
                for c in range(j * BLOCK, min(columns, (j + 1) * BLOCK))
            ]
            if max(block):
                scales[i][j] = 2.0 ** math.ceil(math.log2(max(block) / 448))
    rounded = [
        [nearest(values[r][c] / scales[r // BLOCK][c // BLOCK]) for c in range(columns)] for r in range(rows)
    ]
    return rounded, scales


@settings(max_examples=12, deadline=None)
@given(
    rows=SIDES, columns=st.integers(1, 140), seed=st.integers(0, 99), spread=st.integers(0, 12), dtype=DTYPES
)
def test_every_element_is_what_the_formula_says(
    rows: int, columns: int, seed: int, spread: int, dtype: torch.dtype
) -> None:
    weight = weight_of(rows, columns, seed, spread, dtype)
    quantized, scales = quantize(weight)
    wanted, wanted_scales = by_the_formula(weight)
    assert (quantized.dtype, scales.dtype) == (FP8, torch.float32)
    assert scales.tolist() == wanted_scales
    assert torch.equal(quantized.double(), torch.tensor(wanted, dtype=torch.float64))


@settings(max_examples=60, deadline=None)
@given(rows=SIDES, columns=SIDES, seed=st.integers(0, 99), spread=st.integers(0, 20), dtype=DTYPES)
def test_served_weights_are_within_the_stated_bound(
    rows: int, columns: int, seed: int, spread: int, dtype: torch.dtype
) -> None:
    """|w - q s| <= max(|w| / 16, s / 1024): half a step of 3 bits of mantissa, and of numbers below 2^-6."""
    weight = weight_of(rows, columns, seed, spread, dtype)
    quantized, scales = quantize(weight)
    served = dequantize(quantized, scales, torch.float32)
    spread_scales = scales.repeat_interleave(BLOCK, 0)[:rows].repeat_interleave(BLOCK, 1)[:, :columns]
    bound = torch.maximum(weight.float().abs() / 16, spread_scales / 1024)
    assert bool(((weight.float() - served).abs() <= bound).all())
    assert torch.equal(dequantize(quantized, scales, torch.bfloat16).float(), served), "exact in bf16"
    again = quantize(served)
    assert torch.equal(dequantize(*again, torch.float32), served), "found again"


@settings(max_examples=30, deadline=None)
@given(
    down=st.integers(1, 4),
    across=st.integers(1, 4),
    parts=st.sampled_from([1, 2, 4]),
    axis=st.sampled_from([0, 1]),
    seed=st.integers(0, 99),
    dtype=DTYPES,
)
def test_cut_weights_are_quantized_like_the_whole(
    down: int, across: int, parts: int, axis: int, seed: int, dtype: torch.dtype
) -> None:
    """An engine rank's part, cut between blocks, has the whole's blocks: so it matters not who quantizes."""
    sides = [down * BLOCK, across * BLOCK]
    sides[axis] *= parts
    weight = weight_of(sides[0], sides[1], seed, 6, dtype)
    quantized, scales = quantize(weight)
    for index, part in enumerate(weight.chunk(parts, axis)):
        mine, its = quantize(part)
        assert torch.equal(mine.view(torch.uint8), quantized.view(torch.uint8).chunk(parts, axis)[index])
        assert torch.equal(its, scales.chunk(parts, axis)[index])


def test_the_work_in_parts_is_the_work_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = weight_of(700, 200, 1, 6, torch.bfloat16)
    whole = quantize(weight)
    served = dequantize(*whole, torch.bfloat16)
    monkeypatch.setattr(module, "ELEMENTS_AT_ONCE", 2 * BLOCK * 200)
    parts = quantize(weight)
    assert torch.equal(parts[0].view(torch.uint8), whole[0].view(torch.uint8))
    assert torch.equal(parts[1], whole[1])
    assert torch.equal(dequantize(*parts, torch.bfloat16), served)


@pytest.mark.parametrize("largest", [448.0, 224.0, 1.0, 449.0, 2.0**-120, 3e38, 1e-44])
def test_blocks_at_the_edges_of_the_range(largest: float) -> None:
    weight = torch.full((2, 2), largest)
    weight[0, 0] = -largest
    quantized, scales = quantize(weight)
    served = dequantize(quantized, scales, torch.float32)
    assert bool(served.isfinite().all())
    if largest > 2.0**-110:
        assert torch.allclose(served, weight, rtol=1 / 16, atol=0)
    assert float(quantized.float().abs().max()) <= 448
    assert math.log2(float(scales)).is_integer()


def test_zeros_stay_zeros_and_what_is_not_finite_is_not_hidden() -> None:
    quantized, scales = quantize(torch.zeros(130, 3))
    assert float(quantized.float().abs().sum()) == 0
    assert scales.tolist() == [[1.0], [1.0]]
    for bad in (math.nan, math.inf):
        weight = torch.ones(130, 3)
        weight[129, 0] = bad
        served = dequantize(*quantize(weight), torch.float32)
        assert bool(served[128:].isnan().all())
        assert bool(served[:128].isfinite().all())


# --- buckets ------------------------------------------------------------------------------------------

SHAPE = Shape(
    family="qwen2", layers=2, hidden=256, ffn=384, heads=4, kv_heads=2, head_dim=64, vocab=70, tie=False,
    rope_theta=1e4, norm_eps=1e-6, max_positions=64, init_std=0.02, qkv_bias=True,
)  # fmt: skip
EXPERTS = dataclasses.replace(
    SHAPE, family="qwen3_moe", qkv_bias=False, qk_norm=True, experts=4, experts_per_token=2, expert_ffn=128,
    norm_topk=True,
)  # fmt: skip


def filled(bucket: Bucket, weights: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
    """The bucket's bytes as a publication makes them."""
    flat = torch.zeros(bucket.nbytes(dtype.itemsize), dtype=torch.uint8)
    places = bucket.places(dtype)
    for item in bucket.items:
        for name, _ in item.hf:
            if in_blocks(name):
                quantize(weights[name], view_of(flat, places[name]), view_of(flat, places[scale_name(name)]))
            else:
                view_of(flat, places[name]).copy_(weights[name])
    return flat


def weights_of(shape: Shape, dtype: torch.dtype) -> dict[str, Tensor]:
    return {
        name: weight_of(size[0], math.prod(size[1:]), index, 2, dtype).view(size)
        for index, (name, size) in enumerate(hf_names(shape).items())
    }


@pytest.mark.parametrize("shape", [SHAPE, EXPERTS], ids=["dense", "experts"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_buckets_hold_everything_once_without_gaps(shape: Shape, dtype: torch.dtype) -> None:
    plan = make_plan(shape, Layout("role", 0, 2, pp=2), dtype.itemsize, 500_000, fp8=True)
    assert len(plan) > 2
    seen: dict[str, Any] = {}
    for bucket in plan:
        at = 0
        assert bucket.nbytes(dtype.itemsize) <= 500_000
        for name, place in bucket.places(dtype).items():
            assert place.start == at, "no gap"
            assert at % place.dtype.itemsize == 0, "aligned"
            at += math.prod(place.size) * place.dtype.itemsize
            seen[name] = place
        assert at == bucket.nbytes(dtype.itemsize)
        sent = {entry.name: entry for entry in metadata(bucket.tensors, bucket.dtypes(dtype))}
        assert {name: entry.start_idx for name, entry in sent.items()} == {
            name: place.start for name, place in bucket.places(dtype).items()
        }
    names = hf_names(shape)
    assert set(seen) == set(names) | {scale_name(name) for name in names if in_blocks(name)}
    for name, size in names.items():
        assert seen[name].size == size
        assert seen[name].dtype == (FP8 if in_blocks(name) else dtype)
    assert not any(
        in_blocks(n) for n in names if "norm" in n or "embed" in n or "gate.weight" in n or "bias" in n
    )
    plain = sum(bucket.numel * dtype.itemsize for bucket in plan)
    print("bytes, of plain:", sum(bucket.nbytes(dtype.itemsize) for bucket in plan) / plain)


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_shards_are_said_to_end_between_blocks_where_theirs_are_the_wholes(tp: int) -> None:
    """Beside the outcome: a shard quantized by itself has the scales of its rows or columns of the whole."""
    wide = dataclasses.replace(SHAPE, heads=16, kv_heads=4, ffn=512)  # keys: 256 rows, 64 to a head
    weights, said = weights_of(wide, torch.bfloat16), {}
    for rule in rules(wide):
        if rule.tp_axis is None or not in_blocks(rule.hf[0]):
            continue
        held = [weights[name] for name in rule.hf_names(0)]
        whole = {name: quantize(weights[name])[1] for name in rule.hf_names(0)}
        said[rule.name.split(".")[-2]] = cut_between_blocks(rule, wide, tp)
        if not said[rule.name.split(".")[-2]]:
            continue
        for rank in range(tp):
            for name, part in unshard(rule, [shard(rule, held, wide, rank, tp)], wide, 0).items():
                assert torch.equal(quantize(part)[1], whole[name].chunk(tp, rule.tp_axis)[rank]), name
    # Keys: 256 / tp rows, and no group is cut; o_proj: 1,024 / tp columns; feed-forward: 512 / tp.
    assert said == {
        "linear_qkv": tp <= 2,
        "linear_proj": True,
        "linear_fc1": tp <= 4,
        "linear_fc2": tp <= 4,
    }


def test_what_arrives_is_the_dequantized_weight() -> None:
    weights = weights_of(SHAPE, torch.bfloat16)
    arrived = {}
    for bucket in make_plan(SHAPE, Layout("role", 0, 1), 2, 600_000, fp8=True):
        arrived |= dict(named(bucket, filled(bucket, weights, torch.bfloat16), torch.bfloat16))
    assert set(arrived) == set(weights)
    for name, tensor in weights.items():
        served = dequantize(*quantize(tensor), torch.bfloat16) if in_blocks(name) else tensor
        assert torch.equal(arrived[name], served), name
        assert torch.equal(arrived[name], tensor) != in_blocks(name), name


def test_a_plain_publication_is_as_it_was() -> None:
    for bucket in make_plan(SHAPE, Layout("role", 0, 1), 2):
        assert bucket.nbytes(2) == 2 * bucket.numel
        assert [name for name, _ in bucket.tensors] == [n for item in bucket.items for n, _ in item.hf]
        assert set(bucket.dtypes(torch.bfloat16)) == {torch.bfloat16}
