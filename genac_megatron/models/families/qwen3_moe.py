"""Qwen3-MoE: Qwen3 with a mixture of experts in every layer, routed by softmax."""

from genac_megatron.models.families.base import Family
from genac_megatron.models.families.reading import refuse

EXPERTS = "num_experts num_local_experts num_experts_per_tok moe_intermediate_size norm_topk_prob"
LAYERS = "decoder_sparse_step mlp_only_layers"
BALANCE = "output_router_logits router_aux_loss_coef"  # of training: here the recipe's
ATTENTION = "attention_bias sliding_window use_sliding_window"

FAMILY = Family(
    name="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    qk_norm=True,
    qkv_bias=False,
    defaults={
        "num_key_value_heads": 4,
        "max_position_embeddings": 32_768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
    },
    read_extras=refuse("attention_bias", "use_sliding_window"),
    keys=frozenset(f"{EXPERTS} {LAYERS} {BALANCE} {ATTENTION}".split()),
    write_extras={
        "attention_bias": False,
        "use_sliding_window": False,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
    moe=True,
)
