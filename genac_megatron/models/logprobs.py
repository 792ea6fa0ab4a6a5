"""Log-probs and entropies of labels from hidden states, without ever holding all the logits.

For a vocabulary of 152 k and 8 k tokens the logits alone are 5 GB in fp32, and a dense softmax holds
several copies. Here they exist `chunk` tokens at a time, forward and again backward; what is kept
between the two is hidden states, weight, labels, one log-sum-exp per token, and the last chunk's
logits: backward begins with them, when they would be made again anyway.

With logits l = h W^T / temperature, p = softmax(l), y the label and H the entropy:

    log p_y = l_y - lse          d log p_y / d l_j = 1[j = y] - p_j
    H = lse - sum_j p_j l_j      d H / d l_j       = -p_j (log p_j + H)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from genac_megatron.errors import InputError

# Stands for log 0 where a rank holds no true vocabulary row: finite, so that 0 times it is 0.
_FLOOR = -1e30

_ROWS = 8192  # of the weight's gradient whose half-precision product exists at once


@dataclass(frozen=True)
class _Shard:
    """Which vocabulary rows this rank holds, and how its logits are made."""

    group: dist.ProcessGroup | None  # None: this rank holds all of them
    first: int  # vocabulary id of row 0
    rows: int  # true rows; those after are padding
    temperature: float
    chunk: int

    def slices(self, count: int) -> list[slice]:
        """`count` tokens, at most `chunk` at a time and about as many each; none without rows."""
        if not (self.rows and count):
            return []
        size = -(-count // -(-count // self.chunk))
        return [slice(a, min(a + size, count)) for a in range(0, count, size)]

    def logits(self, hidden_CH: Tensor, weight_VH: Tensor) -> Tensor:
        """[C, rows] in fp32 (fp64 stays), temperature applied, padding rows left out; safe to overwrite."""
        raw_CV = (hidden_CH @ weight_VH.T)[:, : self.rows]
        wide_CV = raw_CV.to(_wide(hidden_CH))
        return wide_CV if self.temperature == 1.0 else wide_CV.div_(self.temperature)

    def local(self, labels_C: Tensor) -> tuple[Tensor, Tensor]:
        """(column of each label on this rank, any where it lies elsewhere; whether it lies here)."""
        column_C = labels_C - self.first
        here_C = (column_C >= 0) & (column_C < self.rows)
        return column_C.clamp(0, max(self.rows - 1, 0)), here_C


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def vocab_parallel_logprobs(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    labels_T: Tensor,
    *,
    tp_group: dist.ProcessGroup | None,
    temperature: float = 1.0,
    chunk: int = 1024,
    vocab: int,
    with_entropy: bool = False,
    mask_T: Tensor | None = None,
    rows_E: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Log-prob [T] (nats) of labels_T under softmax(hidden W^T / temperature), and the entropy [T].

    hidden_TH: the same T hidden states on every rank of tp_group (sequence parallelism already
    gathered). weight_VH: this rank's equal share of the output embedding's rows; rows beyond the
    true `vocab` are padding and get probability 0. labels_T: int64 ids in [0, vocab), on padding
    positions too. mask_T (bool): positions where it is False are not computed, their log-prob and
    entropy are 0. rows_E (int64) in its place: labels_T are E, and label e is predicted by hidden state
    rows_E[e]. Several may have the same one, whose logits and log-sum-exp are computed once; what is
    returned is [E]. Returns fp32 (fp64 for fp64 input), equal on every rank; the entropy is None
    unless with_entropy, and differentiable then. tp_group None or of size 1 needs no torch.distributed.

    **The gradient of hidden_TH is this rank's partial sum**, over its own vocabulary rows: the
    caller reduces it over tp_group, as Megatron's copy-to-region (all-reduce) or the gather of
    sequence parallelism (reduce-scatter) does in its backward. The weight's gradient is whole.
    At most chunk x V/tp logits exist at once, in fp32 and, for backward's products, in the input's
    dtype; the weight's gradient is summed over chunks in fp32. Once differentiable.

    Raises InputError where shapes, vocab, temperature or chunk cannot be; a label outside the
    vocabulary fails torch's asynchronous assert, which costs no wait for the device.
    """
    size, rank = (tp_group.size(), tp_group.rank()) if tp_group is not None else (1, 0)
    _check(
        hidden_TH,
        weight_VH,
        labels_T,
        mask_T,
        rows_E,
        temperature=temperature,
        chunk=chunk,
        vocab=vocab,
        size=size,
    )
    first = rank * weight_VH.size(0)
    shard = _Shard(
        group=tp_group if size > 1 else None,
        first=first,
        rows=min(max(vocab - first, 0), weight_VH.size(0)),
        temperature=temperature,
        chunk=chunk,
    )
    if rows_E is not None:
        by_row_E = rows_E.argsort(stable=True)
        at_R, of_E = rows_E[by_row_E].unique_consecutive(return_inverse=True)
        hidden_RH, labels_E = hidden_TH.index_select(0, at_R), labels_T[by_row_E]
        back_E = by_row_E.argsort()
        logp_E, entropy_E = _compute(hidden_RH, weight_VH, labels_E, of_E, shard, vocab, with_entropy)
        logp_E = logp_E.index_select(0, back_E)
        return logp_E, None if entropy_E is None else entropy_E.index_select(0, back_E)
    if mask_T is None:
        return _compute(hidden_TH, weight_VH, labels_T, None, shard, vocab, with_entropy)
    at_N = mask_T.nonzero().squeeze(1)
    logp_N, entropy_N = _compute(
        hidden_TH.index_select(0, at_N),
        weight_VH,
        labels_T.index_select(0, at_N),
        None,
        shard,
        vocab,
        with_entropy,
    )

    def scatter(values_N: Tensor) -> Tensor:
        return values_N.new_zeros(len(labels_T)).index_copy(0, at_N, values_N)

    return scatter(logp_N), None if entropy_N is None else scatter(entropy_N)


