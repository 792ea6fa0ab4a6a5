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
from genac_megatron.training.plans import MANY, Ints, Plan, Rows, plan_packs

SHORTEST = 16  # tokens; samples that share fewer are apart: a further attention call costs more
LEVEL = 1.01  # ranks whose slowest is this near the mean are level
FEW = 256  # neighbours that are looked at one by one
NEVER = np.iinfo(np.int64).max
TOGETHER = 64  # neighbours of which one must be decided for a look at all to pay
WORTHWHILE = 0.98  # trees are used where they compute at most this share of the samples' tokens


@dataclass(frozen=True)
class Order:
    """Samples of a batch in lexicographic order of their inputs, and what each shares with the next."""

    lengths: Ints  # inputs, by sample
    order: Ints  # [m]: sample indices
    shared: Ints  # [m - 1]: tokens that order[k] and order[k + 1] share

    @cached_property
    def rank(self) -> Ints:
        """By sample, its place in `order`; 0 of samples that are not there."""
        rank = np.zeros(len(self.lengths), np.int64)
        rank[self.order] = np.arange(len(self.order))
        return rank

    def between(self, members: Ints) -> Ints:
        """What each of `members` (sample indices in order of rank) shares with the next."""
        places = self.rank[members]
        if len(places) < 2:
            return np.zeros(0, np.int64)
        return np.minimum.reduceat(self.shared[places[0] : places[-1]], places[:-1] - places[0])

    def sort(self, members: Sequence[int] | Ints) -> Ints:
        """`members` in order of rank."""
        given = np.asarray(members, np.int64)
        return given[np.argsort(self.rank[given])]

    def part(self, members: Sequence[int] | Ints) -> Order:
        """The order of `members` alone, by the same indices."""
        inside = self.sort(members)
        return Order(self.lengths, inside, self.between(inside))

    def size(self, members: Sequence[int] | Ints) -> int:
        """Tokens of the tree of `members`."""
        inside = self.sort(members)
        return int(self.lengths[inside].sum() - self.between(inside).sum())

    def pairs(self, members: Sequence[int] | Ints) -> int:
        """Queries times keys of the tree of `members`, causal."""
        inside = self.sort(members)
        return int(_causal(self.lengths[inside]).sum() - _causal(self.between(inside)).sum())


