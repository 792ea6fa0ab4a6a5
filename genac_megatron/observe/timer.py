"""Seconds by phase, for every rank, with or without a display."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class PhaseTimer:
    """Adds up wall-clock seconds per phase until `take`.

    A phase inside a phase is taken off the outer one, so that the phases of a step add up to at most
    its duration. Work that overlaps (asyncio, threads) is measured by its owner and given to `add`.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._seconds: dict[str, float] = {}
        self._inner: list[float] = []  # per open phase: seconds spent in phases inside it
        self._began = clock()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the block's seconds under `name`, also where it raises."""
        begin = self._clock()
        self._inner.append(0.0)
        try:
            yield
        finally:
            spent = self._clock() - begin
            self.add(name, spent - self._inner.pop())
            if self._inner:
                self._inner[-1] += spent

    def add(self, name: str, seconds: float) -> None:
        """Add seconds that were measured elsewhere."""
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds

    def credit(self, name: str, seconds: float) -> None:
        """Add seconds that the work measured itself, and take them off the phase that is open around it."""
        self.add(name, seconds)
        if self._inner:
            self._inner[-1] += seconds

    def take(self) -> dict[str, float]:
        """`time/<phase>_s` of each phase and `time/total_s` since the last take; starts from zero."""
        now = self._clock()
        figures = {f"time/{name}_s": seconds for name, seconds in self._seconds.items()}
        figures["time/total_s"] = now - self._began
        self._seconds, self._began = {}, now
        return figures
