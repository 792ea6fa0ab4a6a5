"""Qwen3 (dense): Llama with a norm on each head's query and key."""

from genac_megatron.models.families.base import Family
from genac_megatron.models.families.reading import refuse

FAMILY = Family(
    name="qwen3",
    architecture="Qwen3ForCausalLM",
    qk_norm=True,
    qkv_bias=False,
    defaults={"head_dim": 128, "num_key_value_heads": 32, "max_position_embeddings": 32_768},
    read_extras=refuse("attention_bias", "use_sliding_window"),
    keys=frozenset({"attention_bias", "use_sliding_window", "sliding_window"}),
    write_extras={"attention_bias": False, "use_sliding_window": False},
)
