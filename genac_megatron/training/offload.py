"""A role's memory, away from its device while others need that, and back in the same place.

What moves is a storage: its bytes are copied to host memory and it is resized to nothing. Every view of it,
such as a parameter in DDP's flat buffer or an fp32 weight that the optimizer holds a slice of, is a tensor
of the same size all along, and has its values again once the storage has its bytes. Reading one meanwhile
reads no memory at all: a crash, not a wrong number.

Nothing here takes part in a collective. On a CPU the process's own memory plays the device's part.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from genac_megatron import platform
from genac_megatron.errors import GenacError
from genac_megatron.platform.fp8 import data_tensors

BLOCK = 1 << 28  # bytes of a block of host memory; torch rounds what it pins up to a power of two
LEFT = ("main_param", "main_param_sharded")  # on parameters, by Megatron's optimizers
WAY_OUT = "give the node more memory or fewer ranks, or set training.offload: false for this role"

Storage = torch.UntypedStorage


class HostCopy:
    """The storages of some tensors while they are in host memory.

    Host memory is kept for the next time, until `drop`: to pin it takes longer than to copy.
    """

    def __init__(self) -> None:
        self._blocks: list[Tensor] = []
        self._away: list[tuple[Storage, int]] = []  # with the bytes of each

    @property
    def nbytes(self) -> int:
        """Bytes that are away."""
        return sum(size for _, size in self._away)

    @torch.no_grad()
    def take(self, storages: Iterable[Storage]) -> None:
        """Move storages to host memory. Where some are away already, nothing moves.

        Raises GenacError where there is no host memory for them; all are where they were then.
        """
        if self._away:
            return
        found = [(storage, storage.nbytes()) for storage in storages]
        self._reserve(sum(size for _, size in found))
        platform.synchronize()
        for raw, place in self._pieces(found):
            place.copy_(raw, non_blocking=True)
        platform.synchronize()
        for storage, _ in found:
            storage.resize_(0)
        self._away = found

    @torch.no_grad()
    def give_back(self) -> None:
        """Move them back. Where the device has no room, torch's error is raised; it may be asked again."""
        for storage, size in self._away:
            storage.resize_(size)
        for raw, place in self._pieces(self._away):
            raw.copy_(place, non_blocking=True)
        platform.synchronize()
        self._away = []

    def drop(self) -> None:
        """Forget what is away, and let host memory go."""
        self._blocks, self._away = [], []

    def _reserve(self, size: int) -> None:
        held = sum(block.numel() for block in self._blocks)
        if held >= size:
            return
        if self._blocks and self._blocks[-1].numel() < BLOCK:
            held -= self._blocks.pop().numel()
        pinned = platform.device().type == "cuda"
        try:
            while held < size:
                block = torch.empty(min(BLOCK, size - held), dtype=torch.uint8, pin_memory=pinned)
                self._blocks.append(block)
                held += block.numel()
        except RuntimeError as error:
            self._blocks = []
            what = f"no {size / platform.GIB:.2f} GiB of host memory for what leaves the device"
            raise GenacError(f"{what}: {error}".splitlines()[0], way_out=WAY_OUT) from error

    def _pieces(self, storages: Sequence[tuple[Storage, int]]) -> Iterator[tuple[Tensor, Tensor]]:
        """Bytes on the device and their place in host memory, piece by piece."""
        at = 0
        for storage, size in storages:
            raw = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
            done = 0
            while done < size:
                block, start = divmod(at, BLOCK)
                length = min(size - done, BLOCK - start)
                yield raw[done : done + length], self._blocks[block][start : start + length]
                done, at = done + length, at + length


def storages_of(tensors: Iterable[Tensor], apart: Iterable[Tensor] = ()) -> list[Storage]:
    """The storages on this rank's device of `tensors`, each once, but for those of `apart`."""
    device = platform.device().type
    seen = {tensor.untyped_storage().data_ptr() for tensor in apart}
    found = []
    for tensor in tensors:
        if tensor.device.type != device:
            continue
        storage = tensor.untyped_storage()
        if storage.nbytes() and storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            found.append(storage)
    return found


def weights_of(models: Iterable[nn.Module], buffers: Iterable[Any]) -> Iterator[Tensor]:
    """Weights on this rank, those in DDP's flat buffers among them, and Transformer Engine's FP8 copies."""
    for model in models:
        for tensor in (*model.parameters(), *model.buffers()):
            yield from data_tensors(tensor)
        for module in model.modules():
            for copy in getattr(module, "_fp8_workspaces", {}).values():
                yield from data_tensors(copy)
    yield from (buffer.param_data for buffer in buffers if buffer.param_data is not None)


def states_of(optimizer: Any) -> Iterator[Tensor]:
    """What a Megatron optimizer holds on this rank: fp32 weights, and Adam's states of them."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        inner = getattr(part, "optimizer", None)
        if inner is None:  # it has no parameter on this rank
            continue
        for group in inner.param_groups:
            yield from group["params"]
        for state in inner.state.values():
            yield from (value for value in state.values() if isinstance(value, Tensor))


def forget_masters(models: Iterable[nn.Module]) -> None:
    """Take off parameters what an optimizer that is gone has left on them: its fp32 weights."""
    for model in models:
        for parameter in model.parameters():
            for name in LEFT:
                if hasattr(parameter, name):
                    delattr(parameter, name)


# What Megatron's token dispatchers keep of the last pass (token_dispatcher.py of 0.16.1 and 0.19.2).
LAST_PASS = (
    *("probs", "routing_map", "local_map", "local_probs"),
    *("reversed_local_input_permutation_mapping", "num_global_tokens_per_local_expert"),
)


def forget_passes(models: Sequence[Any]) -> None:
    """Let go what models keep of their last pass, all of it set anew in the next: activations that a pipeline
    stage received (and their gradients), an expert layer's routing.
    """
    for model in models:
        if hasattr(model, "set_input_tensor"):
            model.set_input_tensor(None)
        for module in model.modules():
            dispatcher = getattr(module, "token_dispatcher", None)
            for name in LAST_PASS:
                if getattr(dispatcher, name, None) is not None:
                    setattr(dispatcher, name, None)
            replay = getattr(module, "router_replay", None)
            if replay is not None:
                replay.given_TK = None
