"""Process groups of a publication: a source and those that read its buckets, an engine's ranks."""

from __future__ import annotations

from collections.abc import Iterable

import torch.distributed as dist

from genac_megatron.training.layout import new_group

_groups: dict[tuple[int, ...], dist.ProcessGroup | None] = {}
_world: object = None  # that they were made for


def group_of(ranks: Iterable[int]) -> dist.ProcessGroup | None:
    """A group of these global ranks for worker threads, apart from all others; None of a single rank.

    The same ranks have the same group, whose limit is that of all collectives. Collective over its ranks;
    others get None.
    """
    global _world
    if _world is not dist.group.WORLD:
        _world = dist.group.WORLD
        _groups.clear()
    key = tuple(sorted(set(ranks)))
    if len(key) < 2:
        return None
    if key not in _groups:
        _groups[key] = new_group(key, "publication")
    return _groups[key]
