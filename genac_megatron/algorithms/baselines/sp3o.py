"""SP3O ("value flattening", 2026): the value is trained at a few places of each response alone."""

from __future__ import annotations

from collections.abc import Sequence


def trained_places(length: int, at: Sequence[float]) -> list[int]:
    """Indices of the tokens of a response where its value is trained: floor(share * length), each once.

    Every response of at least one token has one or more.
    """
    return sorted({min(int(share * length), length - 1) for share in at}) if length else []
