"""A batch whose samples stay where they were made: each rank has its own, all know what a plan needs.

What is known everywhere is arrays of a few numbers per sample (`Known`): lengths, loss weights, and what
neighbours share at their beginnings. From these every rank makes the same plan of micro-batches. A role takes
a batch once: one exchange brings each sample to the data-parallel rank that computes it (`brought`), whose
peers in tensor, pipeline and context parallelism get it by broadcast in their groups. Passes with other plans
(a minibatch's) exchange inside the block (`fetched`). Log-probs stay with the samples (`settled`) or go back
to where these were made (`returned`). A plain list is a batch that every rank has whole.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, cast
from zlib import crc32

import numpy as np
import torch.distributed as dist
from numpy.typing import NDArray

from genac_megatron.errors import InputError, on_all_ranks
from genac_megatron.models.families.base import Shape
from genac_megatron.models.routing import need_experts
from genac_megatron.records import Sample
from genac_megatron.training.agreement import gathered
from genac_megatron.training.exchange import Bytes, exchanged, gathered_rows, spread_from
from genac_megatron.training.layout import Coords, Layout
from genac_megatron.training.trees import SHORTEST, Order, order_of

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Scores = NDArray[np.float32]  # log-probs, or a scalar critic's outputs
NORMALISED = ("weights", "nll_weights")  # fields whose sum over a batch is its norm
COMMON = 1024  # tokens of what all of a rank's samples begin with that other ranks compare
TOKEN, FIELD = np.dtype(np.int32), np.dtype(np.float32)


@dataclass(frozen=True)
class Known:
    """What every rank knows of a batch's n samples, in the batch's order."""

    tokens: Ints  # [n]
    starts: Ints  # [n]
    trained: Ints  # [n]: tokens that carry loss
    spans: Ints  # [n]: how many ranges these are; 0: all from the start on
    replayed: NDArray[np.bool_]  # [n]: experts come with it
    names: tuple[str, ...]  # of the fields, sorted
    experts: tuple[int, int, str]  # layers, top-k and dtype of what is replayed; ("",) of nothing
    most: int  # the highest expert among them
    sums: dict[str, Floats]  # of NORMALISED fields that are there, [n]
    order: Ints  # [n]: neighbours share much
    shared: Ints  # [n - 1]: tokens that order[k] and order[k + 1] share, at least

    def part(self, indices: Ints, factors: Mapping[str, float]) -> Known:
        """Of these samples in this order, their normalised fields multiplied."""
        rank = np.empty(len(self.order), np.int64)
        rank[self.order] = np.arange(len(self.order))
        at = rank[indices]
        order = np.argsort(at, kind="stable")
        # What samples share that are no neighbours here is the least between them.
        least = np.minimum.reduceat(np.append(self.shared, 0), at[order]) if len(at) else at
        return replace(
            self,
            tokens=self.tokens[indices],
            starts=self.starts[indices],
            trained=self.trained[indices],
            spans=self.spans[indices],
            replayed=self.replayed[indices],
            sums={name: x[indices] * factors.get(name, 1.0) for name, x in self.sums.items()},
            order=order,
            shared=least[:-1],
        )

    # --- samples as bytes, those of a message in the batch's order: tokens, spans, each field, experts ---

    @cached_property
    def _bytes(self) -> Ints:
        """Of each sample in a message."""
        words = self.tokens + 2 * self.spans
        layers, choices, kind = self.experts
        width = layers * choices * np.dtype(kind).itemsize if kind else 0
        found = words * TOKEN.itemsize + self.trained * FIELD.itemsize * len(self.names)
        return found + self.replayed * (self.tokens - 1) * width

    def nbytes(self, indices: Ints) -> int:
        """Of a message with these samples."""
        return int(self._bytes[indices].sum())

    def packed(self, samples: Mapping[int, Sample], indices: Ints) -> Bytes:
        """The message."""
        chosen = [samples[i] for i in indices.tolist()]
        arrays = [np.asarray(one.tokens, TOKEN) for one in chosen]
        arrays += [np.asarray(one.spans, TOKEN) for one in chosen]
        arrays += [np.asarray(one.fields[name], FIELD) for name in self.names for one in chosen]
        kind = self.experts[2]
        arrays += [one.experts.astype(kind) for one in chosen if one.experts is not None]
        parts = [np.ascontiguousarray(array).reshape(-1).view(np.uint8) for array in arrays]
        return np.concatenate(parts) if parts else np.zeros(0, np.uint8)

    def unpacked(self, message: Bytes, indices: Ints) -> dict[int, Sample]:
        """The samples of a message, as arrays."""
        at, chosen = 0, indices.tolist()

        def take(count: int, kind: np.dtype[Any]) -> NDArray[Any]:
            nonlocal at
            begin, at = at, at + count * kind.itemsize
            return message[begin:at].copy().view(kind)  # a view of its own: messages are let go

        tokens = [take(int(self.tokens[i]), TOKEN) for i in chosen]
        spans = [take(2 * int(self.spans[i]), TOKEN).reshape(-1, 2).tolist() for i in chosen]
        fields = {name: [take(int(self.trained[i]), FIELD) for i in chosen] for name in self.names}
        layers, choices, kind = self.experts
        made = {}
        for number, i in enumerate(chosen):
            experts = None
            if self.replayed[i]:
                rows = int(self.tokens[i]) - 1
                experts = take(rows * layers * choices, np.dtype(kind)).reshape(rows, layers, choices)
            own = {name: cast("Sequence[float]", arrays[number]) for name, arrays in fields.items()}
            ids, ranges = cast("Sequence[int]", tokens[number]), tuple(map(tuple, spans[number]))
            made[i] = Sample(ids, int(self.starts[i]), own, experts, spans=ranges)
        return made


@dataclass
class DistributedBatch:
    """Samples over the ranks of the world or, once a role has taken them, of its block.

    held: this rank's, by their places in the batch; there fields are written. holder: who has each, a rank of
    the world, or of the block's data-parallel group; None: every rank has all. block: the layout of the role
    that took it. origin: the rank of the world where each was made.
    """

    known: Known
    held: dict[int, Sample]
    holder: Ints | None
    origin: Ints
    block: Layout | None = None
    dp_rank: int | None = None  # this rank's in the block; None outside, and without one
    plans: dict[Hashable, Any] = field(default_factory=dict)  # by role: what was planned for these samples

    def __len__(self) -> int:
        return len(self.known.tokens)

    @property
    def everywhere(self) -> bool:
        return self.holder is None

    @property
    def mine(self) -> list[Sample]:
        """This rank's samples, in order."""
        return [self.held[i] for i in sorted(self.held)]

    @property
    def made_here(self) -> Ints:
        """Places of the samples whose results come back to this rank."""
        return np.arange(len(self)) if self.everywhere else np.flatnonzero(self.origin == dist.get_rank())

    @property
    def taken(self) -> bool:
        """Whether a role's block has what it needs, so that the rest of the world is not asked."""
        return self.everywhere or self.block is not None

    @property
    def lengths(self) -> Ints:
        """Input positions of each sample."""
        return self.known.tokens - 1

    def order(self) -> Order:
        """An order in which neighbours share much, the lexicographic one where all samples are here."""
        if self.everywhere:
            return order_of([self.held[i] for i in range(len(self))])
        return Order(self.lengths, self.known.order, self.known.shared)

    def total(self, name: str) -> float:
        """The sum of a normalised field, one by one in the batch's order."""
        return float(sum(self.known.sums[name].tolist()))

    def part(self, indices: Sequence[int], factors: Mapping[str, float] | None = None) -> DistributedBatch:
        """The batch of these samples in this order, where they are; normalised fields are multiplied."""
        scale, at = factors or {}, np.asarray(indices, np.int64)
        held = {new: _scaled(self.held[old], scale) for new, old in enumerate(indices) if old in self.held}
        return DistributedBatch(
            self.known.part(at, scale),
            held,
            None if self.holder is None else self.holder[at],
            self.origin[at],
            self.block,
            self.dp_rank,
        )

    def add(self, name: str, scores: Mapping[int, Scores]) -> None:
        """Give every sample a field, of figures that are where it is (`settled`)."""
        for i, sample in self.held.items():
            sample.fields[name] = cast("list[float]", scores[i])
        self.known = replace(self.known, names=tuple(sorted({*self.known.names, name})))

    def need_experts(self, shape: Shape) -> None:
        """Raise InputError, on every rank, where experts are to be replayed that a model does not have."""
        layers, choices, kind = self.known.experts
        if kind:
            try:
                need_experts("a sample", (layers, choices), self.known.most, shape)
            except InputError as error:
                raise on_all_ranks(error) from None

    # --- moving ------------------------------------------------------------------------------------

    def brought(self, layout: Layout, groups: Any, owner: Ints) -> DistributedBatch:
        """The batch on a role's block, each sample on the data-parallel rank that `owner` names.

        groups: the layout's, None outside. Collective over the world.
        """
        assert self.holder is not None
        assert self.block is None
        rank, leaders = dist.get_rank(), layout.leaders
        parts = [np.zeros(0, np.uint8)] * dist.get_world_size()
        sent = _dealt(np.flatnonzero(self.holder == rank), owner, layout.dp)
        for leader, indices in zip(leaders, sent, strict=True):
            parts[leader] = self.known.packed(self.held, indices)
        at = layout.coords(rank) if groups is not None else None
        wanted = np.zeros(0, np.int64) if at is None else np.flatnonzero(owner == at.dp)
        sources = _dealt(wanted, self.holder, len(parts))
        leads = rank in leaders
        sizes = [self.known.nbytes(source) if leads else 0 for source in sources]
        found = exchanged(parts, sizes)
        held: dict[int, Sample] = {}
        if at is not None:
            whole = np.concatenate(sources)
            message = np.concatenate(found) if leads else np.empty(self.known.nbytes(whole), np.uint8)
            sizes = [self.known.nbytes(source) for source in sources]
            message = _to_peers(message, layout, groups, at)
            for part, source in zip(np.split(message, np.cumsum(sizes)[:-1]), sources, strict=True):
                held |= self.known.unpacked(part, source)
        mine_there = None if at is None else at.dp
        return DistributedBatch(
            self.known, held, owner, self.origin, layout, mine_there, plans=dict(self.plans)
        )

    def fetched(self, groups: Any, owner: Ints) -> Mapping[int, Sample]:
        """The samples that `owner` gives to this rank of the block. Collective over the block."""
        if self.holder is None or np.array_equal(owner, self.holder):
            return self.held
        assert self.block is not None
        mine, wanted = (np.flatnonzero(whose == self.dp_rank) for whose in (self.holder, owner))
        parts = [self.known.packed(self.held, there) for there in _dealt(mine, owner, self.block.dp)]
        sources = _dealt(wanted, self.holder, self.block.dp)
        found = exchanged(parts, [self.known.nbytes(source) for source in sources], groups.dp)
        samples: dict[int, Sample] = {}
        for message, source in zip(found, sources, strict=True):
            samples |= self.known.unpacked(message, source)
        return samples

    # --- results -----------------------------------------------------------------------------------

    def settled(
        self, scores: Mapping[int, Scores], owner: Ints, layout: Layout, groups: Any
    ) -> dict[int, Scores]:
        """Figures per trained token where their samples are, on every rank of the block. Collective over it.

        scores: by sample, on the last pipeline stage, of those that `owner` gave to this rank.
        """
        counts, mine, whole = self.known.trained, groups.dp.rank(), np.arange(len(self))
        here = whole if self.holder is None else np.flatnonzero(self.holder == mine)
        come = _dealt(here, owner, layout.dp)
        if layout.is_last_stage(groups):
            made = np.flatnonzero(owner == mine)
            sent = [made] * layout.dp if self.holder is None else _dealt(made, self.holder, layout.dp)
            parts = [_flat([scores[i] for i in part.tolist()]).view(np.uint8) for part in sent]
            sizes = [int(counts[part].sum()) * FIELD.itemsize for part in come]
            values = np.concatenate(exchanged(parts, sizes, groups.dp)).view(np.float32)
        else:
            values = np.empty(int(counts[here].sum()), np.float32)
        if layout.pp > 1:
            at = layout.coords(dist.get_rank())
            values = spread_from(layout.rank_of(at._replace(pp=layout.pp - 1)), values, groups.pp)
        return _cut(values, np.concatenate(come), counts)

    def returned(self, settled: Mapping[int, Scores] | None, layout: Layout) -> list[list[float]]:
        """Figures per trained token of the samples that were made here, in order. Collective over the world.

        settled: on the block's ranks; None elsewhere.
        """
        counts, rank = self.known.trained, dist.get_rank()
        if self.everywhere:
            whole = np.arange(len(self))
            empty = np.empty(int(counts.sum()), np.float32)
            values = empty if settled is None else _flat([settled[i] for i in whole.tolist()])
            found = _cut(spread_from(layout.output_rank, values), whole, counts)
        else:
            found = self._sent_home(settled or {}, layout, counts, rank)
        return [found[i].tolist() for i in self.made_here.tolist()]

    def _sent_home(
        self, settled: Mapping[int, Scores], layout: Layout, counts: Ints, rank: int
    ) -> dict[int, Scores]:
        assert self.holder is not None
        size, leaders = dist.get_world_size(), layout.leaders
        parts = [np.zeros(0, np.uint8)] * size
        if rank in leaders:
            sent = _dealt(np.flatnonzero(self.holder == leaders.index(rank)), self.origin, size)
            parts = [_flat([settled[i] for i in part.tolist()]).view(np.uint8) for part in sent]
        come = [np.zeros(0, np.int64)] * size
        there = _dealt(np.flatnonzero(self.origin == rank), self.holder, layout.dp)
        for leader, part in zip(leaders, there, strict=True):
            come[leader] = part
        sizes = [int(counts[part].sum()) * FIELD.itemsize for part in come]
        values = np.concatenate(exchanged(parts, sizes)).view(np.float32)
        return _cut(values, np.concatenate(come), counts)


