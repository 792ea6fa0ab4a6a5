"""Samples of one batch on their way from the responses that they are of to the ranks that train on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from genac_megatron.records import Sample
from genac_megatron.training.distributed_batch import DistributedBatch
from genac_megatron.training.role import Samples


@dataclass(frozen=True)
class Dealt:
    """A role's samples of one batch: those of this rank's responses, and where the role computes them."""

    mine: list[Sample]
    where: Samples  # a list, which every rank has whole, or what the role has taken
    carries_loss: bool = True  # a token on some rank does

    def has(self, name: str) -> bool:
        """Whether a field came along."""
        if isinstance(self.where, DistributedBatch):
            return name in self.where.known.names
        return name in self.where[0].fields


def placed(samples: list[Sample], places: Sequence[int]) -> list[Sample]:
    """The samples with their places among those of all ranks."""
    for sample, place in zip(samples, places, strict=True):
        sample.place = place
    return samples
