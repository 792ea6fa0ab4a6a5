"""Updates of several roles under way at once: launched one after the other, then collected."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from genac_megatron.training.launched import Launched


class Timed(Protocol):
    """What is needed of a run."""

    def phase(self, name: str) -> AbstractContextManager[None]: ...


@dataclass
class Update:
    """A role's update of one batch, launched on the role's ranks."""

    passes: Sequence[Launched[Any]]
    figures: Callable[[], dict[str, float]]  # once the passes have results


def collected(run: Timed, updates: Sequence[Update]) -> dict[str, float]:
    """The figures of all updates, in order. Collective over the world.

    The phase is what ranks wait for roles that others train, and the way of the results.
    """
    with run.phase("train_wait"):
        for update in updates:
            for one in update.passes:
                one.result()
    return {key: value for update in updates for key, value in update.figures().items()}
