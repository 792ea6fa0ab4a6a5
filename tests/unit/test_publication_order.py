"""Device collectives of a publication: never from two threads. Its peak of memory leaves training's alone.

No GPU is here: a stub transport on a device that is said to be one, and a stub of torch's allocator.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from genac_megatron import platform
from genac_megatron.errors import GenacError
from genac_megatron.publication import memory
from genac_megatron.publication.disk import Disk
from genac_megatron.publication.group import Group
from genac_megatron.publication.memory import PeakMemory
from genac_megatron.publication.publisher import OneThread, Publisher, may_overlap
from genac_megatron.publication.tensor import DeviceTensors
from genac_megatron.publication.transport import InProcess, Parcel, Transport

GPU, CPU = torch.device("cuda"), torch.device("cpu")


class StubTransport(Transport):
    def connect(self, version: int, sources: Sequence[int]) -> None: ...

    def begin(self, version: int) -> None: ...

    def takes_part(self, source: int) -> bool:
        return True

    def send(self, parcel: Parcel) -> None: ...

    def close(self, version: int) -> None: ...


class Recorded(Publisher):
    """The real loop over buckets; joining and sending take a while and note when, inside the real check."""

    def __init__(self, transport: Transport) -> None:
        self.transport, self.plan = transport, cast(Any, range(4))
        self.overlap = may_overlap(transport, platform.device())
        self._one_thread = OneThread()
        self.seen: list[str] = []
        self.threads: set[int] = set()

    def _joined(self, version: int, index: int) -> Parcel:
        with self._launching():
            self.seen.append(f"join {index}")
            time.sleep(0.02)
        return cast(Parcel, SimpleNamespace(index=index, source=0))

    def _deliver(self, parcel: Parcel, progress: Any, ready: bool) -> None:
        assert ready
        with self._launching():
            self.threads.add(threading.get_ident())
            time.sleep(0.05)
            self.seen.append(f"sent {parcel.index}")


@pytest.fixture
def send(monkeypatch: pytest.MonkeyPatch) -> Any:
    def run(device: torch.device, transport: Transport, overlap: bool | None = None) -> Recorded:
        monkeypatch.setattr(platform, "device", lambda: device)
        made = Recorded(transport)
        made.overlap = made.overlap if overlap is None else overlap
        made._send_buckets(1, cast(Any, None))
        return made

    return run


def test_on_a_gpu_a_bucket_is_joined_when_the_one_before_has_arrived(send: Any) -> None:
    made = send(GPU, StubTransport())
    assert made.seen == [f"{what} {index}" for index in range(4) for what in ("join", "sent")]
    assert threading.get_ident() not in made.threads


def test_overlap_on_a_gpu_is_stopped_before_it_can_deadlock(send: Any) -> None:
    with pytest.raises(GenacError, match="two threads would launch device collectives"):
        send(GPU, StubTransport(), overlap=True)


def test_elsewhere_joining_and_sending_overlap(send: Any) -> None:
    without = StubTransport()
    without.on_device = False
    for device, transport in ((CPU, StubTransport()), (GPU, without)):
        seen = send(device, transport).seen
        assert seen.index("join 1") < seen.index("sent 0")


@pytest.mark.parametrize(
    ("kind", "overlaps"), [(InProcess, False), (Group, False), (DeviceTensors, False), (Disk, True)]
)
def test_which_ways_overlap_on_a_gpu(kind: type[Transport], overlaps: bool) -> None:
    transport = object.__new__(kind)
    assert may_overlap(transport, GPU) == overlaps
    assert may_overlap(transport, CPU)


def test_one_thread_after_another_is_no_fault() -> None:
    order = OneThread()
    for _ in range(2):
        with order.launching():
            pass
    with pytest.raises(ValueError, match="inside"), order.launching():
        raise ValueError("inside")
    with order.launching():
        pass


class StubAllocator:
    """torch.cuda's figures of one device."""

    def __init__(self) -> None:
        self.now = self.peak = 0

    def take(self, size: int) -> None:
        self.now += size
        self.peak = max(self.peak, self.now)

    def is_available(self) -> bool:
        return True

    def current_device(self) -> int:
        return 3

    def memory_allocated(self, device: int) -> int:
        assert device == 3, "whichever thread asks"
        return self.now

    def max_memory_allocated(self, device: int) -> int:
        assert device == 3
        return self.peak


@pytest.mark.parametrize(("trained", "peak"), [(1000, 1000), (100, 350)])
def test_a_publications_peak_leaves_trainings_with_a_stub_allocator(
    monkeypatch: pytest.MonkeyPatch, trained: int, peak: int
) -> None:
    stub = StubAllocator()
    monkeypatch.setattr(memory, "torch", SimpleNamespace(cuda=stub))
    stub.take(trained)
    stub.take(50 - trained)
    with PeakMemory() as measured:
        stub.take(300)
        time.sleep(20 * memory.PERIOD_S)
        stub.take(-300)
    assert measured.device == 300
    assert stub.peak == peak, "it was not reset"


def test_a_stages_turn_is_asked_once_and_by_those_with_a_part_in_it() -> None:
    """Of a plan of two stages with two buckets each; the second one's turn comes after a failure."""
    asked: list[int] = []

    class Turns:
        def turn(self, stage: int) -> bool:
            asked.append(stage)
            return stage == 0

    def made(joins: bool, sends: bool) -> Any:
        transport = StubTransport()
        transport.in_turn = True
        transport.takes_part = lambda source: sends  # type: ignore[method-assign]
        publisher = Recorded(transport)
        publisher.plan = cast(Any, [SimpleNamespace(stage=stage) for stage in (0, 0, 1, 1)])
        publisher._sources = [0, 1]
        publisher._joiner = cast(Any, SimpleNamespace(takes_part=lambda bucket: joins))
        return publisher

    for joins, sends in ((True, True), (False, True), (True, False)):
        asked.clear()
        told = [made(joins, sends)._turn(index, Turns()) for index in range(4)]
        assert (told, asked) == ([True, True, False, True], [0, 1])
    asked.clear()
    assert [made(False, False)._turn(index, Turns()) for index in range(4)] == [True] * 4
    assert asked == []


def test_blocks_that_servers_have_read_are_collected_with_a_stub_of_cuda(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At a publication's end, well or not: the allocator has none of them back before."""
    collected: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "ipc_collect", lambda: collected.append("collected"))
    made = DeviceTensors.__new__(DeviceTensors)
    made._slots, made._exported = {0: torch.zeros(8)}, {0}
    made.release()
    assert (collected, made._slots, made._exported) == (["collected"], {}, set())
