"""Samples that begin alike, computed as trees: what they share, who goes together, how a tree is laid out.

Pure arithmetic on the samples' ids; the tensors are training/packing.py's. A sample of n tokens has n - 1
inputs. What two samples share is their inputs' common beginning, token by token, never their text. In
lexicographic order of the inputs two samples share the least that neighbours between them do, so a set's
tree has sum(lengths) - sum(what neighbours share) tokens, and no tree need be built to count them.

A tree is laid out as chains: the longest sample whole, then of each next longest what no sample before it
has, branching from the chain that holds the last token they share. So every chain is one causal sequence, and
further sees, of each chain above it, the tokens before the branch.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise

import numpy as np

from genac_megatron.records import Sample
from genac_megatron.training.packing import Plan, plan_packs

SHORTEST = 16  # tokens; samples that share fewer are apart: a further attention call costs more
MANY = 4096  # samples of which a plan takes its time
LEVEL = 1.01  # ranks whose slowest is this near the mean are level
NEAR = 32  # figures whose minimum is taken one by one
WORTHWHILE = 0.98  # trees are used where they compute at most this share of the samples' tokens


@dataclass(frozen=True)
class Order:
    """A batch's samples in lexicographic order of their inputs, and what each shares with the next."""

    lengths: list[int]  # inputs, by sample
    order: list[int]  # sample indices
    shared: list[int]  # [len(order) - 1]: tokens that order[k] and order[k + 1] share
    rank: dict[int, int]  # sample index -> its place in `order`

    def between(self, members: Sequence[int]) -> list[int]:
        """What each of `members` (sample indices in order of rank) shares with the next."""
        ranks = [self.rank[i] for i in members]
        return [self._least(a, b) for a, b in pairwise(ranks)]

    def _least(self, a: int, b: int) -> int:
        """min(shared[a:b]); of a long range by two that cover it, each as long as a power of two."""
        if b - a < NEAR:
            return min(self.shared[a:b])
        k = (b - a).bit_length() - 1
        return min(self._leasts[k][a], self._leasts[k][b - (1 << k)])

    @cached_property
    def _leasts(self) -> list[list[int]]:
        """By k, the minimum of the 2^k figures of `shared` from each place on."""
        table = [np.asarray(self.shared, np.int64)]
        while 2 << len(table) - 1 <= len(self.shared):
            step = 1 << len(table) - 1
            table.append(np.minimum(table[-1][:-step], table[-1][step:]))
        return [row.tolist() for row in table]

    def sort(self, members: Sequence[int]) -> list[int]:
        """`members` in order of rank."""
        return sorted(members, key=self.rank.__getitem__)

    def size(self, members: Sequence[int]) -> int:
        """Tokens of the tree of `members`."""
        return sum(self.lengths[i] for i in members) - sum(self.between(self.sort(members)))

    def pairs(self, members: Sequence[int]) -> int:
        """Queries times keys of the tree of `members`, causal."""
        whole = sum(_causal(self.lengths[i]) for i in members)
        return whole - sum(map(_causal, self.between(self.sort(members))))


def _causal(length: int) -> int:
    return length * (length + 1) // 2


def order_of(samples: Sequence[Sample], shortest: int = SHORTEST) -> Order:
    """The order of a batch. Beginnings shorter than `shortest` count as nothing shared.

    Where samples carry experts to be replayed, only tokens that go to the same ones are shared, and none
    between a sample that carries them and one that does not.
    """
    inputs = [np.asarray(sample.tokens[:-1], dtype=">u4") for sample in samples]  # bytes sort as ids do
    order = sorted(range(len(samples)), key=lambda i: (inputs[i].tobytes(), i))
    shared = []
    for a, b in pairwise(order):
        common = _common(inputs[a], inputs[b])
        common = _alike(samples[a], samples[b], common)
        shared.append(common if common >= shortest else 0)
    return Order([len(ids) for ids in inputs], order, shared, {i: k for k, i in enumerate(order)})


def _common(a: np.ndarray, b: np.ndarray) -> int:
    """Rows that two arrays have in common from their beginning."""
    length = min(len(a), len(b))
    differ = a[:length] != b[:length]
    if differ.ndim > 1:
        differ = differ.reshape(length, -1).any(axis=1)
    return int(differ.argmax()) if differ.any() else length