def _dealt(places: Ints, to: Ints, count: int) -> list[Ints]:
    """Of `places`, in order, those that go `to` 0, 1, ... count - 1."""
    theirs = to[places]
    ends = np.cumsum(np.bincount(theirs, minlength=count))
    return np.split(places[np.argsort(theirs, kind="stable")], ends[:-1])


def _scaled(sample: Sample, factors: Mapping[str, float]) -> Sample:
    """With fields of its own."""
    own = dict(sample.fields)
    for name, factor in factors.items():
        figures: Any = own[name]
        scaled: Any = figures * factor if isinstance(figures, np.ndarray) else [x * factor for x in figures]
        own[name] = scaled
    return replace(sample, fields=own)


def _flat(scores: Iterable[Scores]) -> Scores:
    return np.concatenate([np.zeros(0, np.float32), *scores])


def _cut(values: Scores, indices: Ints, counts: Ints) -> dict[int, Scores]:
    """Figures that follow each other, by sample."""
    if not len(indices):
        return {}
    return dict(zip(indices.tolist(), np.split(values, np.cumsum(counts[indices])[:-1]), strict=True))


def _to_peers(message: Bytes, layout: Layout, groups: Any, at: Coords) -> Bytes:
    """The leader's message on all ranks that compute the same samples: over context parallelism, then each
    one's tensor and pipeline ranks. Collective over the block.
    """
    if layout.cp > 1 and at.tp == 0 and at.pp == 0:
        message = spread_from(layout.rank_of(at._replace(cp=0)), message, groups.cp)
    if layout.tp * layout.pp > 1:
        message = spread_from(layout.rank_of(at._replace(tp=0, pp=0)), message, groups.mp)
    return message


