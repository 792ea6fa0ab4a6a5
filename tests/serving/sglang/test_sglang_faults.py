"""Servers that die, hang or talk nonsense: no sample is lost or doubled, no process is left."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from sglang_servers import START_S, Farm, client_of, engine_over, run, served_config
from tiny_models import forced_logprobs, plain_model, request

from genac_megatron.errors import InputError, PeerLost
from genac_megatron.models.registry import shape_from_hf
from genac_megatron.platform.network import spare_ports
from genac_megatron.recipe.schema import EngineConfig
from genac_megatron.records import Completion
from genac_megatron.serving.sglang.boot import group_members, shared_files
from genac_megatron.serving.sglang.client import ServerClient, ServerError
from genac_megatron.serving.sglang.engine import SglangEngine
from genac_megatron.serving.sglang.server import (
    PYTHON_VARIABLE,
    Server,
    serving_python,
)

MODEL = plain_model(served_config("qwen3"))
NEW = 300  # tokens: a second or more of decoding
ROOT = Path(__file__).resolve().parents[3]


# --- requests ------------------------------------------------------------------------------------


async def _loaded(engine: SglangEngine, count: int) -> list[asyncio.Future[Completion]]:
    """Requests under way on every server of the engine."""
    asked = [request((1, 2, n), NEW, seed=n, key=f"p{n}#0") for n in range(count)]
    tasks = [asyncio.ensure_future(engine.complete(one)) for one in asked]
    while min(client.running() for client in engine.clients) < 1:
        await asyncio.sleep(0.02)
    return tasks


def test_what_a_killed_server_was_doing_is_done_by_the_other(farm: Farm) -> None:
    servers = [farm.start(), farm.shared()]
    engine = engine_over(servers, MODEL)

    async def work() -> list[Completion]:
        tasks = await _loaded(engine, 12)
        servers[0].stop()
        return list(await asyncio.gather(*tasks))

    for n, got in enumerate(run(work())):
        assert len(got.ids) == NEW
        assert got.logprobs == pytest.approx(forced_logprobs(MODEL, (1, 2, n), got.ids), abs=1e-4)
    assert engine.stats()["batches"] == 12


def test_a_hung_server_is_left_at_the_time_limit(farm: Farm) -> None:
    servers = [farm.start(), farm.shared()]
    engine = engine_over(servers, MODEL, request_timeout_s=30.0)  # also the healthy one's
    pid = servers[0].pid
    assert pid is not None

    async def work() -> list[Completion]:
        tasks = await _loaded(engine, 8)
        os.killpg(pid, signal.SIGSTOP)
        return list(await asyncio.gather(*tasks))

    try:
        assert [len(got.ids) for got in run(work())] == [NEW] * 8
        assert servers[0].alive()
        assert not client_of(servers[0]).healthy(2.0)
    finally:
        servers[0].stop()


def test_no_server_left_is_a_message_with_every_attempt(farm: Farm) -> None:
    server = farm.start()
    engine = engine_over([server], MODEL, attempts=2)
    server.stop()
    with pytest.raises(PeerLost, match=r"2 attempts failed[\s\S]*/generate[\s\S]*/generate"):
        run(engine.complete(request((1, 2), 4)))
    with pytest.raises(ServerError, match="/pause_generation") as caught:
        engine.load_weights(1, MODEL.named_parameters())
    assert caught.value.retryable
    assert engine.version == -1


def test_a_restarted_server_is_not_believed(farm: Farm) -> None:
    """It answers with random weights: its version says that nobody published to it."""
    server = farm.start()
    engine = engine_over([server], MODEL, attempts=1)
    server.stop()
    server.start()
    server.wait_healthy(START_S)
    with pytest.raises(PeerLost, match="none were published to it"):
        run(engine.complete(request((1, 2), 4)))
    engine.load_weights(3, MODEL.named_parameters())
    assert run(engine.complete(request((1, 2), 4))).version == 3
    server.stop()


def _sample(**changes: object) -> bytes:
    meta = {
        "finish_reason": {"type": "length", "length": 2},
        "output_token_logprobs": [[-1.0, 4, None], [-2.0, 5, None]],
        "weight_versions": [{"version": "0", "start": 0, "end": 2}],
    }
    return json.dumps({"output_ids": [4, 5], "meta_info": meta | changes}).encode()


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 15\r\n\r\n<html>no</html>",
        b"HTTP/1.1 200 OK\r\nContent-Length: 4000\r\n\r\n" + _sample(),
        b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\n\r\n",
        b"SSH-2.0-OpenSSH_9.6\r\n",
        b"",
        _sample(output_token_logprobs=[[-1.0, 4, None]]),
        _sample(output_token_logprobs=[[-1.0, 4, None], [-2.0, 6, None]]),
        _sample(finish_reason={"type": "stop", "matched": "NaN happened"}),
        _sample(weight_versions=[{"version": "0", "start": 0, "end": 1}]),
        _sample(weight_versions=[{"version": "default", "start": 0, "end": 2}]),
    ],
)
def test_nonsense_is_no_sample(answer: bytes) -> None:
    """A peer that is not SGLang, or one that is broken; no real server says these things on request."""
    if answer.startswith(b"{"):
        answer = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(answer) + answer

    async def work() -> None:
        async with await asyncio.start_server(_saying(answer), "127.0.0.1") as peer:
            url = f"http://127.0.0.1:{peer.sockets[0].getsockname()[1]}"
            config = EngineConfig(kind="sglang", attempts=2)
            engine = SglangEngine([ServerClient(url)], config, shape_from_hf(served_config("qwen3")))
            engine.version = 0
            with pytest.raises(PeerLost, match="2 attempts failed"):
                await engine.complete(request((1, 2), 2))

    run(work(), 20.0)


def _saying(answer: bytes) -> Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        writer.close()

    return handle


# --- starts and ends -----------------------------------------------------------------------------


def test_a_taken_port_is_named(farm: Farm) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(PeerLost, match=f"port {port} of 127.0.0.1"):
            farm.start(port=port)


def test_another_server_on_the_port_is_not_taken_for_ours(farm: Farm) -> None:
    theirs = farm.shared()
    ours = Server(farm.spec(port=theirs.spec.port), farm.folder / "ours.log", zygote=farm.zygote)
    ours._pid = theirs.pid  # it lost the race for the port, and has not ended yet
    with pytest.raises(PeerLost, match="is not the one that answers"):
        ours.wait_healthy(20.0)


def test_a_server_that_dies_at_its_start_shows_its_log(farm: Farm) -> None:
    with pytest.raises(PeerLost, match=r"qwen3/\d+: died at its start[\s\S]*no-such-backend"):
        farm.start(args=("--attention-backend", "no-such-backend"))
    with pytest.raises(PeerLost, match="was not healthy within 0 s"):
        Server(farm.spec(), farm.folder / "late.log", zygote=farm.zygote).wait_healthy(0.0)


@pytest.mark.parametrize("tp", [1, 2])
def test_a_killed_server_leaves_no_shared_memory(farm: Farm, tp: int) -> None:
    """kill -9 from outside: nobody of its own can clean up."""
    server = farm.start(tp=tp)
    assert server.pid is not None
    held = shared_files(group_members(server.pid))
    assert held
    os.killpg(server.pid, signal.SIGKILL)
    while server.alive():
        time.sleep(0.05)
    assert all(Path(path).exists() for path in held)
    server.stop()
    assert not [path for path in held if Path(path).exists()]


def test_no_interpreter_says_how_to_get_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(PYTHON_VARIABLE, raising=False)
    with pytest.raises(InputError, match="make serve-env"):
        serving_python()
    with pytest.raises(InputError, match="no/such is no interpreter"):
        serving_python("no/such")


LAUNCHER = """
import sys, time
from pathlib import Path
from genac_megatron.serving.sglang.server import Server, ServerSpec, Zygote
python, folder, model, port, zygote, tp = sys.argv[1:]
folder = Path(folder)
spec = ServerSpec("orphan", Path(model), int(port), dtype="fp32", tp=int(tp), max_tokens=4096)
forked = Zygote(Path(python), folder / "zygote.log") if zygote == "zygote" else None
server = Server(spec, folder / "server.log", python=Path(python), zygote=forked)
server.start()
server.wait_healthy(240)
print(server.pid, flush=True)
time.sleep(600)
"""


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize(("how", "tp"), [("alone", 1), ("zygote", 2)])  # alone, each imports SGLang anew
def test_a_server_ends_with_its_launcher(farm: Farm, tmp_path: Path, how: str, tp: int) -> None:
    """All its processes do, whatever end the launcher comes to; its key is on no command line."""
    model = farm.spec().model
    command = [sys.executable, "-c", LAUNCHER, str(farm.python), str(tmp_path), str(model)]
    command += [str(spare_ports(1)[0]), how, str(tp)]
    launcher = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT, start_new_session=True, text=True)
    assert launcher.stdout is not None
    try:
        group = int(launcher.stdout.readline() or "0")
        assert group, (tmp_path / "server.log").read_text()[-2000:]
        processes = group_members(group)
        assert len(processes) >= 1 + tp  # what speaks HTTP, and its ranks
        shared = shared_files(processes)
        assert shared
        assert not any("api-key" in _command(pid) for pid in processes)
    finally:
        launcher.kill()
        launcher.wait()
        launcher.stdout.close()
    until = time.monotonic() + 20.0
    while group_members(group) and time.monotonic() < until:
        time.sleep(0.1)
    assert not group_members(group)
    assert not [path for path in shared if Path(path).exists()]


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""
