"""Logits, or a scalar critic's values, of a checkpoint's role, loaded by Megatron, against transformers' of a
Hugging Face folder.

The Megatron side goes through Megatron's own loading into a model, not through this package's reader. Both
compute in fp32, one after the other, in one process: memory for the fp32 weights of one model at a time.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from genac_megatron.errors import InputError
from genac_megatron.models.families.base import Shape
from genac_megatron.tasks.tokenizer import load_tokenizer

TOLERANCE = 1e-4  # of the largest logit; fp32 rounding in another order of sums is around 1e-6
TEXT = (
    "The critic reads the problem and the answer so far, thinks, and says how likely the end is right.\n"
    "12 + 7 = 19, and 19 - 4 = 15. Paris is the capital of France; la Seine la traverse.\n"
)
RANDOM_TOKENS = 64


@torch.no_grad()
def verify(hf: Path, checkpoint: Path, role: str, shape: Shape, dtype: torch.dtype) -> float:
    """The largest difference of logits (of values), relative to the largest.

    dtype: of the folder's weights; Megatron's are rounded to it first, so that it compares the conversion and
    not the rounding. Raises InputError above TOLERANCE.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("--verify works in one process", way_out="convert first, then verify by itself")
    tokens = sample_tokens(hf, shape)
    theirs = _transformers_logits(hf, shape, tokens)
    ours = _megatron_logits(checkpoint, role, shape, dtype, tokens)
    difference = float((ours - theirs).abs().max() / theirs.abs().max())
    if not difference < TOLERANCE:
        raise InputError(
            f"{compared(shape)} differ by {difference:.2g} of the largest, more than {TOLERANCE:g}",
            where=f"{hf} and {role} of {checkpoint}",
            way_out="do not use the result; please report the model",
        )
    return difference


def compared(shape: Shape) -> str:
    """What a model of that shape says."""
    return "values" if shape.value else "logits"


def sample_tokens(hf: Path, shape: Shape) -> Tensor:
    """[1, T] ids: a text in the folder's tokenizer, then random ones."""
    text = load_tokenizer(str(hf)).encode(TEXT, add_special_tokens=False)
    random = torch.randint(shape.vocab, (RANDOM_TOKENS,), generator=torch.Generator().manual_seed(0))
    return torch.cat([torch.tensor(text), random])[None, : shape.max_positions]


def _transformers_logits(hf: Path, shape: Shape, tokens: Tensor) -> Tensor:
    """[T, vocabulary], or [T, 1] of a scalar critic."""
    from transformers import AutoModelForCausalLM, AutoModelForTokenClassification
    from transformers.utils import logging

    logging.disable_progress_bar()
    kind = AutoModelForTokenClassification if shape.value else AutoModelForCausalLM
    model = kind.from_pretrained(hf, dtype=torch.float32, attn_implementation="sdpa", local_files_only=True)
    logits: Tensor = model.eval()(tokens).logits[0].float()
    return logits


def _megatron_logits(checkpoint: Path, role: str, shape: Shape, dtype: torch.dtype, tokens: Tensor) -> Tensor:
    model = load_alone(checkpoint, role, shape)
    for parameter in model.parameters():
        parameter.copy_(parameter.to(dtype))
    device = next(model.parameters()).device
    positions = torch.arange(tokens.size(1), device=device)[None]
    given = tokens.to(device)
    labels = {"labels": given} if shape.value else {}  # which no value depends on: values are asked for so
    said: Tensor = model.eval()(given, positions, None, **labels)[0].float().cpu()
    return said[:, None] if shape.value else said[:, : shape.vocab]


def load_alone(checkpoint: Path, role: str, shape: Shape) -> Any:
    """A role's model in fp32 on this process alone, loaded from a checkpoint by Megatron."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.utils import add_prefix_for_sharding

    from genac_megatron.models.build import build_model
    from genac_megatron.recipe.schema import TrainingConfig
    from genac_megatron.training.checkpoint import WEIGHTS
    from genac_megatron.training.layout import Layout, init_world

    init_world()
    layout = Layout("verify", 0, 1)
    groups = layout.groups()
    assert groups is not None
    (model,) = build_model(shape, layout, groups, TrainingConfig(dtype="fp32", specs="torch"))
    state = model.sharded_state_dict()
    add_prefix_for_sharding(state, f"{role}.")
    model.load_state_dict(dist_checkpointing.load(state, str(checkpoint / WEIGHTS)))
    return model