# --- making one ----------------------------------------------------------------------------------


def everywhere(samples: Sequence[Sample]) -> DistributedBatch:
    """The batch of a list that every rank has whole."""
    count, first = len(samples), samples[0] if samples else None
    names = tuple(sorted(first.fields)) if first is not None else ()
    nothing = np.zeros(0, np.int64)
    known = Known(
        np.array([len(one.tokens) for one in samples], np.int64),
        np.array([one.start for one in samples], np.int64),
        np.array([one.trained for one in samples], np.int64),
        np.array([len(one.spans) for one in samples], np.int64),
        np.array([one.experts is not None for one in samples], bool),
        names,
        (0, 0, ""),
        -1,
        {},
        nothing,
        nothing,
    )
    return DistributedBatch(known, dict(enumerate(samples)), None, np.zeros(count, np.int64))


def distributed(mine: Sequence[Sample]) -> DistributedBatch:
    """The batch of every rank's samples, by their `place`: a rank's own are in that order, and those of one
    place are of one rank. Collective over the world.

    Raises InputError, on every rank, where samples differ in their fields or in the form of experts, or where
    a field has not one figure per trained token.
    """
    local = order_of(mine)
    rows = np.zeros((len(mine), 8), np.int64)
    rows[:, 0] = [one.place for one in mine]
    rows[:, 1] = [len(one.tokens) for one in mine]
    rows[:, 2] = [one.start for one in mine]
    rows[:, 3] = [one.trained for one in mine]
    rows[:, 4] = [len(one.spans) for one in mine]
    rows[:, 5] = [one.experts is not None for one in mine]
    rows[:, 6] = local.rank
    rows[local.order[:-1], 7] = local.shared
    sums = np.array([[sum(one.fields.get(name, ())) for name in NORMALISED] for one in mine], np.float64)
    ranks = gathered_rows(rows)
    sizes = [len(part) for part in ranks]
    table, totals = np.concatenate(ranks), np.concatenate(gathered_rows(sums.reshape(-1, len(NORMALISED))))
    names, experts, most = _forms(gathered((_form(mine), _misfit(mine))))
    moved = np.argsort(table[:, 0], kind="stable")  # the batch's order of what ranks have one after the other
    place = np.empty(len(moved), np.int64)
    place[moved] = np.arange(len(moved))
    order, shared = _joined(table, sizes, _beginnings(mine, local))
    table, totals = table[moved], totals[moved]
    known = Known(
        table[:, 1],
        table[:, 2],
        table[:, 3],
        table[:, 4],
        table[:, 5] > 0,
        names,
        experts,
        most,
        {name: totals[:, k] for k, name in enumerate(NORMALISED) if name in names},
        place[order],
        shared,
    )
    origin = np.repeat(np.arange(len(sizes)), sizes)[moved]
    here = np.flatnonzero(origin == dist.get_rank())
    return DistributedBatch(known, dict(zip(here.tolist(), mine, strict=True)), origin, origin)


