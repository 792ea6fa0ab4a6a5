"""Sizes of the models that the cluster recipes name, as their publishers' config.json state them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")


def _config(family: dict[str, Any], *sizes: int, **more: Any) -> dict[str, Any]:
    return {**family, **dict(zip(SIZES, sizes, strict=True)), **more}


QWEN3 = {
    "model_type": "qwen3", "head_dim": 128, "num_key_value_heads": 8, "vocab_size": 151_936,
    "max_position_embeddings": 40_960, "rope_theta": 1e6,
}  # fmt: skip
LLAMA = {
    "model_type": "llama", "head_dim": 128, "num_key_value_heads": 8, "vocab_size": 128_256,
    "tie_word_embeddings": False, "max_position_embeddings": 131_072, "rope_theta": 5e5,
    "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                     "original_max_position_embeddings": 8192},
}  # fmt: skip
MODELS = {
    "Qwen3-0.6B": _config(QWEN3, 1024, 28, 16, 3072, tie_word_embeddings=True),
    "Qwen3-1.7B": _config(QWEN3, 2048, 28, 16, 6144, tie_word_embeddings=True),
    "Qwen3-4B": _config(QWEN3, 2560, 36, 32, 9728, tie_word_embeddings=True),
    "Qwen3-8B": _config(QWEN3, 4096, 36, 32, 12_288, tie_word_embeddings=False),
    "Qwen3-14B": _config(QWEN3, 5120, 40, 40, 17_408, tie_word_embeddings=False),
    "Qwen3-32B": _config(QWEN3, 5120, 64, 64, 25_600, tie_word_embeddings=False),
    "Qwen3-30B-A3B": _config(
        QWEN3, 2048, 48, 32, 6144, model_type="qwen3_moe", num_key_value_heads=4, num_experts=128,
        num_experts_per_tok=8, moe_intermediate_size=768, norm_topk_prob=True, tie_word_embeddings=False,
    ),
    "Qwen2.5-7B": {
        "model_type": "qwen2", "hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28,
        "num_key_value_heads": 4, "intermediate_size": 18_944, "vocab_size": 152_064,
        "tie_word_embeddings": False, "max_position_embeddings": 131_072, "rope_theta": 1e6,
    },
    "Llama-3.1-8B": _config(LLAMA, 4096, 32, 32, 14_336),
    "Llama-3.1-70B": _config(LLAMA, 8192, 80, 64, 28_672),
}  # fmt: skip


def write_place(folder: Path) -> None:
    """Fill `folder` with the models' config.json and the data file that the recipes name; no weights."""
    for name, content in MODELS.items():
        (folder / "models" / name).mkdir(parents=True)
        (folder / "models" / name / "config.json").write_text(json.dumps(content))
    (folder / "data").mkdir()
    (folder / "data" / "sft.jsonl").write_text("")
