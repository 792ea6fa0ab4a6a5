"""Figures that judge a critic and an actor. Pure numpy; no torch, no files.

Arrays are 1-D over states (or rollouts) unless said otherwise. `values` are the critic's v in [0, 1],
`outcomes` the verified r in [0, 1]. A figure that the data cannot give (no pair, one class, no
variance) is NaN, never a number that looks like a result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Scope = Literal["between", "prompt", "response"]
LEVELS = 11  # the scores 0..10
NAN = float("nan")


def _floats(values: ArrayLike) -> Floats:
    return np.asarray(values, dtype=np.float64).reshape(-1)


def _pair(values: ArrayLike, targets: ArrayLike) -> tuple[Floats, Floats]:
    v, t = _floats(values), _floats(targets)
    if v.shape != t.shape:
        raise ValueError(f"{v.size} values but {t.size} targets")
    return v, t


def _codes(ids: Sequence[Hashable] | NDArray[Any]) -> Ints:
    """Ids of any hashable kind as integers 0.. in order of first sight; of an array of integers in theirs."""
    if isinstance(ids, np.ndarray) and ids.dtype.kind == "i":
        return np.unique(ids, return_inverse=True)[1]
    seen: dict[Hashable, int] = {}
    return np.array([seen.setdefault(i, len(seen)) for i in ids], dtype=np.int64)


# --- errors --------------------------------------------------------------------------------------


def brier(values: ArrayLike, outcomes: ArrayLike) -> float:
    """Mean (r - v)^2: one minus the critic's mean reward (method: R_v)."""
    v, r = _pair(values, outcomes)
    return float(np.mean((r - v) ** 2)) if v.size else NAN


def brier_constant(outcomes: ArrayLike) -> float:
    """Brier score of the best constant in hindsight, the outcomes' mean: their population variance."""
    r = _floats(outcomes)
    return float(np.var(r)) if r.size else NAN


def monte_carlo_noise(draws: Sequence[ArrayLike]) -> Floats:
    """Unbiased estimate s^2 / K of the variance of each state's mean over its K draws. [states]

    `draws[i]` are the outcomes, in [0, 1], of state i's continuations. Of outcomes 0 and 1 alone it is
    p(1-p)/(K-1). Raises ValueError below two continuations, which say nothing of their spread.
    """
    rows = [_floats(row) for row in draws]
    if any(row.size < 2 for row in rows):
        raise ValueError("the noise of a Monte-Carlo value needs at least two continuations per state")
    return np.array([np.var(row, ddof=1) / row.size for row in rows], dtype=np.float64)


def monte_carlo_means(draws: Sequence[ArrayLike]) -> Floats:
    """The Monte-Carlo value of each state. [states]"""
    return np.array([np.mean(_floats(row)) for row in draws], dtype=np.float64)


def mse_monte_carlo(values: ArrayLike, draws: Sequence[ArrayLike]) -> float:
    """Mean (v - p)^2 against Monte-Carlo values p, their own noise taken off (`draws`: see there).

    Unbiased for the mean of (v - V)^2, so it can come out slightly below zero.
    """
    v, p = _pair(values, monte_carlo_means(draws))
    return float(np.mean((v - p) ** 2 - monte_carlo_noise(draws))) if v.size else NAN


def mse_monte_carlo_constant(draws: Sequence[ArrayLike]) -> float:
    """The same error for the best constant in hindsight: the spread of the true values.

    The n-1 divisor accounts for the mean's having been fitted to the same n states.
    """
    if len(draws) < 2:
        return NAN
    return float(np.var(monte_carlo_means(draws), ddof=1) - np.mean(monte_carlo_noise(draws)))


def explained_variance(values: ArrayLike, outcomes: ArrayLike) -> float:
    """1 - Var(r - v) / Var(r). 1 is perfect, 0 is no better than a constant (bias is forgiven)."""
    v, r = _pair(values, outcomes)
    spread = float(np.var(r)) if r.size else 0.0
    return 1.0 - float(np.var(r - v)) / spread if spread > 0 else NAN


