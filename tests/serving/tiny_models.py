"""Tiny random transformers models, and what a plain transformers forward says about them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from genac_megatron.recipe.schema import EngineConfig
from genac_megatron.records import Completion, Request, SamplingParams
from genac_megatron.serving.embedded import EmbeddedEngine

VOCAB = 96


def tiny_config(family: str, **changes: Any) -> dict[str, Any]:
    """Two layers, grouped heads, weights large enough that next-token distributions are far from flat."""
    return {
        "model_type": family,
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "tie_word_embeddings": False,
        "initializer_range": 0.3,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
    } | changes


def plain_model(config: dict[str, Any], seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A transformers model of its own, as a trainer's exported weights would be loaded."""
    torch.manual_seed(seed)
    fields = {name: value for name, value in config.items() if name != "model_type"}
    hf_config = AutoConfig.for_model(config["model_type"], **fields)
    model = AutoModelForCausalLM.from_config(hf_config, dtype=dtype, attn_implementation="eager").eval()
    model.generation_config = GenerationConfig()  # no end-of-sequence token of the family's
    return model


def make_engine(
    config: dict[str, Any], model: PreTrainedModel | None = None, **engine: Any
) -> EmbeddedEngine:
    """An fp32 engine, with the model's weights as version 0 where one is given."""
    made = EmbeddedEngine(config, EngineConfig(**{"dtype": "fp32", **engine}), "cpu")
    if model is not None:
        made.load_weights(0, model.named_parameters())
    return made


def request(ids: Sequence[int], new: int = 12, *, seed: int = 0, key: str = "", **params: Any) -> Request:
    return Request(tuple(ids), SamplingParams(new, **params), seed, key)


def complete_all(engine: EmbeddedEngine, requests: Sequence[Request]) -> list[Completion]:
    """All requests at once, in one event loop."""

    async def run() -> list[Completion]:
        return list(await asyncio.gather(*(engine.complete(one) for one in requests)))

    return asyncio.run(run())


def prompts(count: int, seed: int = 0, shortest: int = 1, longest: int = 20) -> list[tuple[int, ...]]:
    """Random prompts of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(shortest, longest + 1, (count,), generator=generator).tolist()
    return [tuple(torch.randint(0, VOCAB, (n,), generator=generator).tolist()) for n in lengths]


@torch.no_grad()
def forced_logprobs(
    model: PreTrainedModel, ids: Sequence[int], response: Sequence[int], temperature: float = 1.0
) -> list[float]:
    """log p of each response token given what precedes it: one forward, no cache, no padding."""
    logits = model(torch.tensor([[*ids, *response]])).logits[0].float()
    logprobs = torch.log_softmax(logits / temperature, dim=-1)[len(ids) - 1 : -1]
    return logprobs.gather(1, torch.tensor([*response])[:, None])[:, 0].tolist()
