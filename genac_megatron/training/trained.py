"""What of a role is trained, and so has gradients, an optimizer's states and a place in its checkpoints."""

from __future__ import annotations

from genac_megatron.models.families.base import Shape
from genac_megatron.models.mapping import beside_base
from genac_megatron.recipe.schema import TrainingConfig

# Of a layer, the attention and the norm before it, which Transformer Engine keeps inside the attention.
ATTENTION = (".self_attention.", ".input_layernorm.")


def is_trained(name: str, training: TrainingConfig, shape: Shape) -> bool:
    """Whether a role trains a parameter. name: in its model, wrapped or not."""
    if training.frozen:
        return False
    if training.adapter is not None:
        return beside_base(name, shape)
    return not (training.frozen_attention and any(part in name for part in ATTENTION))