def _compute(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    labels_T: Tensor,
    of_E: Tensor | None,
    shard: _Shard,
    vocab: int,
    with_entropy: bool,
) -> tuple[Tensor, Tensor | None]:
    """of_E: the row of each label, ascending; None: each row has its own."""
    torch._assert_async(
        ((labels_T >= 0) & (labels_T < vocab)).all(), f"a label is outside the vocabulary of {vocab}"
    )
    edges = _Edges(of_E, len(hidden_TH), shard)
    return _ChunkedLogprobs.apply(hidden_TH, weight_VH, labels_T, edges, shard, with_entropy)


class _Edges:
    """Which row predicts which labels: E labels over T rows."""

    def __init__(self, of_E: Tensor | None, rows: int, shard: _Shard) -> None:
        self.of_E = of_E
        self.parts: dict[int, slice] = {}  # first row of a chunk -> its labels
        if of_E is not None:
            chunks = shard.slices(rows)
            firsts = torch.tensor([chunk.start for chunk in chunks], device=of_E.device)
            begins = [*torch.searchsorted(of_E, firsts).tolist(), len(of_E)]
            self.parts = {c.start: slice(*begins[i : i + 2]) for i, c in enumerate(chunks)}

    def part(self, rows: slice) -> slice:
        """The labels of a chunk of rows."""
        return rows if self.of_E is None else self.parts[rows.start]

    def take(self, z_CV: Tensor, column_E: Tensor, rows: slice) -> Tensor:
        """Of a chunk's values, those at its labels' columns."""
        if self.of_E is None:
            return z_CV.gather(1, column_E[:, None]).squeeze(1)
        return z_CV[self.of_E[self.part(rows)] - rows.start, column_E]

    def add(self, d_CV: Tensor, column_E: Tensor, values_E: Tensor, rows: slice) -> None:
        """Add values to a chunk at its labels' columns."""
        if self.of_E is None:
            d_CV.scatter_add_(1, column_E[:, None], values_E[:, None])
        else:
            d_CV.index_put_((self.of_E[self.part(rows)] - rows.start, column_E), values_E, accumulate=True)

    def spread(self, values_T: Tensor) -> Tensor:
        """Each row's figure at its labels: [T] -> [E]."""
        return values_T if self.of_E is None else values_T.index_select(0, self.of_E)

    def sums(self, values_E: Tensor, rows: int) -> Tensor:
        """[E] -> [T], a row's labels added up."""
        return values_E if self.of_E is None else values_E.new_zeros(rows).index_add(0, self.of_E, values_E)


