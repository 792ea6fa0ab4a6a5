"""Which server takes a request: each has as many groups of requests as any other, and a group's prefix."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from genac_megatron.serving.sglang.client import ServerClient

REST_S = 5.0  # without requests, for a server that failed one; it may be restarting


@dataclass(eq=False)
class Route:
    """A server, what is in flight on it, and who waits for it: told whether a place is theirs."""

    client: ServerClient
    in_flight: int = 0
    rests_until: float = 0.0  # on the monotonic clock
    waiting: deque[asyncio.Future[bool]] = field(default_factory=deque)


def group_of(key: str) -> str:
    """What requests with the same long prefix have in common, "" for a request without a key.

    A response "p#s" shares its prompt "p" with the group's others; the state "p#s@k" and what continues from
    it share the response "p#s".
    """
    return key.rpartition("@")[0] or key.partition("#")[0]


def home_of(number: int, servers: int, lost: Collection[int]) -> int:
    """Which of `servers` takes group `number`: every rank that misses the same ones says the same.

    Groups go to servers in turn. A lost server's are dealt in turn over the others, the last of them first:
    so of groups 0 to n the fullest server has one more than the emptiest at most, whichever are lost, and no
    group leaves a server that is there.
    """
    turn, home = divmod(number, servers)
    gone = sorted(lost)
    if home not in gone or len(gone) == servers:
        return home
    left = [server for server in reversed(range(servers)) if server not in gone]
    return left[(turn * len(gone) + gone.index(home)) % len(left)]


class Router:
    """At most `limit` requests in flight on each server; the others wait for theirs, oldest first.

    A group's requests go to one server, so that they share its prefix cache: by the number that `deal` gave
    the group, else in turn as groups come, from server `first` on. While a server rests the others have its
    groups.
    """

    def __init__(self, clients: Sequence[ServerClient], limit: int, first: int = 0) -> None:
        self.routes = [Route(client) for client in clients]
        self.limit, self.first = limit, first
        self._dealt: Mapping[str, int] = {}
        self._seen: dict[str, int] = {}  # groups that nobody dealt, in this event loop
        self._loop: asyncio.AbstractEventLoop | None = None

    def deal(self, numbers: Mapping[str, int]) -> None:
        """The groups to come, with numbers from 0 and without gaps over all ranks; in place of the last."""
        self._dealt = dict(numbers)

    async def take(self, group: str) -> Route:
        """Wait for a place on the group's server; give it back."""
        loop = asyncio.get_running_loop()
        if loop is not self._loop:  # what was in flight in a loop that is gone is in flight no more
            self._loop, self._seen = loop, {}
            for route in self.routes:
                route.in_flight = 0
                route.waiting.clear()
        while (route := self._home(group)).in_flight >= self.limit:
            turn: asyncio.Future[bool] = loop.create_future()
            route.waiting.append(turn)
            try:
                if await turn:  # the place of one that has left
                    return route
            except asyncio.CancelledError:
                if turn.done() and not turn.cancelled() and turn.result():
                    self.give_back(route)
                raise
        route.in_flight += 1
        return route

    def give_back(self, route: Route) -> None:
        while route.waiting:
            turn = route.waiting.popleft()
            if not turn.done():
                turn.set_result(True)
                return
        route.in_flight = max(0, route.in_flight - 1)

    def rest(self, route: Route) -> None:
        """Send nothing there for REST_S seconds, if there is another server; who waits for it goes there."""
        route.rests_until = time.monotonic() + REST_S
        while route.waiting:
            turn = route.waiting.popleft()
            if not turn.done():
                turn.set_result(False)

    def _home(self, group: str) -> Route:
        now = time.monotonic()
        lost = [place for place, route in enumerate(self.routes) if route.rests_until > now]
        if not group:
            up = [route for place, route in enumerate(self.routes) if place not in lost] or self.routes
            return min(up, key=lambda route: route.in_flight + len(route.waiting))
        number = self._dealt.get(group)
        if number is None:
            number = self._seen.setdefault(group, self.first + len(self._seen))
        return self.routes[home_of(number, len(self.routes), lost)]
