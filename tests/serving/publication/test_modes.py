"""What runs when a publication begins: it is waited for, or goes on under the new weights."""

from __future__ import annotations

import asyncio
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from genac_megatron.serving.sglang.client import Generated
from genac_megatron.serving.sglang.fleet import Endpoint
from tests.serving.publication.fleet_cases import (
    NEW,
    PROMPTS,
    Servers,
    client_of,
    config_of,
    forced,
    greedy,
    make_publisher,
    members,
    publish_case,
)

LONG = 200  # tokens: seconds of generation, also on a quiet machine
PAUSED_S = 2.0
OLD, NEWER = 41, 42  # seeds, and versions
READY = ".ready"  # beside the folder of the weights
TP2 = {"count": 2, "tp": 2}


class Live:
    """A long request to each server in the background, from when the ranks are ready to publish.

    Not before: on a quiet machine it would be over by then.
    """

    def __init__(self, endpoints: list[Endpoint], ready: Path) -> None:
        self.answers: list[Generated] = []
        self._endpoints, self._ready = endpoints, ready
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        until = time.monotonic() + 60.0
        while not self._ready.exists() and time.monotonic() < until:
            time.sleep(0.01)
        asyncio.run(self._generate())

    async def _generate(self) -> None:
        sampling = {"temperature": 0.0, "max_new_tokens": LONG, "ignore_eos": True}
        asked = [client_of(e).generate(PROMPTS[0], sampling, limit_s=400.0) for e in self._endpoints]
        self.answers = [answer for answers in await asyncio.gather(*asked) for answer in answers]

    def wait(self) -> list[Generated]:
        self._thread.join(410.0)
        assert self.answers, "the live requests did not end"
        return self.answers


def into_live_case(
    rank: int, config: Any, endpoints: list[Endpoint], folder: str, seed: int, version: int
) -> dict[str, float]:
    """Published once every server runs a request."""
    publisher = make_publisher(config, endpoints, folder, seed)
    dist.barrier()
    if rank == 0:
        Path(folder + READY).touch()
    until = time.monotonic() + 60.0
    clients = [client_of(endpoint) for endpoint in endpoints]
    while rank == 0 and not all(client.running(limit_s=10.0) for client in clients):
        assert time.monotonic() < until, "no request came to run"
        time.sleep(0.05)
    try:
        figures: dict[str, float] = publisher.publish(version)
        return figures
    finally:
        publisher.close()


def publish_into_live(
    pool: Any, endpoints: list[Endpoint], folder: Path, **publication: Any
) -> tuple[Any, list[Generated], dict[str, float]]:
    config = config_of(TP2, publication=publication)
    pool.run(publish_case, config, endpoints, str(folder), OLD, OLD)
    live = Live(endpoints, Path(f"{folder}{READY}"))
    figures = pool.run(into_live_case, config, endpoints, str(folder), NEWER, NEWER)[0]
    return config, live.wait(), figures


def test_a_paused_server_leaves_the_cores_to_others(servers: Servers, endpoints: list[Endpoint]) -> None:
    """SGLang's own loop takes a core of each server; ranks that publish on the same cores need them."""
    clients = [client_of(endpoint) for endpoint in endpoints]
    processes = [p for e in endpoints for p in members(servers.running[e.name].pid)]
    for client in clients:
        client.pause()
    try:
        before = sum(sum(process.cpu_times()[:2]) for process in processes)
        time.sleep(PAUSED_S)
        assert sum(sum(process.cpu_times()[:2]) for process in processes) - before < 0.3 * PAUSED_S
    finally:
        for client in clients:
            client.resume()
    assert all(len(answer.ids) == NEW for endpoint in endpoints for answer in greedy(endpoint))


@pytest.mark.parametrize("transport", ["tensor", pytest.param("group", marks=pytest.mark.extended)])
def test_drained(pool: Any, endpoints: list[Endpoint], tmp_path: Path, transport: str) -> None:
    """Requests that run end under the weights they began with, none is aborted."""
    config, answers, figures = publish_into_live(pool, endpoints, tmp_path, transport=transport, mode="drain")
    print(figures)
    for answer in answers:
        assert answer.finish == "length"
        assert answer.spans == ((str(OLD), LONG),)
        wanted = forced(config, OLD, PROMPTS[0], list(answer.ids))
        assert max(abs(a - b) for a, b in zip(answer.logprobs, wanted, strict=True)) <= 1e-4
    assert figures["drain_s"] > 0.1
    assert {client_of(endpoint).version() for endpoint in endpoints} == {str(NEWER)}


@pytest.mark.parametrize(
    ("transport", "pause"),
    [
        ("group", "retract"),
        ("tensor", "in_place"),
        *(pytest.param(how, "retract", marks=pytest.mark.extended) for how in ("tensor", "disk")),
    ],
)
def test_in_flight(pool: Any, endpoints: list[Endpoint], tmp_path: Path, transport: str, pause: str) -> None:
    """Requests that run go on under the new weights, and their spans tell which token is of which."""
    config, answers, figures = publish_into_live(
        pool, endpoints, tmp_path / "w", transport=transport, mode="in_flight", pause=pause
    )
    print(figures, [answer.spans for answer in answers])
    for answer in answers:
        assert answer.finish == "length"
        (old, before), (new, after) = answer.spans
        assert (old, new) == (str(OLD), str(NEWER))
        assert before > 0
        assert before + after == LONG
        ids = list(answer.ids)
        spans = [(OLD, slice(0, before))]
        if pause == "retract":  # in place, the cache of the old weights is still in use
            spans.append((NEWER, slice(before, LONG)))
        for seed, span in spans:
            wanted = forced(config, seed, PROMPTS[0], ids)[span]
            assert max(abs(a - b) for a, b in zip(answer.logprobs[span], wanted, strict=True)) <= 1e-4
    assert "drain_s" not in figures
