"""A pass that a role's ranks have made, and whose result the others have yet to learn.

Roles on disjoint ranks work at once where both passes are launched before either is collected: a launch
waits for nobody outside the role's block. Where roles share ranks, these make one pass after the other, in
the order of the launches.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Generic, TypeVar, cast

import numpy as np
import torch
import torch.distributed as dist

from genac_megatron import platform
from genac_megatron.training.distributed_batch import DistributedBatch, Scores
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
            self._found = (self._finish(_from(self._layout.output_rank, self._mine)),)
        return self._found[0]


class ScoredPass(Launched[T]):
    """A pass over a batch's samples, which gives figures per trained token besides.

    stats: what the last stage knows of the pass, the same few figures whatever the batch. finish: takes them,
    and a function that brings this rank its samples' figures, which every rank calls or none.
    scores: on the block's ranks, of the samples that are there.
    """

    def __init__(
        self,
        layout: Layout,
        groups: Any,
        stats: dict[str, float] | None,
        finish: Callable[[dict[str, float], Callable[[], list[list[float]]]], T],
        batch: DistributedBatch,
        scores: dict[int, Scores] | None,
    ) -> None:
        def whole(found: dict[str, float]) -> T:
            return finish(found, lambda: batch.returned(scores, layout))

        super().__init__(layout, groups, stats, whole)
        self._scores = scores

    def spoilt(self) -> bool:
        """Whether a training step's result will be refused, so that another update on top of it is in vain.

        Collective over the block, whose ranks all learn it; False on others.
        """
        if self._groups is None:
            return False
        finite = all(math.isfinite(self._mine.get(key, 0.0)) for key in NEED_FINITE)  # losses: on last stages
        told = torch.tensor([float(not finite)], device=platform.device())
        dist.all_reduce(told, group=self._groups.intra_dist_opt)
        return bool(told.item())

    def for_ranks_of(self, other: Layout) -> dict[int, Scores]:
        """Of a list: all samples' figures, for what `other`'s ranks do next; {} on ranks that are in neither
        block. Collective over the world where `other` has ranks outside this block.
        """
        if set(other.ranks) <= set(self._layout.ranks):
            return self.there()
        whole = cast("list[list[float]]", self.result())
        return {i: np.array(values, np.float32) for i, values in enumerate(whole)}

    def there(self) -> dict[int, Scores]:
        """The figures of the samples that the role's block has on this rank; {} outside. Nobody waits."""
        return self._scores or {}


def _from(rank: int, value: Any) -> Any:
    """`value` of a rank, on all ranks of the world."""
    if dist.get_world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=rank)
    return box[0]
