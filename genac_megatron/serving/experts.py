"""A mixture of experts in transformers' memory: the names that its files have, and what routers choose."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from genac_megatron.errors import GenacError

if TYPE_CHECKING:
    from genac_megatron.records import Experts

GATE_UP, DOWN = ".experts.gate_up_proj", ".experts.down_proj"


def by_file_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """`tensors` of a model in memory, with views of each expert's gate, up and down in place of stacks.

    transformers keeps gate over up [experts, 2 ffn, hidden] and down [experts, hidden, ffn]; in files every
    expert has three tensors of its own.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.endswith(GATE_UP):
            base = name.removesuffix("gate_up_proj")
            for expert, stacked in enumerate(tensor):
                gate, up = stacked.chunk(2)
                found |= {f"{base}{expert}.gate_proj.weight": gate, f"{base}{expert}.up_proj.weight": up}
        elif name.endswith(DOWN):
            base = name.removesuffix("down_proj")
            found |= {f"{base}{expert}.down_proj.weight": down for expert, down in enumerate(tensor)}
        else:
            found[name] = tensor
    return found


def routers(model: nn.Module) -> list[nn.Module]:
    """What chooses experts, layer by layer; none where the model is dense.

    A router's forward returns (logits, gates, chosen experts [tokens, top-k]).
    """
    return [module for name, module in model.named_modules() if name.endswith(".mlp.gate")]


def as_experts(chosen: np.ndarray[Any, Any], experts: int, where: str) -> Experts:
    """Choices [tokens, layers, top-k] of an engine in the fewest bytes.

    Raises GenacError where one is no expert, or a token has the same expert twice in a layer: then they were
    not recorded where they should have been (a buffer's zeros).
    """
    ordered = np.sort(chosen, axis=-1)
    if chosen.size and (ordered.min() < 0 or ordered.max() >= experts):
        raise GenacError(f"experts {ordered.min()} to {ordered.max()} of {experts} were chosen", where=where)
    if (ordered[..., 1:] == ordered[..., :-1]).any():
        raise GenacError("a token was sent to one expert twice in a layer", where=where)
    return chosen.astype(np.uint8 if experts <= 256 else np.uint16)


class RecordingCache(DynamicCache):
    """A cache that also keeps which experts every position was sent to."""

    def __init__(self, capacity: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.capacity = capacity
        self._rooms: dict[int, Tensor] = {}  # per layer [b, capacity, top-k]

    @contextmanager
    def recording(self, model: PreTrainedModel) -> Iterator[None]:
        """While what `model` chooses in passes with this cache is noted."""
        hooks = [
            router.register_forward_hook(partial(self._note, layer))
            for layer, router in enumerate(routers(model))
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _note(self, layer: int, _router: Any, _inputs: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
        keys: Any = self.layers[layer].keys  # attention comes first: this pass's positions are its last
        batch, end = keys.shape[0], keys.shape[2]
        chosen = output[2].unflatten(0, (batch, -1))
        if layer not in self._rooms:
            self._rooms[layer] = chosen.new_zeros((batch, self.capacity, chosen.shape[2]), dtype=torch.int16)
        self._rooms[layer][:, end - chosen.shape[1] : end] = chosen

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep, in this order, the rows `indices` [n] of the batch; a row may be named more than once."""
        super().batch_select_indices(indices)
        self._rooms = {layer: room.index_select(0, indices) for layer, room in self._rooms.items()}

    def chosen(self, row: int, positions: Tensor) -> np.ndarray[Any, Any]:
        """Experts [n, layers, top-k] of a row's positions [n]."""
        layers = [self._rooms[layer][row, positions] for layer in range(len(self._rooms))]
        return torch.stack(layers, dim=1).cpu().numpy()
