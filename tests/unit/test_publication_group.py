"""A group of servers whose broadcast failed is let go at once: its end is what servers that wait notice."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch

from genac_megatron.publication import group as group_module
from genac_megatron.publication.group import Group, Joined


class Held:
    """In a process group's place."""


def test_a_failed_broadcast_holds_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(tensor: torch.Tensor, group: Held, group_src: int) -> None:
        raise RuntimeError("connection closed by peer")

    monkeypatch.setattr(group_module.dist, "broadcast", broken)
    monkeypatch.setattr(group_module.dist, "destroy_process_group", lambda group: None)
    transport: Any = Group.__new__(Group)
    joined = transport._joined = Joined("actor-0", [], Held(), None)
    seen = weakref.ref(joined.group)
    with pytest.raises(RuntimeError, match="closed by peer") as caught:
        transport._broadcast(joined, torch.zeros(1))
    assert seen() is None
    assert caught.value.__traceback__ is not None
