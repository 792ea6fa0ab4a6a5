"""How good estimators of a policy gradient are, from inner products of their gradients alone. Pure numpy.

Words: G is the true gradient, g an estimator's of one batch, n the batch's rollouts. A reference of R chunks
of rollouts estimates G; it is independent of the batches, which lie in K blocks. An estimator's scale says
nothing (whitening, a deviation and a learning rate change it), so each is taken at the scale at which its
part along G is G: what is left is its error, bias and noise alike.

    cosine    mean over batches of the cosine of g with G; 0 for a batch without a gradient
    snr       |G|^2 / E|g - G|^2 / n = rho^2 / (1 - rho^2) / n, rho^2 = (E g.G)^2 / (|G|^2 E|g|^2)
    bias      |E g - G| / |G|: the tangent of the angle between E g and G; below 0 where noise alone made it

Squares of means are means over pairs of different chunks or blocks, which noise does not raise (it may make
one negative). Intervals: chunks and blocks are resampled, each by itself, the same draws for all estimators.

bias, size and excess are sums over pairs in which, for an unbiased estimator, noise alone is left. Weights
drawn for each member of a pair spread such a sum by three times its variance: once by their products, which
is right, and twice by the members' own sums, which are noise there and no part of the truth. `_deviations`
takes those two off.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from genac_megatron.evaluation.intervals import Estimate, Resampled, plain
from genac_megatron.metrics import NAN, Floats, Ints

DRAWS = 1000
WIDE = 0.99  # of the check's intervals: it looks at several estimators


@dataclass(frozen=True)
class Products:
    """One estimator's inner products. Chunks are means over rollouts, blocks sums over their batches."""

    with_reference: Floats  # [batches, R]
    squares: Floats  # [batches]: |g|^2
    block_of: Ints  # [batches], in 0..K-1
    between_blocks: Floats  # [K, K]


