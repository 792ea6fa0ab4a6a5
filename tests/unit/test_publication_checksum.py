"""What engine ranks must hold: slices that cover every tensor, and hashes that any change would change."""

from __future__ import annotations

import dataclasses
import hashlib
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from genac_megatron.models.families.base import Shape
from genac_megatron.models.registry import family
from genac_megatron.publication.checksum import (
    DeviceHash,
    Hash,
    HostHash,
    RankSums,
    Sums,
    differences,
    engine_parameter,
    unpublished,
)
from genac_megatron.publication.plan import Bucket, Item, make_plan
from genac_megatron.training.layout import Layout

BASE = Shape(
    family="qwen3", layers=1, hidden=8, ffn=8, heads=4, kv_heads=2, head_dim=2, vocab=70, tie=False,
    rope_theta=1e4, norm_eps=1e-6, max_positions=64, init_std=0.02, qk_norm=True,
)  # fmt: skip


NAMES = ["llama", "qwen2", "qwen3"]


def shape_of(name: str, **changes: object) -> Shape:
    kind = family(name)
    return dataclasses.replace(
        BASE,
        family=name,
        qk_norm=kind.qk_norm,
        qkv_bias=kind.qkv_bias,
        **changes,  # type: ignore[arg-type]
    )


def items(shape: Shape) -> list[Item]:
    return [item for bucket in make_plan(shape, Layout("role", 0, 1), 4) for item in bucket.items]


def tensors_of(item: Item) -> list[torch.Tensor]:
    return [torch.randn(size) for _, size in item.hf]


def rank_sums(plan: list[Bucket], flats: list[torch.Tensor], shape: Shape, tp: int, kind: str) -> list[Sums]:
    """Of every rank, bucket by bucket."""
    ranks = [RankSums(shape, tp, rank, kind) for rank in range(tp)]
    for bucket, flat in zip(plan, flats, strict=True):
        for rank in ranks:
            rank.add(bucket, flat)
    return [rank.sums for rank in ranks]


def hashed(made: Hash, *parts: torch.Tensor) -> str:
    for part in parts:
        made.update(part)
    return made.hexdigest()


