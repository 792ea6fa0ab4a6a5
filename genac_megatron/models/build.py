"""Build a role's model on its layout's ranks, ready for Megatron's pipeline schedules.

Interface in short:

    shape = shape_of(config.model, tokenizer_vocab)               # models.registry; Shape: families.base
    chunks = build_model(shape, layout, groups, config.training)  # list[RoleModel], one per virtual chunk;
                                                                  # call only where groups is not None
    load_hf_into(chunks, layout, shape, HfFolder(path).get)       # models.mapping / models.hf_folder
    load_hf_into(chunks, layout, shape, random_weights(shape, seed))   # ... or seeded random weights

    chunks[0].config                                              # the TransformerConfig, shared by chunks
    model.scoring.temperature, model.scoring.with_entropy         # set before a pass, on every chunk
    out = model(tokens_1T, positions_1T, None, labels=labels_1T, loss_mask=mask_1T,
                packed_seq_params=PackedSeqParams(qkv_format="thd", ...))

`model` may be wrapped (Float16Module, DistributedDataParallel). With labels, the last stage returns fp32
[1, T] (log-prob of each label) or, with_entropy, [2, T] (log-prob, entropy); where loss_mask is False both
are 0; a scalar critic's gives [1, T], the value of the prefix before each label. Earlier stages return hidden
states, as the schedules want. Without labels the last stage returns logits [1, T, padded vocab / tp]. T is a
multiple of tp where sequence parallelism is on; cu_seqlens covers all T positions (padding is a sequence of
its own). Every micro-batch of a step has the same T where pp > 1: pass seq_length=T, micro_batch_size=1 to
the schedule.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from genac_megatron import platform
from genac_megatron.dtypes import DTYPES
from genac_megatron.errors import InputError
from genac_megatron.models.adapters import Adapters, attach, stand_on
from genac_megatron.models.families.base import Shape
from genac_megatron.models.layout import Sizes
from genac_megatron.models.logprobs import vocab_parallel_logprobs
from genac_megatron.models.packed_attention import plan_of, rows_of, tree_of
from genac_megatron.models.pipeline import StageLayout
from genac_megatron.models.routing import install
from genac_megatron.models.sizes import padded_vocab
from genac_megatron.models.specs import Kind, block_spec, choose, fuse_weight_gradients, tree_way
from genac_megatron.platform.fp8 import refusal_here
from genac_megatron.recipe.schema import TrainingConfig

FP8 = {  # training.fp8 -> Megatron's (format, recipe)
    "delayed": ("hybrid", "delayed"),
    "tensorwise": ("hybrid", "tensorwise"),
    "blockwise": ("e4m3", "blockwise"),
    "mxfp8": ("e4m3", "mxfp8"),
}


@dataclass
class Scoring:
    """How the last stage turns hidden states into log-probs. Set before a pass."""

    temperature: float = 1.0
    with_entropy: bool = False
    chunk: int = 1024  # tokens whose logits exist at once


class ValueHead(nn.Module):
    """hidden -> one figure, in fp32 whatever the model's dtype; whole on every tensor-parallel rank."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, config.hidden_size, dtype=config.params_dtype))
        self.bias = nn.Parameter(torch.zeros(1, dtype=config.params_dtype))

    def forward(self, hidden_TH: Tensor) -> Tensor:
        """[T, hidden] -> [T]."""
        return F.linear(hidden_TH.float(), self.weight.float(), self.bias.float()).squeeze(1)