Form = tuple[tuple[str, ...], tuple[int, int, str], int]


def _form(mine: Sequence[Sample]) -> set[Form]:
    """Names of fields, form of experts, the highest of them: the same few words whatever the batch's size."""
    found: dict[tuple[tuple[str, ...], tuple[int, int, str]], int] = {}
    for one in mine:
        form, most = (0, 0, ""), -1
        if one.experts is not None:
            form, most = (*one.experts.shape[1:], one.experts.dtype.str), int(one.experts.max(initial=0))
        key = tuple(sorted(one.fields)), form
        found[key] = max(found.get(key, -1), most)
    return {(*key, most) for key, most in found.items()}


def _misfit(mine: Sequence[Sample]) -> str:
    """What is wrong with the first field that has not one figure per trained token; "" where none is."""
    for index, one in enumerate(mine):
        for name, figures in one.fields.items():
            if len(figures) != one.trained:
                return (
                    f"field {name!r} of a rank's sample {index} has {len(figures)} figures, where "
                    f"{one.trained} tokens are trained"
                )
    return ""


def _forms(ranks: Sequence[tuple[set[Form], str]]) -> Form:
    if wrong := next((misfit for _, misfit in ranks if misfit), ""):
        raise on_all_ranks(InputError(wrong, where="distributed batch"))
    found = set[Form]().union(*(forms for forms, _ in ranks))
    names = {one for one, _, _ in found}
    experts = {one for _, one, _ in found if one[2]}
    if len(names) > 1 or len(experts) > 1:
        what = f"samples of one batch have {'fields' if len(names) > 1 else 'experts'} of several forms: "
        told = sorted(map(str, names if len(names) > 1 else experts))
        raise on_all_ranks(InputError(what + " and ".join(told), where="distributed batch"))
    nothing: tuple[int, int, str] = (0, 0, "")
    return (
        next(iter(names), ()),
        next(iter(experts), nothing),
        max((most for _, _, most in found), default=-1),
    )


