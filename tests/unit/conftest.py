"""What several unit tests share."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from fake_chat import Answer, FakeChat

from genac_megatron.serving import chat
from genac_megatron.tasks import grading


@pytest.fixture
def fake_chat(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Answer], FakeChat]]:
    """Starts chat endpoints; clients wait for a moment only before they ask again."""
    monkeypatch.setattr(chat, "FIRST_WAIT_S", 0.01)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    servers: list[FakeChat] = []

    def start(answer: Answer) -> FakeChat:
        servers.append(FakeChat(answer))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


@pytest.fixture(scope="session")
def math_process() -> Iterator[grading.Workers]:
    process = grading.Workers(grading._math, limit_s=60.0, name="math-verify")  # a machine may be busy
    yield process
    process.close()


@pytest.fixture
def one_math_process(math_process: grading.Workers, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks made here grade in one process; of their own, each would import sympy anew."""
    monkeypatch.setattr(grading, "Workers", lambda *_: math_process)
