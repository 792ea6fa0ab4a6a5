"""What is begun in order on an event loop beside the trainer's, and is taken in that order.

The order is the whole of the rule by which work that is under way at once is shared out: whoever is done
first is not trained first. Were it so, the first batches would be of the shortest episodes, and a bound on
how old tokens may be would throw the longest away (tests/unit/test_queue.py has both rules side by side).
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Future, wait
from dataclasses import dataclass
from threading import Thread
from typing import Any, Generic, TypeVar

T = TypeVar("T")
Kind = TypeVar("Kind")


class Beside:
    """An event loop in a thread of its own."""

    def __init__(self, name: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()

    def begin(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Work under way."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def call(self, act: Callable[[], T]) -> T:
        """What `act` gives, run between two steps of what is under way."""

        async def acting() -> T:
            return act()

        return self.begin(acting()).result()

    def close(self) -> None:
        """End what is under way."""

        async def end() -> None:
            others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)
            await self._loop.shutdown_default_executor()

        self.begin(end()).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


@dataclass(eq=False)
class Begun(Generic[Kind, T]):
    """A step's work under way, or done."""

    step: int
    work: Kind  # what it was begun with
    future: Future[T]


class Queue(Generic[Kind, T]):
    """The work of a stage's steps: of the next one, and of `ahead` more.

    plan: what a step's is begun with, asked for once, in order; play: the work itself, which may be begun
    again.
    """

    def __init__(
        self,
        ahead: int,
        plan: Callable[[int], Kind],
        play: Callable[[Kind], Coroutine[Any, Any, T]],
    ) -> None:
        self.ahead = ahead
        self._plan, self._play = plan, play
        self._begun: deque[Begun[Kind, T]] = deque()
        self._beside: Beside | None = None

    def __iter__(self) -> Iterator[Begun[Kind, T]]:
        return iter(self._begun)

    def next(self, step: int, last: int) -> Begun[Kind, T]:
        """A step's, once all are begun that may be: `ahead` beyond it, up to the stage's last one."""
        following = self._begun[-1].step + 1 if self._begun else step
        for number in range(following, min(step + self.ahead, last) + 1):
            kind = self._plan(number)
            self._begun.append(Begun(number, kind, self._begin(kind)))
        assert self._begun[0].step == step
        return self._begun[0]

    def taken(self) -> None:
        """The first one has been."""
        self._begun.popleft()

    def again(self, begun: Begun[Kind, T]) -> None:
        """Begin one again that has failed."""
        begun.future = self._begin(begun.work)

    def put(self, step: int, kind: Kind, done: T) -> None:
        """One that was done before, behind those that are here."""
        future: Future[T] = Future()
        future.set_result(done)
        self._begun.append(Begun(step, kind, future))

    def settle(self) -> None:
        """Wait for all that is begun, however it ends."""
        wait([begun.future for begun in self._begun])

    def call(self, act: Callable[[], Any]) -> None:
        """Act where nothing that is under way acts meanwhile."""
        if self._beside is None:
            act()
        else:
            self._beside.call(act)

    def close(self) -> None:
        """End what is under way."""
        beside, self._beside = self._beside, None
        if beside is not None:
            beside.close()
        self._begun.clear()

    def _begin(self, kind: Kind) -> Future[T]:
        self._beside = self._beside or Beside("ahead")
        return self._beside.begin(self._play(kind))
