"""A pass that a role's ranks have made, and whose result the others have yet to learn.

Roles on disjoint ranks work at once where both passes are launched before either is collected: a launch
waits for nobody outside the role's block. Where roles share ranks, these make one pass after the other, in
the order of the launches.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch
import torch.distributed as dist

from genac_megatron import platform
from genac_megatron.training.layout import Layout

NEED_FINITE = ("loss", "grad_norm")  # of a training step's stats

T = TypeVar("T")


class Launched(Generic[T]):
    """A pass and its result.

    mine: what this rank knows of the result, None where it knows nothing; a layout's last stage knows all.
    finish: makes the result of it, on every rank; raises what the result is refused for.
    """

    def __init__(self, layout: Layout, groups: Any, mine: Any, finish: Callable[[Any], T]) -> None:
        self._layout, self._groups, self._mine, self._finish = layout, groups, mine, finish
        self._found: tuple[T] | None = None

    def result(self) -> T:
        """The result, the same on every rank. Collective over the world the first time.

        Launched passes are collected in the same order on every rank.
        """
        if self._found is None:
            self._found = (self._finish(_from(self._layout.output_rank, self._mine, None)),)
        return self._found[0]

    def spoilt(self) -> bool:
        """Whether a training step's result will be refused, so that another update on top of it is in vain.

        Collective over the block, whose ranks all learn it; False on others.
        """
        if self._groups is None:
            return False
        stats = self._mine[0]
        finite = all(math.isfinite(stats.get(key, 0.0)) for key in NEED_FINITE)  # losses: on last stages
        told = torch.tensor([float(not finite)], device=platform.device())
        dist.all_reduce(told, group=self._groups.intra_dist_opt)
        return bool(told.item())

    def for_ranks_of(self, other: Layout) -> T | None:
        """The result, for what `other`'s ranks do next; None on ranks that are in neither block.

        Of log-probs and values alone: a step's result may be refused, which all ranks must learn at once.

        Collective: over this block alone where it holds all of `other`'s ranks, else over the world.
        """
        if not set(other.ranks) <= set(self._layout.ranks):
            return self.result()
        if self._groups is None:
            return None
        return self._finish(_from(self._layout.output_rank, self._mine, self._groups.intra_dist_opt))


def _from(rank: int, value: Any, group: Any) -> Any:
    """`value` of a global rank, on all ranks of a group; None: of the world."""
    if dist.get_world_size(group) == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=rank, group=group)
    return box[0]
