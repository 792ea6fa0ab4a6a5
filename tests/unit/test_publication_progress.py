"""How ranks that have no part in a publication's buckets wait for it: with a limit, and for whom."""

from __future__ import annotations

import threading
import time

import pytest
import torch.distributed as dist

from genac_megatron.errors import PeerLost
from genac_megatron.publication.progress import Progress


def test_a_stage_waits_for_its_turn_and_an_idle_rank_for_all() -> None:
    progress = Progress([0, 4, 8], 30.0, "publication of actor 3", dist.HashStore())
    seen: list[str] = []

    def source(stage: int) -> None:
        assert progress.turn(stage)
        for bucket in range(3):
            seen.append(f"{stage}.{bucket}")
            progress.tell(stage, bucket)
        progress.end(stage, ok=True)

    threads = [threading.Thread(target=source, args=(stage,)) for stage in (2, 1, 0)]
    for thread in threads:
        thread.start()
    progress.wait_for_all()
    assert seen == [f"{stage}.{bucket}" for stage in range(3) for bucket in range(3)]
    for thread in threads:
        thread.join()


def test_a_stage_learns_that_the_one_before_failed() -> None:
    progress = Progress([0, 4], 30.0, "publication of actor 3", dist.HashStore())
    progress.end(0, ok=False)
    progress.end(0, ok=True)  # the first word counts
    assert not progress.turn(1)
    progress.end(1, ok=False)
    progress.wait_for_all()


def test_a_source_that_goes_silent_is_named_and_one_that_is_slow_is_waited_for() -> None:
    progress = Progress([0, 4], 0.5, "publication of actor 3", dist.HashStore())

    def slow() -> None:
        for bucket in range(4):
            time.sleep(0.25)
            progress.tell(0, bucket)
        progress.end(0, ok=True)
        progress.tell(1, 7)

    thread = threading.Thread(target=slow)
    thread.start()
    with pytest.raises(PeerLost) as caught:
        progress.wait_for_all()
    thread.join()
    assert "rank 4 sent nothing for 0.5 s, after 8 buckets" in str(caught.value)
    assert "publication of actor 3, pipeline stage 1" in str(caught.value)


def test_a_stage_that_waits_for_its_turn_is_not_lost_while_an_earlier_one_moves() -> None:
    progress = Progress([0, 4, 8], 0.5, "publication of actor 3", dist.HashStore())

    def slow() -> None:
        for bucket in range(5):
            time.sleep(0.25)
            progress.tell(0, bucket)
        progress.end(0, ok=True)
        progress.end(1, ok=True)

    thread = threading.Thread(target=slow)
    thread.start()
    assert progress.turn(2)
    thread.join()


def test_an_idle_rank_that_nobody_tells_the_end_says_how_far_each_stage_came() -> None:
    progress = Progress([0, 4], 0.2, "publication of actor 3", dist.HashStore())
    progress.tell(0, 6)
    with pytest.raises(PeerLost, match=r"nothing was sent for 0\.2 s, after 7, no buckets of each stage"):
        progress.wait_until_over()


def test_what_was_told_is_removed() -> None:
    store = dist.HashStore()
    before = store.num_keys()
    for _ in range(20):
        progress = Progress([0], 1.0, "publication", store)
        progress.tell(0, 0)
        progress.end(0, ok=True)
        progress.wait_for_all()
        progress.forget(0)
    assert store.num_keys() == before
