"""What several unit tests share."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from fake_chat import Answer, FakeChat

from genac_megatron.serving import chat


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
