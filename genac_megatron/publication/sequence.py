"""The order of a publication on a fleet: pause, flush, begin, (buckets), end, version, verify, resume.

One rank drives it, on all servers in parallel; each phase has a time limit, and an error names the phase,
the rank and the servers. What runs when it begins: `drain` aborts nothing and waits until all is done;
`in_flight` lets it go on afterwards under the new weights, its spans keeping their versions. Of these,
"retract" computes what runs its cache anew. "in_place" keeps it; and as a server with running requests keeps
its whole prefix cache, later requests may build on what the old weights made.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch.distributed as dist

from genac_megatron.errors import PeerLost
from genac_megatron.publication.checksum import Sums, differences, unpublished
from genac_megatron.publication.control import CallsFailed, Control, at_once
from genac_megatron.recipe.schema import PublicationConfig

T = TypeVar("T")
SHOWN = 5  # names in a message
NO_WEIGHTS = -1  # the version of a server whose weights are no complete set
WAY_OUT = "read that server's log; a server that was restarted gets the weights at the next publication"
logger = logging.getLogger(__name__)


class Steps:
    """Drives one publication after another."""

    def __init__(self, config: PublicationConfig, role: str, session: bool) -> None:
        self.config, self.role, self.session = config, role, session
        self.servers: Sequence[Control] = ()
        self.figures: dict[str, float] = {}
        self.version = 0

    def open(self, version: int) -> None:
        """Until the servers take buckets."""
        config, limit = self.config, self.config.control_s
        self.version = version
        mode = "retract" if config.mode == "drain" else config.pause
        if config.mode == "drain":
            self.phase("drain", lambda server: server.drain(config.drain_s, limit_s=limit))
        self.phase("pause", lambda server: server.pause(mode, limit_s=limit))
        if mode == "retract":
            self.phase("flush", lambda server: server.flush_cache(limit_s=limit))
        else:
            kept = self.phase("flush", lambda server: not server.flush_if_idle(limit_s=limit))
            self.figures["caches_kept"] = float(sum(kept))
        if self.session:
            self.phase("begin", lambda server: server.begin_anew(limit_s=limit))

    def close(self, expected: Mapping[str, Sequence[Sums]] | None) -> None:
        """From the last bucket until they generate. expected: per server name and rank; None: not checked."""
        limit, wanted = self.config.control_s, str(self.version)
        if self.session:
            self.phase("end", lambda server: server.end_update(limit_s=limit))
        self.phase("version", lambda server: server.set_version(self.version, limit_s=limit))
        found = self.phase("verify", lambda server: server.version(limit_s=limit))
        wrong = [f"server {s.name}: {v!r}" for s, v in zip(self.servers, found, strict=True) if v != wanted]
        if wrong:
            raise self._error("verify", f"after version {wanted} was set: {'; '.join(wrong)}")
        if expected is not None:
            held = self.phase("verify", lambda server: server.checksums(limit_s=self.config.verify_s))
            for server, ranks in zip(self.servers, held, strict=True):
                self._compare(server, expected[server.name], ranks)
        self.phase("resume", lambda server: server.resume(limit_s=limit))

    def _compare(self, server: Control, expected: Sequence[Sums], held: Sequence[Mapping[str, str]]) -> None:
        for rank, (wanted, found) in enumerate(zip(expected, held, strict=True)):
            wrong = differences(wanted, found)
            random = unpublished(wanted, found)
            if random:
                names = ", ".join(random[:SHOWN]) + (", ..." if len(random) > SHOWN else "")
                what = f"server {server.name}, rank {rank}: holds weights that no publication brings: {names}"
                raise self._error("verify", what)
            if not wrong:
                continue
            names = ", ".join(wrong[:SHOWN]) + (", ..." if len(wrong) > SHOWN else "")
            what = f"server {server.name}, rank {rank}: {len(wrong)} of {len(wanted)} tensors differ: {names}"
            if len(wrong) == len(wanted):
                what += " (if it says what the trainer says, its SGLang hashes otherwise: verify by version)"
            raise self._error("verify", what)

    def abandon(self, touched: bool) -> list[str]:
        """Leave no server paused; names of the lost: those that cannot be brought back to generating.

        touched: weights may be mixed, so requests end as aborted and the version becomes NO_WEIGHTS.
        """

        def recover(server: Control) -> None:
            limit = min(self.config.control_s, RECOVER_S)
            if touched:
                server.set_version(NO_WEIGHTS, limit_s=limit)
                server.abort_all(limit_s=limit)
            if self.session:
                try:
                    server.end_update(limit_s=limit)
                except PeerLost as error:  # none was open
                    logger.info("%s: %s", server.name, error.what)
            server.resume(limit_s=limit)

        try:
            at_once(self.servers, recover)
        except CallsFailed as error:
            logger.error("after a failed publication of %s: %s", self.role, error.what)
            return sorted(error.failed)
        return []

    def phase(self, name: str, call: Callable[[Control], T]) -> list[T]:
        """One call on every server. Raises PeerLost naming phase, rank and servers."""
        began = time.perf_counter()
        try:
            return at_once(self.servers, call)
        except CallsFailed as error:
            raise self._error(name, error.what) from error
        finally:
            figure = f"{FIGURE.get(name, name)}_s"
            self.figures[figure] = self.figures.get(figure, 0.0) + time.perf_counter() - began

    def _error(self, phase: str, what: str) -> PeerLost:
        return PeerLost(what, where=place(self.role, self.version, phase), way_out=WAY_OUT)


FIGURE = {"begin": "pause", "end": "resume", "version": "resume"}  # phases that share a figure
RECOVER_S = 10.0


def place(role: str, version: int, phase: str, bucket: str = "") -> str:
    """Where a publication failed."""
    of_bucket = f", bucket {bucket}" if bucket else ""
    return f"publication of {role} {version}, phase {phase}{of_bucket}, rank {dist.get_rank()}"
