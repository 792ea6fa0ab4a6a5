"""How far a publication has come, for ranks that have no part in its buckets.

Each pipeline stage's source writes it to the world's store. The next stage's source waits there for its turn,
and idle ranks for the end, which the store tells them: no collective, so nothing is exchanged per bucket but
a source's few bytes. A wait ends with an error once nothing has moved for as long as a collective may take.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from genac_megatron.errors import PeerLost

LONGEST_PAUSE_S = 0.1  # between two looks of a source
DONE, FAILED = "done", "failed"
OVER = "over"  # the publication, however it went
_count = 0  # publications of this process's world; each is collective, so all ranks count alike


class Progress:
    """One publication's. Every rank of the world makes one, in the same order.

    sources: the global rank of each pipeline stage's source. limit_s: without any movement. name: of the
    publication, for messages. A world of one rank needs no store.
    """

    def __init__(
        self, sources: Sequence[int], limit_s: float, name: str, store: dist.Store | None = None
    ) -> None:
        global _count
        _count += 1
        self.sources, self.limit_s, self.name = list(sources), limit_s, name
        if store is None and len(sources) and dist.get_world_size() > 1:
            store = c10d._get_default_store()
        self._store = None if store is None else dist.PrefixStore(f"publication/{_count}", store)
        self._ended: set[int] = set()

    def tell(self, stage: int, bucket: int) -> None:
        """The stage's source has sent a bucket."""
        self._say(stage, str(bucket + 1))

    def end(self, stage: int, ok: bool) -> None:
        """The stage's source sends nothing more. The first call counts."""
        if stage not in self._ended:
            self._ended.add(stage)
            self._say(stage, DONE if ok else FAILED)

    def _say(self, stage: int, word: str) -> None:
        if self._store is not None:
            self._store.set(str(stage), word)

    def turn(self, stage: int) -> bool:
        """Wait until the stages before `stage` have sent everything; whether all went well.

        One after the other: while a stage moves, those that wait for it say nothing.
        """
        return all(self.wait(each) for each in range(stage))

    def wait_for_all(self) -> None:
        """Wait until every source has ended, well or not."""
        for stage in range(len(self.sources)):
            self.wait(stage)

    def wait(self, stage: int) -> bool:
        """Wait for a stage's end; whether it went well. Raises PeerLost after `limit_s` without movement."""
        if self._store is None:
            return True
        key, seen, since, pause = str(stage), "", time.monotonic(), 0.001
        while True:
            said = self._store.get(key).decode() if self._store.check([key]) else ""
            if said in (DONE, FAILED):
                return said == DONE
            now = time.monotonic()
            if said != seen:
                seen, since = said, now
            elif now - since > self.limit_s:
                raise PeerLost(
                    f"rank {self.sources[stage]} sent nothing for {self.limit_s:g} s, after {seen or 'no'} "
                    "buckets",
                    where=f"{self.name}, pipeline stage {stage}",
                    way_out="read that rank's log",
                )
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_S)

    def over(self) -> None:
        """There is an outcome for all ranks: idle ones may come for it.

        The key stays: no exchange says that the latest rank has seen it (a broadcast goes down a tree, and
        its source returns once its own neighbours have it).
        """
        if self._store is not None:
            self._store.set(OVER, DONE)

    def wait_until_over(self) -> None:
        """Wait, without asking again and again, until there is an outcome. Raises PeerLost after `limit_s`
        without movement.
        """
        if self._store is None:
            return
        seen: list[str] | None = None
        while True:
            try:
                self._store.wait([OVER], timedelta(seconds=self.limit_s))
            except dist.DistStoreError:
                keys = [str(stage) for stage in range(len(self.sources))]
                said = [self._store.get(k).decode() if self._store.check([k]) else "" for k in keys]
                if said == seen:
                    raise PeerLost(
                        f"nothing was sent for {self.limit_s:g} s, after "
                        f"{', '.join(each or 'no' for each in said)} buckets of each stage",
                        where=self.name,
                        way_out=f"read the logs of ranks {', '.join(map(str, self.sources))}",
                    ) from None
                seen = said
            else:
                return

    def forget(self, stage: int) -> None:
        """Remove what was told of a stage, once nobody waits any more."""
        if self._store is not None:
            self._store.delete_key(str(stage))
