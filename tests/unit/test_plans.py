"""Plans of micro-batches: ranks that pack their own rows make the plan that one makes for all."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genac_megatron.training import trees
from genac_megatron.training.plans import Ints, Plan, Rows, plan_packs
from genac_megatron.training.trees import Order, plan_trees


class InStep:
    """Ranks, threads here, that tell each other figures of their rows."""

    def __init__(self, dp: int) -> None:
        self.dp, self.given, self.barrier = dp, [np.zeros((0, 0), np.int64)] * dp, threading.Barrier(dp)

    def rows(self, dp_rank: int) -> Rows:
        def told(mine: Ints) -> Ints:
            self.given[dp_rank] = mine
            self.barrier.wait(120)
            found = np.concatenate(self.given)
            self.barrier.wait(120)
            return found

        return Rows(self.dp, (dp_rank,), told)

    def plan(self, make: Any, *given: Any, **how: Any) -> list[Plan | None]:
        with ThreadPoolExecutor(self.dp) as pool:
            tasks = [pool.submit(make, *given, rows=self.rows(r), **how) for r in range(self.dp)]
            return [task.result() for task in tasks]


@st.composite
def orders(draw: st.DrawFn) -> Order:
    """Of samples of which neighbours share much, little or nothing."""
    lengths = draw(st.lists(st.integers(1, 60), min_size=1, max_size=40))
    count = len(lengths)
    order = np.array(draw(st.permutations(range(count))), np.int64)
    most = [min(lengths[a], lengths[b]) for a, b in pairwise(order)]
    shared = [draw(st.sampled_from([0, n // 3, n // 2, n])) for n in most]
    return Order(np.array(lengths, np.int64), order, np.array(shared, np.int64))


setup_st = st.fixed_dictionaries(
    {
        "tokens_per_microbatch": st.integers(60, 200),
        "multiple": st.sampled_from([1, 4]),
        "microbatch_multiple": st.integers(1, 3),
    }
)


@settings(max_examples=60, deadline=None)
@given(orders(), st.integers(1, 4), setup_st, st.sampled_from([0.0, 0.05]))
def test_each_rank_packs_its_row_of_the_plan_for_all(
    order: Order, dp: int, setup: dict[str, int], pair_cost: float
) -> None:
    for make, given_, how in (
        (plan_packs, order.lengths.tolist(), setup),
        (plan_trees, order, setup | {"pair_cost": pair_cost}),
    ):
        whole = make(given_, rows=Rows.whole(dp), **how)  # type: ignore[operator]
        parts = InStep(dp).plan(make, given_, **how)
        if whole is None:
            assert parts == [None] * dp
            continue
        assert [row for part in parts if part for row in part.rows] == whole.rows
        for part in parts:
            assert part is not None
            assert part.owner.tolist() == whole.owner.tolist()
            assert part.microbatches == whole.microbatches == len(whole.rows[0])
        for dp_rank, row in enumerate(whole.rows):
            mine = sorted(i for pack in row for i in pack)
            assert mine == np.flatnonzero(whole.owner == dp_rank).tolist()


def one_by_one(order: Order, limit: int) -> list[int]:
    """Where clumps begin: neighbours that share most are joined first, in a plain loop."""
    clump, sizes = list(range(len(order.order))), order.lengths[order.order].tolist()
    for k in sorted(range(len(order.shared)), key=lambda k: (-order.shared[k], k)):
        left, right = clump[k], clump[k + 1]
        merged = sizes[left] + sizes[right] - order.shared[k]
        if order.shared[k] and merged <= limit:
            sizes[left] = merged
            clump = [left if c == right else c for c in clump]
    return sorted(set(clump))


@pytest.mark.parametrize("few", [0, 8, 256])
@settings(max_examples=60)
@given(order=orders(), limit=st.integers(1, 200), together=st.sampled_from([4, 1000]))
def test_clumps_in_rounds_are_those_of_a_loop(order: Order, few: int, limit: int, together: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trees, "FEW", few)
        patch.setattr(trees, "TOGETHER", together)
        firsts = trees._clumps(order, limit)
    assert firsts.tolist() == one_by_one(order, limit)
    tokens, pairs = trees._sizes(order, firsts)
    clumps = np.split(order.order, firsts[1:])
    assert tokens.tolist() == [order.size(clump) for clump in clumps]
    assert pairs.tolist() == [order.pairs(clump) for clump in clumps]


def test_the_order_of_some_is_that_of_all_without_the_others() -> None:
    order = Order(np.array([9, 9, 9, 9, 9]), np.array([3, 1, 4, 0, 2]), np.array([5, 2, 7, 3]))
    some = order.part([2, 3, 4])
    assert some.order.tolist() == [3, 4, 2]
    assert some.shared.tolist() == [2, 3]
    assert some.size([3, 4]) == order.size([3, 4]) == 16
    assert order.part([]).order.tolist() == []
