"""Bootstrap intervals by clusters: whole prompts are resampled, the same draws for every figure.

Figures of one `Resampled` are paired: their differences may be compared draw by draw. Pure numpy.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from genac_megatron.metrics import NAN, Floats, Ints

LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A figure, its interval (the draws' percentiles, unless `reflected`), and its value in every draw.

    NaN where the data cannot give it.
    """

    value: float
    low: float
    high: float
    draws: Floats

    def minus(self, other: Estimate) -> Estimate:
        """The difference of two figures of the same draws."""
        return _estimate(self.value - other.value, self.draws - other.draws)


def plain(estimate: Estimate) -> dict[str, float]:
    """The figure and its interval, as scores files have them."""
    return {"value": estimate.value, "low": estimate.low, "high": estimate.high}


def reflected(estimate: Estimate, least: float = 0.0) -> Estimate:
    """With the basic bootstrap's interval, the percentiles reflected at the value; not below `least`.

    For figures that noise pushes up, such as means of absolute values: drawing adds as much noise again, so
    percentiles lie above the truth where that is small.
    """
    value = estimate.value
    low, high = 2 * value - estimate.high, max(2 * value - estimate.low, value)
    return Estimate(value, max(low, least), high, estimate.draws)


class Resampled:
    """Draws of whole clusters, with replacement. `clusters`: the cluster of each row, in 0..n-1."""

    def __init__(self, clusters: Sequence[Hashable], draws: int = 500, seed: int = 0) -> None:
        seen: dict[Hashable, int] = {}
        self.code: Ints = np.array([seen.setdefault(c, len(seen)) for c in clusters], dtype=np.int64)
        self.groups = len(seen)
        self.members = [np.flatnonzero(self.code == group) for group in range(self.groups)]
        rng = np.random.default_rng(seed)
        # How often each cluster is in each draw, [draws, clusters].
        even = np.full(self.groups, 1.0 / max(self.groups, 1))
        drawn = rng.multinomial(self.groups, even, size=draws) if self.groups else np.zeros((draws, 0))
        self.times: Floats = np.asarray(drawn, dtype=np.float64)

    def mean(self, values: ArrayLike) -> Estimate:
        """The mean over rows; rows that are NaN are left out."""
        v = np.asarray(values, dtype=np.float64)
        known = np.isfinite(v)
        return self.ratio(np.where(known, v, 0.0), known.astype(np.float64))

    def ratio(self, above: Floats, below: Floats) -> Estimate:
        """sum(above) / sum(below) over rows."""
        a, b = (
            np.bincount(self.code, weights=part, minlength=self.groups).astype(np.float64)
            for part in (above, below)
        )
        return self._made(a.sum(), b.sum(), self.times @ a, self.times @ b)

    def pairs(self, above: Floats, below: Floats) -> Estimate:
        """sum(above) / sum(below) over pairs of clusters, [clusters, clusters]."""
        draws = [((self.times @ part) * self.times).sum(1) for part in (above, below)]
        return self._made(above.sum(), below.sum(), *draws)

    def within(self, above: Floats, below: Floats) -> Estimate:
        """As `pairs`, of pairs inside a cluster alone: a cluster drawn twice has them twice."""
        a, b = np.diag(above), np.diag(below)
        return self._made(a.sum(), b.sum(), self.times @ a, self.times @ b)

    def any(self, statistic: Callable[[Ints], float]) -> Estimate:
        """Any statistic of row numbers; a cluster drawn twice has its rows twice."""
        every = np.arange(self.code.size)
        found = np.array([statistic(self._rows(times)) for times in self.times])
        return _estimate(statistic(every), found if self.groups > 1 else np.full(len(found), NAN))

    def _rows(self, times: Floats) -> Ints:
        drawn = np.flatnonzero(times)
        return np.concatenate([np.tile(self.members[group], int(times[group])) for group in drawn])

    def _made(self, above: float, below: float, draws_above: Floats, draws_below: Floats) -> Estimate:
        with np.errstate(invalid="ignore", divide="ignore"):
            draws = draws_above / draws_below
        value = float(above / below) if below else NAN
        return _estimate(value, draws if self.groups > 1 else np.full(len(draws), NAN))


def _estimate(value: float, draws: Floats) -> Estimate:
    """One cluster tells nothing of the spread between clusters: NaN there."""
    draws = np.asarray(draws, dtype=np.float64)
    known = draws[np.isfinite(draws)]
    if not known.size or not np.isfinite(value):
        return Estimate(value, NAN, NAN, draws)
    low, high = np.quantile(known, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(value, float(low), float(high), draws)
