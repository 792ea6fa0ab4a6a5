"""How long to wait for a server's answer: for as long as it is seen to work, whatever its queue.

SGLang tells nobody when a request has left its queue, unless every token is streamed. It does tell whether
its scheduler goes round (`/health_generate`, which costs a busy server nothing) and whether it has requests
(`/v1/loads`). One that goes round comes to every request in turn, and ends each at its limit of tokens.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Any

TICK_S = 0.001  # less is no time to wait
LOOKS = 3  # at a server, in the time that it may be silent


def _now() -> float:
    return asyncio.get_running_loop().time()


class Pulse:
    """When a server was last seen to work; one for all requests that wait for it in an event loop.

    look: whether it works, asked with a limit in seconds; it may not raise.
    """

    def __init__(self, look: Callable[[float], Awaitable[bool]]) -> None:
        self._look = look
        self._seen = -float("inf")
        self._looking: asyncio.Task[None] | None = None

    def seen(self) -> None:
        """It has answered somebody."""
        self._seen = _now()

    async def wait(self, work: asyncio.Future[Any], limit_s: float) -> None:
        """Until `work` is done. Raises TimeoutError after `limit_s` seconds without a sign of the server."""
        began = _now()
        while not work.done():
            silent = _now() - max(began, self._seen)
            if silent > limit_s - TICK_S:
                raise TimeoutError
            waits: set[asyncio.Future[Any]] = {work}
            next_s = limit_s / LOOKS - silent
            if next_s < TICK_S:
                waits.add(self._begin_to_look(limit_s / LOOKS))
                next_s = limit_s - silent
            await asyncio.wait(waits, timeout=next_s, return_when=asyncio.FIRST_COMPLETED)

    def _begin_to_look(self, limit_s: float) -> asyncio.Task[None]:
        if self._looking is None or self._looking.done():
            self._looking = asyncio.ensure_future(self._look_once(limit_s))
        return self._looking

    async def _look_once(self, limit_s: float) -> None:
        began = _now()
        works = False
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(limit_s):
                works = await self._look(limit_s)
        if works:
            self.seen()
        else:  # not at once again
            await asyncio.sleep(limit_s - (_now() - began))