class GradientFigures:
    """Figures against one reference. between_chunks: [R, R], its chunks' inner products; R at least 2."""

    def __init__(self, between_chunks: Floats, blocks: int, draws: int = DRAWS, seed: int = 0) -> None:
        self.between = np.asarray(between_chunks, dtype=np.float64)
        count = len(self.between)
        # Row 0: each once, which gives the figure itself.
        self.chunks = _draws(count, draws, seed)
        self.chunks /= self.chunks.sum(1, keepdims=True)
        self.blocks = _draws(blocks, draws, seed + 1)
        pairs = 1.0 - (self.chunks**2).sum(1)
        # |G|^2, [draws + 1]; NaN where the reference is too small to show any: then nothing can be said
        self.square = _positive(_between(self.chunks, self.between) / _positive(pairs))

    def reference(self, rollouts: int) -> dict[str, Estimate]:
        """Of the reference itself, of so many rollouts: how sure it is. cosine: of its mean with G."""
        count = len(self.between)
        found = _positive(_between(np.full((1, count), 1.0 / count), self.between) / (1.0 - 1.0 / count))
        square = _positive(found + _deviations(self._times()[1:], self._chunk_pairs()))
        # Of a chunk, then of the mean of all: that of a draw, in which some chunks are twice, has more.
        noise = (self.chunks @ np.diag(self.between) - square) / count
        with np.errstate(invalid="ignore", divide="ignore"):
            cosine = np.sqrt(square / (square + _positive(noise)))
            snr = square / _positive(noise) / rollouts
        return {"norm": _estimate(np.sqrt(square)), "cosine": _estimate(cosine), "snr": _estimate(snr)}

    def of(self, found: Products, rollouts: int) -> dict[str, Estimate]:
        """cosine, snr, bias; and, for what is in the reference's units, size (E g.G / |G|^2), excess
        (|E g - G|^2 / |G|^2) and noise (E|g|^2 / |G|^2). rollouts: of a batch.
        """
        members = found.block_of[None] == np.arange(self.blocks.shape[1])[:, None]  # [K, batches]
        counts = members.sum(1).astype(np.float64)
        w, total = self.blocks, self.blocks @ counts
        along_BD = found.with_reference @ self.chunks.T  # g.G of each batch, by draw
        along_DK = (members @ along_BD).T
        inner = (w * along_DK).sum(1) / total
        pairs = total**2 - (w * counts) ** 2 @ np.ones(len(counts))
        inner_square = ((w * along_DK).sum(1) ** 2 - ((w * along_DK) ** 2).sum(1)) / _positive(pairs)
        mean_square = _between(w, found.between_blocks) / _positive(pairs)
        square = w @ (members @ found.squares) / total
        with np.errstate(invalid="ignore", divide="ignore"):
            lengths = np.sqrt(found.squares)[:, None]
            cosines = np.where(lengths > 0, along_BD / lengths, 0.0) / np.sqrt(self.square)
            rho = inner_square / (self.square * square)
            snr = np.where(rho < 1.0, np.sign(inner) * rho / (1.0 - rho), NAN) / rollouts
            return {
                "cosine": _estimate((w * (members @ cosines).T).sum(1) / total),
                "snr": _estimate(snr),
                "noise": _estimate(square / self.square),
                **self._against(
                    Means(self.square[0], inner[0], inner_square[0], mean_square[0]),
                    _block_pairs(found.between_blocks, counts),
                    _cross_pairs(members @ found.with_reference, counts),
                ),
            }

    def _against(self, of: Means, blocks: Floats, cross: Floats) -> dict[str, Estimate]:
        """bias, size and excess, linear in deviations of the means that they are made of. blocks: [K, K];
        cross: [K, R]."""
        inner_square = of.inner_square if of.inner_square > 0 else NAN
        off = of.square * of.mean_square / inner_square - 1.0
        size = of.inner / of.square
        excess = (of.mean_square - 2.0 * of.inner + of.square) / of.square
        chunks, times = self._chunk_pairs(), self._times()

        def drawn(value: float, *by: float) -> Floats:
            """value and draws of the truth; by: its derivative by mean_square, inner and square."""
            if not np.isfinite([value, *by]).all():
                return np.full(len(times[0]), NAN)
            parts = [[by[0] * blocks, by[1] / 2 * cross], [by[1] / 2 * cross.T, by[2] * chunks]]
            # The truth lies as far below the figure as a draw above it (the basic bootstrap).
            return value - _deviations(times, np.block(parts))

        part = (off + 1.0) / of.inner
        off_draws = drawn(off, of.square / inner_square, -2.0 * part, of.mean_square / inner_square)
        return {
            "bias": _estimate(np.sign(off_draws) * np.sqrt(np.abs(off_draws))),
            "size": _estimate(drawn(size, 0.0, 1.0 / of.square, -size / of.square)),
            "excess": _estimate(drawn(excess, 1.0 / of.square, -2.0 / of.square, (1.0 - excess) / of.square)),
        }

    def _times(self) -> tuple[Floats, Floats]:
        """How often more than once each block [draws + 1, K] and chunk [draws + 1, R] is in each draw."""
        return self.blocks - 1.0, self.chunks * len(self.between) - 1.0

    def _chunk_pairs(self) -> Floats:
        return _block_pairs(self.between, np.ones(len(self.between)))


@dataclass(frozen=True)
class Means:
    """What figures are made of, without resampling."""

    square: float  # |G|^2
    inner: float  # E g.G
    inner_square: float  # its square, of different blocks
    mean_square: float  # |E g|^2


def _block_pairs(products: Floats, counts: Floats) -> Floats:
    """By how much each pair moves the mean over pairs of different ones, [n, n]. products: of sums."""
    pairs = np.outer(counts, counts)
    np.fill_diagonal(pairs, 0.0)
    mean = (products * (pairs > 0)).sum() / pairs.sum()
    return np.asarray((products * (pairs > 0) - mean * pairs) / pairs.sum())


def _cross_pairs(products: Floats, counts: Floats) -> Floats:
    """The same of pairs of a block, of so many batches, and a chunk, [K, R]."""
    pairs = np.repeat(counts[:, None], products.shape[1], axis=1)
    return np.asarray((products - products.sum() / pairs.sum() * pairs) / pairs.sum())


