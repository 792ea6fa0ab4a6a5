"""A role's memory on its device: given back while others need it (training/offload.py moves it)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from megatron.core.distributed import DistributedDataParallel
from torch import Tensor

from genac_megatron import platform
from genac_megatron.errors import GenacError
from genac_megatron.models.families.base import Shape
from genac_megatron.models.mapping import beside_base
from genac_megatron.platform.fp8 import data_tensors
from genac_megatron.training.offload import HostCopy, forget_passes, states_of, storages_of, weights_of
from genac_megatron.training.overlap import end_gather


class BaseMemory:
    """A base's memory, of all roles that stand on it: away while every one of them rests. And how far it has
    moved, by adapters that were merged into it.

    moved: what it is called since; "": it is the recipe's. merges: how often.
    """

    def __init__(self) -> None:
        self._copy = HostCopy()
        self._roles: list[Resting] = []
        self._resting = 0
        self.moved, self.merges = "", 0

    def join(self, role: Resting) -> None:
        """One more role stands on it."""
        self._roles.append(role)

    def move(self, moved: str, merges: int, *, by: Resting) -> None:
        """It has other weights: so have all roles on it, but for the one that says so. On every rank."""
        self.moved, self.merges = moved, merges
        for role in self._roles:
            role.serial += role is not by

    def rest(self, weights: Iterable[Tensor]) -> None:
        """A role rests. Raises GenacError where there is no host memory for it; nothing has moved then."""
        if self._resting + 1 == len(self._roles):
            self._copy.take(storages_of(weights))
        self._resting += 1

    def wake(self) -> None:
        """A role that rested is awake."""
        self._copy.give_back()
        self._resting -= 1


class Resting:
    """What a Role does with its memory.

    memory: of the base that it shares; None: one of its own, which others may come to stand on.
    """

    active: bool
    shape: Shape
    chunks: list[Any]
    optimizer: Any
    serial: int  # changes whenever the weights do, on every rank of the world

    def __init__(self, memory: BaseMemory | None = None) -> None:
        self._models: list[Any] = []
        self._weights, self._states = HostCopy(), HostCopy()
        self.resting = False
        self.memory = memory or BaseMemory()
        self.memory.join(self)

    @property
    def models(self) -> list[Any]:
        """The bare models of this rank's chunks, none outside the block. Asked for, a resting role wakes, and
        updated weights that are still on their way (`overlap_param_gather`) are waited for.
        """
        self.settle()
        return self._models

    def settle(self) -> None:
        """Have all weights here, awake and gathered: passes alone may be ahead of that. Not collective."""
        self.wake()
        end_gather(self.chunks)

    def rest(self) -> None:
        """Give the device's memory back until `wake`, but for what passes need besides (NCCL, FP8 histories).

        Weights, fp32 masters and moments go to host memory, pinned where there is a GPU; gradients, which no
        step leaves to the next, are dropped. A base goes once all that stand on it rest. At rest it does
        nothing. Not collective. Raises GenacError where there is no host memory for it: nothing has moved
        then.

        Whatever needs the weights wakes the role: passes, stages, `models`. So order is for memory's sake.
        """
        if not self.active or self.resting:
            return
        self.settle()
        forget_passes(self._models)
        gradients = [buffer.grad_data for buffer in self._buffers()]
        base = self._base()
        weights = [*weights_of(self._models, self._buffers())]
        states = [*states_of(self.optimizer)] if self.optimizer is not None else []
        apart = storages_of(states, [*weights, *gradients])  # fp32 weights are their own masters
        self._weights.take(storages_of(weights, [*gradients, *base]))
        try:
            self._states.take(apart)
            self.memory.rest(base)
        except GenacError:
            self._weights.give_back()
            self._states.give_back()
            raise
        self._drop_gradients()
        self.resting = True
        platform.empty_cache()

    def wake(self) -> None:
        """Take the device's memory again, everything as it was and where it was. Awake it does nothing.

        Not collective. Where the device has no room torch's error is raised; it may be asked again.
        """
        if self.resting:
            self._weights.give_back()
            self._states.give_back()
            if self.optimizer is not None:
                self._have_gradients()
            self.memory.wake()
            self.resting = False

    def _base(self) -> list[Tensor]:
        """The weights of this rank that adapters stand beside; none of a role that is trained whole."""
        return [
            held
            for model in self._models
            if model.adapters is not None
            for name, parameter in model.named_parameters()
            if not beside_base(name, self.shape)
            for held in data_tensors(parameter)
        ]

    def _buffers(self) -> list[Any]:
        """DDP's flat buffers of weights and gradients on this rank."""
        ddp = [chunk for chunk in self.chunks if isinstance(chunk, DistributedDataParallel)]
        return [buffer for chunk in ddp for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)]

    def _drop_gradients(self) -> None:
        for buffer in self._buffers():
            buffer.grad_data.untyped_storage().resize_(0)

    def _have_gradients(self) -> None:
        """All zero, where they were dropped."""
        for gradients in (buffer.grad_data for buffer in self._buffers()):
            if not gradients.untyped_storage().nbytes():
                gradients.untyped_storage().resize_(gradients.nbytes)
                gradients.zero_()
