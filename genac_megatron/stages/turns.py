"""Whose turn it is on GPUs that the trainer shares with servers: never both with all they have.

    generate   roles with `training.offload` rest, then servers take their KV cache
    train      servers give back what `engine.release` says, then roles wake
    publish    servers give back their KV cache, roles wake, then the receiving servers take their weights
    restart    roles rest: a lost server takes its whole share at once

recipe/memory.py counts what is held in each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from genac_megatron import platform
from genac_megatron.training.agreement import agree


class Trainer(Protocol):
    """What a role does for it. Awake or at rest already, it does nothing; neither is collective."""

    def rest(self) -> None: ...

    def wake(self) -> None: ...


class Sleeper(Protocol):
    """What a role's engines do for it, collectively."""

    @property
    def sleeps(self) -> bool:
        """Whether they ever give memory back."""
        ...

    def sleep(self, *, weights: bool) -> None: ...

    def wake(self, *, cache: bool) -> None: ...


class Turns:
    """Every method is collective: where one rank finds no memory, all raise its error."""

    def __init__(self, trainers: Sequence[Trainer], engines: Mapping[str, Sleeper]) -> None:
        self._trainers, self._engines = trainers, engines

    def generate(self) -> None:
        """For requests. Engines that are bare are given weights before."""
        if self._trainers or any(engine.sleeps for engine in self._engines.values()):
            self._rest()
        for engine in self._engines.values():
            engine.wake(cache=True)

    def train(self) -> None:
        """For passes, checkpoints and whatever else looks at weights; also where nothing was generated."""
        for engine in self._engines.values():
            engine.sleep(weights=True)
        self._wake()

    def publish(self, name: str) -> None:
        """For a publication to the engines of one role; others keep the weights that they have."""
        for engine in self._engines.values():
            engine.sleep(weights=False)
        self._wake()
        if self._engines[name].sleeps:  # what the last pass left is in the way of the servers' weights
            agree(platform.empty_cache)
        self._engines[name].wake(cache=False)

    def restart(self) -> None:
        """For servers that start."""
        self._rest()

    def _rest(self) -> None:
        def rest() -> None:
            for trainer in self._trainers:
                trainer.rest()
            platform.empty_cache()  # what the last pass left, of roles that do not rest too

        agree(rest)

    def _wake(self) -> None:
        def wake() -> None:
            for trainer in self._trainers:
                trainer.wake()

        if self._trainers:
            agree(wake)