def explained_within(
    values: ArrayLike,
    targets: ArrayLike,
    groups: Sequence[Hashable] | Ints,
    noise: ArrayLike | None = None,
) -> float:
    """1 - Var(t - v) / Var(t), both about their group's mean: what values know beyond which group it is.

    groups: of each state, its prompt or its response. noise: the variance of each target's own error (of a
    Monte-Carlo value), which is taken off both. NaN where targets do not vary within a group.
    """
    v, t = _pair(values, targets)
    code = _codes(groups)
    sizes = np.bincount(code) if code.size else np.zeros(0, dtype=np.int64)

    def spread(x: Floats) -> float:
        return float(np.sum((x - (np.bincount(code, weights=x) / sizes)[code]) ** 2)) if x.size else 0.0

    off = 0.0 if noise is None else float(np.sum(_floats(noise) * (1.0 - 1.0 / sizes[code])))
    whole = spread(t) - off
    return 1.0 - (spread(t - v) - off) / whole if whole > 1e-12 else NAN


def skill(values: ArrayLike, outcomes: ArrayLike) -> float:
    """1 - Brier / Brier of the best constant: explained variance with bias counted."""
    base = brier_constant(outcomes)
    return 1.0 - brier(values, outcomes) / base if base > 0 else NAN


# --- calibration ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reliability:
    """Calibration by bins. `value` and `outcome` are NaN in an empty bin."""

    edges: Floats  # [bins + 1]
    count: Ints  # [bins]
    value: Floats  # [bins], mean value in the bin
    outcome: Floats  # [bins], mean outcome in the bin

    @property
    def ece(self) -> float:
        """Expected calibration error: sum over bins of share * |mean outcome - mean value|."""
        full = self.count > 0
        if not full.any():
            return NAN
        gap = np.abs(self.outcome[full] - self.value[full])
        return float(np.sum(self.count[full] * gap) / self.count.sum())


def reliability(values: ArrayLike, outcomes: ArrayLike, edges: ArrayLike | None = None) -> Reliability:
    """Bin values, half-open [a, b), the last bin closed. Default: eleven bins centred on n/10."""
    v, r = _pair(values, outcomes)
    e = (np.arange(LEVELS + 1) - 0.5) / (LEVELS - 1) if edges is None else _floats(edges)
    if v.size and (v.min() < e[0] or v.max() > e[-1]):
        raise ValueError(f"values lie in [{v.min():g}, {v.max():g}], the bins in [{e[0]:g}, {e[-1]:g}]")
    bins = np.clip(np.searchsorted(e, v, side="right") - 1, 0, e.size - 2)
    count = np.bincount(bins, minlength=e.size - 1)
    with np.errstate(invalid="ignore"):
        value = np.bincount(bins, weights=v, minlength=e.size - 1) / count
        outcome = np.bincount(bins, weights=r, minlength=e.size - 1) / count
    return Reliability(e, count.astype(np.int64), value, outcome)


def ece(values: ArrayLike, outcomes: ArrayLike, edges: ArrayLike | None = None) -> float:
    """Expected calibration error over the bins of `reliability`."""
    return reliability(values, outcomes, edges).ece


# --- order ---------------------------------------------------------------------------------------


def ranks(values: ArrayLike) -> Floats:
    """Ranks from 1, ties sharing their mean rank. [n]"""
    v = _floats(values)
    _, inverse, count = np.unique(v, return_inverse=True, return_counts=True)
    last = np.cumsum(count)
    return np.asarray((last - (count - 1) / 2.0)[inverse], dtype=np.float64)


def spearman(values: ArrayLike, targets: ArrayLike) -> float:
    """Spearman's rank correlation, ties by mean rank. NaN where either side is constant."""
    v, t = _pair(values, targets)
    if v.size < 2:
        return NAN
    a, b = ranks(v), ranks(t)
    a, b = a - a.mean(), b - b.mean()
    norm = math.sqrt(float(a @ a) * float(b @ b))
    return float(a @ b) / norm if norm > 0 else NAN


def pearson(values: ArrayLike, targets: ArrayLike) -> float:
    """Pearson's correlation. NaN where either side is constant."""
    v, t = _pair(values, targets)
    if v.size < 2 or np.ptp(v) == 0 or np.ptp(t) == 0:
        return NAN
    return float(np.corrcoef(v, t)[0, 1])


