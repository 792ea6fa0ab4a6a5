"""Serving in a run: what is published when, and what happens where a server is lost."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

from genac_megatron.errors import PeerLost
from genac_megatron.observe.progress import Progress
from genac_megatron.serving.engine import Engine
from genac_megatron.stages.progression import Progression
from genac_megatron.stages.served import Served
from genac_megatron.stages.turns import Turns
from genac_megatron.training.agreement import agree
from genac_megatron.training.role import Role

T = TypeVar("T")


class Serving:
    """The served roles of a run. Every method is collective but for the properties.

    `settle`, where it is set, waits for what is generated beside the trainer (stages/ahead.py).
    """

    def __init__(
        self, roles: Mapping[str, Role], served: Mapping[str, Served], at: Progression, progress: Progress
    ) -> None:
        self.roles, self.served, self.at, self.progress = roles, served, at, progress
        self.turns = Turns([role for role in roles.values() if role.config.training.offload], served)
        self.settle: Callable[[], object] | None = None
        self._stood: dict[str, str] = {}  # the base on which a role stood at its last publication

    @property
    def engines(self) -> dict[str, Engine]:
        """What generates with each role's weights."""
        return {name: served.engine for name, served in self.served.items()}

    def publish(self, *names: str, advance: bool = True, step: int | None = None) -> dict[str, float]:
        """Bring the roles' current weights to their engines under the next version, where they changed.

        Without `advance` the version stays: engines that lost their weights get them again. With `step`,
        roles whose recipe publishes every k steps are left out at the others, unless their base has moved;
        one that stands on a base that has is published with those named.
        """
        figures: dict[str, float] = {}
        moved = [name for name in self.served if advance and self._has_moved(name)]
        with self.progress.phase("publish"):
            for name in dict.fromkeys((*names, *moved)):
                if name not in self.served:  # a scalar critic
                    continue
                role = self.roles[name]
                if step is not None and step % role.config.publication.every and name not in moved:
                    continue
                unchanged = self.at.published.get(name) == role.serial
                if advance and unchanged and self.engines[name].version == self.at.versions[name]:
                    continue
                version = self.at.versions.get(name, 0) + int(advance)
                if advance:
                    self.at.published[name] = role.serial
                self.at.versions[name] = version
                stats = self._bring(name, version)
                figures[f"publish/{name}_version"] = float(version)
                figures[f"publish/{name}_s"] = stats.pop("seconds")
                figures |= {f"publish/{name}_{key}": value for key, value in stats.items()}
        return figures

    def _has_moved(self, name: str) -> bool:
        """Whether the base under a role is another one than at its last publication."""
        return name in self._stood and self._stood[name] != self.roles[name].memory.moved

    def behind(self, name: str) -> int:
        """How many updates of a role's weights its engines have not seen."""
        return self.roles[name].serial - self.at.published[name] if name in self.at.published else 0

    def figures(self) -> dict[str, float]:
        """How far the engines are behind, and the servers replaced so far where there were any."""
        behind = {f"publish/{name}_behind": float(self.behind(name)) for name in self.at.published}
        restarts = {name: served.restarts() for name, served in self.served.items()}
        return behind | {f"serving/{name}_restarts": float(n) for name, n in restarts.items() if n}

    def generating(self, act: Callable[[], T]) -> T:
        """`agree` for what asks engines: where servers were lost, it begins again with others.

        Roles rest meanwhile, and engines do afterwards, as the recipe says. Raises PeerLost where the budget
        of restarts is spent, or nothing was lost.
        """
        while True:
            self._give_missing()
            self.turns.generate()
            if self._doubted():
                self._heal()
                continue
            try:
                found = agree(act)
            except PeerLost as error:
                if not self._heal():
                    raise
                self.progress.note(f"warning: lost servers were replaced: {error.what.splitlines()[0]}")
                continue
            self.turns.train()
            if self._doubted():
                self._heal()
                self.turns.train()
            return found

    def wait_settled(self) -> None:
        """Wait for what is generated beside the trainer."""
        if self.settle is not None:
            with self.progress.phase("settle"):
                self.settle()

    def close(self) -> None:
        """End requests and engines."""
        for served in self.served.values():
            served.close()

    def restarts(self) -> int:
        """Servers replaced so far."""
        return sum(served.restarts() for served in self.served.values())

    def _bring(self, name: str, version: int, only: list[str] | None = None) -> dict[str, float]:
        """The role's weights to its engines, or to `only` the servers named. Collective."""
        served, config = self.served[name], self.roles[name].config
        drains = config.publication.mode == "drain"
        if self._has_moved(name) if config.engine.enable_lora else drains:
            self.wait_settled()
        while True:
            self.turns.publish(name)
            if served.doubted:
                self._restart_lost(name)
                only = None
                continue
            only = None if served.bare else only
            try:
                stats = served.publisher.publish(version, only=only)
            except PeerLost as error:
                if not error.agreed or not self._restart_lost(name):
                    raise
                only = None
                continue
            served.engine.version = version
            self._stood[name] = self.roles[name].memory.moved
            if only is None:
                served.filled()
            return stats

    def _doubted(self) -> bool:
        return any(served.doubted for served in self.served.values())

    def _restart_lost(self, name: str) -> list[str]:
        """A server comes up where roles rest, as in generation: then its GPU has room for all of it."""
        self.turns.restart()
        return self.served[name].restart_lost()

    def _give_missing(self) -> None:
        """Weights for the engines that gave them up with their memory, or were replaced for another role."""
        for name, served in self.served.items():
            if served.bare:
                self._give_again(name, None)
            elif lacking := served.lacking:
                self._give_again(name, list(lacking))

    def _heal(self) -> bool:
        """Replace lost servers and give them the weights that the others have; whether any was lost."""
        with self.progress.phase("heal"):
            lost = {name: found for name in self.served if (found := self._restart_lost(name))}
            for name, servers in lost.items():
                self._give_again(name, servers)
        return bool(lost)

    def _give_again(self, name: str, servers: list[str] | None) -> None:
        """Weights for servers (None: all) that have none: those of the others, unless they have moved on."""
        if self.behind(name):
            self.publish(name)
        else:
            self._bring(name, self.at.versions[name], servers)
