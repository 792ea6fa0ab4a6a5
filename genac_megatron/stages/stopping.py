"""Being asked to stop: a flag that signals set, looked at between steps."""

from __future__ import annotations

import os
import signal


class StopFlag:
    """SIGUSR1, SIGTERM and SIGINT ask for a checkpoint and an end at the next safe point."""

    def __init__(self) -> None:
        self.asked = False

    def install(self, *numbers: signal.Signals) -> StopFlag:
        """Take the signals over (none given: all); early, so that one during the start is not lost."""
        for number in numbers or (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        return self

    def _on_signal(self, number: int, _frame: object) -> None:
        if self.asked and number == signal.SIGINT:
            os._exit(130)  # asked a second time: leave at once, the last checkpoint stands
        self.asked = True