def auc(values: ArrayLike, outcomes: ArrayLike, threshold: float = 0.5) -> float:
    """Chance that a success outscores a failure, ties counting half. A success is r >= threshold."""
    v, r = _pair(values, outcomes)
    good = r >= threshold
    positives, negatives = int(good.sum()), int((~good).sum())
    if positives == 0 or negatives == 0:
        return NAN
    above = float(ranks(v)[good].sum()) - positives * (positives + 1) / 2.0
    return above / (positives * negatives)


def ranking_accuracy(
    values: ArrayLike,
    targets: ArrayLike,
    prompts: Sequence[Hashable],
    responses: Sequence[Hashable],
    scope: Scope,
    margin: float = 0.0,
) -> tuple[float, int]:
    """Share of pairs that the values order as the targets do (a tie in value counts half), and the pairs.

    A pair counts where its targets differ by more than `margin`. Scopes: `between`, of different
    prompts; `prompt`, of one prompt and different responses; `response`, of one response (all of
    whose states share an outcome, so the targets must be Monte-Carlo values). A response is known by
    (prompt, response), so response ids need only be unique within a prompt.
    """
    v, t = _pair(values, targets)
    p = _codes(prompts)
    q = _codes([(a, b) for a, b in zip(prompts, responses, strict=True)])
    if p.size != v.size:
        raise ValueError(f"{v.size} values but {p.size} prompts")
    hits, pairs = 0.0, 0
    for i in range(v.size - 1):
        rest = slice(i + 1, None)
        if scope == "between":
            chosen = p[rest] != p[i]
        elif scope == "prompt":
            chosen = (p[rest] == p[i]) & (q[rest] != q[i])
        else:
            chosen = q[rest] == q[i]
        wanted = t[rest] - t[i]
        chosen &= np.abs(wanted) > margin
        agree = np.sign(v[rest] - v[i])[chosen] * np.sign(wanted[chosen])
        hits += float(np.sum((agree + 1.0) / 2.0))
        pairs += int(chosen.sum())
    return (hits / pairs if pairs else NAN), pairs


# --- scores --------------------------------------------------------------------------------------


def parse_rate(values: Sequence[float | None]) -> float:
    """Share of judgements whose score parsed (is not None)."""
    return sum(v is not None for v in values) / len(values) if len(values) else NAN


def score_histogram(values: ArrayLike) -> Ints:
    """Counts of the scores 0..10, values rounded to the nearest tenth. [11]"""
    levels = np.clip(np.rint(_floats(values) * (LEVELS - 1)), 0, LEVELS - 1).astype(np.int64)
    return np.bincount(levels, minlength=LEVELS).astype(np.int64)


def entropy(counts: ArrayLike) -> float:
    """Entropy of a histogram in nats; 0 is a collapsed critic, ln 11 = 2.40 the most of eleven scores."""
    c = _floats(counts)
    if c.sum() <= 0:
        return NAN
    share = c[c > 0] / c.sum()
    return abs(float(-np.sum(share * np.log(share))))


# --- the actor -----------------------------------------------------------------------------------


def avg_at_k(outcomes: Mapping[str, Sequence[float]]) -> float:
    """Mean over prompts of the mean outcome of their samples (avg@k; 0..1)."""
    means = [float(np.mean(r)) for r in outcomes.values() if len(r)]
    return float(np.mean(means)) if means else NAN


def pass_at_k(outcomes: Mapping[str, Sequence[float]], k: int) -> float:
    """Unbiased pass@k: mean over prompts of 1 - C(n-c, k) / C(n, k) (Chen et al., 2107.03374, eq. 1).

    c of a prompt's n samples succeed (r >= 0.5). Raises ValueError where a prompt has fewer than k samples.
    """
    shares = pass_shares(outcomes, k)
    return float(np.mean(shares)) if shares else NAN


def pass_shares(outcomes: Mapping[str, Sequence[float]], k: int) -> list[float]:
    """What `pass_at_k` is the mean of, per prompt."""
    shares = []
    for prompt, samples in outcomes.items():
        n, c = len(samples), int(sum(r >= 0.5 for r in samples))
        if not 1 <= k <= n:
            raise ValueError(f"pass@{k} of prompt {prompt}, which has {n} samples")
        shares.append(1.0 - math.comb(n - c, k) / math.comb(n, k))
    return shares


