"""Log-probs, entropies and logits of one set of weights in every layout, against one rank."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

VOCAB = 67  # odd: with TP the vocabulary is padded
PACKS = [[5, 1, 18, 9, 3], [20, 16], [36], [4] * 9]  # sequence lengths of each micro-batch; 36 tokens each
# Log-probs reach 9, logits 5: fp32 sums in another order. Measured: at most 4e-6 with TP, 0 with PP alone.
TOLERANCE = 2e-5

LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2": {"tp": 2},
    "tp2-sp": {"tp": 2, "sequence_parallel": True},
    "pp2": {"pp": 2},
    "pp2-vpp2": {"pp": 2, "vpp": 2},
    "tp2-pp2": {"tp": 2, "pp": 2, "sequence_parallel": True},
    "tp2-offset": {"tp": 2, "first_rank": 2},
}


def _shape(family: str, tie: bool) -> Any:
    from genac_megatron.models.registry import shape_of
    from genac_megatron.recipe.schema import ModelConfig, ModelShape

    sizes = ModelShape(
        layers=4, hidden=32, ffn=64, heads=4, kv_heads=2, head_dim=8, tie_embeddings=tie, init_std=0.2
    )
    return shape_of(ModelConfig(family=family, shape=sizes), VOCAB)


def _micro_batch(lengths: list[int], seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Any]:
    """tokens, positions, labels, loss mask (each [1, T]) and the pack."""
    from megatron.core.packed_seq_params import PackedSeqParams

    g = torch.Generator().manual_seed(seed)
    tokens, labels = torch.randint(0, VOCAB, (2, 1, sum(lengths)), generator=g)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    mask = torch.rand(1, sum(lengths), generator=g) < 0.8
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    longest = max(lengths)
    pack = PackedSeqParams("thd", bounds, bounds, max_seqlen_q=longest, max_seqlen_kv=longest)
    return tokens, positions, labels, mask, pack


def forward_case(rank: int, family: str, tie: bool, sizes: dict[str, Any]) -> dict[str, Tensor] | None:
    """Scores [micro-batch, 2, T] and logits [micro-batch, T, vocab], on ranks of the last stage."""
    from genac_megatron.models.build import build_model
    from genac_megatron.models.mapping import load_hf_into, random_weights
    from genac_megatron.recipe.schema import TrainingConfig
    from genac_megatron.training.layout import Layout

    count = sizes.get("tp", 1) * sizes.get("pp", 1)
    layout = Layout(**{"name": "test", "first_rank": 0, "count": count, **sizes})
    groups = layout.groups()
    if groups is None:
        return None
    shape = _shape(family, tie)
    training = TrainingConfig(dtype="fp32", specs="torch", logprob_chunk=16)
    chunks = build_model(shape, layout, groups, training)
    load_hf_into(chunks, layout, shape, random_weights(shape, 5))
    for chunk in chunks:
        chunk.scoring.temperature, chunk.scoring.with_entropy = 0.8, True
    scores = _forward(chunks, layout, groups, with_labels=True)
    logits = _forward(chunks, layout, groups, with_labels=False)
    if not layout.is_last_stage(groups):
        return None
    parts = [torch.empty_like(logits) for _ in range(layout.tp)]
    dist.all_gather(parts, logits, group=groups.tp)
    return {"scores": scores, "logits": torch.cat(parts, -1)[..., :VOCAB]}


@torch.no_grad()
def _forward(chunks: Any, layout: Any, groups: Any, with_labels: bool) -> Tensor:
    """The outputs of all micro-batches by Megatron's own schedule; empty before the last stage."""
    from megatron.core.pipeline_parallel import schedules
    from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

    outputs: list[Tensor] = []

    def keep(output: Tensor, **_: Any) -> tuple[Tensor, dict[str, Any]]:
        outputs.append(output)
        return output.sum(), {}

    def step(batches: Any, model: Any) -> tuple[Tensor, Any]:
        tokens, positions, labels, mask, pack = next(batches)
        kwargs = {"labels": labels, "loss_mask": mask} if with_labels else {}
        return model(tokens, positions, None, packed_seq_params=pack, **kwargs), partial(keep)

    batches = [[_micro_batch(lengths, 7 + i) for i, lengths in enumerate(PACKS)] for _ in chunks]
    arguments: dict[str, Any] = {
        "forward_step_func": step,
        "data_iterator": [iter(b) for b in batches] if layout.vpp > 1 else iter(batches[0]),
        "model": chunks if layout.vpp > 1 else chunks[0],
        "num_microbatches": len(PACKS),
        "seq_length": sum(PACKS[0]),
        "micro_batch_size": 1,
        "forward_only": True,
        "pg_collection": groups,
    }
    schedule = schedules.forward_backward_no_pipelining
    if layout.pp > 1:
        arguments["p2p_communicator"] = P2PCommunicator(groups.pp, chunks[0].config)
        schedule = schedules.forward_backward_pipelining_without_interleaving
    if layout.vpp > 1:
        schedule = schedules.forward_backward_pipelining_with_interleaving
    schedule(**arguments)
    return torch.cat(outputs) if outputs and not with_labels else torch.stack(outputs or [torch.empty(0)])


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_every_layout_gives_the_scores_of_one_rank(pool: Any, family: str, tie: bool) -> None:
    (wanted,) = [x for x in pool.run(forward_case, family, tie, {}) if x is not None]
    for name, sizes in LAYOUTS.items():
        found = [x for x in pool.run(forward_case, family, tie, sizes) if x is not None]
        assert len(found) == sizes.get("tp", 1), name
        for got in found:
            for key, value in wanted.items():
                torch.testing.assert_close(
                    got[key], value, atol=TOLERANCE, rtol=0, msg=lambda m, n=name, k=key: f"{n} {k}: {m}"
                )


def test_scores_are_those_of_the_logits(pool: Any) -> None:
    (found,) = [x for x in pool.run(forward_case, "qwen3", True, {}) if x is not None]
    logp = torch.log_softmax(found["logits"] / 0.8, -1)
    for index, lengths in enumerate(PACKS):
        _, _, labels, mask, _ = _micro_batch(lengths, 7 + index)
        wanted = logp[index].gather(-1, labels.T)[:, 0] * mask[0]
        torch.testing.assert_close(found["scores"][index, 0], wanted, atol=TOLERANCE, rtol=0)