def _beginnings(mine: Sequence[Sample], local: Order) -> list[NDArray[np.int64]]:
    """Of every rank, what all its samples begin with, up to COMMON tokens with their experts. Collective."""
    common = int((local.shared if len(mine) > 1 else local.lengths).min(initial=COMMON))
    words = np.zeros(0, np.int64)
    if mine and common:
        first = mine[local.order[0]]
        words = np.asarray(first.tokens[:common], np.int64)
        if first.experts is not None:  # tokens are shared where they go to the same experts
            rows = first.experts[:common].reshape(common, -1)
            words = words + (np.array([crc32(row.tobytes()) for row in rows], np.int64) << 31)
    return gathered_rows(words)


def _joined(table: Ints, sizes: Sequence[int], beginnings: Sequence[Ints]) -> tuple[Ints, Ints]:
    """Ranks' orders one after the other, and what neighbours share: inside a rank what they do, between two
    ranks what all samples of both begin with.
    """
    order, shared, at, last = [], [], 0, None
    for size, words in zip(sizes, beginnings, strict=True):
        rows = table[at : at + size]
        inside = np.argsort(rows[:, 6], kind="stable")
        if size:
            if last is not None:
                common = min(len(last), len(words))
                differ = np.append(last[:common] != words[:common], True)
                met = int(differ.argmax())
                shared.append(np.array([met if met >= SHORTEST else 0]))
            order.append(at + inside)
            shared.append(rows[inside[:-1], 7])
            last = words
        at += size
    nothing = np.zeros(0, np.int64)
    return np.concatenate([nothing, *order]), np.concatenate([nothing, *shared])