class RoleModel(GPTModel):
    """A GPT model chunk whose last stage gives log-probs of labels, without ever holding all logits."""

    def __init__(self, *args: Any, shape: Shape, specs: Kind, scoring: Scoring, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.shape, self.specs, self.scoring = shape, specs, scoring
        self.adapters: Adapters | None = None
        if shape.value and self.post_process:
            self.output_layer = ValueHead(self.config)

    def _preprocess(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """Under torch specs the packed attention rotates queries and keys itself, from tables made once; so
        does attention over trees under any, as positions run along a tree's paths.
        """
        prepared = super()._preprocess(*args, **kwargs)
        packed = kwargs.get("packed_seq_params")
        if packed is None or (self.specs != "torch" and tree_of(packed) is None):
            return tuple(prepared)
        hidden, freqs, *rest = prepared
        plan_of(packed, freqs.device).set_rope(freqs)
        return (hidden, None, *rest)

    def _postprocess(
        self, hidden_states: Tensor, *args: Any, labels: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        """[1, T] log-probs or [2, T] log-probs and entropies where this is the last stage and has labels."""
        if not self.post_process or labels is None:
            output: Tensor = super()._postprocess(hidden_states, *args, labels=labels, **kwargs)
            return output
        rows_E = rows_of(kwargs.get("packed_seq_params"))
        if self.shape.value:
            return self.values(hidden_states, rows_E)
        return self.score(hidden_states, labels, kwargs.get("loss_mask"), rows_E)

    def values(self, hidden_states: Tensor, rows_E: Tensor | None = None) -> Tensor:
        """[1, T]: the value of the prefix that ends at each position, from the decoder's output.

        rows_E: of a pack of trees, the positions that are asked for: [1, E].
        """
        if self.config.sequence_parallel:
            # Every rank computes the same from all of it, so each keeps its own part of the gradient.
            hidden_states = gather_from_sequence_parallel_region(
                hidden_states, tensor_parallel_output_grad=False, group=self.pg_collection.tp
            )
        values_T = self.output_layer(hidden_states.squeeze(1))
        return (values_T if rows_E is None else values_T.index_select(0, rows_E))[None]

    def score(
        self,
        hidden_states: Tensor,
        labels_1T: Tensor,
        mask_1T: Tensor | None,
        rows_E: Tensor | None = None,
    ) -> Tensor:
        """Log-probs (and entropies) of labels from the decoder's output [T or T / tp, 1, hidden].

        rows_E: of a pack of trees, the position that predicts each of E labels; mask_1T says nothing then.
        """
        tp_group = self.pg_collection.tp
        if self.config.sequence_parallel:
            # The gradient that comes back is this rank's share of a sum: backward must reduce-scatter it.
            hidden = gather_from_sequence_parallel_region(
                hidden_states, tensor_parallel_output_grad=True, group=tp_group
            )
        else:
            hidden = copy_to_tensor_model_parallel_region(hidden_states, group=tp_group)
        tied = self.share_embeddings_and_output_weights
        weight = self.shared_embedding_or_output_weight() if tied else self.output_layer.weight
        logp_T, entropy_T = vocab_parallel_logprobs(
            hidden.squeeze(1),
            weight,
            labels_1T[0],
            tp_group=tp_group,
            temperature=self.scoring.temperature,
            chunk=self.scoring.chunk,
            vocab=self.shape.vocab,
            with_entropy=self.scoring.with_entropy,
            mask_T=None if mask_1T is None or rows_E is not None else mask_1T[0].bool(),
            rows_E=rows_E,
        )
        return torch.stack([logp_T] if entropy_T is None else [logp_T, entropy_T])


def build_model(
    shape: Shape,
    layout: Sizes,
    groups: ProcessGroupCollection,
    training: TrainingConfig,
    seed: int = 0,
    base: Sequence[RoleModel] | None = None,
) -> list[RoleModel]:
    """This rank's model chunks, on its device, weights not yet set (see `load_hf_into`).

    seed: of adapters, which begin by it. base: another role's chunks, whose base they stand on. The chunks
    share one TransformerConfig. Raises InputError where shape, layout and training do not fit.
    """
    specs = choose(training.specs)
    check(shape, layout, training, specs)
    config = transformer_config(shape, layout, training, specs, groups.pp.rank())
    scoring, trees = Scoring(chunk=training.logprob_chunk), tree_way(training)
    fused = training.fuse_weight_gradients and not (training.frozen or training.adapter)
    chunks = []
    for index in range(layout.vpp):
        chunks.append(_chunk(shape, layout, groups, config, specs, scoring, index, fused, trees))
        if base is not None:  # at once, so that no second copy is there of more than a chunk
            stand_on(chunks[-1], base[index], shape)
    if training.adapter is not None:
        for index, chunk in enumerate(chunks):
            layers = layout.chunk_layers(shape.layers, groups.pp.rank(), index)
            attach(chunk, layers, shape, training.adapter, seed)
            chunk.to(platform.device())
    return chunks


def _chunk(
    shape: Shape,
    layout: Sizes,
    groups: ProcessGroupCollection,
    config: TransformerConfig,
    specs: Kind,
    scoring: Scoring,
    index: int,
    fused: bool,
    trees: Literal["cpu", "flex", "merged"] | None,
) -> RoleModel:
    pp_rank = groups.pp.rank()
    vp_stage = index if layout.vpp > 1 else None
    model = RoleModel(
        config=config,
        transformer_layer_spec=block_spec(config, specs, pp_rank, vp_stage, trees),
        vocab_size=padded_vocab(shape, layout.tp),
        max_sequence_length=shape.max_positions,
        pre_process=pp_rank == 0 and index == 0,
        post_process=pp_rank == layout.pp - 1 and index == layout.vpp - 1,
        parallel_output=True,
        share_embeddings_and_output_weights=shape.tie,
        position_embedding_type="rope",
        rotary_base=shape.rope_theta,
        rope_scaling=shape.rope_factor is not None,
        rope_scaling_factor=shape.rope_factor or 8.0,
        pg_collection=groups,
        vp_stage=vp_stage,
        shape=shape,
        specs=specs,
        scoring=scoring,
    )
    install(model)
    _mark_experts(model)
    if specs == "te" and fused:
        fuse_weight_gradients(model)
    model.to(platform.device())
    return model


def _mark_experts(model: RoleModel) -> None:
    """Have the weights of experts reduced over the ranks that share them, whatever ep is.

    Megatron 0.16 does so where ep > 1 alone. With ep 1 and tp > 1, where every rank has all experts and its
    own share of the tokens, it sums their gradients over data-parallel ranks, not over tp: silently wrong.
    Marked always, their optimizer states also lie in a checkpoint where any ep finds them.
    """
    for name, parameter in model.named_parameters():
        if ".mlp.experts." in name:
            parameter.allreduce = False


def check(shape: Shape, layout: Sizes, training: TrainingConfig, specs: Kind) -> None:
    """Raise InputError where a layout cannot cut this shape, or the machine cannot do what is asked."""
    where = f"layout of {layout.name}"
    layout.chunk_layers(shape.layers, 0, 0)  # raises where they cannot be cut so
    for what in ("heads",) if shape.experts else ("heads", "ffn"):
        if getattr(shape, what) % layout.tp:
            size = getattr(shape, what)
            way_out = f"choose tp that divides {size}"
            raise InputError(f"{what} {size} cannot be cut by tp {layout.tp}", where=where, way_out=way_out)
    if shape.kv_heads % layout.tp and layout.tp % shape.kv_heads:
        raise InputError(
            f"kv_heads {shape.kv_heads} cannot be shared by tp {layout.tp}",
            where=where,
            way_out=f"choose tp that divides {shape.kv_heads}, or a multiple of it",
        )
    if specs == "torch" and shape.heads // layout.tp % layout.cp:
        # Transformer Engine's ring has no such limit.
        raise InputError(
            f"{shape.heads} heads cannot be cut by tp {layout.tp} x cp {layout.cp} with torch's layers",
            where=where,
            way_out=f"choose tp and cp whose product divides {shape.heads}",
        )
    _check_experts(shape, layout, where)
    _need_engine(training, specs)
    if tree_way(training) == "merged" and training.dtype == "fp32" and platform.device().type != "cpu":
        raise InputError(
            "merged calls of flash attention take half precision, and the dtype is fp32",
            where="training.tree_attention",
            way_out="set it to flex, or auto",
        )
    if training.fp8 != "off" and specs != "te":
        # Without Transformer Engine Megatron ignores fp8 without a word.
        raise InputError(
            f"fp8 {training.fp8} needs Transformer Engine", where="training.fp8", way_out="set it to off"
        )
    if training.fp8 != "off" and (reason := refusal_here(training.fp8)):
        raise InputError(reason, where="training.fp8", way_out="set another of fp8's recipes, or off")


def _check_experts(shape: Shape, layout: Sizes, where: str) -> None:
    if shape.experts is None:
        if layout.ep > 1:
            what = "ep needs a mixture of experts, and this family is dense"
            raise InputError(what, where=where, way_out="set ep: 1")
        return
    if shape.experts % layout.ep:
        way_out = f"choose ep that divides {shape.experts}"
        raise InputError(
            f"{shape.experts} experts cannot be cut by ep {layout.ep}", where=where, way_out=way_out
        )
    if layout.tp > 1 and not layout.sequence_parallel:
        # Every rank would send all tokens to the experts: Megatron refuses to train so.
        raise InputError(
            "experts with tp > 1 need sequence_parallel", where=where, way_out="leave sequence_parallel out"
        )


def transformer_config(
    shape: Shape, layout: Sizes, training: TrainingConfig, specs: Kind, stage: int = 0
) -> TransformerConfig:
    """Megatron's configuration of a role, on a rank of pipeline stage `stage`."""
    fused = specs == "te"
    dtype = DTYPES[training.dtype]
    arguments: dict[str, Any] = {
        "num_layers": shape.layers,
        "hidden_size": shape.hidden,
        "ffn_hidden_size": shape.ffn,
        "num_attention_heads": shape.heads,
        "num_query_groups": shape.kv_heads,
        "kv_channels": shape.head_dim,
        "qk_layernorm": shape.qk_norm,
        "add_qkv_bias": shape.qkv_bias,
        "add_bias_linear": False,
        "normalization": "RMSNorm",
        "layernorm_epsilon": shape.norm_eps,
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "init_method_std": shape.init_std,
        # Every weight is loaded later, but what initialises them also marks which ones are cut over TP.
        "perform_initialization": True,
        "use_cpu_initialization": platform.device().type == "cpu",
        "params_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        "attention_softmax_in_fp32": True,
        # Fusions need kernels that only GPUs have. Megatron's word for weight gradients that are added up in
        # a kernel would ask for apex's in the output layer: specs.fuse_weight_gradients has TE's do it.
        "bias_activation_fusion": fused,
        "bias_dropout_fusion": fused,
        "apply_rope_fusion": fused,
        "masked_softmax_fusion": False,
        "persist_layer_norm": False,
        "gradient_accumulation_fusion": False,
    }
    arguments |= _experts(shape, training, fused)
    arguments |= _parallel(layout, dtype) | _precision(training)
    arguments["tp_comm_overlap"] = training.tp_comm_overlap
    if layout.pipeline_model_parallel_layout is not None:
        arguments["pipeline_model_parallel_layout"] = StageLayout(
            layout.pipeline_model_parallel_layout, layout.pp, stage
        )
    if training.variable_seq_lengths:
        arguments |= {"variable_seq_lengths": True, "moe_token_dispatcher_type": "alltoall"}
    return TransformerConfig(**arguments)


def _experts(shape: Shape, training: TrainingConfig, fused: bool) -> dict[str, Any]:
    """A mixture of experts, routed by softmax: nothing where the model is dense."""
    if shape.experts is None:
        return {}
    balanced = training.moe_aux_loss > 0
    return {
        "num_moe_experts": shape.experts,
        "moe_router_topk": shape.experts_per_token,
        "moe_ffn_hidden_size": shape.expert_ffn,
        # Softmax over the chosen experts is softmax over all, made to sum to 1 again over the chosen.
        "moe_router_pre_softmax": not shape.norm_topk,
        "moe_router_load_balancing_type": "aux_loss" if balanced else "none",
        "moe_aux_loss_coeff": training.moe_aux_loss,
        "moe_token_dispatcher_type": training.moe_dispatcher,
        "moe_grouped_gemm": fused,
        "moe_permute_fusion": False,
        "expert_tensor_parallel_size": 1,
    }


def _parallel(layout: Sizes, dtype: torch.dtype) -> dict[str, Any]:
    interleaved = layout.vpp > 1
    return {
        "tensor_model_parallel_size": layout.tp,
        "pipeline_model_parallel_size": layout.pp,
        "virtual_pipeline_model_parallel_size": layout.vpp if interleaved else None,
        "context_parallel_size": layout.cp,
        "expert_model_parallel_size": layout.ep,
        "sequence_parallel": layout.sequence_parallel,
        "pipeline_dtype": dtype,
        # Interleaving with batched exchanges mixes up messages; freeing outputs that are still being sent
        # gives wrong results (both without an error, seen on 0.16).
        "overlap_p2p_comm": interleaved,
        "batch_p2p_comm": not interleaved,
        "deallocate_pipeline_outputs": False,
    }


def _need_engine(training: TrainingConfig, specs: Kind) -> None:
    """What Transformer Engine alone has. Raises InputError."""
    for key in ("tp_comm_overlap", "use_precision_aware_optimizer"):
        if getattr(training, key) and (specs != "te" or not platform.has_te()):
            raise InputError(
                f"{key} needs Transformer Engine, on a GPU",
                where=f"training.{key}",
                way_out="take it out (and what goes with it)",
            )


def _precision(training: TrainingConfig) -> dict[str, Any]:
    """FP8 and recomputation."""
    arguments: dict[str, Any] = {}
    if training.fp8 != "off":
        arguments["fp8"], arguments["fp8_recipe"] = FP8[training.fp8]
        arguments |= {
            "fp8_param": training.fp8_param,
            "fp8_amax_history_len": training.fp8_amax_history,
            "fp8_amax_compute_algo": "max",
            # Megatron would reduce over groups of the whole world, where other roles' ranks do not take part.
            "tp_only_amax_red": True,
            "first_last_layers_bf16": training.bf16_first_layers + training.bf16_last_layers > 0,
            "num_layers_at_start_in_bf16": training.bf16_first_layers,
            "num_layers_at_end_in_bf16": training.bf16_last_layers,
        }
    if training.recompute == "selective":
        arguments |= {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
    elif training.recompute == "full":
        arguments |= {
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 1,
        }
    return arguments
