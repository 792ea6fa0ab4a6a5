"""Llama 2 and 3, and models of their shape (SmolLM2, TinyLlama)."""

from genac_megatron.models.families.base import Family
from genac_megatron.models.families.reading import refuse

FAMILY = Family(
    name="llama",
    architecture="LlamaForCausalLM",
    qk_norm=False,
    qkv_bias=False,
    defaults={"max_position_embeddings": 2048},
    read_extras=refuse("attention_bias", "mlp_bias"),
    keys=frozenset({"attention_bias", "mlp_bias"}),
    write_extras={"attention_bias": False, "mlp_bias": False},
)
