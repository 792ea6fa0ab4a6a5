"""A bare Megatron-core training loop, and ours, on the same sequences: what benchmarks of overhead compare.

Bare is what a short script over megatron.core would be: its GPTModel with the same layer specs and
TransformerConfig, its DDP, distributed optimizer and schedule, its own cross-entropy over whole logits, over
packs that were made beforehand and lie on the device. Ours is `Role.train_step` from plain samples: planning,
packing, transfer, chunked log-probs, loss, optimizer, schedule, and the log-probs of every token given back.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from torch import Tensor

from genac_megatron import platform
from genac_megatron.models.build import build_model, transformer_config  # first: megatron's CPU hook
from genac_megatron.models.mapping import load_hf_into, random_weights
from genac_megatron.models.registry import shape_of
from genac_megatron.models.sizes import padded_vocab
from genac_megatron.models.specs import block_spec, choose, fuse_weight_gradients
from genac_megatron.recipe.schema import RoleConfig
from genac_megatron.records import Sample
from genac_megatron.training.layout import Layout
from genac_megatron.training.optimizer import build_optimizer
from genac_megatron.training.packing import Pack, build_pack, multiple_for
from genac_megatron.training.plans import Rows, plan_packs
from genac_megatron.training.role import Role

from megatron.core.distributed import (  # isort: skip
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel  # isort: skip
from megatron.core.packed_seq_params import PackedSeqParams  # isort: skip
from megatron.core.pipeline_parallel import schedules  # isort: skip
from megatron.core.transformer.module import Float16Module  # isort: skip

Step = Callable[[], float]  # one optimizer step; its loss
MODES = ("bare", "bare, our log-probs", "ours")


def role_config(shape: dict[str, Any], tokens: int, **training: Any) -> RoleConfig:
    """A role of one rank. shape: keys of recipe.schema.ModelShape, and perhaps `family`."""
    family = shape.get("family", "qwen2")
    sizes = {key: value for key, value in shape.items() if key != "family"}
    return RoleConfig.model_validate(
        {
            "model": {"family": family, "shape": sizes, "tokenizer": "none"},
            "training": {"tokens_per_microbatch": tokens, **training},
            "optimizer": {"lr": 1e-5},
        }
    )


def make_samples(tokens: int, microbatches: int, vocab: int, seed: int = 0) -> list[Sample]:
    """Sequences of tokens / 16 to tokens / 4 positions that fill `microbatches` packs to the last one."""
    rng = random.Random(seed)
    samples = []
    for _ in range(microbatches):
        left = tokens
        while left:
            length = min(left, rng.randint(tokens // 16, tokens // 4))
            length = left if left - length < tokens // 16 else length
            samples.append(Sample([rng.randrange(vocab) for _ in range(length + 1)], 1))
            left -= length
    total = sum(sample.trained for sample in samples)
    for sample in samples:
        sample.fields = {"weights": [1 / total] * sample.trained}
    return samples


def model_flops(shape: Any, samples: list[Sample]) -> float:
    """Of one step, forward and backward: 6 per weight of a matrix and token, and causal attention's.

    Attention multiplies queries with keys and scores with values: 2 x 2 x s^2 x heads x head_dim a layer in
    the forward pass, half of it under the causal mask, twice as much again in the backward pass. What is
    computed twice (recomputation, our log-probs' second pass over the output layer) does not count.
    """
    attention_weights = shape.hidden * (2 * shape.q_size + 2 * shape.kv_size)
    layers = shape.layers * (attention_weights + 3 * shape.hidden * shape.ffn)
    lengths = [len(sample.tokens) - 1 for sample in samples]
    matrices = 6.0 * (layers + shape.hidden * shape.vocab) * sum(lengths)
    return matrices + 6.0 * shape.layers * shape.q_size * sum(n * n for n in lengths)


def ours(config: RoleConfig, samples: list[Sample]) -> Step:
    """`Role.train_step` with the SFT loss."""
    from genac_megatron.algorithms.losses import make_sft_loss

    layout = Layout.from_config("actor", config.layout, 1)
    shape = shape_of(config.model, config.model.shape.vocab)  # type: ignore[union-attr]
    role = Role("actor", config, shape, layout, layout.groups())
    load_hf_into(role.models, layout, shape, random_weights(shape, 0, platform.device()))
    role.begin_stage(None, 1000)
    loss = make_sft_loss()
    return lambda: role.train_step(samples, loss).stats["loss"]


def bare(config: RoleConfig, samples: list[Sample], *, our_logprobs: bool = False) -> Step:
    """The bare loop. our_logprobs: our model, whose log-probs are chunked, instead of whole logits."""
    training = config.training
    layout = Layout.from_config("bare", config.layout, 1)
    groups: Any = layout.groups()
    shape = shape_of(config.model, config.model.shape.vocab)  # type: ignore[union-attr]
    if our_logprobs:
        (model,) = build_model(shape, layout, groups, training)
        load_hf_into([model], layout, shape, random_weights(shape, 0, platform.device()))
    else:
        model = _stock_model(config, shape, layout, groups)
    inner = model.config
    if training.dtype == "bf16":
        model = Float16Module(inner, model)
    ddp_config = DistributedDataParallelConfig(
        use_distributed_optimizer=training.distributed_optimizer,
        grad_reduce_in_fp32=True,
        check_for_nan_in_grad=False,
        fp8_param_gather=training.fp8_param,
    )
    ddp = DistributedDataParallel(inner, ddp_config, model, pg_collection=groups)
    inner.finalize_model_grads_func = partial(_finalize, groups)
    optimizer: Any = build_optimizer([ddp], groups, config.optimizer, training)
    inner.grad_scale_func = optimizer.scale_loss
    packs = make_packs(config, samples)
    return partial(_bare_step, ddp, optimizer, groups, packs, our_logprobs)


def _stock_model(config: RoleConfig, shape: Any, layout: Layout, groups: Any) -> Any:
    """Megatron's GPTModel with the specs, the configuration and the weights that ours has."""
    kind = choose(config.training.specs)
    arguments = transformer_config(shape, layout, config.training, kind)
    if kind == "te":
        arguments.cross_entropy_loss_fusion, arguments.cross_entropy_fusion_impl = True, "native"
    model = GPTModel(
        config=arguments,
        transformer_layer_spec=block_spec(arguments, kind, 0, None),
        vocab_size=padded_vocab(shape, 1),
        max_sequence_length=shape.max_positions,
        share_embeddings_and_output_weights=shape.tie,
        position_embedding_type="rope",
        rotary_base=shape.rope_theta,
        pg_collection=groups,
    )
    if kind == "te" and config.training.fuse_weight_gradients:
        fuse_weight_gradients(model)
    model.to(platform.device())
    load_hf_into([model], layout, shape, random_weights(shape, 0, platform.device()))
    return model


def make_packs(config: RoleConfig, samples: list[Sample]) -> list[Pack]:
    """The packs that our step would make, on the device."""
    training = config.training
    multiple = multiple_for(tp=1, cp=1, fp8=training.fp8)
    lengths = [len(sample.tokens) - 1 for sample in samples]
    limit = training.tokens_per_microbatch
    (plan,) = plan_packs(lengths, rows=Rows.whole(1), tokens_per_microbatch=limit, multiple=multiple).rows
    device = platform.device()
    return [build_pack(samples, pack, multiple=multiple, field_names=["weights"]).to(device) for pack in plan]


def _finalize(groups: Any, model: Any, num_tokens: Any = None, **_: Any) -> None:
    finalize_model_grads(model, num_tokens, pg_collection=groups)


def _bare_step(ddp: Any, optimizer: Any, groups: Any, packs: list[Pack], our_logprobs: bool) -> float:
    ddp.train()
    ddp.zero_grad_buffer()
    optimizer.zero_grad()

    def forward(left: Iterator[Pack], model: Any) -> tuple[Tensor, Any]:
        pack = next(left)
        packed = PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=pack.cu_seqlens,
            cu_seqlens_kv=pack.cu_seqlens,
            max_seqlen_q=pack.max_seqlen,
            max_seqlen_kv=pack.max_seqlen,
        )
        extra = {"loss_mask": pack.loss_mask_T[None]} if our_logprobs else {}
        output = model(
            pack.tokens_T[None],
            pack.positions_T[None],
            None,
            labels=pack.labels_T[None],
            packed_seq_params=packed,
            **extra,
        )
        return output, partial(_mean_loss, pack, len(packs), -1.0 if our_logprobs else 1.0)

    outputs = schedules.forward_backward_no_pipelining(
        forward_step_func=forward,
        data_iterator=iter(packs),
        model=ddp,
        num_microbatches=len(packs),
        seq_length=packs[0].tokens_T.numel(),
        micro_batch_size=1,
        forward_only=False,
        pg_collection=groups,
    )
    optimizer.step()
    return float(sum(output["loss"] for output in outputs))


def _mean_loss(pack: Pack, count: int, sign: float, output: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """output [1, T]: the cross-entropy of each position, or its log-prob with sign -1."""
    loss = sign * (output[0].float() * pack.fields["weights"]).sum()
    return loss * count, {"loss": loss.detach()}


def make_step(mode: str, config: RoleConfig, samples: list[Sample]) -> Step:
    """The step of one of MODES."""
    if mode == "ours":
        return ours(config, samples)
    return bare(config, samples, our_logprobs=mode != "bare")
