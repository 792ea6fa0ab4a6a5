"""A batch's micro-batches on one data-parallel rank: flat packs, or trees where samples begin alike."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch.distributed as dist
from megatron.core.packed_seq_params import PackedSeqParams

from genac_megatron.errors import InputError, on_all_ranks
from genac_megatron.models.dropout import attach_keys, prefixes_of, token_keys
from genac_megatron.models.families.base import Shape
from genac_megatron.models.packed_attention import attach_tree
from genac_megatron.models.routing import attach, check_experts
from genac_megatron.models.sizes import parameters
from genac_megatron.models.specs import tree_way
from genac_megatron.recipe.schema import TrainingConfig
from genac_megatron.records import Sample
from genac_megatron.training.distributed_batch import DistributedBatch
from genac_megatron.training.exchange import gathered_rows
from genac_megatron.training.layout import Layout
from genac_megatron.training.packing import Pack, build_pack, sample_multiple_for
from genac_megatron.training.plans import MANY, Ints, Plan, Row, Rows, plan_packs, round_up
from genac_megatron.training.tree_packs import build_tree_pack
from genac_megatron.training.trees import Order, forest_of, plan_trees

logger = logging.getLogger(__name__)
_told: set[str] = set()  # roles that were told of flat packs


def shares_prefixes(name: str, training: TrainingConfig, shape: Shape, *, cp: int = 1, tell: bool) -> bool:
    """Whether role `name` computes shared beginnings once: as its recipe says, where that changes no result.

    Context parallelism cuts each sample by itself; a load-balancing loss counts each sample's tokens: there
    packs stay flat, which is said once where `tell` is (on one rank).
    """
    if tree_way(training) is None:
        return False
    if cp > 1:
        reason = "context parallelism cuts each sample by itself"
    elif shape.experts and training.moe_aux_loss > 0:
        reason = "moe_aux_loss counts every sample's tokens"
    else:
        return True
    if tell and name not in _told:
        _told.add(name)
        logger.warning("genac: %s trains on flat packs: %s", name, reason)
    return False


def pair_cost(shape: Shape) -> float:
    """What a query with a key costs in attention, over what a token costs in matrices."""
    return 2.0 * shape.layers * shape.heads * shape.head_dim / parameters(shape)


@dataclass(frozen=True)
class Planned:
    """Which samples go together."""

    owner: Ints  # [n]: the data-parallel rank of each sample, the same on every rank
    rows: dict[int, Row]  # by data-parallel rank, of those planned here
    order: Order | None  # of their samples' shared beginnings; None: packs are flat
    pad_to: int | None  # positions of every pack; None: as many as it needs
    multiple: int  # what a pack's length is a multiple of
    filled: int  # what a sample's span is a multiple of


def _rows(batch: DistributedBatch, layout: Layout, groups: Any) -> Rows:
    """Whose micro-batches are planned here: all, or of many samples this data-parallel rank's alone."""
    if len(batch) < MANY or layout.dp == 1:
        return Rows.whole(layout.dp)
    leads = dist.get_rank() in layout.leaders

    def told(mine: Ints) -> Ints:
        if batch.taken:
            return np.concatenate(gathered_rows(mine, groups.dp))
        return np.concatenate(gathered_rows(mine if leads else mine[:0]))

    return Rows(layout.dp, () if groups is None else (groups.dp.rank(),), told)