def on_device(*parts: torch.Tensor) -> str:
    """As of one tensor that comes in parts."""
    return hashed(DeviceHash(sum(part.nbytes for part in parts)), *parts)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_ranks_together_hold_every_tensor(name: str, tp: int) -> None:
    """Two key-value heads over four ranks: each is held twice."""
    shape = shape_of(name)
    for item in items(shape):
        tensors = tensors_of(item)
        parts = [engine_parameter(item, tensors, shape, tp, rank, "cuda") for rank in range(tp)]
        assert len({part[0] for part in parts}) == 1
        engine_name, held = parts[0][0], [part[1] for part in parts]
        if item.rule.fuse == "qkv":
            assert ".qkv_proj." in engine_name
            copies = max(1, tp // shape.kv_heads)
            rows = [shape.q_size // tp, *[shape.kv_size * copies // tp] * 2]
            for index, tensor in enumerate(tensors):
                pieces = [part.split(rows)[index] for part in held]
                assert torch.equal(torch.cat(pieces[:: copies if index else 1]), tensor)
        elif item.rule.fuse == "gate_up":
            assert ".gate_up_proj." in engine_name
            for index, tensor in enumerate(tensors):
                assert torch.equal(torch.cat([part.chunk(2)[index] for part in held]), tensor)
        elif item.rule.padded:
            whole = torch.cat(held)
            assert torch.equal(whole[: shape.vocab], tensors[0])
            assert whole.size(0) == 128
            assert not whole[shape.vocab :].any()
        elif item.rule.tp_axis is None:
            assert all(torch.equal(part, tensors[0]) for part in held)
        else:
            assert torch.equal(torch.cat(held, dim=item.rule.tp_axis), tensors[0])


def test_a_vocabulary_whose_padding_no_tp_divides() -> None:
    """70 rows pad to 128, which three ranks do not divide: SGLang then pads to a multiple of 192."""
    shape = shape_of("llama", heads=3, kv_heads=3, head_dim=2, hidden=6, ffn=6)
    embedding = next(item for item in items(shape) if item.rule.padded)
    given = tensors_of(embedding)
    parts = [engine_parameter(embedding, given, shape, 3, rank, "cuda")[1] for rank in range(3)]
    assert [part.size(0) for part in parts] == [64, 64, 64]


@settings(max_examples=30, deadline=None)
@given(st.data(), st.sampled_from(NAMES), st.sampled_from([1, 2]))
def test_any_changed_element_changes_the_sum_of_its_tensor(data: st.DataObject, name: str, tp: int) -> None:
    shape = shape_of(name, vocab=9)
    bucket = make_plan(shape, Layout("role", 0, 1), 4)[0]
    flat = torch.randn(bucket.numel)
    before = rank_sums([bucket], [flat], shape, tp, "cpu")
    at = data.draw(st.integers(0, bucket.numel - 1))
    flat[at] += 1
    after = rank_sums([bucket], [flat], shape, tp, "cpu")
    changed = {name for x, y in zip(before, after, strict=True) for name in differences(x, y)}
    assert len(changed) == 1


def test_a_tensor_that_an_engine_lacks_differs() -> None:
    assert differences({"a": "1", "b": "2"}, {"b": "2", "c": "3"}) == ["a"]


def test_weights_that_nobody_brings_are_told_and_what_is_computed_is_not() -> None:
    held = {"a.weight": "1", "lm_head.weight": "2", "rotary.cache": "3", "mlp.experts.w2_weight": "4"}
    assert unpublished({"a.weight": "0"}, held) == ["lm_head.weight", "mlp.experts.w2_weight"]


def test_the_hash_of_host_memory() -> None:
    tensor = torch.arange(6, dtype=torch.float32).view(2, 3)
    assert hashed(HostHash(), tensor) == hashlib.sha256(struct.pack("<6f", *range(6))).hexdigest()[:16]
    assert hashed(HostHash(), tensor.T) == hashed(HostHash(), tensor.T.contiguous())


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("bucket_bytes", [None, 1600], ids=["one-bucket", "experts-over-buckets"])
def test_a_layers_experts_are_one_parameter(kind: str, tp: int, bucket_bytes: int | None) -> None:
    """Against a stack made by hand: expert, then gate above up (a rank's rows of each), or down's columns."""
    kinds = {"experts": 3, "experts_per_token": 2, "expert_ffn": 6, "norm_topk": True}
    shape = shape_of("qwen3_moe", vocab=9, **kinds)
    plan = make_plan(shape, Layout("role", 0, 1), 4, bucket_bytes)
    flats = [torch.randn(bucket.numel) for bucket in plan]
    named: dict[str, torch.Tensor] = {}
    for bucket, flat in zip(plan, flats, strict=True):
        sizes = [torch.Size(size) for _, size in bucket.tensors]
        parts = flat.split([size.numel() for size in sizes])
        names = [name for name, _ in bucket.tensors]
        named |= {n: part.view(size) for n, part, size in zip(names, parts, sizes, strict=True)}
    for rank, sums in enumerate(rank_sums(plan, flats, shape, tp, kind)):
        experts = "model.layers.0.mlp.experts."
        width = 6 if kind == "cuda" else 32 * tp  # 6 rows are padded to 32 of each rank by a CPU server
        rows = slice(rank * width // tp, (rank + 1) * width // tp)

        def part(name: str, rows: slice = rows, width: int = width) -> torch.Tensor:
            whole = torch.zeros(width, 8)
            whole[:6] = named[name].T if "down" in name else named[name]
            return whole[rows]

        up = [torch.cat([part(f"{experts}{n}.{x}_proj.weight") for x in ("gate", "up")]) for n in range(3)]
        down = [part(f"{experts}{n}.down_proj.weight").T for n in range(3)]
        for name, stacked in (("w13_weight", torch.stack(up)), ("w2_weight", torch.stack(down))):
            wanted = hashed(HostHash(), stacked) if kind == "cpu" else on_device(stacked)
            assert sums[experts + name] == wanted
        assert not [name for name in sums if ".experts.0." in name]
        assert "model.layers.0.mlp.gate.weight" in sums


def slow_gpu_hash(words: list[int]) -> str:
    """The same hash, word by word in Python's integers."""
    m32, m64 = (1 << 32) - 1, (1 << 64) - 1

    def rotl(x: int, r: int) -> int:
        return (x << r | x >> (32 - r)) & m32

    def fmix(x: int) -> int:
        x ^= x >> 16
        x = x * 0x85EBCA6B & m32
        x ^= x >> 13
        x = x * 0xC2B2AE35 & m32
        return x ^ x >> 16

    seeds = 0x243F6A88, (0x243F6A88 * 0x9E3779B1 ^ 0xDEADBEEF) & m32
    total = 0
    for start in range(0, len(words), 8192):
        h = [0, 0]
        for i in range(start, min(start + 8192, len(words))):
            p = (
                ((i * 0x27D4EB2D + seeds[0]) & m32) ^ rotl(i, 15),
                ((i * 0x165667B1 + seeds[1]) & m32) ^ rotl(i, 13),
            )
            h = [(h[k] + fmix(words[i] ^ p[k])) & m32 for k in range(2)]
        h = [fmix(x ^ (len(words) * 4 & m32)) for x in h]
        total = (total + (h[0] << 32 | h[1])) & m64
    x = total
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & m64
    x = (x ^ x >> 27) * 0x94D049BB133111EB & m64
    return f"{x ^ x >> 31:016x}"


@pytest.mark.parametrize("count", [0, 1, 8191, 8192, 8193, 20_000])
def test_the_hash_of_device_memory(count: int) -> None:
    words = torch.randint(-(2**31), 2**31 - 1, (count,), dtype=torch.int32)
    wanted = slow_gpu_hash([int(x) & 0xFFFFFFFF for x in words]) if count else f"{0:016x}"
    assert on_device(words) == wanted
    assert on_device(*words.split(5000)) == wanted
    assert on_device(*words.view(torch.int16).split(4099)) == wanted


def test_the_hash_of_device_memory_pads_half_words() -> None:
    odd = torch.arange(5, dtype=torch.bfloat16)
    padded = torch.cat([odd, torch.zeros(1, dtype=torch.bfloat16)])
    assert on_device(odd) == on_device(padded)
