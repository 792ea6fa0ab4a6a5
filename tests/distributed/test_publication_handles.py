"""Memory of each rank's own, handed to servers: who makes handles, who reads them, what stays behind.

CUDA IPC is not here: shared memory takes its place, and a stand-in that counts takes the servers'. What real
servers make of it is in tests/serving/publication/test_each_rank.py, what a GPU does in tests/gpu.
"""

from __future__ import annotations

import base64
import hashlib
import io
import os
import pickle
import time
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.cases import make_role, role_config

WORLD = 4
BUCKET = 1 << 14
LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2-dp2": {"count": 4, "tp": 2},
    "tp2-pp2": {"count": 4, "tp": 2, "pp": 2},
    "dp2": {"count": 2},
}
SERVERS: dict[str, dict[str, list[int]]] = {
    "one-of-two": {"actor/0": [2, 3]},
    "out-of-order": {"actor/0": [3, 1]},
    "two-of-one": {"actor/0": [3], "actor/1": [0]},
    "all": {"actor/0": [0, 1], "actor/1": [2, 3]},
}


class CountingStandIn:
    """Stands for a server's `Control`: reads each handle once, and lets go of nothing until it is asked to.

    So it is as late as a server's second rank may be. `late()` tells what it holds now, and `came` what was
    in it when it came.
    """

    def __init__(self, endpoint: Any) -> None:
        self.endpoint, self.name = endpoint, endpoint.name
        self.handles: list[str] = []
        self.held: list[tuple[Any, str]] = []
        self.names: list[list[str]] = []  # per rank
        self.calls: list[str] = []
        self.times: list[float] = []  # of updates, by the machine's clock
        self.fails_at = -1
        self.now = ""

    def update_from_tensor(self, payloads: list[str], *, load_format: str, limit_s: float) -> None:
        from genac_megatron.errors import PeerLost

        self.calls.append("update")
        self.times.append(time.monotonic())
        if self.calls.count("update") == self.fails_at:
            raise PeerLost("it is gone")
        for rank, payload in enumerate(payloads):
            self.handles.append(payload)
            bucket = pickle.load(io.BytesIO(base64.b64decode(payload)))
            flat = bucket["flattened_tensor"]
            self.held.append((flat, digest(flat)))
            self.names += [[] for _ in range(rank + 1 - len(self.names))]
            self.names[rank] += [entry.name for entry in bucket["metadata"]]

    def late(self) -> list[str]:
        return [digest(flat) for flat, _ in self.held]

    @property
    def came(self) -> list[str]:
        return [sha for _, sha in self.held]

    def let_go(self) -> None:
        self.held, self.names, self.handles = [], [], []

    def set_version(self, version: int, **_: Any) -> None:
        self.now = str(version)

    def version(self, **_: Any) -> str:
        return self.now

    def flush_if_idle(self, **_: Any) -> bool:
        return True

    def checksums(self, **_: Any) -> list[dict[str, str]]:
        self.calls.append("checksums")
        return [{} for _ in range(self.endpoint.tp)]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return lambda *args, **kwargs: self.calls.append(name)


def digest(flat: Any) -> str:
    return hashlib.sha256(flat.numpy().tobytes()).hexdigest()


def make_publisher(
    layout: dict[str, Any], gpus: dict[str, list[int]], *, host: bool = False, **publication: Any
) -> Any:
    """A publisher to counting stand-ins on the "GPUs" of the ranks given. host: each source sends."""
    from genac_megatron.publication import fleet
    from genac_megatron.publication.publisher import Publisher
    from genac_megatron.publication.tensor import DeviceTensors, HostTensors
    from genac_megatron.recipe.schema import PublicationConfig
    from genac_megatron.serving.sglang.fleet import Endpoint

    role = make_role("actor", role_config(layout=layout), WORLD)
    engine = role.config.engine.model_copy(update={"kind": "sglang", "dtype": "fp32"})
    role.config = role.config.model_copy(update={"engine": engine})
    config = PublicationConfig.model_validate({"verify": "version", **publication})
    real, fleet.Control = fleet.Control, CountingStandIn  # type: ignore[misc,assignment]
    try:
        url = "http://127.0.0.1:9"
        endpoints = [Endpoint(name, url, "", len(ranks), "cpu") for name, ranks in gpus.items()]
        transport: Any = HostTensors(role, endpoints, config) if host else None
        transport = transport or DeviceTensors(role, endpoints, config, gpus)
    finally:
        fleet.Control = real  # type: ignore[misc]
    return Publisher(role, bucket_bytes=BUCKET, transport=transport)