def planned(
    batch: DistributedBatch,
    layout: Layout,
    groups: Any,
    *,
    training: TrainingConfig,
    shape: Shape,
    multiple: int,
    trees: bool,
) -> Planned:
    """Who computes which samples, and micro-batches, the longest of a row first: a function of what all ranks
    know of the batch. Which rows are planned here changes nothing in them.

    groups: the layout's, None outside. multiple: what a pack's length is a multiple of. trees: samples that
    begin alike may share (training/trees.py); where that saves too little, and in packs where nobody shares,
    all is as without. Collective over the world where the batch is not taken yet, else over the block.
    """
    lengths, rows = batch.lengths, _rows(batch, layout, groups)
    filled = sample_multiple_for(layout.cp)
    step = layout.pp if layout.vpp > 1 else 1
    limit = training.tokens_per_microbatch
    order: Order | None = None
    plan: Plan | None = None
    if trees and len(lengths) and lengths.min() > 0 and limit >= multiple:
        order = batch.order()
        plan = plan_trees(
            order,
            rows=rows,
            tokens_per_microbatch=limit,
            multiple=multiple,
            microbatch_multiple=step,
            pair_cost=pair_cost(shape),
        )
    if plan is None:
        order = None
        plan = plan_packs(
            lengths,
            rows=rows,
            tokens_per_microbatch=limit,
            multiple=multiple,
            microbatch_multiple=step,
            sample_multiple=filled,
        )
    if order is not None:
        order = order.part([i for row in plan.rows for pack in row for i in pack])
    pad_to = None
    gathered = layout.ep > 1 and training.moe_dispatcher == "allgather"
    one_shape = layout.pp > 1 and not training.variable_seq_lengths
    buffered = training.tp_comm_overlap  # ... and user buffers have one size
    if (
        one_shape or gathered or buffered
    ):  # stages, or experts' ranks, exchange activations of one known shape
        longest = [max(_tokens(pack, lengths, order, filled) for pack in row) for row in plan.rows]
        most = rows.most(longest)
        pad_to = _whole(most, limit) if buffered else round_up(most, multiple)
    made = dict(zip(rows.here, plan.rows, strict=True))
    return Planned(plan.owner, made, order, pad_to, multiple, filled)


def _whole(longest: int, limit: int) -> int:
    """What user buffers are made for: a whole micro-batch. Raises InputError, on every rank, for more."""
    if longest > limit:
        raise on_all_ranks(
            InputError(
                f"a sample takes {longest} positions, and tp_comm_overlap has buffers for {limit}",
                where="training.tokens_per_microbatch",
                way_out="raise it, or take tp_comm_overlap out",
            )
        )
    return limit


def microbatches(
    samples: Mapping[int, Sample],
    fields: Sequence[str],
    made: Planned,
    layout: Layout,
    dp_rank: int,
    cp_rank: int = 0,
    *,
    training: TrainingConfig,
    shape: Shape,
) -> list[Pack]:
    """The packs of rank dp_rank, whose samples are `samples` by their places in the batch.

    Under context parallelism they are cut to what cp_rank holds.
    """
    check_experts(samples, shape)
    packs = [_build(samples, pack, made, fields) for pack in made.rows[dp_rank]]
    if training.adapter is not None and training.adapter.dropout:
        for pack in packs:
            pack.prefixes_T = prefixes_of(pack.tokens_T, pack.positions_T, pack.cu_seqlens, pack.tree)
    return [pack.cut(layout.cp, cp_rank) for pack in packs]


def _tokens(pack: Sequence[int], lengths: Ints, order: Order | None, filled: int) -> int:
    """Computed positions of a pack, samples filled up to multiples of `filled`."""
    if order is not None:
        return order.size(pack)
    return sum(round_up(length, filled) for length in lengths[np.asarray(pack, np.int64)].tolist())


def _build(samples: Mapping[int, Sample], pack: Sequence[int], made: Planned, fields: Sequence[str]) -> Pack:
    if made.order is not None:
        forest = forest_of(made.order, pack)
        if forest.branched:
            return build_tree_pack(
                samples, pack, forest, multiple=made.multiple, pad_to=made.pad_to, field_names=fields
            )
    return build_pack(
        samples,
        pack,
        multiple=made.multiple,
        pad_to=made.pad_to,
        field_names=fields,
        sample_multiple=made.filled,
    )


def packed_params(pack: Pack, dropping: int | None = None) -> PackedSeqParams:
    """What a model is told of a pack: its sequences, its trees, the experts to be replayed.

    dropping: the optimizer's step whose dropout its adapters have; None: none.
    """
    packed = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=pack.cu_seqlens,
        cu_seqlens_kv=pack.cu_seqlens,
        max_seqlen_q=pack.max_seqlen,
        max_seqlen_kv=pack.max_seqlen,
    )
    if dropping is not None and pack.prefixes_T is not None:
        attach_keys(packed, token_keys(pack.prefixes_T, dropping))
    return attach_tree(attach(packed, pack.experts_TLK), pack.tree, pack.rows_E)
