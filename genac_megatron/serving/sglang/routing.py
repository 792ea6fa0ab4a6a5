"""Which server takes a request: the one that has its prefix, unless that one is overloaded or resting."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from genac_megatron.serving.sglang.client import ServerClient

REST_S = 5.0  # without requests, for a server that failed one; it may be restarting


@dataclass(eq=False)
class Route:
    """A server and what is in flight on it."""

    client: ServerClient
    in_flight: int = 0
    rests_until: float = 0.0  # on the monotonic clock


def group_of(key: str) -> str:
    """What requests with the same long prefix have in common, "" for a request without a key.

    A response "p#s" shares its prompt "p" with the group's others; the state "p#s@k" and what continues from
    it share the response "p#s".
    """
    return key.rpartition("@")[0] or key.partition("#")[0]


class Router:
    """At most `limit` requests in flight on each server; the others wait, oldest first.

    A group's requests go to one server by rendezvous hashing, so that others keep their groups where a server
    is lost; to the least loaded where that one has a quarter of `limit` more in flight, is full or rests.
    """

    def __init__(self, clients: Sequence[ServerClient], limit: int) -> None:
        self.routes = [Route(client) for client in clients]
        self.limit = limit
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._loop: asyncio.AbstractEventLoop | None = None

    async def take(self, group: str) -> Route:
        """Wait for a place on a server; give it back."""
        loop = asyncio.get_running_loop()
        if loop is not self._loop:  # what was in flight in a loop that is gone is in flight no more
            self._loop = loop
            self._waiting.clear()
            for route in self.routes:
                route.in_flight = 0
        while (found := self._choose(group)) is None:
            turn = loop.create_future()
            self._waiting.append(turn)
            try:
                await turn
            except asyncio.CancelledError:
                if turn.done() and not turn.cancelled():
                    self._wake()
                raise
        found.in_flight += 1
        return found

    def give_back(self, route: Route) -> None:
        route.in_flight = max(0, route.in_flight - 1)
        self._wake()

    def rest(self, route: Route) -> None:
        """Send nothing there for REST_S seconds, if there is another server."""
        route.rests_until = time.monotonic() + REST_S

    def _choose(self, group: str) -> Route | None:
        now = time.monotonic()
        up = [route for route in self.routes if route.rests_until <= now] or self.routes
        least = min(up, key=lambda route: route.in_flight)
        if least.in_flight >= self.limit:
            return None
        home = max(up, key=lambda route: _weight(group, route.client.name)) if group else least
        overloaded = home.in_flight >= min(self.limit, least.in_flight + max(1, self.limit // 4))
        return least if overloaded else home

    def _wake(self) -> None:
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                return


def _weight(group: str, server: str) -> bytes:
    return hashlib.blake2b(f"{group}\0{server}".encode(), digest_size=8).digest()
