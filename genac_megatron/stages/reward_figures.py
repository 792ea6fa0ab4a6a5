"""Figures of what outcomes are made of: a reward's named parts, a mixture's sources."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from genac_megatron.records import Rollout
from genac_megatron.stages.ranks import ALONE, Ranks

Earned = tuple[str, float, Mapping[str, float]]  # (source of the prompt, outcome, the outcome's parts)


def earned(rollouts: Iterable[Rollout]) -> list[Earned]:
    """What each response earned, small enough to be sent around."""
    return [(rollout.prompt.source, rollout.outcome, rollout.parts) for rollout in rollouts]


def part_figures(found: Iterable[Earned], ranks: Ranks = ALONE) -> dict[str, float]:
    """The mean of each part over the responses that have it, in a mixture by source. Collective over `ranks`,
    whose responses are counted together, as the other figures here.

    Cut-off responses that were never scored have none, nor have those that the reward failed on.
    """
    values: dict[str, list[float]] = {}
    for source, _, parts in found:
        for name, value in parts.items():
            values.setdefault(f"{source}.{name}" if source else name, []).append(value)
    return _means(values, ranks)


def source_figures(found: Iterable[Earned], ranks: Ranks = ALONE) -> dict[str, float]:
    """The mean outcome by source; {} where the task is no mixture."""
    values: dict[str, list[float]] = {}
    for source, outcome, _ in found:
        if source:
            values.setdefault(source, []).append(outcome)
    return _means(values, ranks)


def source_shares(found: Sequence[Earned], ranks: Ranks = ALONE) -> dict[str, float]:
    """The share of the responses by source; {} where the task is no mixture."""
    counts = Counter(source for source, _, _ in found if source)
    names = ranks.words(counts)
    whole, *each = ranks.totals(len(found), *(counts[name] for name in names))
    return {name: count / whole for name, count in zip(names, each, strict=True)}


def _means(values: dict[str, list[float]], ranks: Ranks) -> dict[str, float]:
    return ranks.means({name: values.get(name, ()) for name in ranks.words(values)})