def _alike(a: Sample, b: Sample, common: int) -> int:
    """Of the first `common` tokens, those that go to the same experts."""
    if (a.experts is None) != (b.experts is None):
        return 0
    if a.experts is None or b.experts is None or common == 0:
        return common
    return _common(a.experts[:common], b.experts[:common])


# --- who goes together ---------------------------------------------------------------------------


def plan_trees(
    order: Order,
    *,
    dp: int,
    tokens_per_microbatch: int,
    multiple: int = 1,
    microbatch_multiple: int = 1,
    pair_cost: float = 0.0,
) -> Plan | None:
    """`plan_packs`, samples that share much together, packs counted by the tokens of their trees.

    pair_cost: of a query with a key, in tokens: ranks are levelled by computed tokens and attention.
    A tree beyond tokens_per_microbatch, or too large for ranks to be level, is cut: its parts each have
    the trunk. Deeper branches stay together first. None where trees save too little: packs are flat then.
    """
    flat, indices = sum(order.lengths), range(len(order.lengths))
    if order.size(indices) > WORTHWHILE * flat:
        return None
    capacity = tokens_per_microbatch // multiple * multiple
    limits = dict.fromkeys(max(1, capacity // parts) for parts in (1, 2, 4))
    best: tuple[tuple[float, int], Plan] | None = None
    for limit in limits:
        clumps = _clumps(order, limit)
        sizes = [order.size(clump) for clump in clumps]
        plan = plan_packs(
            sizes,
            dp=dp,
            tokens_per_microbatch=tokens_per_microbatch,
            multiple=multiple,
            microbatch_multiple=microbatch_multiple,
            costs=[_cost(order, clump, pair_cost) for clump in clumps],
        )
        dealt = [[sorted(i for c in pack for i in clumps[c]) for pack in row] for row in plan]
        dealt = [sorted(row, key=lambda pack: (-order.size(pack), pack)) for row in dealt]
        slowest = max(sum(_cost(order, pack, pair_cost) for pack in row) for row in dealt)
        if best is None or (slowest, len(plan[0])) < best[0]:
            best = (slowest, len(plan[0])), dealt
        if len(order.lengths) >= MANY:
            mean = sum(_cost(order, pack, pair_cost) for row in dealt for pack in row) / dp
            if slowest <= LEVEL * mean:  # smaller trees share less, and so many need not be tried to be level
                break
    assert best is not None
    if sum(order.size(pack) for row in best[1] for pack in row) > WORTHWHILE * flat:
        return None
    return best[1]


def _cost(order: Order, members: Sequence[int], pair_cost: float) -> int:
    return order.size(members) + round(pair_cost * order.pairs(members))


def _clumps(order: Order, limit: int) -> list[list[int]]:
    """Neighbours in one clump while its tree has at most `limit` tokens; those that share most come first."""
    ends = {k: k for k in range(len(order.order))}  # first rank -> last rank
    starts = dict(ends)  # last rank -> first rank
    sizes = {k: order.lengths[i] for k, i in enumerate(order.order)}  # by first rank
    for k in sorted(range(len(order.shared)), key=lambda k: (-order.shared[k], k)):
        if not order.shared[k]:
            break
        left, right = starts[k], k + 1
        merged = sizes[left] + sizes[right] - order.shared[k]
        if merged <= limit:
            sizes[left] = merged
            last = ends.pop(right)
            ends[left], starts[last] = last, left
    return [order.order[first : last + 1] for first, last in sorted(ends.items())]


# --- how a tree is laid out ----------------------------------------------------------------------


@dataclass
class Chain:
    """Tokens [first, first + length) of a sample, end to end in a pack from `begin` on."""

    sample: int
    first: int  # also how many tokens are above it on its path
    length: int
    parent: int  # the chain it branches from; -1: none
    begin: int = 0
    end: int = 0  # where it and all that branches from it end
    children: list[int] = field(default_factory=list)


@dataclass
class Forest:
    """The trees of a pack's samples, as chains in the order in which they lie."""

    chains: list[Chain]
    home: dict[int, int]  # sample index -> the chain that has its last input
    lengths: dict[int, int]

    @property
    def size(self) -> int:
        """Tokens computed."""
        return sum(chain.length for chain in self.chains)

    @property
    def deepest(self) -> int:
        """Tokens of the longest path."""
        return max((chain.first + chain.length for chain in self.chains), default=0)

    @property
    def branched(self) -> bool:
        """Whether any token is shared."""
        return self.size < sum(self.lengths.values())

    def rows(self, sample: int, first: int = 0) -> np.ndarray:
        """Where inputs `first` and on of a sample lie in the pack, int64."""
        parts, chain, upto = [], self.home[sample], self.lengths[sample]
        while chain >= 0 and upto > first:
            here = self.chains[chain]
            low = max(first, here.first)
            parts.append(np.arange(here.begin + low - here.first, here.begin + upto - here.first))
            chain, upto = here.parent, here.first
        return np.concatenate(parts[::-1]) if parts else np.arange(0)

    def cuts(self) -> list[tuple[int, int, int, int]]:
        """(q, q end, k, k end): rows [q, q end) see all of rows [k, k end), besides their chain's own."""
        found: list[tuple[int, int, int, int]] = []
        for chain in self.chains:
            last = None
            for child in (self.chains[c] for c in chain.children):
                if child.first == last:
                    found[-1] = (found[-1][0], child.end, *found[-1][2:])
                else:
                    reach = chain.begin + child.first - chain.first
                    found.append((child.begin, child.end, chain.begin, reach))
                last = child.first
        return found


def forest_of(order: Order, members: Sequence[int]) -> Forest:
    """The trees of `members` (sample indices), laid out."""
    sorted_members = order.sort(members)
    lengths = [order.lengths[i] for i in sorted_members]
    chains, home = _grow(lengths, order.between(sorted_members))
    for chain in chains:
        chain.sample = sorted_members[chain.sample]
    placed, moved = _lay_out(chains)
    return Forest(
        placed,
        {i: moved[chain] for i, chain in zip(sorted_members, home, strict=True)},
        dict(zip(sorted_members, lengths, strict=True)),
    )


def _grow(lengths: Sequence[int], shared: Sequence[int]) -> tuple[list[Chain], list[int]]:
    """Chains, the longest sample's first, and the one that each sample's last input is in."""
    chains: list[Chain] = []
    home = [-1] * len(lengths)
    there: list[int] = []  # who is placed, sorted
    for k in sorted(range(len(lengths)), key=lambda k: (-lengths[k], k)):
        at = bisect_left(there, k)
        beside = [(min(shared[j:k]), j) for j in there[max(0, at - 1) : at]]
        beside += [(min(shared[k:j]), j) for j in there[at : at + 1]]
        common, nearest = max(beside, default=(0, k))
        parent = home[nearest]
        while parent >= 0 and chains[parent].first >= common:
            parent = chains[parent].parent
        if common == lengths[k]:
            home[k] = parent
        else:
            home[k] = len(chains)
            chains.append(Chain(k, common, lengths[k] - common, parent))
        insort(there, k)
    return chains, home


def _lay_out(chains: list[Chain]) -> tuple[list[Chain], list[int]]:
    """Chains in depth-first order, branches of one chain by where they leave it; and where each one went.

    So what branches from one place is one range, which makes the attention to the trunk one call.
    """
    below: list[list[int]] = [[] for _ in chains]
    for c, chain in enumerate(chains):
        if chain.parent >= 0:
            below[chain.parent].append(c)
    for children in below:
        children.sort(key=lambda c: (chains[c].first, c))
    placed: list[Chain] = []
    moved = [-1] * len(chains)
    at = 0
    stack = [c for c in reversed(range(len(chains))) if chains[c].parent < 0]
    while stack:
        c = stack.pop()
        moved[c], chain = len(placed), chains[c]
        chain.begin, chain.end = at, at + chain.length
        at += chain.length
        placed.append(chain)
        stack.extend(reversed(below[c]))
    for c, chain in enumerate(chains):
        chain.children = [moved[child] for child in below[c]]
        chain.parent = moved[chain.parent] if chain.parent >= 0 else -1
    for chain in reversed(placed):
        if chain.parent >= 0:
            placed[chain.parent].end = max(placed[chain.parent].end, chain.end)
    return placed, moved
