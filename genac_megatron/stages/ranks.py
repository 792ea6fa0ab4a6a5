"""What figures and weights of a batch need of all ranks: a few sums, and short arrays, in order of rank.

A batch that is here whole needs nobody: `ALONE` gives back what it was given.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from genac_megatron.algorithms.advantages import explained_variance
from genac_megatron.training.exchange import gathered_rows, summed

Number = TypeVar("Number", bound=np.generic)


class Ranks:
    """Everything is here."""

    def rows(self, mine: NDArray[Number]) -> NDArray[Number]:
        """[n, ...] of every rank, one after the other."""
        return mine

    def texts(self, mine: list[str]) -> list[str]:
        """Of every rank, one after the other."""
        return mine

    def quantiles(self, mine: NDArray[np.float64], shares: Iterable[float]) -> list[float]:
        """numpy's quantiles of all ranks' figures; there is one at least."""
        return [float(np.quantile(mine, share)) for share in shares]

    def explained_variance(self, values: Tensor, outcomes: Tensor) -> float:
        """Of all ranks' figures, [S] each (algorithms/advantages.py)."""
        return float(explained_variance(values, outcomes))

    # --- made of these -------------------------------------------------------------------------------

    def words(self, mine: Iterable[str]) -> list[str]:
        """Every rank's words, each once, sorted."""
        return sorted(set(self.texts(sorted(set(mine)))))

    def totals(self, *mine: float) -> list[float]:
        """Each figure summed over ranks."""
        table = self.rows(np.array([mine], np.float64))
        return [sum(column) for column in table.T.tolist()]

    def least(self, mine: float) -> float:
        """The minimum; inf where no rank has one."""
        return min(self.rows(np.array([mine], np.float64)).tolist())

    def any(self, mine: bool) -> bool:
        """Whether it is so on a rank."""
        return bool(self.totals(float(mine))[0])

    def means(self, lists: Mapping[str, Iterable[float]]) -> dict[str, float]:
        """The mean of each list over all ranks, NaN of nothing. Their names are the same on every rank."""
        given = {name: list(values) for name, values in lists.items()}
        sums = self.totals(
            *(x for values in given.values() for x in (float(sum(values)), float(len(values))))
        )
        pairs = zip(sums[::2], sums[1::2], strict=True)
        return {n: s / c if c else math.nan for n, (s, c) in zip(given, pairs, strict=True)}


class Everyone(Ranks):
    """Every rank of the world has some. Every method is collective over it."""

    def rows(self, mine: NDArray[Number]) -> NDArray[Number]:
        return np.concatenate(gathered_rows(mine))

    def texts(self, mine: list[str]) -> list[str]:
        parts = gathered_rows(np.frombuffer(json.dumps(mine).encode(), np.uint8))
        return [text for part in parts for text in json.loads(part.tobytes())]

    def quantiles(self, mine: NDArray[np.float64], shares: Iterable[float]) -> list[float]:
        return quantiles(mine, shares, summed)

    def explained_variance(self, values: Tensor, outcomes: Tensor) -> float:
        values, outcomes = values.double(), outcomes.double()
        count, total, off = self.totals(len(values), float(outcomes.sum()), float((outcomes - values).sum()))
        spread, left = self.totals(
            float(((outcomes - total / count) ** 2).sum()),
            float(((outcomes - values - off / count) ** 2).sum()),
        )
        return 1.0 - left / spread if spread / count > 1e-12 else 0.0


ALONE, EVERYONE = Ranks(), Everyone()

# --- quantiles of figures that lie on many ranks ------------------------------------------------------

DIGIT = 16  # bits that a round tells apart


def quantiles(
    mine: NDArray[np.float64],
    shares: Iterable[float],
    summed: Callable[[NDArray[np.int64]], NDArray[np.int64]],
) -> list[float]:
    """numpy's linear quantiles of what all ranks have together, at least one figure, none negative.

    Exact, by counts alone: a float that is not negative sorts as its bits do, and each round finds the next
    16 of those of the figure at a place. summed: adds arrays up over ranks.
    """
    count, spoilt = summed(np.array([len(mine), np.isnan(mine).sum()])).tolist()
    bits, found = mine.view(np.uint64), []
    for share in shares:
        place = share * (count - 1)
        low, high = (_at(bits, min(k, count - 1), summed) for k in (int(place), int(place) + 1))
        found.append(low + (high - low) * (place - int(place)) if not spoilt else math.nan)
    return found


def _at(
    bits: NDArray[np.uint64], place: int, summed: Callable[[NDArray[np.int64]], NDArray[np.int64]]
) -> float:
    """The figure at a place of all ranks' in order."""
    found = 0
    for shift in range(64 - DIGIT, -1, -DIGIT):
        digits = (bits >> np.uint64(shift)) & np.uint64(2**DIGIT - 1)
        upto = np.cumsum(summed(np.bincount(digits.astype(np.int64), minlength=2**DIGIT)))
        digit = int(np.searchsorted(upto, place, side="right"))
        place -= int(upto[digit - 1]) if digit else 0
        bits, found = bits[digits == digit], (found << DIGIT) | digit
    return float(np.array([found], np.uint64).view(np.float64)[0])
