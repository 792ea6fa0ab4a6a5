"""Layer specs: Transformer Engine's on GPUs that have it, torch's own anywhere.

The torch specs are Megatron's local specs with two parts of ours, which those lack: a norm that works under
sequence parallelism, and a core attention on SDPA that takes packed sequences and holds no s^2 scores.
Parameters have the same names in checkpoints under both kinds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec, get_gpt_layer_local_spec
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from genac_megatron import platform
from genac_megatron.errors import InputError
from genac_megatron.models.context_parallel import exchanged_sdpa
from genac_megatron.models.flex_trees import How, with_trees
from genac_megatron.models.packed_attention import packed_sdpa, plan_of, sdpa
from genac_megatron.models.repeated_heads import RepeatedHeads
from genac_megatron.platform.without_te import repair_router
from genac_megatron.recipe.schema import TrainingConfig

Kind = Literal["torch", "te"]


def choose(specs: Literal["auto", "torch", "te"]) -> Kind:
    """The kind of specs for a recipe's `training.specs`. Raises InputError where te is wanted and missing."""
    if specs == "te" and not platform.has_te():
        raise InputError(
            "Transformer Engine cannot be used here", where="training.specs", way_out="use auto or torch"
        )
    return "te" if specs == "te" or (specs == "auto" and platform.has_te()) else "torch"


def without_engine(specs: Iterable[str]) -> str:
    """What to tell where `auto`, of these `training.specs`, takes torch's layers on a GPU; "" elsewhere."""
    if platform.device().type != "cuda" or "auto" not in specs or platform.has_te():
        return ""
    return (
        "Transformer Engine cannot be used here: torch's layers take the place of its own (genac doctor says "
        "what is missing; training.specs: torch asks for torch's)"
    )


def tree_way(training: TrainingConfig) -> Literal["cpu", "flex", "merged"] | None:
    """What computes attention over packs of trees here; None: packs are flat.

    cpu: our packed attention's own, of torch's layers on a CPU.
    """
    if not training.share_prefixes or training.tree_attention == "flat":
        return None
    if training.tree_attention != "auto":
        return training.tree_attention
    return "cpu" if choose(training.specs) == "torch" and platform.device().type == "cpu" else "flex"


def block_spec(
    config: TransformerConfig,
    kind: Kind,
    pp_rank: int,
    vp_stage: int | None,
    trees: Literal["cpu", "flex", "merged"] | None = None,
) -> Any:
    """The decoder's submodules for one model chunk: TransformerBlockSubmodules. trees: a `tree_way`."""
    if kind == "te":
        block = get_gpt_decoder_block_spec(
            config, use_transformer_engine=True, vp_stage=vp_stage, pp_rank=pp_rank
        )
    else:
        layers = get_num_layers_to_build(config, vp_stage=vp_stage, pp_rank=pp_rank)
        block = TransformerBlockSubmodules(
            layer_specs=[torch_layer_spec(config)] * layers, layer_norm=TorchNorm
        )
    made = block.layer_specs
    if config.num_query_groups < config.tensor_model_parallel_size:
        made = [*map(_repeating, made)]
    if trees in ("flex", "merged"):
        made = [_tree_layer(spec, trees) for spec in made]
    return dataclasses.replace(block, layer_specs=made)


def _repeating(layer: ModuleSpec) -> ModuleSpec:
    """The layer with attention whose ranks share key-value heads."""
    attention = dataclasses.replace(layer.submodules.self_attention, module=RepeatedHeads)
    return dataclasses.replace(
        layer, submodules=dataclasses.replace(layer.submodules, self_attention=attention)
    )


def _tree_layer(spec: ModuleSpec, how: How) -> ModuleSpec:
    """A layer's spec whose core attention takes packs of trees too."""
    attention = spec.submodules.self_attention
    core = with_trees(attention.submodules.core_attention, how)
    inner = dataclasses.replace(attention.submodules, core_attention=core)
    attention = dataclasses.replace(attention, submodules=inner)
    return dataclasses.replace(
        spec, submodules=dataclasses.replace(spec.submodules, self_attention=attention)
    )


def torch_layer_spec(config: TransformerConfig) -> ModuleSpec:
    """Megatron's local layer spec with our norm and core attention."""
    stock = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts,
        moe_grouped_gemm=False,
        qk_layernorm=config.qk_layernorm,
        normalization=config.normalization,
    )
    head_norm = TorchNorm if config.qk_layernorm else IdentityOp
    attention = dataclasses.replace(
        stock.submodules.self_attention,
        submodules=dataclasses.replace(
            stock.submodules.self_attention.submodules,
            core_attention=SDPACoreAttention,
            q_layernorm=head_norm,
            k_layernorm=head_norm,
        ),
    )
    submodules = dataclasses.replace(
        stock.submodules,
        input_layernorm=TorchNorm,
        pre_mlp_layernorm=TorchNorm,
        self_attention=attention,
    )
    if config.num_moe_experts is not None:
        repair_router()
        # The norm before experts is a part of no linear layer under Transformer Engine either: the stock
        # local spec stores it as one.
        kept = {k: v for k, v in submodules.sharded_state_dict_keys_map.items() if "pre_mlp" not in k}
        submodules = dataclasses.replace(submodules, sharded_state_dict_keys_map=kept)
    return dataclasses.replace(stock, submodules=submodules)


def fuse_weight_gradients(model: nn.Module) -> int:
    """Have Transformer Engine's layers add weight gradients into DDP's fp32 buffer inside the matrix product.

    Returns how many layers do. Megatron's `gradient_accumulation_fusion` would say it to them too, but its
    own output layer then refuses to be built without apex; that one is not used here (RoleModel.score).
    """
    layers = [m for m in model.modules() if hasattr(m, "fuse_wgrad_accumulation")]
    for layer in layers:
        layer.fuse_wgrad_accumulation = True  # type: ignore[assignment]
    return len(layers)


class TorchNorm(nn.Module):
    """RMSNorm over the last axis, computed by torch.

    Its weight is marked `sequence_parallel` where that is on: each rank then sees a part of the tokens, and
    Megatron sums the marked weights' gradients over the tensor-parallel group.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__()
        if config.normalization != "RMSNorm":
            raise InputError(f"normalization {config.normalization} is not RMSNorm", where="torch specs")
        self.eps = eps
        device = torch.device("cpu") if config.use_cpu_initialization else platform.device()
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=device))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class SDPACoreAttention(MegatronModule):
    """Causal core attention on torch's SDPA: GQA, packed sequences ("thd") or a plain batch ("sbhd")."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        pg_collection: Any = None,
        **unused: Any,  # cp_comm_type and such
    ) -> None:
        super().__init__(config=config)
        self.cp_group = pg_collection.cp if config.context_parallel_size > 1 else None
        self.scale = softmax_scale
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """query [s, b, heads, d] or, packed, [T, heads, d]; key and value with kv_heads.

        Returns [s, b, heads d] or [T, heads d]. Always causal: attention_mask is not looked at. Under context
        parallelism T is what this rank holds of the pack.
        """
        dropout = self.dropout if self.training else 0.0
        if self.cp_group is not None:
            out = exchanged_sdpa(
                query, key, value, packed_seq_params, self.cp_group, scale=self.scale, dropout=dropout
            )
            return out.flatten(1)
        if packed_seq_params is not None:
            plan = plan_of(packed_seq_params, query.device)
            return packed_sdpa(query, key, value, plan, scale=self.scale, dropout=dropout).flatten(1)
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        return sdpa(q, k, v, scale=self.scale, dropout=dropout).permute(2, 0, 1, 3).flatten(2)
