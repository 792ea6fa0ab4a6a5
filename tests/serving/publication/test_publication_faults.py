"""A publication that fails says where, leaves no server waiting, and the next one puts things right."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from genac_megatron.errors import EXIT_LOST
from genac_megatron.serving.sglang.fleet import Endpoint
from tests.serving.publication.fleet_cases import (
    START_S,
    Servers,
    client_of,
    config_of,
    gap,
    greedy,
    make_publisher,
    publish_case,
    reference,
    restarted,
)

# Of healthy publications too, on a busy machine; `failure_of` waits for the one that runs out.
LIMITS = {"control_s": 15.0, "send_s": 12.0, "drain_s": 15.0, "verify_s": 30.0}
PP2 = {"count": 2, "pp": 2}


def failure_of(publisher: Any, version: int) -> dict[str, Any]:
    """Of a publication that must fail: the error, and what the transport says of the servers."""
    import time

    from genac_megatron.errors import GenacError

    began = time.monotonic()
    try:
        publisher.publish(version)
    except GenacError as error:
        transport = publisher.transport
        return {
            "error": str(error),
            "code": error.exit_code,
            "lost": transport.lost,
            "usable": sorted(transport.usable),
            "seconds": time.monotonic() - began,
        }
    raise AssertionError("the publication succeeded")


def before_bucket(publisher: Any, index: int, act: Callable[[Any], Callable[[], None]]) -> None:
    """Have the source call `act(parcel)` before it delivers a bucket, and what that returned afterwards."""
    deliver = publisher.transport.deliver

    def disturbed(parcel: Any) -> None:
        after = act(parcel) if parcel.index == index else lambda: None
        try:
            deliver(parcel)
        finally:
            after()

    publisher.transport.deliver = disturbed


def signal_case(
    rank: int, config: Any, endpoints: list[Endpoint], folder: str, group: int, number: int, index: int
) -> list[Any]:
    """Published once; then a server gets a signal before bucket `index` of the second publication."""
    publisher = make_publisher(config, endpoints, folder, 11)
    publisher.publish(1)

    def send_signal(parcel: Any) -> Callable[[], None]:
        os.killpg(group, number)
        return lambda: None

    before_bucket(publisher, index, send_signal)
    failure = failure_of(publisher, 2)
    publisher.close()
    return [failure, len(publisher.plan)]


@pytest.mark.parametrize("transport", ["tensor", "group", "disk"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "hung"])
def test_an_engine_lost_mid_publication_is_named(
    pool: Any, servers: Servers, tmp_path: Path, transport: str, number: signal.Signals
) -> None:
    config = config_of(PP2, publication={"transport": transport, **LIMITS})
    with servers.fresh(tps=(1, 1)) as endpoints:
        victim, other = endpoints
        group = servers.running[victim.name].pid
        results = pool.run(
            signal_case, config, endpoints, str(tmp_path / "w"), group, number, 1, timeout=180.0
        )
        for failure, buckets in results:
            print(failure)
            assert f"server {victim.name}: " in failure["error"]
            assert "publication of actor 2, phase send" in failure["error"]
            if transport != "disk":  # there the servers load all buckets at once
                assert f"bucket 2 of {buckets}, rank 0" in failure["error"]
            assert failure["code"] == EXIT_LOST
            assert victim.name in failure["lost"]
            assert failure == results[0][0] | {"seconds": failure["seconds"]}
            assert failure["seconds"] < sum(LIMITS.values()) + 20.0
        if other.name not in results[0][0]["lost"]:  # it goes on, and its weights have no version
            assert client_of(other).version(limit_s=5.0) == "-1"
            assert len(greedy(other)) == 3
        if number == signal.SIGKILL:
            assert results[0][0]["lost"] == [victim.name]


def restart_case(
    rank: int, config: Any, endpoints: list[Endpoint], folder: str, now: list[Endpoint], only: list[str]
) -> list[float]:
    publisher = make_publisher(config, endpoints, folder, 12)
    publisher.publish(1)
    publisher.transport.set_endpoints(now)
    usable = len(publisher.transport.usable)
    figures = publisher.publish(1, only=only)
    publisher.close()
    return [usable, len(publisher.transport.usable), figures["verify_s"]]


@pytest.mark.parametrize("transport", ["tensor", "group"])
def test_a_restarted_engine_gets_the_weights_alone(
    pool: Any, servers: Servers, tmp_path: Path, transport: str
) -> None:
    """It is another instance at the same address; the other servers are left in peace."""
    config = config_of(PP2, publication={"transport": transport, "control_s": 30.0})
    with servers.fresh(tps=(1, 1)) as endpoints:
        again = servers.running[endpoints[0].name]
        pool.run(publish_case, config, endpoints, str(tmp_path), 3, 3)
        again.stop()
        again.start()
        again.wait_healthy(START_S)
        assert gap(greedy(endpoints[0]), reference(config, 3)) > 1e-4
        now = [restarted(endpoints[0]), endpoints[1]]
        results = pool.run(restart_case, config, endpoints, str(tmp_path), now, [endpoints[0].name])
        assert all(result[:2] == [1, 2] for result in results)
        for endpoint in endpoints:
            assert gap(greedy(endpoint), reference(config, 12)) <= 1e-4


def altered_case(
    rank: int, config: Any, endpoints: list[Endpoint], folder: str, version: int
) -> dict[str, Any]:
    """One element of a tensor is changed on its way; the next publication is as it should be."""
    publisher = make_publisher(config, endpoints, folder, 21)

    def alter(parcel: Any) -> Callable[[], None]:
        right = parcel.flat[0].clone()
        parcel.flat[0] += 1.0

        def restore() -> None:
            parcel.flat[0] = right

        return restore

    before_bucket(publisher, 1, alter)
    failure = failure_of(publisher, version)
    failure["name"] = publisher.plan[1].tensors[0][0]
    del publisher.transport.deliver
    publisher.publish(version)
    failure["usable_after"] = sorted(publisher.transport.usable)
    publisher.close()
    return failure


@pytest.mark.parametrize("transport", ["tensor", "group", "disk"])
def test_an_altered_tensor_is_named(
    pool: Any, endpoints: list[Endpoint], tmp_path: Path, transport: str
) -> None:
    config = config_of(PP2, publication={"transport": transport, "control_s": 30.0})
    results = pool.run(altered_case, config, endpoints, str(tmp_path / "w"), 500)
    for failure in results:
        print(failure["error"])
        layer = failure["name"].removesuffix(".weight").rpartition(".")[0]
        place = "publication of actor 500, phase verify, rank 0: "
        assert f"{place}server {endpoints[0].name}, rank 0: 1 of 34" in failure["error"]
        assert layer in failure["error"]
        assert failure["lost"] == failure["usable"] == []
        assert failure["usable_after"] == sorted(endpoint.name for endpoint in endpoints)
    for endpoint in endpoints:
        assert gap(greedy(endpoint), reference(config, 21)) <= 1e-4


def unreachable_case(rank: int, config: Any, endpoints: list[Endpoint], folder: str) -> dict[str, Any]:
    publisher = make_publisher(config, endpoints, folder, 31)
    publisher.publish(600)
    publisher.transport.set_endpoints([*endpoints, Endpoint("tiny/none", "http://127.0.0.1:9", "", 1, "cpu")])
    failure = failure_of(publisher, 601)
    publisher.close()
    return failure


def test_a_failure_before_the_first_byte_leaves_the_old_weights_in_use(
    pool: Any, endpoints: list[Endpoint], tmp_path: Path
) -> None:
    config = config_of(PP2, publication={"transport": "tensor", **LIMITS})
    for failure in pool.run(unreachable_case, config, endpoints, str(tmp_path)):
        assert "phase drain" in failure["error"]
        assert "server tiny/none: " in failure["error"]
        assert failure["lost"] == ["tiny/none"]
        assert failure["usable"] == sorted(endpoint.name for endpoint in endpoints)
    for endpoint in endpoints:
        assert gap(greedy(endpoint), reference(config, 31)) <= 1e-4
        assert client_of(endpoint).version() == "600"
