"""Work that is begun ahead and taken in order: no short episode comes before a long one, none is lost."""

from __future__ import annotations

import asyncio
import heapq
import random
import statistics
import threading
from collections.abc import Callable, Iterator

import pytest

from genac_megatron.stages.queue import Queue

BATCH, AHEAD, STEPS, SLOTS = 8, 3, 24, 20
Episode = tuple[int, float]  # its number, and how long it takes


def lengths(count: int) -> list[float]:
    """Most are short, a few are many times as long."""
    draw = random.Random(3)
    return [draw.lognormvariate(0.0, 1.2) for _ in range(count)]


@pytest.fixture
def queue() -> Iterator[Callable[..., Queue[int, list[Episode]]]]:
    made: list[Queue[int, list[Episode]]] = []

    def make(episodes: list[float], begun: list[int], second_s: float) -> Queue[int, list[Episode]]:
        """Batches of episodes on servers that decode some of them at a time, oldest first."""
        slots = asyncio.Semaphore(SLOTS)

        async def one(number: int) -> Episode:
            async with slots:
                begun.append(number)
                await asyncio.sleep(episodes[number] * second_s)
                return number, episodes[number]

        async def play(step: int) -> list[Episode]:
            first = (step - 1) * BATCH
            return list(await asyncio.gather(*(one(n) for n in range(first, first + BATCH))))

        made.append(Queue(AHEAD, lambda step: step, play))
        return made[-1]

    yield make
    for one in made:
        one.close()


def first_done(episodes: list[float]) -> list[list[Episode]]:
    """The rule that is not used: as many under way as here, a batch is of the first that are done, and what
    would be older than AHEAD steps is thrown away.
    """
    following, under_way, batches = iter(enumerate(episodes)), list[tuple[float, int, int]](), []
    now = 0.0
    for step in range(STEPS):
        batch: list[Episode] = []
        under_way = [one for one in under_way if step - one[2] <= AHEAD]
        heapq.heapify(under_way)
        while len(batch) < BATCH:
            while len(under_way) < SLOTS and (new := next(following, None)) is not None:
                heapq.heappush(under_way, (now + new[1], new[0], step))
            now, number, _ = heapq.heappop(under_way)
            batch.append((number, episodes[number]))
        batches.append(batch)
    return batches


def test_batches_are_of_what_was_begun_first_however_long_it_takes(
    queue: Callable[..., Queue[int, list[Episode]]],
) -> None:
    """Each batch holds the very episodes that its prompts are, so its lengths are those of the actor. By who
    is done first, batches are of shorter ones than the actor has, at the beginning and for good.
    """
    episodes, begun = lengths(BATCH * STEPS * 4), list[int]()
    made, most = queue(episodes, begun, 1e-3), 0
    batches: list[list[Episode]] = []
    for step in range(1, STEPS + 1):
        batches.append(made.next(step, STEPS).future.result(30.0))
        made.taken()
        most = max(most, len(begun) - BATCH * step)
    taken = [number for batch in batches for number, _ in batch]
    assert taken == list(range(BATCH * STEPS)), "all that was begun, each once, in order"
    assert 0 < most <= BATCH * AHEAD, "servers have more to do than a batch, and a bound to it"

    mean = statistics.fmean(episodes)
    own = [statistics.fmean(length for _, length in batch) for batch in batches]
    assert own == [statistics.fmean(episodes[n * BATCH : (n + 1) * BATCH]) for n in range(STEPS)]
    others = [statistics.fmean(length for _, length in batch) for batch in first_done(episodes)]
    assert others[0] < 0.5 * own[0]
    assert statistics.fmean(others) < 0.8 * mean, "what a bound on age throws away is the long ones"
    assert statistics.fmean(own) == pytest.approx(mean, rel=0.2)


def test_what_failed_is_begun_again_and_the_others_are_not() -> None:
    tries: list[int] = []

    async def play(step: int) -> int:
        tries.append(step)
        if step == 2 and tries.count(2) == 1:
            raise ValueError("lost")
        return step

    made = Queue(AHEAD, lambda step: step, play)
    try:
        assert made.next(1, 3).future.result(10.0) == 1
        made.settle()
        assert sorted(tries) == [1, 2, 3], "no more than the stage has"
        made.taken()
        failed = made.next(2, 3)
        with pytest.raises(ValueError, match="lost"):
            failed.future.result(10.0)
        made.again(failed)
        assert failed.future.result(10.0) == 2
        made.taken()
        assert made.next(3, 3).future.result(10.0) == 3
        assert sorted(tries) == [1, 2, 2, 3]
    finally:
        made.close()


def test_what_was_done_before_is_taken_first() -> None:
    played: list[int] = []

    async def play(step: int) -> int:
        played.append(step)
        return step

    made = Queue(1, lambda step: step, play)
    made.put(4, 4, 40)
    made.put(5, 5, 50)
    try:
        for step, wanted in ((4, 40), (5, 50), (6, 6)):
            assert made.next(step, 6).future.result(10.0) == wanted
            made.taken()
        assert played == [6]
    finally:
        made.close()


def test_closing_ends_what_is_under_way_and_its_thread() -> None:
    ended: list[int] = []

    async def play(step: int) -> int:
        try:
            await asyncio.sleep(60.0)
        finally:
            ended.append(step)
        return step

    made = Queue(2, lambda step: step, play)
    made.next(1, 9)
    made.call(lambda: None)
    made.close()
    assert sorted(ended) == [1, 2, 3]
    assert not any(thread.name == "ahead" for thread in threading.enumerate())