def _deviations(times: Sequence[Floats], moved: Floats) -> Floats:
    """How far off a sum over pairs is by chance, in each draw. times: of each kind, [draws + 1, n], less 1;
    moved: by each pair, [all, all], in their order. NaN in draws where a kind has but two members: nothing is
    known of the spread of one pair.

    A member's own part is a mean over its partners, whose noise is in it: on average two thirds of what draws
    of degenerate pairs vary by, and known from the products of weights, which have the other third.
    """
    if any(of_kind.shape[1] < 3 for of_kind in times):
        return np.where(np.arange(len(times[0])) > 0, NAN, 0.0)
    every, own, wide, first = (
        np.concatenate(times, axis=1),
        np.zeros(len(times[0])),
        np.zeros(len(times[0])),
        0,
    )
    for of_kind in times:
        n = of_kind.shape[1]
        last = first + n
        # Each is in its partners' mean too, which hides 1 / (n - 1) of it.
        within = moved[first:last, first:last].sum(1) * (n - 1) / (n - 2)
        part = 2.0 * of_kind @ (within + moved[first:last].sum(1) - moved[first:last, first:last].sum(1))
        own, wide, first = own + part, wide + student(n) * part, last
    products = np.einsum("di,ij,dj->d", every, moved, every)
    products[1:] -= products[1:].mean()
    of_own, of_products = np.var(own[1:]), products[1:].var()
    kept = np.sqrt(max(1.0 - 2.0 * of_products / of_own, 0.0)) if of_own > 0 else 0.0
    return np.asarray(kept * wide + products)


def student(n: int) -> float:
    """By how much draws of a mean of n members are too narrow for 95 %: Student's t over the normal's
    quantile, and the variance of n over that of n - 1."""
    df = n - 1
    return float(np.sqrt(n / df) * (1.0 + 1.21 / df + 1.43 / df**2))


def agrees(figures: Mapping[str, Estimate]) -> bool | None:
    """Whether one in the reference's units may be unbiased: size 1 and excess 0 are in wide intervals.

    None where the reference is too small to tell.
    """
    size, excess = (_known(figures[name].draws) for name in ("size", "excess"))
    if not (size.size and excess.size and np.isfinite(figures["size"].value)):
        return None
    low, high = np.quantile(size, [(1 - WIDE) / 2, (1 + WIDE) / 2])
    return bool(low <= 1.0 <= high and np.quantile(excess, (1 - WIDE) / 2) <= 0.0)


def ratio(above: Estimate, below: Estimate) -> Estimate:
    """The quotient of two figures of the same draws; NaN where the lower one is not above 0."""
    with np.errstate(invalid="ignore", divide="ignore"):
        draws = above.draws / _positive(below.draws)
        value = np.float64(above.value) / _positive(np.array([below.value]))
    return _estimate(np.concatenate([value, draws]))


def plain_figures(figures: Mapping[str, Estimate]) -> dict[str, dict[str, float]]:
    """Figures and intervals, as files have them; `dropped`: draws that gave none, where there are any."""
    found = {}
    for name, estimate in figures.items():
        dropped = int((~np.isfinite(estimate.draws)).sum())
        found[name] = plain(estimate)
        if dropped:
            found[name] |= {"dropped": dropped, "draws": estimate.draws.size}
    return found


def _draws(count: int, draws: int, seed: int) -> Floats:
    """How often each of `count` is in each draw, [draws + 1, count]; first each once."""
    return np.concatenate([np.ones((1, count)), Resampled(range(count), draws, seed).times])


def _between(weights: Floats, products: Floats) -> Floats:
    """sum over i != j of w_i w_j products_ij, for each row of weights."""
    return ((weights @ products) * weights).sum(1) - weights**2 @ np.diag(products)


def _positive(x: Floats) -> Floats:
    """NaN where it is not above 0."""
    return np.where(x > 0, x, NAN)


def _known(x: Floats) -> Floats:
    return x[np.isfinite(x)]


def _estimate(found: Floats) -> Estimate:
    """Of a figure in row 0 and its draws behind it."""
    value, draws = float(found[0]), found[1:]
    known = _known(draws)
    if not known.size or not np.isfinite(value):
        return Estimate(value, NAN, NAN, draws)
    low, high = np.quantile(known, [0.025, 0.975])
    return Estimate(value, float(low), float(high), draws)
