"""Figures of what outcomes are made of: a reward's named parts, a mixture's sources."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from genac_megatron.records import Rollout

Earned = tuple[str, float, Mapping[str, float]]  # (source of the prompt, outcome, the outcome's parts)


def earned(rollouts: Iterable[Rollout]) -> list[Earned]:
    """What each response earned, small enough to be sent around."""
    return [(rollout.prompt.source, rollout.outcome, rollout.parts) for rollout in rollouts]


def part_figures(found: Iterable[Earned]) -> dict[str, float]:
    """The mean of each part over the responses that have it, in a mixture by source.

    Cut-off responses that were never scored have none, nor have those that the reward failed on.
    """
    values: dict[str, list[float]] = {}
    for source, _, parts in found:
        for name, value in parts.items():
            values.setdefault(f"{source}.{name}" if source else name, []).append(value)
    return {name: _mean(values[name]) for name in sorted(values)}


def source_figures(found: Iterable[Earned]) -> dict[str, float]:
    """The mean outcome by source; {} where the task is no mixture."""
    values: dict[str, list[float]] = {}
    for source, outcome, _ in found:
        if source:
            values.setdefault(source, []).append(outcome)
    return {name: _mean(values[name]) for name in sorted(values)}


def source_shares(found: Sequence[Earned]) -> dict[str, float]:
    """The share of the responses by source; {} where the task is no mixture."""
    counts = Counter(source for source, _, _ in found if source)
    return {name: counts[name] / len(found) for name in sorted(counts)}


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
