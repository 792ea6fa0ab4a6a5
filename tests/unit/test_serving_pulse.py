"""A request's time limit: a queue does not count, a server that stands still does. Peers here are stubs."""

from __future__ import annotations

import asyncio
import json
import selectors
import time
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, TypeVar

import pytest

from genac_megatron.serving.sglang.client import ServerClient, ServerError
from genac_megatron.serving.sglang.pulse import Pulse

LIMIT_S = 2.0
SAMPLE = {
    "output_ids": [5],
    "meta_info": {
        "finish_reason": {"type": "length"},
        "weight_version": "1",
        "output_token_logprobs": [[-0.1, 5, None]],
    },
}


class Clock(selectors.DefaultSelector):
    """Lets no time pass while nothing happens: an event loop's clock goes on at once to what comes next."""

    now = 0.0

    def select(self, timeout: float | None = None) -> Any:
        self.now += max(0.0, timeout or 0.0)
        return super().select(0.0)


T = TypeVar("T")


def run(work: Coroutine[Any, Any, T]) -> T:
    """In an event loop without real time."""
    clock = Clock()
    loop = asyncio.SelectorEventLoop(clock)
    loop.time = lambda: clock.now  # type: ignore[method-assign]
    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        return runner.run(work)


def now() -> float:
    return asyncio.get_running_loop().time()


async def waited(pulse: Pulse, work_s: float) -> float:
    """Seconds until `work` of so many seconds, or the limit, ended it; negative for the limit."""
    began = now()
    work = asyncio.ensure_future(asyncio.sleep(work_s))
    try:
        await pulse.wait(work, LIMIT_S)
    except TimeoutError:
        return began - now()
    finally:
        work.cancel()
    return now() - began


def test_a_server_that_works_is_waited_for() -> None:
    looks = 0

    async def look(limit_s: float) -> bool:
        nonlocal looks
        looks += 1
        await asyncio.sleep(0.1)
        return True

    async def work() -> list[float]:
        pulse = Pulse(look)
        return await asyncio.gather(*(waited(pulse, 10 * LIMIT_S) for _ in range(20)))

    assert run(work()) == [pytest.approx(10 * LIMIT_S)] * 20
    assert 10 <= looks <= 30, "one look serves all requests"


@pytest.mark.parametrize("hangs", [False, True])
def test_one_that_does_not_is_left_at_the_limit(hangs: bool) -> None:
    looks = 0

    async def look(limit_s: float) -> bool:
        nonlocal looks
        looks += 1
        if hangs:
            await asyncio.sleep(1e6)
        return False

    async def work() -> list[float]:
        pulse = Pulse(look)
        return await asyncio.gather(*(waited(pulse, 1e6) for _ in range(20)))

    assert run(work()) == [pytest.approx(-LIMIT_S)] * 20
    assert looks == 2


def test_one_that_stops_working_is_left_a_limit_later() -> None:
    async def work() -> float:
        async def look(limit_s: float) -> bool:
            return now() < 5 * LIMIT_S

        return await waited(Pulse(look), 1e6)

    assert 5 * LIMIT_S < -run(work()) <= 6 * LIMIT_S


def test_one_that_stands_still_for_a_while_is_waited_for() -> None:
    async def work() -> float:
        async def look(limit_s: float) -> bool:
            return not LIMIT_S < now() < 1.6 * LIMIT_S  # as while weights are loaded

        return await waited(Pulse(look), 4 * LIMIT_S)

    assert run(work()) == pytest.approx(4 * LIMIT_S)


def test_an_answer_to_another_request_is_a_sign_too() -> None:
    async def work() -> float:
        async def look(limit_s: float) -> bool:
            return False

        pulse = Pulse(look)
        waits = asyncio.ensure_future(waited(pulse, 3 * LIMIT_S))
        for _ in range(4):
            await asyncio.sleep(0.7 * LIMIT_S)
            pulse.seen()
        return await waits

    assert run(work()) == pytest.approx(3 * LIMIT_S)


# --- the client, over HTTP -----------------------------------------------------------------------


@dataclass
class Stub:
    """Answers as SGLang would: /generate after a while, /health_generate and /v1/loads as it is told."""

    generate_s: float
    works: bool = True
    waiting: int = 1
    asked: list[str] = field(default_factory=list)

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        path = head.split()[1]
        self.asked.append(path)
        body: Any = {}
        if path == "/generate":
            await asyncio.sleep(self.generate_s)
            body = SAMPLE
        elif path.startswith("/v1/loads"):
            body = {"loads": [{"num_running_reqs": 0, "num_waiting_reqs": self.waiting}]}
        status = "200 OK" if self.works or path != "/health_generate" else "503 Service Unavailable"
        text = json.dumps(body).encode()
        writer.write(f"HTTP/1.1 {status}\r\nContent-Length: {len(text)}\r\n\r\n".encode() + text)
        writer.close()


def over_http(stub: Stub, act: Callable[[ServerClient], Awaitable[Any]]) -> Any:
    async def work() -> Any:
        async with await asyncio.start_server(stub, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            client = ServerClient(f"http://127.0.0.1:{port}", name="actor/0")
            try:
                return await act(client)
            finally:
                client.close()

    return asyncio.run(work())


def test_a_stubs_queue_does_not_count() -> None:
    stub = Stub(4 * LIMIT_S)
    (got,) = over_http(stub, lambda client: client.generate((1, 2), {}, limit_s=LIMIT_S))
    assert got.ids == (5,)
    assert stub.asked.count("/generate") == 1
    assert stub.asked.count("/health_generate") >= 3


@pytest.mark.parametrize("stub", [Stub(1e4, works=False), Stub(1e4, waiting=0)], ids=["hangs", "lost it"])
def test_a_stub_that_hangs_or_has_lost_the_request_is_left(stub: Stub) -> None:
    began = time.monotonic()
    with pytest.raises(ServerError, match=f"no answer within {LIMIT_S:g} s") as raised:
        over_http(stub, lambda client: client.generate((1, 2), {}, limit_s=LIMIT_S))
    assert raised.value.retryable
    assert time.monotonic() - began >= LIMIT_S


def test_other_calls_have_their_limit_whatever_the_stub_does() -> None:
    stub = Stub(60.0)
    with pytest.raises(ServerError, match=r"no answer within 0\.3 s"):
        over_http(stub, lambda client: client._ask("/generate", {}, 0.3))
    assert stub.asked == ["/generate"]


def test_a_request_that_is_given_up_ends_its_connection_to_the_stub() -> None:
    async def act(client: ServerClient) -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await client.generate((1, 2), {}, limit_s=60.0)
        await asyncio.sleep(0.1)
        assert client._here is not None
        assert not client._here[0]._transport._pool.connections  # type: ignore[attr-defined]

    over_http(Stub(60.0), act)