class _ChunkedLogprobs(torch.autograd.Function):
    """The forward keeps one figure per token, and of the last chunk what it has computed; the backward
    makes the other chunks' logits again."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TH: Tensor,
        weight_VH: Tensor,
        labels_E: Tensor,
        edges: _Edges,
        shard: _Shard,
        with_entropy: bool,
    ) -> tuple[Tensor, Tensor | None]:
        T = len(hidden_TH)
        stats = hidden_TH.new_zeros(3 * T + len(labels_E), dtype=_wide(hidden_TH))
        max_T, sum_T, dot_T, target_E = stats.split([T, T, T, len(labels_E)])
        max_T.fill_(_FLOOR)
        ctx.kept = None
        for part in shard.slices(T):
            ctx.kept = z_CV = None  # before the next chunk's is made
            z_CV = shard.logits(hidden_TH[part], weight_VH)
            column_E, here_E = shard.local(labels_E[edges.part(part)])
            max_T[part] = z_CV.amax(1)
            z_CV.sub_(max_T[part, None])
            target_E[edges.part(part)] = edges.take(z_CV, column_E, part) * here_E
            if with_entropy:
                e_CV = z_CV.exp()
                sum_T[part] = e_CV.sum(1)
                dot_T[part] = e_CV.mul_(z_CV).sum(1)
                del e_CV
            else:
                sum_T[part] = z_CV.exp_().sum(1)
            ctx.kept = z_CV, max_T[part].clone()

        if shard.group is not None and T:
            own_max_T = max_T.clone()
            dist.all_reduce(max_T, dist.ReduceOp.MAX, group=shard.group)
            shift_T = own_max_T - max_T
            dot_T.add_(shift_T * sum_T).mul_(shift_T.exp())
            sum_T.mul_(shift_T.exp())
            target_E.add_(edges.spread(shift_T) * shard.local(labels_E)[1])
            dist.all_reduce(stats[T:], group=shard.group)

        log_sum_T = sum_T.log()
        entropy_T = log_sum_T - dot_T / sum_T if with_entropy else None
        ctx.save_for_backward(hidden_TH, weight_VH, labels_E, max_T + log_sum_T, entropy_T)
        ctx.shard, ctx.edges = shard, edges
        ctx.set_materialize_grads(False)
        return target_E - edges.spread(log_sum_T), None if entropy_T is None else edges.spread(entropy_T)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logp_E: Tensor | None, grad_entropy_E: Tensor | None) -> tuple[Any, ...]:
        hidden_TH, weight_VH, labels_E, lse_T, entropy_T = ctx.saved_tensors
        shard: _Shard = ctx.shard
        edges: _Edges = ctx.edges
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        if grad_logp_E is None:
            grad_logp_E = lse_T.new_zeros(len(labels_E))
        grad_logp_T = edges.sums(grad_logp_E, len(lse_T))
        grad_entropy_T = None if grad_entropy_E is None else edges.sums(grad_entropy_E, len(lse_T))
        grad_hidden_TH = torch.zeros_like(hidden_TH) if need_hidden else None
        grad_weight_VH = weight_VH.new_zeros(weight_VH.shape, dtype=_wide(weight_VH)) if need_weight else None
        for part in reversed(shard.slices(len(lse_T))):
            g_C, lse_C = grad_logp_T[part], lse_T[part]
            kept, ctx.kept = ctx.kept, None  # the last chunk's, once
            if kept is not None and entropy_T is None:
                e_CV, max_C = kept
                d_CV = e_CV.mul_(((max_C - lse_C).exp_() * -g_C)[:, None])
            else:
                logp_CV = shard.logits(hidden_TH[part], weight_VH) if kept is None else kept[0]
                logp_CV.sub_((lse_C if kept is None else lse_C - kept[1])[:, None])
                if grad_entropy_T is None:
                    d_CV = logp_CV.exp_().mul_(-g_C[:, None])
                else:
                    d_CV = logp_CV.exp().neg_()
                    logp_CV.add_(entropy_T[part, None]).mul_(grad_entropy_T[part, None]).add_(g_C[:, None])
                    d_CV.mul_(logp_CV)
                del logp_CV
            kept = e_CV = None
            column_E, here_E = shard.local(labels_E[edges.part(part)])
            edges.add(d_CV, column_E, grad_logp_E[edges.part(part)] * here_E, part)
            if shard.temperature != 1.0:
                d_CV.div_(shard.temperature)
            d_CV = d_CV.to(hidden_TH.dtype)
            if grad_hidden_TH is not None:
                torch.mm(d_CV, weight_VH[: shard.rows], out=grad_hidden_TH[part])
            if grad_weight_VH is not None:
                _add_product(grad_weight_VH[: shard.rows], d_CV.T, hidden_TH[part])
            del d_CV  # before the next chunk's is made
        if grad_weight_VH is not None:
            grad_weight_VH = grad_weight_VH.to(weight_VH.dtype)
        return grad_hidden_TH, grad_weight_VH, None, None, None, None


def _add_product(sum_VH: Tensor, a_VC: Tensor, b_CH: Tensor) -> None:
    if a_VC.dtype == sum_VH.dtype:
        sum_VH.addmm_(a_VC, b_CH)  # no V x H product beside the sum
    else:
        for sum_RH, a_RC in zip(sum_VH.split(_ROWS), a_VC.split(_ROWS), strict=True):
            sum_RH += a_RC @ b_CH


def _check(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    labels_T: Tensor,
    mask_T: Tensor | None,
    rows_E: Tensor | None,
    *,
    temperature: float,
    chunk: int,
    vocab: int,
    size: int,
) -> None:
    wrong = ""
    if hidden_TH.dim() != 2 or weight_VH.dim() != 2 or hidden_TH.size(1) != weight_VH.size(1):
        wrong = f"hidden {tuple(hidden_TH.shape)} does not meet weight {tuple(weight_VH.shape)}"
    elif hidden_TH.dtype != weight_VH.dtype:
        wrong = f"hidden is {hidden_TH.dtype} and weight {weight_VH.dtype}"
    elif rows_E is not None:
        if rows_E.shape != labels_T.shape or rows_E.dtype != torch.int64:
            wrong = f"rows {tuple(rows_E.shape)} {rows_E.dtype} for labels {tuple(labels_T.shape)}"
        elif mask_T is not None:
            wrong = "a mask beside rows"
    elif labels_T.shape != hidden_TH.shape[:1]:
        wrong = f"labels {tuple(labels_T.shape)} for hidden {tuple(hidden_TH.shape)}"
    elif mask_T is not None and (mask_T.shape != labels_T.shape or mask_T.dtype != torch.bool):
        wrong = f"mask {tuple(mask_T.shape)} {mask_T.dtype} for labels {tuple(labels_T.shape)}"
    if wrong:
        pass
    elif not 1 <= vocab <= weight_VH.size(0) * size:
        wrong = f"a vocabulary of {vocab} over {size} x {weight_VH.size(0)} rows"
    elif temperature <= 0:
        wrong = f"temperature {temperature} is not above 0"
    elif chunk < 1:
        wrong = f"chunk {chunk} is not above 0"
    if wrong:
        raise InputError(wrong, where="vocab_parallel_logprobs")