def open_here() -> tuple[int, int]:
    """Open files of this process, and its files in shared memory."""
    shared = Path("/dev/shm").glob(f"torch_{os.getpid()}_*")
    return len(os.listdir("/proc/self/fd")), len(list(shared))


def counting_case(rank: int, layout: dict[str, Any], gpus: dict[str, list[int]]) -> dict[str, Any]:
    from genac_megatron.publication import tensor
    from genac_megatron.publication.plan import make_plan

    publisher = make_publisher(layout, gpus)
    transport = publisher.transport
    servers = {server.name: server for server in transport.fleet}
    made = []
    real = tensor.by_handle

    def counted(*args: Any) -> str:
        made.append(args)
        return real(*args)

    tensor.by_handle = counted
    found: dict[str, Any] = {"buckets": len(publisher.plan), "names": [], "late": True, "read": 0, "open": []}
    try:
        for version in (1, 2):
            publisher.publish(version)
            for server in servers.values():
                found["read"] += len(server.handles)
                found["late"] &= server.late() == server.came
                found["names"].append([sorted(names) for names in server.names])
                server.let_go()
    finally:
        tensor.by_handle = real
    found |= {"made": len(made), "counted": (transport.handles_made, transport.handles_read)}
    shape, layout_ = publisher.role.shape, publisher.role.layout
    publisher.plan = make_plan(shape, layout_, 4, 4 * BUCKET)  # fewer: a busy machine takes long over each
    for version in range(3, 23):
        publisher.publish(version)
        for server in servers.values():
            server.let_go()
        found["open"].append(open_here())
    publisher.close()
    return found


@pytest.mark.parametrize(
    ("layout", "servers"),
    [("tp2-dp2", "one-of-two"), ("tp2-pp2", "out-of-order"), ("dp2", "two-of-one"), ("tp2-pp2", "all")],
)
def test_handles_are_made_where_they_are_read_and_nowhere_else(pool: Any, layout: str, servers: str) -> None:
    """Each is read once, what was read is not written again while somebody holds it, and nothing piles up."""
    from genac_megatron.models.registry import shape_of
    from genac_megatron.models.sizes import hf_names

    gpus = SERVERS[servers]
    results = pool.run(counting_case, LAYOUTS[layout], gpus, timeout=300.0)
    readers = [rank for ranks in gpus.values() for rank in ranks]
    wanted = sorted(hf_names(shape_of(role_config().model, 67)))
    for rank, found in enumerate(results):
        made = 2 * found["buckets"] * readers.count(rank)
        assert found["buckets"] >= 5
        assert found["made"] == made
        assert found["counted"] == (made, made)
        assert found["late"], "memory was written again that a server had not let go of"
        leads = [ranks for ranks in gpus.values() if ranks[0] == rank]
        assert found["read"] == sum(2 * found["buckets"] * len(ranks) for ranks in leads)
        for names in (per_rank for per_rank in found["names"] if per_rank):
            assert all(each == wanted for each in names)
        assert len(set(found["open"][2:])) == 1, found["open"]
    assert sum(found["made"] for found in results) == sum(found["read"] for found in results)


def failing_case(rank: int, layout: dict[str, Any], gpus: dict[str, list[int]], kind: str, where: int) -> Any:
    """Published once; then something fails in the second publication, and the third is as the first."""
    from genac_megatron.errors import GenacError
    from genac_megatron.publication import tensor

    publisher = make_publisher(layout, gpus)
    transport = publisher.transport
    publisher.publish(1)
    real, calls = tensor.by_handle, []

    def failing(*args: Any) -> Any:
        calls.append(args)
        if len(calls) > 2:
            raise MemoryError("no room")
        return real(*args)

    if rank == where and kind == "server":
        for server in transport.fleet:
            server.fails_at = server.calls.count("update") + 2
    elif rank == where and kind == "handle":
        tensor.by_handle = failing
    elif rank == where and kind == "memory":
        allocate = transport.allocate
        transport.allocate = lambda n: failing_allocate(calls, allocate, n)
    told = ""
    try:
        publisher.publish(2)
    except GenacError as error:
        told = str(error)
    finally:
        tensor.by_handle = real
        transport.__dict__.pop("allocate", None)
    for server in transport.fleet:
        server.fails_at = -1
        server.let_go()
    recovered = [server.calls[-1:] for server in transport.fleet]  # what the leader asked for last
    unread = transport.handles_made - transport.handles_read
    publisher.publish(3)
    again = transport.handles_made - transport.handles_read
    names = [[sorted(each) for each in server.names] for server in transport.fleet if server.names]
    publisher.close()
    return {"told": told, "recovered": recovered, "unread": unread, "again": again, "names": names}


