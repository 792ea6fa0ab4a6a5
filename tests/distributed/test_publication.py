"""Publication: from any training layout, every engine holds the trainer's weights and says what it says."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.distributed.cases import SEED, make_role, published, role_config, train

# fp32 on both sides, but other kernels and other orders of sums: measured below 1e-6 at log-probs of about 4.
FP32 = 1e-5
# bf16 keeps 8 bits of every activation, and layouts round their sums in other places: logits of about 4 move
# by some 2^-7; measured below 0.022.
BF16 = 0.06
WEIGHT = 2e-5  # test_role.py: one layout's fp32 training against another's
TEMPERATURE = 0.8
BUCKET = 1 << 14  # bytes: the largest fp32 parameter (gate and up) just fits

LAYOUTS: dict[str, dict[str, Any]] = {
    "tp1": {"count": 1},
    "tp2": {"count": 2, "tp": 2},
    "tp2-no-sp": {"count": 2, "tp": 2, "sequence_parallel": False},
    "pp2": {"count": 2, "pp": 2},
    "pp2-vpp2": {"count": 2, "pp": 2, "vpp": 2},
    "tp2-pp2": {"count": 4, "tp": 2, "pp": 2},
    "dp2": {"count": 2},
    "tp2-dp2": {"count": 4, "tp": 2},
    "tp2-offset": {"first_rank": 2, "count": 2, "tp": 2},
}
PROMPTS = [(3, 1, 4, 1, 5), (9, 2, 6), (5, 3, 5, 8, 9, 7, 9)]


class Calls:
    """A sink that keeps every call: version, tensors, whether it was the last."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, list[tuple[str, Tensor]], bool]] = []

    def load_weights(
        self, version: int, tensors: Iterable[tuple[str, Tensor]], *, final: bool = True
    ) -> None:
        self.calls.append((version, [(name, tensor.clone()) for name, tensor in tensors], final))

    @property
    def named(self) -> list[tuple[str, Tensor]]:
        return [pair for _, tensors, _ in self.calls for pair in tensors]


def complete(engine: Any, temperature: float, stop: tuple[int, ...] = ()) -> Any:
    """Eight tokens after each prompt."""
    from genac_megatron.records import Request, SamplingParams

    async def run() -> Any:
        params = SamplingParams(8, temperature, stop)
        requests = [Request(ids, params, seed=7 + i, key=f"{i}") for i, ids in enumerate(PROMPTS)]
        return await asyncio.gather(*(engine.complete(request) for request in requests))

    return asyncio.run(run())


def gap(role: Any, completions: Any, temperature: float) -> float:
    """Largest |trainer - engine| over the log-probs of what the engine sampled. Collective."""
    from genac_megatron.records import Sample

    samples = [Sample([*p, *c.ids], len(p)) for p, c in zip(PROMPTS, completions, strict=True)]
    trainer = role.logprobs(samples, temperature=temperature)
    pairs = zip(trainer, (c.logprobs for c in completions), strict=True)
    return max(abs(a - b) for mine, theirs in pairs for a, b in zip(mine, theirs, strict=True))


def behind_best(role: Any, completions: Any) -> float:
    """How far, by the trainer, the greedy first token is behind the best of the vocabulary. Collective."""
    from genac_megatron.records import Sample

    vocab = role.shape.vocab
    samples = [Sample([*PROMPTS[0], token], len(PROMPTS[0])) for token in range(vocab)]
    flat = [row[0] for row in role.logprobs(samples)]
    return max(flat) - flat[completions[0].ids[0]]


