"""What the tests of the real model run on every rank, and what they compare it with."""

from __future__ import annotations

import asyncio
import functools
import gc
from pathlib import Path
from typing import Any

import torch

TEXT = (
    "The moon has no air, so there is no sound there, and the sky is black even at noon. When astronauts "
    "walked on it, they could talk only by radio. A feather and a hammer fall side by side: nothing slows "
    "the feather down. In 1971 David Scott let both go at once, and they landed together, just as Galileo "
    "had said they would. Die Erde ist 384 400 km entfernt; 3 + 4 = 7.\n"
)
QUESTION = "Why is the sky blue? Answer in two sentences."
NEW_TOKENS = 32
LAYOUTS: dict[str, dict[str, int]] = {
    "tp1": {"count": 1},
    "tp3": {"count": 3, "tp": 3},
    "pp2": {"count": 2, "pp": 2},
    "tp3-pp2": {"tp": 3, "pp": 2},
}


_kept: dict[tuple[Any, ...], Any] = {}  # the role that this rank loaded last


def load_role(hf: str, checkpoint: str, layout: dict[str, int], dtype: str) -> Any:
    """Collective: the role that a recipe with this model, checkpoint and layout gives.

    Kept until another is asked for: what the cases below do changes no weight.
    """
    key = (hf, checkpoint, tuple(sorted(layout.items())), dtype)
    if key not in _kept:
        _kept.clear()  # first: a machine has room for one
        gc.collect()
        _kept[key] = _loaded(hf, checkpoint, layout, dtype)
    return _kept[key]


def _loaded(hf: str, checkpoint: str, layout: dict[str, int], dtype: str) -> Any:
    import torch.distributed as dist

    from genac_megatron.models.registry import shape_of
    from genac_megatron.recipe.schema import RoleConfig
    from genac_megatron.training.checkpoint import load_checkpoint
    from genac_megatron.training.layout import Layout
    from genac_megatron.training.role import Role

    config = RoleConfig.model_validate(
        {
            "model": {"hf": hf, "checkpoint": checkpoint},
            "layout": layout,
            "training": {"dtype": dtype, "tokens_per_microbatch": 256},
            "engine": {"kind": "sglang", "dtype": "fp32"},
        }
    )
    place = Layout.from_config("actor", config.layout, dist.get_world_size())
    role = Role("actor", config, shape_of(config.model, None), place, place.groups())
    load_checkpoint(Path(checkpoint), {"actor": role})
    return role


def save_case(rank: int, hf: str, checkpoint: str, layout: dict[str, int], out: str) -> None:
    """Load in a layout, save in it: the checkpoint of a training that learnt nothing."""
    from genac_megatron.training.checkpoint import Checkpoints

    role = load_role(hf, checkpoint, layout, "bf16")
    Checkpoints(Path(out), keep=1, asynchronous=False).save("sft-00001", {"actor": role}, {})


def scores_case(
    rank: int, hf: str, checkpoint: str, layout: dict[str, int], texts: list[list[int]]
) -> list[tuple[list[float], Any]]:
    """fp32, per text: log-probs of its tokens and, on the last stage's ranks, logits [T, vocab]."""
    from genac_megatron.records import Sample

    role = load_role(hf, checkpoint, layout, "fp32")
    found = []
    for ids in texts:
        sample = Sample(ids, 1)
        sample.fields = {"weights": [1.0] * sample.trained}
        found.append((role.logprobs([sample])[0], logits_of(role, ids) if role.active else None))
    return found


@torch.no_grad()
def logits_of(role: Any, ids: list[int]) -> Any:
    """Megatron's logits [T, vocab] on the last stage's ranks, None on others; without a schedule."""
    import torch.distributed as dist

    (model,), layout, groups = role.models, role.layout, role.groups
    padded = ids + [0] * (-len(ids) % layout.tp)  # behind the text, where causal attention does not look
    stage, ranks = groups.pp.rank(), dist.get_process_group_ranks(groups.pp)
    if stage > 0:
        shape = (len(padded) // layout.tp, 1, role.shape.hidden)  # sequence parallelism's share
        hidden = torch.empty(shape)
        dist.recv(hidden, ranks[stage - 1], group=groups.pp)
        model.set_input_tensor(hidden)
    out = model(torch.tensor([padded]), torch.arange(len(padded))[None], None)
    if stage < layout.pp - 1:
        dist.send(out.contiguous(), ranks[stage + 1], group=groups.pp)
        return None
    parts = [torch.empty_like(out[0]) for _ in range(layout.tp)]
    dist.all_gather(parts, out[0].contiguous(), group=groups.tp)
    return torch.cat(parts, -1)[: len(ids), : role.shape.vocab]


def greedy_case(rank: int, hf: str, checkpoint: str, layout: dict[str, int], ids: list[int]) -> list[int]:
    """Publish from the layout to an embedded engine on rank 0; its greedy answer."""
    from genac_megatron.models.registry import hf_config
    from genac_megatron.publication.publisher import Publisher
    from genac_megatron.recipe.schema import EngineConfig
    from genac_megatron.records import Request, SamplingParams
    from genac_megatron.serving.embedded import EmbeddedEngine

    role = load_role(hf, checkpoint, layout, "fp32")
    if rank > 0:
        Publisher(role, []).publish(1)
        return []
    engine = EmbeddedEngine(hf_config(role.shape), EngineConfig(dtype="fp32"), "cpu")
    Publisher(role, [engine]).publish(1)
    request = Request(tuple(ids), SamplingParams(NEW_TOKENS, temperature=0.0))
    return list(asyncio.run(engine.complete(request)).ids)


def serve_case(
    rank: int,
    hf: str,
    checkpoint: str,
    layout: dict[str, int],
    endpoints: list[Any],
    folder: str,
    version: int,
) -> dict[str, float]:
    """Publish from the layout to running servers."""
    from genac_megatron.publication.factory import fleet_publisher

    role = load_role(hf, checkpoint, layout, "fp32")
    publisher = fleet_publisher(role, endpoints, Path(folder))
    try:
        figures: dict[str, float] = publisher.publish(version)
        return figures
    finally:
        publisher.close()


# --- transformers --------------------------------------------------------------------------------


def plain(folder: Path) -> Any:
    """The folder as transformers loads it, in fp32."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()


@functools.cache
def text_ids(folder: Path) -> list[int]:
    from transformers import AutoTokenizer

    ids: list[int] = AutoTokenizer.from_pretrained(folder).encode(TEXT, add_special_tokens=False)
    return ids


@functools.cache
def chat(folder: Path) -> list[int]:
    """The question through the folder's own chat template."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": QUESTION}]
    ids: list[int] = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    return ids


@torch.no_grad()
def greedy(model: Any, ids: list[int]) -> list[int]:
    """transformers' greedy continuation of exactly NEW_TOKENS tokens."""
    out = model.generate(
        torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids)),
        do_sample=False,
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
    )
    tokens: list[int] = out[0, len(ids) :].tolist()
    return tokens


@torch.no_grad()
def perplexity(model: Any, ids: list[int]) -> float:
    return float(model(torch.tensor([ids]), labels=torch.tensor([ids])).loss.exp())
