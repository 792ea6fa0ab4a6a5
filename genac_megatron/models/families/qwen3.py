"""Qwen3 (dense): Llama with a norm on each head's query and key."""

from genac_megatron.models.families.base import Family, refuse

FAMILY = Family(
    name="qwen3",
    architecture="Qwen3ForCausalLM",
    qk_norm=True,
    qkv_bias=False,
    read_extras=refuse("attention_bias", "use_sliding_window"),
    write_extras={"attention_bias": False, "use_sliding_window": False},
)
