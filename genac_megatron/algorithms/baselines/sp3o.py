"""SP3O ("value flattening", 2026): the value is trained at a few places of each response alone."""

from __future__ import annotations

from collections.abc import Sequence


def trained_places(length: int, at: Sequence[float], cuts: Sequence[int] | None = None) -> list[int]:
    """Indices of the tokens of a response where its value is trained: floor(share * length), each once.

    With `cuts`, each is moved to the nearest of them, the earlier of two. Every response of at least one
    token has one or more.
    """
    if not length:
        return []
    places = {min(int(share * length), length - 1) for share in at}
    if cuts is not None:
        places = {min(cuts, key=lambda cut: (abs(cut - place), cut)) for place in places}
    return sorted(places)
