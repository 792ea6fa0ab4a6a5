"""How often ranks meet for a checkpoint: the same few times whatever their number."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import torch.distributed as dist

from benchmarks.checkpoint_collectives import Counts, acts, counted
from tests.distributed.cases import train
from tests.distributed.test_checkpoint_shards import role_in


def case(rank: int, folder: str) -> dict[str, Counts]:
    from genac_megatron.training.checkpoint import Checkpoints, load_checkpoint

    role = role_in({})
    train(role, 1)
    return acts(role, Checkpoints(Path(folder), 2, asynchronous=True), load_checkpoint, dist.barrier)


def test_a_save_and_a_resume_meet_as_often_as_is_said(pool: Any, tmp_path: Path) -> None:
    """docs/performance.md has these counts: one more is a word of every rank to all at each save."""
    for found in pool.run(case, str(tmp_path)):
        calls = {act: {kind: len(sizes) for kind, sizes in counts.items()} for act, counts in found.items()}
        of_weights = calls["a resume: weights"].pop(("broadcast", "a group"))
        assert of_weights > 0
        world, group = "the world", "a group"
        assert calls == {
            "a save": {
                ("all_gather_object", world): 6,
                ("all_gather_object", group): 1,
                ("gather_object", world): 1,
                ("broadcast_object_list", world): 2,
            },
            "completing it": {
                ("all_reduce", world): 2,
                ("gather_object", world): 1,
                ("broadcast", world): 1,
                ("barrier", world): 2,
                ("all_gather_object", world): 1,
            },
            "a resume: weights": {
                ("all_gather_object", world): 6,
                ("all_gather_object", group): 1,
                ("broadcast_object_list", world): 1,
                ("gather_object", world): 1,
                ("scatter_object_list", world): 1,
            },
            "a resume: optimizer": {
                ("all_gather_object", world): 5,
                ("broadcast_object_list", world): 1,
                ("gather_object", world): 1,
                ("scatter_object_list", world): 1,
            },
        }


def test_a_collective_that_is_made_of_others_counts_once(pool: Any) -> None:
    for found in pool.run(counted_case):
        assert {kind: len(sizes) for kind, sizes in found.items()} == {("all_gather_object", "the world"): 1}
        (size,) = found["all_gather_object", "the world"]
        assert 1000 < size < 1100


def counted_case(rank: int) -> Counts:
    found: Counts = defaultdict(list)
    with counted(found):
        dist.all_gather_object([None] * dist.get_world_size(), "x" * 1000)
    return dict(found)
