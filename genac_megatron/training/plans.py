"""Who computes which samples, in which micro-batches: pure arithmetic on lengths, the same on every rank.

Every rank deals all samples out to data-parallel ranks; what one of these gets, its row, is packed by itself.
Of a small batch all rows are packed everywhere. Of a large one each rank packs its own, and they tell each
other a few figures of their rows (`Rows`): the plan is the same either way.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from genac_megatron.errors import InputError

Ints = NDArray[np.int64]
Row = list[list[int]]  # a data-parallel rank's micro-batches: sample indices

MANY = 4096  # samples of which a plan takes its time
_EVEN = 1.0025  # bins whose fullest is this near the mean are not levelled further


@dataclass(frozen=True)
class Rows:
    """The rows that are planned here, of `dp`.

    told: figures of each row here, [len(here), k], to those of all, [dp, k]; who plans does so in step.
    """

    dp: int
    here: tuple[int, ...]
    told: Callable[[Ints], Ints]

    @staticmethod
    def whole(dp: int) -> Rows:
        """All of them, and nobody is asked."""
        return Rows(dp, tuple(range(dp)), lambda mine: mine)

    def most(self, mine: Sequence[int]) -> int:
        """The largest figure of any row; mine: one of each row here."""
        return int(self.told(np.array(mine, np.int64).reshape(-1, 1)).max())


@dataclass(frozen=True)
class Plan:
    """owner: [n], the data-parallel rank of each sample. rows: those planned here, in order. microbatches: of
    each row.
    """

    owner: Ints
    rows: list[Row]
    microbatches: int


def round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def plan_packs(
    lengths: Sequence[int] | Ints,
    *,
    rows: Rows,
    tokens_per_microbatch: int,
    multiple: int = 1,
    microbatch_multiple: int = 1,
    sample_multiple: int = 1,
    costs: Ints | None = None,
) -> Plan:
    """Deal samples out to data-parallel ranks and micro-batches, even in tokens over both.

    lengths: input positions of each sample (its tokens less one). Every index is in one row; each row has the
    same number of micro-batches, the least that holds the fullest one, rounded up to microbatch_multiple (at
    least one of it). No micro-batch exceeds tokens_per_microbatch once padded to `multiple`, except that a
    longer sample has one to itself. Within a row the longest micro-batch comes first (memory is tried at
    once, and ranks in step hold alike lengths); where samples are few the last ones may be empty.
    Deterministic: the same arguments give the same plan on every rank, whatever rows are planned there.
    costs: what ranks are to be even in; None: lengths.

    Longest first to the least loaded (Graham 1969), then swaps: ranks differ by at most the longest
    sample. So do micro-batches, save where that overflows one, and best fit under a bisected
    capacity (MULTIFIT: Coffman, Garey, Johnson 1978) takes its place.
    Raises InputError for a length below 1 or a tokens_per_microbatch below `multiple`.
    """
    capacity = tokens_per_microbatch // multiple * multiple
    if capacity < 1:
        raise InputError(
            f"tokens_per_microbatch {tokens_per_microbatch} is below the {multiple} that packs are padded to",
            where="training.tokens_per_microbatch",
            way_out=f"raise it to a multiple of {multiple}",
        )
    given = np.asarray(lengths, np.int64)
    if given.size and given.min() < 1:
        raise InputError(f"sample {given.argmin()} has no input position", where="plan_packs")
    filled = -(-given // sample_multiple) * sample_multiple
    weights = filled if costs is None else costs
    dearest_first, loads = np.argsort(-weights, kind="stable"), weights.tolist()
    dealt = _level(_spread(dearest_first.tolist(), loads, rows.dp), loads)
    owner = np.empty(len(given), np.int64)
    for dp_rank, row in enumerate(dealt):
        owner[row] = dp_rank
    sizes = filled.tolist()
    here = [sorted(dealt[dp_rank], key=lambda i: (-sizes[i], i)) for dp_rank in rows.here]
    needed = rows.most([len(_best_fit(row, sizes, capacity)) for row in here])
    count = round_up(max(needed, 1), microbatch_multiple)
    return Plan(owner, [_pack_row(row, sizes, count, capacity) for row in here], count)


def _pack_row(row: list[int], sizes: list[int], count: int, capacity: int) -> list[list[int]]:
    packs = _level(_spread(row, sizes, count), sizes)
    if any(len(pack) > 1 and _load(pack, sizes) > capacity for pack in packs):
        packs = _multifit(row, sizes, count, capacity)
        packs = _level(packs + [[] for _ in range(count - len(packs))], sizes)
    return sorted((sorted(pack) for pack in packs), key=lambda pack: (-_load(pack, sizes), pack))


def _load(pack: list[int], sizes: list[int]) -> int:
    return sum(sizes[i] for i in pack)


def _spread(longest_first: list[int], sizes: list[int], bins: int) -> list[list[int]]:
    """Each item to the bin with the least load so far."""
    heap = [(0, b) for b in range(bins)]
    out: list[list[int]] = [[] for _ in range(bins)]
    for i in longest_first:
        load, b = heap[0]
        out[b].append(i)
        heapq.heapreplace(heap, (load + sizes[i], b))
    return out


def _level(bins: list[list[int]], sizes: list[int]) -> list[list[int]]:
    """Move or swap items out of the fullest bin while that lowers it; no bin rises to what it was.

    A bin of one item cannot be lowered and is passed over. Ends, as each step lowers the loads'
    sum of squares.
    """
    loads = [_load(b, sizes) for b in bins]
    goal = _EVEN * sum(loads) / len(loads)
    while divisible := [b for b in range(len(bins)) if len(bins[b]) > 1 and loads[b] > goal]:
        top = max(divisible, key=lambda b: loads[b])
        for other in sorted(range(len(bins)), key=lambda b: loads[b]):
            swap = _best_swap(bins[top], bins[other], sizes, loads[top] - loads[other])
            if swap is not None:
                break
        else:
            break
        given, taken = swap
        bins[top].remove(given)
        bins[other].append(given)
        if taken is not None:
            bins[other].remove(taken)
            bins[top].append(taken)
        moved = sizes[given] - (0 if taken is None else sizes[taken])
        loads[top] -= moved
        loads[other] += moved
    return bins


def _best_swap(
    fuller: list[int], emptier: list[int], sizes: list[int], gap: int
) -> tuple[int, int | None] | None:
    """The (item to give, item to take or None) that brings two bins, gap apart, nearest to equal."""
    takes: list[int | None] = [None, *sorted(emptier, key=lambda i: sizes[i])]
    weights = [0, *sorted(sizes[i] for i in emptier)]
    best, best_miss = None, gap
    for give in fuller:
        at = bisect_left(weights, sizes[give] - gap / 2)
        for j in (at - 1, at):
            if 0 <= j < len(weights):
                miss = abs(2 * (sizes[give] - weights[j]) - gap)
                if miss < best_miss:  # so 0 < what moves < gap
                    best, best_miss = (give, takes[j]), miss
    return best


def _best_fit(longest_first: list[int], sizes: list[int], capacity: int) -> list[list[int]]:
    """Each item to the fullest bin that still holds it, else to a new one; as many bins as it takes."""
    out: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free, bin), sorted
    for i in longest_first:
        at = bisect_left(room, (sizes[i], -1))
        if at < len(room):
            free, b = room.pop(at)
        else:
            free, b = capacity, len(out)
            out.append([])
        out[b].append(i)
        if free > sizes[i]:
            insort(room, (free - sizes[i], b))
    return out


def _multifit(longest_first: list[int], sizes: list[int], bins: int, capacity: int) -> list[list[int]]:
    """Best fit under the smallest capacity, found by bisection, that needs no more than `bins`."""
    best = _best_fit(longest_first, sizes, capacity)
    low, high = _load(longest_first, sizes) // bins, capacity
    while high - low > 1:
        middle = (low + high) // 2
        tried = _best_fit(longest_first, sizes, middle)
        if len(tried) <= bins:
            best, high = tried, middle
        else:
            low = middle
    return best
