"""A role's SGLang servers as every rank sees them: healthy, replaced where lost, at rest or awake."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from genac_megatron.errors import PeerLost
from genac_megatron.recipe.schema import EngineConfig
from genac_megatron.serving.sglang.client import ServerClient
from genac_megatron.serving.sglang.fleet import Endpoint, Fleet
from genac_megatron.training.agreement import agree, from_first, gathered

logger = logging.getLogger(__name__)

CACHE, WEIGHTS = "kv_cache", "weights"  # SGLang's tags
GIVEN_BACK: dict[str, tuple[str, ...]] = {
    "off": (),
    "kv_cache": (CACHE,),
    "all": (CACHE, WEIGHTS),
}  # by engine.release


class Servers:
    """Made once they are healthy. Every method is collective.

    fleet: those of this rank's node, on its first rank; None elsewhere. What `release` gives back `take` gets
    again, but for what was in it: `bare` says that they wait for weights.
    """

    def __init__(self, config: EngineConfig, fleet: Fleet | None) -> None:
        self._fleet, self._budget = fleet, config.restarts
        self._tags = GIVEN_BACK[config.release]
        self.endpoints = _of_all(agree(lambda: fleet.ready() if fleet is not None else []))
        self.clients = [ServerClient(e.url, e.key, name=e.name) for e in self.endpoints]
        self.restarts = 0
        self.bare = False
        self.given: tuple[str, ...] = ()  # tags of what is given back now
        self._doubted: list[str] = []  # servers that did not do as they were told

    @property
    def sleeps(self) -> bool:
        """Whether the recipe has them give memory back."""
        return bool(self._tags)

    @property
    def doubted(self) -> bool:
        """Whether some did not do as they were told: they are to be replaced before anything is asked."""
        return bool(self._doubted)

    def release(self, *tags: str) -> None:
        """Give back those of `tags` that the recipe says, for the trainer."""
        more = [tag for tag in tags if tag in self._tags and tag not in self.given]
        if more:
            self.given = (*self.given, *more)
            self._tell(ServerClient.release_memory, more)
            self.bare |= WEIGHTS in more

    def take(self, *tags: str) -> None:
        """Take that memory again, where it was given back."""
        mine = [tag for tag in tags if tag in self.given]
        if mine:
            self.given = tuple(tag for tag in self.given if tag not in mine)
            self._tell(ServerClient.resume_memory, mine)

    def replace_lost(self, doubted: Sequence[str] = ()) -> list[str]:
        """Start lost servers again, and those that are doubted; their names. They have random weights, and
        have given back what the others have.

        Raises PeerLost where the budget of restarts is spent.
        """
        fleet, resting = self._fleet, bool(self.given)
        doubted, self._doubted = [*doubted, *self._doubted], []
        found = gathered(agree(lambda: fleet.lost(resting=resting) if fleet is not None else []))
        lost = sorted({*doubted, *(name for part in found for name in part)})
        allowed = lost[: self._budget - self.restarts]

        def replace() -> list[Endpoint]:
            if fleet is None:
                return []
            fleet.restart(lost, allowed)
            return fleet.endpoints()

        self.endpoints = _of_all(agree(replace))
        self.restarts += len(lost)
        if lost and self.given:
            self._tell(ServerClient.release_memory, self.given, lost)
        return lost

    def _tell(
        self,
        call: Callable[[ServerClient, Sequence[str]], None],
        tags: Sequence[str],
        names: Sequence[str] | None = None,
    ) -> None:
        """All at once, by rank 0. Those that fail are `doubted`."""
        clients = [client for client in self.clients if names is None or client.name in names]

        def told(client: ServerClient) -> str | None:
            try:
                call(client, tags)
            except PeerLost as error:
                logger.warning("%s", error)
                return client.name
            return None

        def act() -> list[str]:
            with ThreadPoolExecutor(max(1, len(clients)), thread_name_prefix="memory") as pool:
                return [name for name in pool.map(told, clients) if name is not None]

        self._doubted += from_first(act)


def _of_all(mine: list[Endpoint]) -> list[Endpoint]:
    """The endpoints of every node, in order. Collective."""
    return sorted((e for part in gathered(mine) for e in part), key=lambda endpoint: endpoint.index)
