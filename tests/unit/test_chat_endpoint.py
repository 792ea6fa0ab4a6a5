"""Why a chat endpoint gave no answer: teachers, judges and benchmarks say it. Real sockets."""

from __future__ import annotations

import errno
import socket
import time
from collections.abc import Callable
from typing import Any

import pytest
from fake_chat import reply

from genac_megatron.critic.endpoint import ask_endpoint
from genac_megatron.errors import InputError, PeerLost
from genac_megatron.recipe.schema import TeacherConfig
from genac_megatron.serving import chat
from genac_megatron.serving.chat import Answer, ChatEndpoint, Unanswered

MESSAGES = [{"role": "user", "content": "2+2?"}]


@pytest.fixture
def nobody(monkeypatch: pytest.MonkeyPatch) -> str:
    """An address where nothing listens."""
    monkeypatch.setattr(chat, "FIRST_WAIT_S", 0.01)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    return f"http://127.0.0.1:{port}/v1"


def asked(url: str, **options: Any) -> Any:
    endpoint = ChatEndpoint(url, "m", attempts=2, **options)
    try:
        return endpoint.ask(MESSAGES, 8)
    finally:
        endpoint.close()


def test_nothing_listens(nobody: str) -> None:
    got = asked(nobody)
    assert isinstance(got, Unanswered)
    assert "ConnectError: Connection refused (ECONNREFUSED)" in got.cause


def test_a_name_that_does_not_resolve(nobody: str) -> None:
    got = asked("http://no-such-host.invalid/v1")
    assert isinstance(got, Unanswered)
    assert "ConnectError" in got.cause


def test_one_that_is_silent_and_one_that_hangs_up(nobody: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        began = time.monotonic()
        got = asked(f"http://127.0.0.1:{server.getsockname()[1]}/v1", timeout_s=0.2)
        assert time.monotonic() - began < 20
    assert isinstance(got, Unanswered)
    assert "no answer within 0.2 s (ReadTimeout" in got.cause


def test_a_busy_server_says_so_itself(fake_chat: Callable[..., Any]) -> None:
    server = fake_chat(lambda body: (503, {"error": "the model is loading"}))
    got = asked(server.url)
    assert isinstance(got, Unanswered)
    assert got.cause.startswith("status 503: ")
    assert "the model is loading" in got.cause


def test_a_reply_that_cannot_be_decoded(fake_chat: Callable[..., Any]) -> None:
    """httpx raises an error there that is none of the transport's."""
    server = fake_chat(lambda body: (200, reply("4")))
    http = server.http.RequestHandlerClass
    real = http.end_headers

    def claims_to_be_packed(self: Any) -> None:
        self.send_header("content-encoding", "gzip")
        real(self)

    http.end_headers = claims_to_be_packed
    got = asked(server.url)
    assert isinstance(got, Unanswered)
    assert "DecodingError" in got.cause


def test_a_teacher_that_is_down_says_why(nobody: str) -> None:
    config = TeacherConfig(kind="endpoint", url=nobody, model="m", attempts=1)
    with pytest.raises(PeerLost) as raised:
        ask_endpoint(config, [MESSAGES, MESSAGES], 8)
    assert "none of 2 requests, the last: ConnectError: Connection refused (ECONNREFUSED)" in str(
        raised.value
    )


@pytest.mark.parametrize("key", ["sekret\n", "  sekret "])
def test_white_space_around_a_key_is_left_out(
    fake_chat: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    server = fake_chat(lambda body: (200, reply("4")))
    monkeypatch.setenv("KEY", key)
    assert isinstance(asked(server.url, api_key_env="KEY"), Answer)
    assert server.headers[0]["Authorization"] == "Bearer sekret"


@pytest.mark.parametrize("key", ["sek\nret", "s\N{LATIN SMALL LETTER E WITH ACUTE}kret"])
def test_a_key_that_no_header_holds_is_refused_and_not_shown(
    nobody: str, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.setenv("KEY", key)
    with pytest.raises(InputError, match="no HTTP header can") as raised:
        asked(nobody, api_key_env="KEY")
    assert key not in str(raised.value)
    assert "ret" not in str(raised.value)


@pytest.mark.parametrize("proxy", ["socks5://127.0.0.1:9", "nonsense://127.0.0.1:9"])
def test_a_proxy_that_cannot_be_used(monkeypatch: pytest.MonkeyPatch, proxy: str) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy", "NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ALL_PROXY", proxy)
    with pytest.raises(InputError, match="proxy cannot be used"):
        asked("http://192.0.2.1/v1")


def test_no_file_descriptor_is_left(nobody: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(socket, "create_connection", refuse)  # as httpcore connects
    got = asked(nobody)
    assert isinstance(got, Unanswered)
    assert "Too many open files (EMFILE), this process may have" in got.cause
