"""The limit of open files, raised, kept to and named; and what a connection that fails says."""

from __future__ import annotations

import asyncio
import os
import resource
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import pytest

from genac_megatron import platform
from genac_megatron.cli import need_files
from genac_megatron.errors import InputError, PeerLost
from genac_megatron.models.registry import shape_from_hf
from genac_megatron.recipe.estimate import open_files
from genac_megatron.recipe.schema import EngineConfig, Recipe
from genac_megatron.records import Request, SamplingParams
from genac_megatron.serving.sglang import engine as engines
from genac_megatron.serving.sglang.client import ServerClient, ServerError
from genac_megatron.serving.sglang.engine import SglangEngine, connections_each
from genac_megatron.serving.transport import system_error

MODEL = {
    "model_type": "qwen3", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "head_dim": 8,
    "num_key_value_heads": 1, "intermediate_size": 8, "vocab_size": 16, "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6, "tie_word_embeddings": True,
}  # fmt: skip
ANSWER = (
    b'{"output_ids": [5], "meta_info": {"finish_reason": {"type": "length"}, "weight_version": "1",'
    b' "output_token_logprobs": [[-0.1, 5, null]]}}'
)


@contextmanager
def soft_limit(files: int) -> Iterator[None]:
    real = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, real[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, real)


def test_the_soft_limit_is_raised_to_the_hard_one() -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with soft_limit(300):
        most = platform.raise_open_files()
        assert most == min(hard, platform.FILES) == resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def test_a_large_world_wants_its_connections_before_it_begins() -> None:
    roles = {
        name: {"model": {"family": "qwen3", "tokenizer": "builtin:tiny"}} for name in ("actor", "critic")
    }
    given = {"name": "n", "roles": roles, "world": {"ranks": 1024}, "task": {"kind": "state_tracking"}}
    recipe = Recipe.model_validate({**given, "stages": [{"kind": "ppo"}]})
    assert open_files(recipe) == 3 * 1024 + 512
    need_files(recipe, 4096)
    with pytest.raises(
        InputError, match="of 1024 ranks has up to 3584 files open, and this process may"
    ) as r:
        need_files(recipe, 1024)
    assert "ulimit -Hn" in r.value.way_out


def test_few_files_bound_what_is_in_flight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "raise_open_files", lambda: 1024)  # as where the hard limit is low
    assert connections_each(8) == (1024 - 128) // 2 // 8
    assert connections_each(1) == 448
    monkeypatch.setattr(platform, "raise_open_files", lambda: 64)
    assert connections_each(100) == 1
    config = EngineConfig(kind="sglang", engines=8)
    clients = [ServerClient(f"http://127.0.0.1:{9 + n}") for n in range(8)]
    engine = SglangEngine(clients, config, shape_from_hf(MODEL))
    assert engine.in_flight == engine._router.limit == 2
    engine.close()


PEER = f"""
import asyncio

async def answer(reader, writer):
    await reader.readuntil(b"\\r\\n\\r\\n")
    await asyncio.sleep(1.0)
    writer.write(b"HTTP/1.1 200 OK\\r\\nContent-Length: {len(ANSWER)}\\r\\n\\r\\n" + {ANSWER!r})
    writer.close()

async def main():
    peer = await asyncio.start_server(answer, "127.0.0.1", 0, backlog=2048)
    print(peer.sockets[0].getsockname()[1], flush=True)
    await peer.serve_forever()

asyncio.run(main())
"""


def test_more_requests_than_the_soft_limit_has_files() -> None:
    """300 connections at once, where 200 files may be open, to a peer in a process of its own: no SGLang."""
    peer = subprocess.Popen([sys.executable, "-c", PEER], stdout=subprocess.PIPE)
    try:
        assert peer.stdout is not None
        url = f"http://127.0.0.1:{int(peer.stdout.readline())}"
        with soft_limit(200):
            config = EngineConfig(kind="sglang", max_in_flight=300, attempts=1)
            engine = SglangEngine([ServerClient(url)], config, shape_from_hf(MODEL))
            engine.version = 1

            async def work() -> list[int]:
                asked = [Request((1, 2), SamplingParams(1), n, f"r{n}") for n in range(400)]
                return [got.ids[0] for got in await asyncio.gather(*map(engine.complete, asked))]

            assert asyncio.run(work()) == [5] * 400
    finally:
        peer.kill()
        peer.wait()
        if peer.stdout is not None:
            peer.stdout.close()


def test_no_file_left_is_named_and_is_no_servers_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "RETRY_S", 0.0)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        engine = SglangEngine(
            [ServerClient(url)], EngineConfig(kind="sglang", attempts=2), shape_from_hf(MODEL)
        )
        engine.version = 1

        async def work() -> None:
            fd = os.dup(0)
            os.close(fd)
            with soft_limit(fd):  # the next one, the lowest that is free, is none
                await engine.complete(Request((1, 2), SamplingParams(1), 1, "r"))

        with pytest.raises(InputError, match=r"2 attempts failed[\s\S]*EMFILE") as raised:
            asyncio.run(work())
        assert "ulimit -Hn" in raised.value.way_out
        assert "max_in_flight" in raised.value.way_out


def _refused() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


def test_a_refused_connection_says_so_by_both_clients() -> None:
    client = ServerClient(_refused(), name="actor/0")
    with pytest.raises(ServerError, match=r"Connection refused \(ECONNREFUSED\)") as raised:
        client.pause()
    assert not raised.value.files
    with pytest.raises(ServerError, match=r"/generate: ConnectError: .*ECONNREFUSED"):
        asyncio.run(client.generate((1, 2), {}, limit_s=900.0))
    engine = SglangEngine([client], EngineConfig(kind="sglang", attempts=1), shape_from_hf(MODEL))
    engine.version = 1
    with pytest.raises(PeerLost, match="ECONNREFUSED"):
        asyncio.run(engine.complete(Request((1, 2), SamplingParams(1), 1, "r")))


def test_each_time_limit_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """No peer lets a connection wait here on request: the connection's limit is told by its error alone."""
    client = ServerClient("http://127.0.0.1:9")
    error = client._not_answered("/generate", httpx.ConnectTimeout("late"), 900.0)
    assert "no connection within 10 s" in str(error)
    assert "900" not in str(error)
    assert "no connection within 2 s" in str(client._not_answered("/pause", httpx.ConnectTimeout(""), 2.0))
    for late in (httpx.ReadTimeout("late"), TimeoutError()):
        assert "no answer within 900 s" in str(client._not_answered("/generate", late, 900.0))


def test_the_systems_error_is_found_behind_others() -> None:
    cause = OSError(24, "Too many open files")
    outer = RuntimeError("outer")
    outer.__cause__ = OSError("All connection attempts failed")
    outer.__cause__.__cause__ = ExceptionGroup("several", [ValueError("no"), cause])
    assert system_error(outer) is cause
    loop = RuntimeError("a")
    loop.__context__ = loop.__cause__ = RuntimeError("b")
    loop.__context__.__context__ = loop
    assert system_error(loop) is None
