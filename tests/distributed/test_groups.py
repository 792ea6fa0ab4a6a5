"""The process groups of layouts, as real ranks see them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
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


def megatrons(rank: int) -> tuple[bool, list[int]]:
    """Whether Megatron's own data-parallel groups are the world's, and the sizes of its others."""
    from megatron.core import parallel_state

    of_world = (
        *(parallel_state.get_data_parallel_group(), parallel_state.get_data_parallel_group_gloo()),
        parallel_state.get_data_parallel_group(with_context_parallel=True),
    )
    alone = (
        *(parallel_state.get_tensor_model_parallel_group(), parallel_state.get_context_parallel_group()),
        *(parallel_state.get_pipeline_model_parallel_group(), parallel_state.get_model_parallel_group()),
    )
    return all(g is dist.group.WORLD for g in of_world), [dist.get_world_size(g) for g in alone]


def test_megatrons_own_groups_are_the_worlds_and_one_of_this_rank(pool: Any) -> None:
    for of_world, alone in pool.run(megatrons):
        assert of_world
        assert alone == [1, 1, 1, 1]


def made_by_members(rank: int, first: list[int], second: list[int]) -> list[float]:
    """Sums over groups that none but their members make, some of which are in more groups than others."""
    from genac_megatron.training.layout import new_group

    sums = []
    for ranks, name in ((first, "first"), (second, "second")):
        if rank in ranks:
            value = torch.tensor([float(rank)])
            dist.all_reduce(value, group=new_group(ranks, name))
            sums.append(value.item())
    return sums


def test_a_group_is_made_by_its_members_alone(pool: Any) -> None:
    assert pool.run(made_by_members, [0, 1], [1, 3]) == [[1.0], [1.0, 4.0], [], [4.0]]
