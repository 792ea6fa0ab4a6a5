"""What an event loop's embedded engines wait for before a batch: answers that come from outside of the loop.

An environment answers when it does. Were the next batch made meanwhile, it would hold other requests each
time, and log-probs would differ by rounding: a run would not resume to the same bytes.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from weakref import WeakKeyDictionary


class Rounds:
    """Answers that are awaited go on together, in the order in which they were asked for."""

    def __init__(self) -> None:
        self._open = 0
        self._answered: list[asyncio.Future[None]] = []
        self._then: list[Callable[[], object]] = []

    @asynccontextmanager
    async def outside(self) -> AsyncIterator[None]:
        """Around an await of something outside; what is behind it runs once nothing else is awaited."""
        gone_on = asyncio.get_running_loop().create_future()
        self._answered.append(gone_on)
        self._open += 1
        try:
            yield
        finally:
            self._open -= 1
            if not self._open:  # not at once: who is answered last would go on first
                gone_on.get_loop().call_soon(self._go_on)
        await gone_on

    def wait(self, then: Callable[[], object]) -> bool:
        """Whether something is awaited; `then` is called once nothing is."""
        if self._answered:
            self._then.append(then)
        return bool(self._answered)

    def _go_on(self) -> None:
        if self._open:  # something was asked for meanwhile
            return
        answered, self._answered = self._answered, []
        then, self._then = self._then, []
        for future in answered:
            if not future.done():
                future.set_result(None)
        for call in then:
            call()


_rounds: WeakKeyDictionary[asyncio.AbstractEventLoop, Rounds] = WeakKeyDictionary()


def rounds(loop: asyncio.AbstractEventLoop) -> Rounds:
    """Those of an event loop."""
    return _rounds.setdefault(loop, Rounds())
