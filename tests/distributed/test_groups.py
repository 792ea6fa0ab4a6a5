"""The process groups of layouts, as real ranks see them."""

from __future__ import annotations

from typing import Any

import pytest
import torch.distributed as dist


def members(rank: int, sizes: dict[str, Any]) -> dict[str, list[int]] | None:
    """Global ranks of each of this rank's groups."""
    from genac_megatron.training.layout import Layout

    groups = Layout(**{"name": "test", "first_rank": 0, **sizes}).groups()
    if groups is None:
        return None
    return {name: dist.get_process_group_ranks(group) for name, group in vars(groups).items()}


@pytest.mark.parametrize(
    ("sizes", "wanted"),
    [
        # rank by rank: tp, dp, pp, embd, all of the block
        (
            {"count": 4, "tp": 2, "pp": 2},
            {
                "tp": [[0, 1], [0, 1], [2, 3], [2, 3]],
                "dp": [[0], [1], [2], [3]],
                "pp": [[0, 2], [1, 3], [0, 2], [1, 3]],
                "embd": [[0, 2], [1, 3], [0, 2], [1, 3]],
                "mp": [[0, 1, 2, 3]] * 4,
                "intra_dist_opt": [[0, 1, 2, 3]] * 4,
            },
        ),
        (
            {"count": 4, "tp": 2},
            {
                "tp": [[0, 1], [0, 1], [2, 3], [2, 3]],
                "dp": [[0, 2], [1, 3], [0, 2], [1, 3]],
                "dp_cp": [[0, 2], [1, 3], [0, 2], [1, 3]],
                "pp": [[0], [1], [2], [3]],
                "mp": [[0, 1], [0, 1], [2, 3], [2, 3]],
            },
        ),
        # Only the first and the last stage share a tied embedding.
        ({"count": 4, "pp": 4}, {"pp": [[0, 1, 2, 3]] * 4, "embd": [[0, 3], [1], [2], [0, 3]]}),
        ({"first_rank": 1, "count": 2, "tp": 2}, {"tp": [None, [1, 2], [1, 2], None]}),
        ({"count": 4, "ep": 2}, {"ep": [[0, 1], [0, 1], [2, 3], [2, 3]], "expt_dp": [[0, 2], [1, 3]] * 2}),
    ],
)
def test_groups_hold_the_right_ranks(pool: Any, sizes: dict[str, Any], wanted: dict[str, Any]) -> None:
    found = pool.run(members, sizes)
    for name, ranks in wanted.items():
        assert [None if f is None else f[name] for f in found] == ranks, name


def shared_objects(rank: int) -> tuple[bool, set[str]]:
    """Whether a role gets its collection again, and which groups two roles of equal sizes have in common."""
    from genac_megatron.training.layout import Layout

    actor, again, critic = (Layout(name, 0, 4, tp=2).groups() for name in ("actor", "actor", "critic"))
    other = {id(group) for group in vars(critic).values()}
    return actor is again, {name for name, group in vars(actor).items() if id(group) in other}


def test_each_role_has_groups_of_its_own(pool: Any) -> None:
    assert pool.run(shared_objects) == [(True, set())] * 4
