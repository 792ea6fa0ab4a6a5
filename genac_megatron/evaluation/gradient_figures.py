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
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from genac_megatron.evaluation.intervals import Estimate, Resampled, plain
from genac_megatron.evaluation.metrics import NAN, Floats, Ints

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
        whole = np.einsum("di,ij,dj->d", self.chunks, self.between, self.chunks)
        with np.errstate(invalid="ignore", divide="ignore"):
            cosine = np.sqrt(self.square / whole)
            snr = self.square / _positive(whole - self.square) / rollouts
        return {"norm": _estimate(np.sqrt(self.square)), "cosine": _estimate(cosine), "snr": _estimate(snr)}

    def of(self, found: Products, rollouts: int) -> dict[str, Estimate]:
        """cosine, snr, bias; and, for what is in the reference's units, size (E g.G / |G|^2) and
        excess (|E g - G|^2 / |G|^2). rollouts: of a batch.
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
            off = self.square * mean_square / _positive(inner_square) - 1.0
            excess = (mean_square - 2.0 * inner + self.square) / self.square
            return {
                "cosine": _estimate((w * (members @ cosines).T).sum(1) / total),
                "snr": _estimate(snr),
                "bias": _estimate(np.sign(off) * np.sqrt(np.abs(off))),
                "size": _estimate(inner / self.square),
                "excess": _estimate(excess),
            }


def agrees(figures: Mapping[str, Estimate]) -> bool:
    """Whether one in the reference's units may be unbiased: size 1 and excess 0 are in wide intervals."""
    size, excess = (_known(figures[name].draws) for name in ("size", "excess"))
    if not (size.size and excess.size and np.isfinite(figures["size"].value)):
        return False
    low, high = np.quantile(size, [(1 - WIDE) / 2, (1 + WIDE) / 2])
    return bool(low <= 1.0 <= high and np.quantile(excess, (1 - WIDE) / 2) <= 0.0)


def ratio(above: Estimate, below: Estimate) -> Estimate:
    """The quotient of two figures of the same draws."""
    with np.errstate(invalid="ignore", divide="ignore"):
        draws = above.draws / below.draws
        value = np.float64(above.value) / np.float64(below.value)
    return _estimate(np.concatenate([[value], draws]))


def plain_figures(figures: Mapping[str, Estimate]) -> dict[str, dict[str, float]]:
    """Figures and intervals, as files have them."""
    return {name: plain(estimate) for name, estimate in figures.items()}


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