def digest(named: Iterable[tuple[str, Tensor]]) -> str:
    sha = hashlib.sha256()
    for name, tensor in sorted(named, key=lambda pair: pair[0]):
        sha.update(name.encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def engine_of(shape: Any, dtype: str) -> Any:
    from genac_megatron.models.registry import hf_config
    from genac_megatron.recipe.schema import EngineConfig
    from genac_megatron.serving.embedded import EmbeddedEngine

    return EmbeddedEngine(hf_config(shape), EngineConfig(dtype=dtype))


_direct: dict[tuple[bool, str], Any] = {}  # on this rank


def said_directly(shape: Any, dtype: str, reference: dict[str, Tensor]) -> Any:
    """What an engine says that was given the weights themselves; no layout has a part in it."""
    key = (shape.tie, dtype)
    if key not in _direct:
        direct = engine_of(shape, dtype)
        direct.load_weights(1, reference.items())
        _direct[key] = complete(direct, 0.0), complete(direct, TEMPERATURE)
    return _direct[key]


def publish_case(rank: int, config: Any) -> dict[str, Any]:
    """Random weights to this rank's engine, a training step, and the new weights."""
    from genac_megatron.dtypes import DTYPES
    from genac_megatron.models.mapping import random_weights
    from genac_megatron.models.sizes import hf_names
    from genac_megatron.publication.publisher import Publisher

    role = make_role("actor", config, torch.distributed.get_world_size())
    role.begin_stage(None, 10)
    dtype = DTYPES[config.training.dtype]
    get = random_weights(role.shape, SEED)
    reference = {name: get(name).to(dtype) for name in hf_names(role.shape)}
    engine = engine_of(role.shape, config.training.dtype)

    calls = Calls()
    publisher = Publisher(role, [engine, calls], BUCKET)
    stats = publisher.publish(1)
    greedy, sampled = complete(engine, 0.0), complete(engine, TEMPERATURE)
    got = {
        "names": sorted(name for name, _ in calls.named) == sorted(reference),
        "bits": digest(calls.named) == digest(reference.items()),
        "bytes": stats["bytes"] == sum(t.numel() * t.element_size() for t in reference.values()),
        "largest": max(sum(t.nbytes for _, t in tensors) for _, tensors, _ in calls.calls),
        "buckets": len(calls.calls),
        "finals": [final for _, _, final in calls.calls],
        "same_as_direct": (greedy, sampled) == said_directly(role.shape, config.training.dtype, reference),
        "greedy": [c.ids for c in greedy],
        "behind": behind_best(role, greedy),
        "gap": max(gap(role, greedy, 1.0), gap(role, sampled, TEMPERATURE)),
        "versions": {c.version for c in greedy},
    }
    train(role, 1)
    calls.calls.clear()
    stats = publisher.publish(2)
    after = complete(engine, TEMPERATURE)
    held = dict(engine._model.named_parameters())
    got |= {
        "gap_after": gap(role, after, TEMPERATURE),
        "says_other": [c.logprobs for c in after] != [c.logprobs for c in sampled],
        "versions_after": {c.version for c in after} | {version for version, _, _ in calls.calls},
        "digest_after": digest(calls.named),
        "engine_holds": all(torch.equal(held[name], tensor) for name, tensor in calls.named),
    }
    return got


_first_greedy: dict[tuple[bool, str], Any] = {}  # of whichever layout ran first


# Every layout in fp32; a head of its own and a cast to bf16 in those that differ in where these are done.
CASES = [(layout, True, "fp32") for layout in LAYOUTS]
CASES += [(layout, False, "fp32") for layout in ("tp1", "pp2-vpp2", "tp2-pp2")]
CASES += [(layout, True, "bf16") for layout in ("pp2-vpp2", "tp2-pp2")]
CASES += [(layout, False, "bf16") for layout in ("tp2-pp2", "dp2")]
REST = [(layout, tie, dtype) for layout in LAYOUTS for tie, dtype in ((False, "fp32"), (True, "bf16"))]
MORE = [pytest.param(*case, marks=pytest.mark.extended) for case in REST if case not in CASES]


@pytest.mark.parametrize(("layout", "tie", "dtype"), [*CASES, *MORE])
def test_engines_say_what_the_trainer_says(pool: Any, layout: str, tie: bool, dtype: str) -> None:
    training = {"dtype": dtype, "tokens_per_microbatch": 256}
    config = role_config(tie=tie, layout=LAYOUTS[layout], training=training)
    results = pool.run(publish_case, config)
    tolerance = FP32 if dtype == "fp32" else BF16
    wanted = _first_greedy.setdefault((tie, dtype), results[0]["greedy"])
    print(layout, tie, dtype, "GAP", [(g["gap"], g["gap_after"], g["behind"]) for g in results][:1])
    for got in results:
        assert got["names"], "every tensor once; a tied output layer not at all"
        assert got["bits"], "the tensors are not the reference's to the bit"
        assert got["bytes"]
        assert got["largest"] <= BUCKET
        assert got["buckets"] >= 5
        assert got["finals"] == [False] * (got["buckets"] - 1) + [True]
        assert got["same_as_direct"]
        assert got["greedy"] == wanted
        assert got["behind"] <= (0.0 if dtype == "fp32" else BF16)
        assert got["gap"] < tolerance
        assert got["versions"] == {1}
        assert got["gap_after"] < tolerance
        assert got["says_other"]
        assert got["versions_after"] == {2}
        assert got["engine_holds"]
        assert got["digest_after"] == results[0]["digest_after"]


def bucket_case(rank: int, config: Any, sizes: list[int | None]) -> list[tuple[int, str]]:
    from genac_megatron.publication.publisher import Publisher

    role = make_role("actor", config, torch.distributed.get_world_size())
    seen = []
    for size in sizes:
        calls = Calls()
        Publisher(role, [calls], size).publish(1)
        seen.append((len(calls.calls), digest(calls.named)))
    return seen


def test_the_size_of_buckets_changes_only_their_number(pool: Any) -> None:
    config = role_config(layout={"count": 4, "tp": 2, "pp": 2})
    for seen in pool.run(bucket_case, config, [BUCKET, 3 * BUCKET, None]):
        numbers, digests = zip(*seen, strict=True)
        assert numbers[0] > numbers[1] > numbers[2] == 2  # one per pipeline stage
        assert len(set(digests)) == 1


def too_large_case(rank: int, config: Any) -> str:
    from genac_megatron.errors import InputError
    from genac_megatron.publication.publisher import Publisher

    role = make_role("actor", config, torch.distributed.get_world_size())
    with pytest.raises(InputError) as caught:
        Publisher(role, [], BUCKET - 1)
    return str(caught.value)


def test_a_tensor_larger_than_the_bucket_is_named_on_every_rank(pool: Any) -> None:
    for message in pool.run(too_large_case, role_config(layout={"count": 2, "tp": 2})):
        assert "model.layers.0.mlp.gate_proj.weight + model.layers.0.mlp.up_proj.weight" in message
        assert "16,384 bytes, a bucket 16,383" in message


def copy_case(rank: int, layouts: Any, dtype: str, started: bool) -> Any:
    """A trained actor's copy into a critic in a layout of its own; then both train the same step.

    started: the critic has an optimizer already, whose master weights must follow.
    """
    from genac_megatron.publication.publisher import Publisher, RoleSink

    source, target = (
        make_role(name, role_config(layout=layout, training={"dtype": dtype}), 4, seed)
        for name, layout, seed in zip(("actor", "critic"), layouts, (SEED, 9), strict=True)
    )
    source.begin_stage(None, 10)
    train(source, 1)
    if started:
        target.begin_stage(None, 10)
    Publisher(source, [RoleSink(target)], BUCKET).publish(0)
    copies = published(source), published(target)
    source.begin_stage(None, 10)
    if not started:
        target.begin_stage(None, 10)
    figures = train(source, 1, 5), train(target, 1, 5)
    return copies, figures, (published(source), published(target))


COPIES: dict[str, tuple[dict[str, Any], dict[str, Any], str, bool]] = {
    "tp2-to-pp2": ({"count": 2, "tp": 2}, {"first_rank": 2, "count": 2, "pp": 2}, "fp32", False),
    "tp2pp2-to-dp2": ({"tp": 2, "pp": 2}, {"first_rank": 1, "count": 2}, "fp32", False),
    "overlapping": ({"count": 2, "tp": 2}, {"first_rank": 1, "count": 2, "tp": 2}, "fp32", True),
    "bf16": ({"count": 2}, {"first_rank": 2, "count": 2}, "bf16", True),
}
STARTED = {"before-its-stage": False, "in-its-stage": True}
# Ways to copy as they are in a stage; before one, where masters are and are not.
COPIED = [
    pytest.param(
        *case,
        started,
        id=f"{name}-{when}",
        marks=[] if started or name in ("tp2pp2-to-dp2", "bf16") else [pytest.mark.extended],
    )
    for name, case in COPIES.items()
    for when, started in STARTED.items()
]


@pytest.mark.parametrize(("actor", "critic", "dtype", "exact", "started"), COPIED)
def test_a_role_starts_as_an_exact_copy(
    pool: Any, actor: Any, critic: Any, dtype: str, exact: bool, started: bool
) -> None:
    """Equal layouts train bit for bit alike; had master weights stayed behind, they would part at once."""
    for copies, figures, ends in pool.run(copy_case, (actor, critic), dtype, started):
        for name, tensor in copies[0].items():
            assert torch.equal(copies[1][name], tensor), name
        assert figures[1][0] == pytest.approx(
            figures[0][0], abs=0 if exact else FP32, rel=0 if exact else FP32
        )
        for name, tensor in ends[0].items():
            atol = 0.0 if exact else WEIGHT
            torch.testing.assert_close(ends[1][name], tensor, atol=atol, rtol=0, msg=name)
            assert not torch.equal(tensor, copies[0][name]) or tensor.ndim == 1
