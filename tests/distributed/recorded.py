"""What ranks exchange, noted on its way to torch.distributed's own functions."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

COLLECTIVES = (
    *("all_gather_object", "gather_object", "broadcast_object_list", "broadcast", "gather", "all_gather"),
    *("all_reduce", "barrier", "send", "recv"),
)


@contextmanager
def recorded() -> Iterator[Counter[tuple[str, int]]]:
    """Counts this rank's calls meanwhile, by function and size of the group."""
    import torch.distributed as dist

    real = {name: getattr(dist, name) for name in COLLECTIVES}
    found: Counter[tuple[str, int]] = Counter()
    lock = threading.Lock()  # a publication's worker and main thread both call

    def noted(name: str) -> Any:
        def call(*args: Any, group: Any = None, **kwargs: Any) -> Any:
            with lock:
                found[name, dist.get_world_size(group)] += 1
            return real[name](*args, group=group, **kwargs)

        return call

    for name in COLLECTIVES:
        setattr(dist, name, noted(name))
    try:
        yield found
    finally:
        for name, function in real.items():
            setattr(dist, name, function)
