"""What a critic's values of a bank's states are worth: every figure of method §6, with intervals. Pure numpy.

Targets are the bank's own continuations, never the two responses' outcomes: those were chosen to be one right
and one wrong, so they are no fair draw from their states.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from genac_megatron import metrics
from genac_megatron.critic.score import reward
from genac_megatron.evaluation.bank import BankPrompt, Valued, by_response
from genac_megatron.evaluation.intervals import Estimate, Resampled, reflected
from genac_megatron.metrics import NAN, Floats, Ints

SCOPES = ("between", "prompt", "response")


@dataclass(frozen=True)
class Scored:
    """A critic's values beside the bank's, in order of states. All arrays [states]."""

    used: Floats  # the value, or the fallback where none parsed
    read: list[float | None]
    tokens: Ints
    p: Floats  # Monte-Carlo values
    noise: Floats  # variance of each
    squares: Floats  # mean of r^2 over a state's draws
    brier: Floats  # mean over draws of (r - v)^2; 1 where none parsed
    prompts: list[str]
    response: Ints  # 0: the right one, 1: the wrong one, -1: the prompt state
    place: Floats  # how far through the response: 0 .. 1
    chains: list[list[int]]  # per response its states in order, the prompt state first


def scored(prompts: Sequence[BankPrompt], values: Sequence[Valued], p_bar: float) -> Scored:
    """The critic's answers made into arrays; where none parses: the state before's, then p_bar."""
    states = [state for prompt in prompts for state in prompt.states]
    chains, first = [], 0
    for prompt in prompts:
        chains += [[first + place for place in places] for places in by_response(prompt)]
        first += len(prompt.states)
    used = np.full(len(states), NAN)
    for chain in chains:
        last = p_bar
        for row in chain:
            value = values[row].value
            last = last if value is None else value
            used[row] = last
    draws = [state.draws for state in states]
    return Scored(
        used=used,
        read=[valued.value for valued in values],
        tokens=np.array([valued.tokens for valued in values], dtype=np.int64),
        p=metrics.monte_carlo_means(draws),
        noise=metrics.monte_carlo_noise(draws),
        squares=np.array([np.mean(np.square(row)) for row in draws]),
        brier=np.array(
            [np.mean([1.0 - reward(v.value, r) for r in d]) for v, d in zip(values, draws, strict=True)]
        ),
        prompts=[state.prompt.id for state in states],
        response=np.array([-1 if s.response is None else s.response for s in states], dtype=np.int64),
        place=np.array(
            [s.state.cut / max(1, len(s.state.rollout.completion.ids)) for s in states], dtype=np.float64
        ),
        chains=chains,
    )


def critic_estimates(found: Scored, continuations: int, draws: int, seed: int) -> dict[str, Estimate]:
    """Every figure with its interval over prompts. What each means: docs/evaluation.md."""
    sample = Resampled(found.prompts, draws, seed)
    error = (found.used - found.p) ** 2 - found.noise
    used, p, noise = found.used, found.p, found.noise
    figures = {
        "mse": sample.mean(error),
        "mse_constant": sample.any(lambda rows: _true_variance(p[rows], noise[rows])),
        "explained_variance": sample.any(lambda rows: _explained(used[rows], p[rows], noise[rows])),
        "brier": sample.mean(found.brier),
        "brier_constant": sample.any(lambda rows: float(found.squares[rows].mean() - p[rows].mean() ** 2)),
        "ece": reflected(sample.any(lambda rows: metrics.ece(used[rows], p[rows]))),
        "spearman": sample.any(lambda rows: metrics.spearman(used[rows], p[rows])),
        "bias": sample.mean(used - p),
        "value_mean": sample.mean(used),
        "monte_carlo_mean": sample.mean(p),
        "parse_rate": sample.mean([float(value is not None) for value in found.read]),
        "tokens_per_state": sample.mean(found.tokens),
    }
    # Two deviations of a pair's difference, at their largest (p = 1/2): nearer pairs are ordered by noise.
    clear = 2 * np.sqrt(2 * 0.25 / max(1, continuations - 1))
    for scope in SCOPES:
        for name, margin in (("", 0.0), ("_clear", clear)):
            hits, pairs = ranking(found, sample, scope, margin)
            made = sample.pairs if scope == "between" else sample.within
            figures[f"ranking_{scope}{name}"] = made(hits, pairs)
    for name, rows in subsets(found).items():
        figures[f"mse_{name}"] = sample.mean(np.where(rows, error, NAN))
        figures[f"bias_{name}"] = sample.mean(np.where(rows, used - p, NAN))
    return figures


def subsets(found: Scored) -> dict[str, np.ndarray]:
    """Where critics go wrong: the prompt state, and early and late states of right and wrong responses."""
    late = found.place >= 0.5
    sets = {"prompt_state": found.response == -1}
    for which, kind in ((0, "right"), (1, "wrong")):
        sets[f"{kind}_early"] = (found.response == which) & ~late
        sets[f"{kind}_late"] = (found.response == which) & late
    return sets


def ranking(found: Scored, sample: Resampled, scope: str, margin: float) -> tuple[Floats, Floats]:
    """(hits, pairs) by the clusters of a pair's two states, [clusters, clusters].

    A pair counts where its Monte-Carlo values differ by more than the margin; a tie in value is half a hit.
    `between`: of different prompts. `prompt`: of one prompt and different responses, the prompt state left
    out, which is of both. `response`: of one response, its prompt state included.
    """
    hits, pairs = (np.zeros((sample.groups, sample.groups)) for _ in range(2))
    for rows, others in _candidates(found, sample, scope):
        wanted = found.p[others][None, :] - found.p[rows][:, None]
        agree = np.sign(found.used[others][None, :] - found.used[rows][:, None]) * np.sign(wanted)
        counts = np.abs(wanted) > margin
        group = sample.code[rows[0]]
        np.add.at(hits[group], sample.code[others], np.where(counts, (agree + 1) / 2, 0.0).sum(0))
        np.add.at(pairs[group], sample.code[others], counts.sum(0))
    return hits, pairs


def _candidates(found: Scored, sample: Resampled, scope: str) -> list[tuple[Ints, Ints]]:
    """Rows of one prompt, and others: every one of the first with every one of the second is a pair."""
    if scope == "between":
        later = [np.flatnonzero(sample.code > group) for group in range(sample.groups)]
        return [both for both in zip(sample.members, later, strict=True) if both[1].size]
    if scope == "prompt":
        own = [[rows[found.response[rows] == which] for which in (0, 1)] for rows in sample.members]
        return [(right, wrong) for right, wrong in own if right.size and wrong.size]
    return [
        (np.array([row]), np.array(chain[place + 1 :]))
        for chain in found.chains
        for place, row in enumerate(chain[:-1])
    ]


def _true_variance(p: Floats, noise: Floats) -> float:
    """The spread of the true values: that of the Monte-Carlo values, less their noise."""
    return float(np.var(p, ddof=1) - noise.mean()) if p.size > 1 else NAN


def _explained(used: Floats, p: Floats, noise: Floats) -> float:
    """1 - Var(V - v) / Var(V), the Monte-Carlo values' noise taken off both."""
    spread = _true_variance(p, noise)
    if not spread > 0:
        return NAN
    return 1.0 - float(np.var(p - used, ddof=1) - noise.mean()) / spread
