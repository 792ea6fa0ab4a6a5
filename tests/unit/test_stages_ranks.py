"""What a batch needs of all ranks, over ranks that are threads here: as of one rank with everything."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from genac_megatron.algorithms.losses import token_weights
from genac_megatron.critic.score import reinforce_weights
from genac_megatron.stages.ranks import ALONE, quantiles


def together(count: int, act: Callable[[int, Callable[[Any], Any]], Any]) -> list[Any]:
    """What `act(rank, summed)` gives on ranks that are threads; summed adds arrays up over them."""
    barrier, shared, found = threading.Barrier(count, timeout=20), [None] * count, [None] * count

    def work(rank: int) -> None:
        def summed(mine: Any) -> Any:
            shared[rank] = mine
            barrier.wait()
            total = sum(shared[1:], shared[0])
            barrier.wait()
            return total

        found[rank] = act(rank, summed)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


SHARES = (0.0, 0.5, 0.99, 1.0)


@given(st.lists(st.floats(0, 1e3) | st.sampled_from([0.0, 0.25, 0.25]), min_size=1, max_size=12), st.data())
def test_quantiles_of_all_ranks_are_numpys(figures: list[float], data: Any) -> None:
    cut = data.draw(st.integers(0, len(figures)))
    parts = [np.array(figures[:cut], np.float64), np.array(figures[cut:], np.float64)]
    wanted = ALONE.quantiles(np.array(figures), SHARES)
    for found in together(2, lambda rank, summed: quantiles(parts[rank], SHARES, summed)):
        assert found == pytest.approx(wanted, rel=1e-12, abs=1e-300)


def test_a_figure_that_is_no_number_is_not_lost() -> None:
    parts = [np.array([1.0]), np.array([np.nan, 0.0])]
    found = together(2, lambda rank, summed: quantiles(parts[rank], (0.5, 1.0), summed))
    assert all(np.isnan(found).ravel())


def test_weights_of_a_part_are_those_of_the_whole() -> None:
    lengths = [3, 0, 5, 2]
    for how in ("token", "sequence", "constant"):
        whole = token_weights(lengths, how, 7).tolist()
        parts = [token_weights(part, how, 7, (10.0, 3.0)).tolist() for part in (lengths[:1], lengths[1:])]
        assert parts[0] + parts[1] == whole


def test_baselines_of_a_part_are_of_all_entries() -> None:
    rewards, outcomes, keys = [0.1, 0.4, 0.7, 0.2, 0.9], [1.0, 1.0, 0.0, 1.0, 0.0], ["a", "a", "a", "b", "c"]
    whole = reinforce_weights(rewards, outcomes, keys)
    for part in (slice(0, 3), slice(3, 4), slice(4, 5)):
        mine = rewards[part], outcomes[part], keys[part]
        assert reinforce_weights(*mine, everyone=(rewards, outcomes)) == {k: whole[k] for k in mine[2]}