# --- intervals -----------------------------------------------------------------------------------


def _quantiles(draws: Floats, level: float) -> tuple[float, float]:
    draws = draws[np.isfinite(draws)]
    if draws.size == 0:
        return NAN, NAN
    low, high = np.quantile(draws, [(1.0 - level) / 2.0, (1.0 + level) / 2.0])
    return float(low), float(high)


def bootstrap_mean(
    values: ArrayLike,
    clusters: Sequence[Hashable],
    *,
    draws: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile interval of mean(values), whole clusters (prompts) resampled with replacement.

    NaN where there are fewer than two clusters: nothing is known of the spread between prompts.
    """
    v, code = _floats(values), _codes(clusters)
    if code.size != v.size:
        raise ValueError(f"{v.size} values but {code.size} cluster ids")
    groups = int(code.max()) + 1 if code.size else 0
    if groups < 2:
        return NAN, NAN
    sums, sizes = np.bincount(code, weights=v), np.bincount(code).astype(np.float64)
    rng = np.random.default_rng(seed)
    picked = rng.multinomial(groups, np.full(groups, 1.0 / groups), size=draws).astype(np.float64)
    return _quantiles((picked @ sums) / (picked @ sizes), level)


def bootstrap(
    statistic: Callable[[Ints], float],
    clusters: Sequence[Hashable],
    *,
    draws: int = 500,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile interval of any statistic of row indices, whole clusters resampled with replacement.

    `statistic(index)` gets the rows of the drawn clusters, a cluster drawn twice listed twice.
    """
    code = _codes(clusters)
    groups = int(code.max()) + 1 if code.size else 0
    if groups < 2:
        return NAN, NAN
    order = np.argsort(code, kind="stable")
    members = np.split(order, np.cumsum(np.bincount(code))[:-1])
    rng = np.random.default_rng(seed)
    drawn = np.empty(draws)
    for i in range(draws):
        drawn[i] = statistic(np.concatenate([members[g] for g in rng.integers(0, groups, groups)]))
    return _quantiles(drawn, level)


# --- all of a critic's figures -------------------------------------------------------------------


def critic_figures(
    used: ArrayLike,
    outcomes: ArrayLike,
    prompts: Sequence[str],
    responses: Sequence[Hashable],
    *,
    parsed: Sequence[float | None] | None = None,
    draws: Sequence[ArrayLike] | None = None,
) -> dict[str, float]:
    """Every scalar figure of a critic on a set of states.

    `used` are the values that advantages would use (a fallback where none parsed), `parsed` the scores
    as read (None where none parsed; default: all parsed), `draws` the outcomes of each state's
    Monte-Carlo continuations where there are any. Ranking and Spearman use the Monte-Carlo values
    where given, else the outcomes. What the data cannot give is NaN.
    """
    v, r = _pair(used, outcomes)
    read = list(parsed) if parsed is not None else [float(x) for x in v]
    histogram = score_histogram([x for x in read if x is not None])
    targets = r if draws is None else monte_carlo_means(draws)
    figures = {
        "brier": brier(v, r),
        "brier_constant": brier_constant(r),
        "skill": skill(v, r),
        "mse": NAN if draws is None else mse_monte_carlo(v, draws),
        "mse_constant": NAN if draws is None else mse_monte_carlo_constant(draws),
        "auc": auc(v, r),
        "ece": ece(v, r),
        "explained_variance": explained_variance(v, r),
        "spearman": spearman(v, targets),
        "parse_rate": parse_rate(read),
        "score_entropy": entropy(histogram),
        "value_mean": float(v.mean()) if v.size else NAN,
        "outcome_mean": float(r.mean()) if r.size else NAN,
    }
    scopes: tuple[Scope, ...] = ("between", "prompt", "response")
    for scope in scopes:
        figures[f"ranking_{scope}"], _ = ranking_accuracy(v, targets, prompts, responses, scope)
    return figures
