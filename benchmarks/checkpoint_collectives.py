"""Collectives of a save and of a resume, counted on real ranks over gloo, at dp 2 to 8 of a small model.

A step's worth of each: the save up to where training goes on, a look whether writers are done, what completes
the checkpoint after them; a resume's weights and optimizer. By kind and by whose they are, the world's or a
data-parallel group's, of rank 0; bytes are what one rank gives at most (of a broadcast, what is sent). How a
count grows with ranks is what counts here: bytes of a large model are benchmarks/scale_checkpoint.py's.

Run: python -m benchmarks.checkpoint_collectives
"""

from __future__ import annotations

import argparse
import inspect
import os
import pickle
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks.checkpoint_memory import LIMIT_S, make_role, on_ranks
from benchmarks.machine import save, table
from genac_megatron.platform.megatron import install

KINDS = (
    *("all_gather_object", "gather_object", "broadcast_object_list", "scatter_object_list"),
    *("all_gather", "all_gather_into_tensor", "gather", "broadcast", "all_reduce", "scatter", "barrier"),
    *("reduce_scatter_tensor", "all_to_all_single"),
)
GIVEN = ("object", "obj", "object_list", "tensor", "input_tensor", "input")  # what a rank gives is called
Counts = dict[tuple[str, str], list[int]]  # (kind, whose): bytes of each


@contextmanager
def counted(found: Counts) -> Iterator[None]:
    """Add each collective of torch.distributed that this rank calls; those that it makes of others once."""
    import torch.distributed as dist

    depth = 0

    def counting(kind: str, real: Callable[..., Any]) -> Callable[..., Any]:
        form = inspect.signature(real)

        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal depth
            depth += 1
            try:
                result = real(*args, **kwargs)
            finally:
                depth -= 1
            if not depth:
                given = form.bind(*args, **kwargs).arguments
                world = dist.get_world_size(given.get("group")) == dist.get_world_size()
                size = next((nbytes(given[name]) for name in GIVEN if given.get(name) is not None), 0)
                found[kind, "the world" if world and given.get("group") is None else "a group"].append(size)
            return result

        return call

    wrapped: Any = {kind: counting(kind, getattr(dist, kind)) for kind in KINDS}
    with mock.patch.multiple(dist, **wrapped), mock.patch.multiple(dist.distributed_c10d, **wrapped):
        yield


def nbytes(given: Any) -> int:
    import torch

    return given.numel() * given.itemsize if isinstance(given, torch.Tensor) else len(pickle.dumps(given))


def of_rank(rank: int, ranks: int, folder: Path) -> dict[str, Counts]:
    """What this rank calls, by act."""
    import torch.distributed as dist

    from genac_megatron.training.checkpoint import Checkpoints, load_checkpoint
    from genac_megatron.training.layout import init_world, seed_everything

    init_world(LIMIT_S)
    seed_everything(0)
    return acts(make_role(ranks), Checkpoints(folder, 9, asynchronous=True), load_checkpoint, dist.barrier)


def acts(
    role: Any, checkpoints: Any, load: Callable[..., None], barrier: Callable[[], Any]
) -> dict[str, Counts]:
    """A save that is written in the background and a resume, each act's collectives. Collective."""
    found: dict[str, Counts] = defaultdict(lambda: defaultdict(list))
    barrier()
    with counted(found["a save"]):
        checkpoints.save("ppo-00001", {role.name: role}, {})
    while checkpoints._writing():
        time.sleep(0.05)
    barrier()
    with counted(found["completing it"]):
        assert checkpoints.poll()
    for what, optimizers in (("a resume: weights", False), ("a resume: optimizer", True)):
        with counted(found[what]):
            load(checkpoints.folder / "ppo-00001", {role.name: role}, optimizers=optimizers)
    return {act: dict(counts) for act, counts in found.items()}


def rows_of(ranks: int, found: list[dict[str, Counts]]) -> list[dict[str, Any]]:
    return [
        {
            "dp": ranks,
            "act": act,
            "collective": kind,
            "whose": whose,
            "calls": len(sizes),
            "of a rank, KB": round(max(sum(one[act].get((kind, whose), [])) for one in found) / 1e3, 1),
        }
        for act, counts in found[0].items()
        for (kind, whose), sizes in counts.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--dp", type=int, nargs="+", default=[2, 4, 8])
    options = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    install()
    rows = [row for dp in options.dp for row in rows_of(dp, on_ranks(of_rank, dp))]
    print(table(rows))
    print(save("checkpoint_collectives", vars(options), rows))


if __name__ == "__main__":
    main()