def failing_allocate(calls: list[Any], allocate: Any, nbytes: int) -> Any:
    """There is room for the two buffers that a publication begins with."""
    calls.append(nbytes)
    if len(calls) > 2:
        raise MemoryError("no room")
    return allocate(nbytes)


@pytest.mark.parametrize(
    ("kind", "where", "layout"),
    [
        ("server", 2, "tp2-pp2"),
        ("handle", 3, "tp2-dp2"),
        ("handle", 2, "tp2-pp2"),
        ("memory", 3, "tp2-pp2"),
        ("memory", 2, "tp2-pp2"),
    ],
)
def test_what_fails_on_one_rank_fails_on_all_and_nobody_waits(
    pool: Any, kind: str, where: int, layout: str
) -> None:
    results = pool.run(failing_case, LAYOUTS[layout], {"actor/0": [2, 3]}, kind, where, timeout=200.0)
    told = results[0]["told"]
    print(told)
    if kind == "server":
        assert "server actor/0: it is gone" in told
        assert "phase send, bucket 2 of" in told
        assert f"rank {where}" in told
    else:
        assert f"rank {where}: MemoryError: no room" in told
    assert all(found["told"] == told for found in results)
    assert results[0]["recovered"] == [["resume"]]  # by the leader
    assert all(found["again"] == found["unread"] <= 1 for found in results)
    names = [each for found in results for server in found["names"] for each in server]
    assert len(names) == 2
    assert names[0] == names[1] != []


def in_turn_case(rank: int, fails_at: int) -> dict[str, Any]:
    """A publication that each stage's source sends, and that may fail in the first; then one more."""
    from genac_megatron.errors import GenacError

    publisher = make_publisher(LAYOUTS["tp2-pp2"], {"actor/0": [0, 1]}, host=True)
    (server,) = publisher.transport.fleet
    server.fails_at = fails_at if rank == 0 else -1
    told = ""
    try:
        publisher.publish(1)
    except GenacError as error:
        told = str(error)
    times, asked = list(server.times), server.calls[-1:]
    server.fails_at = -1
    server.let_go()
    publisher.publish(2)
    names = [sorted(each) for each in server.names]
    publisher.close()
    return {"told": told, "times": times, "asked": asked, "names": names}


@pytest.mark.parametrize("fails_at", [-1, 2])
def test_stages_send_in_turn_and_not_after_one_that_failed(pool: Any, fails_at: int) -> None:
    """Rank 0 and rank 2 are the sources; each has a stand-in of the one server."""
    from genac_megatron.models.registry import shape_of
    from genac_megatron.models.sizes import hf_names

    results = pool.run(in_turn_case, fails_at, timeout=300.0)
    first, second = results[0], results[2]
    assert results[1]["times"] == results[3]["times"] == []
    assert first["asked"] == ["resume"]
    if fails_at < 0:
        assert {found["told"] for found in results} == {""}
        assert max(first["times"]) < min(second["times"])
    else:
        assert len(first["times"]) == fails_at
        assert second["times"] == []
        assert "server actor/0: it is gone" in first["told"]
        assert "phase send, bucket 2 of" in first["told"]
        assert {found["told"] for found in results} == {first["told"]}
    wanted = sorted(hf_names(shape_of(role_config().model, 67)))
    for one, other in zip(first["names"], second["names"], strict=True):
        assert sorted([*one, *other]) == wanted


def checked_case(rank: int, every: int | None) -> list[int]:
    """At which of seven publications a server is asked for its checksums."""
    publisher = make_publisher({"count": 1}, {"actor/0": [0]}, verify="tensors", verify_every=every)
    transport = publisher.transport
    compared: list[int] = []
    transport.steps._compare = lambda *_: compared.append(version)
    for version in range(1, 8):
        publisher.publish(version)
        for server in transport.fleet:
            server.let_go()
    publisher.close()
    return compared


@pytest.mark.parametrize(("every", "wanted"), [(1, [1, 2, 3, 4, 5, 6, 7]), (3, [1, 4, 7]), (None, [1])])
def test_weights_are_checked_again_after_so_many_publications(
    pool: Any, every: int | None, wanted: list[int]
) -> None:
    assert pool.run(checked_case, every)[0] == wanted