def _causal(lengths: Ints) -> Ints:
    return lengths * (lengths + 1) // 2


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
    lengths = [len(ids) for ids in inputs]
    return Order(*(np.array(figures, np.int64) for figures in (lengths, order, shared)))


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
    rows: Rows,
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
    flat, most = int(order.lengths.sum()), WORTHWHILE * int(order.lengths.sum())
    if flat - int(order.shared.sum()) > most:
        return None
    capacity = tokens_per_microbatch // multiple * multiple
    limits = dict.fromkeys(max(1, capacity // parts) for parts in (1, 2, 4))
    best: tuple[tuple[int, int], int, Plan] | None = None
    for limit in limits:
        firsts = _clumps(order, limit)
        sizes, pairs = _sizes(order, firsts)
        dealt = plan_packs(
            sizes,
            rows=rows,
            tokens_per_microbatch=tokens_per_microbatch,
            multiple=multiple,
            microbatch_multiple=microbatch_multiple,
            costs=sizes + np.rint(pair_cost * pairs).astype(np.int64),
        )
        plan, figures = _of_samples(order, firsts, dealt, pair_cost)
        costs, tokens = rows.told(figures).T.tolist()
        slowest, count = max(costs), dealt.microbatches
        if best is None or (slowest, count) < best[0]:
            best = (slowest, count), sum(tokens), plan
        # Smaller trees share less, and of many samples not all cuts are tried to be level.
        if len(order.lengths) >= MANY and slowest <= LEVEL * sum(costs) / rows.dp:
            break
    assert best is not None
    return None if best[1] > most else best[2]


def _of_samples(order: Order, firsts: Ints, dealt: Plan, pair_cost: float) -> tuple[Plan, Ints]:
    """The plan of samples that a plan of clumps is; of each row here, what it costs and what it computes."""
    ends = np.append(firsts[1:], len(order.order))
    owner = np.empty(len(order.order), np.int64)
    owner[order.order] = np.repeat(dealt.owner, ends - firsts)
    rows, figures = [], []
    for row in dealt.rows:
        packs = [sorted(i for c in p for i in order.order[firsts[c] : ends[c]].tolist()) for p in row]
        own = order.part([i for pack in packs for i in pack])
        sized = sorted((-own.size(pack), pack) for pack in packs)
        tokens, attended = -sum(size for size, _ in sized), (own.pairs(pack) for _, pack in sized)
        rows.append([pack for _, pack in sized])
        figures.append((tokens + sum(round(pair_cost * pairs) for pairs in attended), tokens))
    return Plan(owner, rows, dealt.microbatches), np.array(figures, np.int64).reshape(-1, 2)


def _sizes(order: Order, firsts: Ints) -> tuple[Ints, Ints]:
    """Tokens, and queries times keys, of each clump's tree."""
    if not len(firsts):
        return firsts, firsts
    own = np.append(order.shared, 0)  # what each shares with the next of its clump
    own[firsts[1:] - 1] = 0
    lengths = order.lengths[order.order]
    sizes, pairs = lengths - own, _causal(lengths) - _causal(own)
    return np.add.reduceat(sizes, firsts), np.add.reduceat(pairs, firsts)


def _clumps(order: Order, limit: int) -> Ints:
    """Neighbours in one clump while its tree has at most `limit` tokens; those that share most come first.

    Returns the place in the order where each clump begins. The result of a loop over all neighbours. What is
    decided for two depends on none that share less, so whoever shares more than both beside is decided at
    once, in rounds over arrays while enough are.
    """
    firsts, sizes, shared = np.arange(len(order.order)), order.lengths[order.order], order.shared
    later = np.empty(len(shared), np.int64)  # place in the order of looking; NEVER: two that stay apart
    later[np.argsort(-shared, kind="stable")] = np.arange(len(shared))
    later[shared == 0] = NEVER
    while (open_ := int((later < NEVER).sum())) > FEW:
        walled = np.concatenate([[NEVER], later, [NEVER]])
        now = np.flatnonzero((later < walled[:-2]) & (later < walled[2:]))
        merged = sizes[now] + sizes[now + 1] - shared[now]
        fits = merged <= limit
        later[now[~fits]] = NEVER
        sizes[now[fits]] = merged[fits]
        gone = now[fits]
        firsts, sizes = np.delete(firsts, gone + 1), np.delete(sizes, gone + 1)
        shared, later = np.delete(shared, gone), np.delete(later, gone)
        if len(now) * TOGETHER < open_:
            break
    return firsts[_kept(sizes.tolist(), shared.tolist(), later, limit)]


def _kept(sizes: list[int], shared: list[int], later: Ints, limit: int) -> list[int]:
    """`_clumps` one by one: of clumps that lie side by side, those that others join on their right."""
    ends = list(range(len(sizes)))  # of a clump's first one, its last
    starts = list(range(len(sizes)))  # and the other way
    joined = [False] * len(sizes)
    for k in np.argsort(later, kind="stable")[: int((later < NEVER).sum())].tolist():
        left, right = starts[k], k + 1
        merged = sizes[left] + sizes[right] - shared[k]
        if merged <= limit:
            sizes[left], joined[right] = merged, True
            last = ends[left] = ends[right]
            starts[last] = left
    return [k for k, inside in enumerate(joined) if not inside]


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
    inside = order.sort(members)
    sorted_members, lengths = inside.tolist(), order.lengths[inside].tolist()
    chains, home = _grow(lengths, order.between(inside).tolist())
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
