"""A study's MSE on a bank, of prompt states and of all others, from the figures that it kept.

    python -m tools.mse_by_place experiments/scaling [--bank in]

figures.json has each critic's MSE over a bank's states, and over five kinds of them: prompt states, early and
late ones of right and of wrong responses. How many states are of each kind it does not say, but that is the
same for every critic on one bank: with the right shares all critics' MSEs are the weighted means of their
five, so these are found by least squares (what is left over is rounding).
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

KINDS = ("prompt_state", "right_early", "right_late", "wrong_early", "wrong_late")
LEFT_OVER = 1e-6  # of an MSE, beyond which shares do not explain the figures
Figures = Mapping[str, float]


def split(figures: Sequence[Figures], bank: str) -> list[tuple[float, float]]:
    """(MSE of prompt states, of all other states) of each critic. All are of one bank, of one seed.

    Raises ValueError where there are fewer critics than kinds of states, or shares do not explain their MSEs.
    """
    each = np.array([[one[f"{bank}/mse_{kind}"] for kind in KINDS] for one in figures])
    whole = np.array([one[f"{bank}/mse"] for one in figures])
    shares, _, rank, _ = np.linalg.lstsq(each, whole, rcond=None)
    if (
        rank < len(KINDS)
        or np.abs(each @ shares - whole).max() > LEFT_OVER
        or abs(shares.sum() - 1) > LEFT_OVER
    ):
        raise ValueError(
            f"{len(figures)} critics do not tell how many states of bank {bank} are of each kind"
        )
    others = each[:, 1:] @ shares[1:] / shares[1:].sum()
    return list(zip(each[:, 0].tolist(), others.tolist(), strict=True))


def by_seed(records: Sequence[Mapping[str, Any]], bank: str) -> dict[str, dict[int, tuple[float, float]]]:
    """By cell and seed, of records that were scored on the bank."""
    seeds: defaultdict[int, list[Mapping[str, Any]]] = defaultdict(list)
    for record in records:
        if all(f"{bank}/mse_{kind}" in record["figures"] for kind in KINDS):
            seeds[record["seed"]].append(record)
    found: defaultdict[str, dict[int, tuple[float, float]]] = defaultdict(dict)
    for seed, members in seeds.items():
        parts = split([record["figures"] for record in members], bank)
        for record, part in zip(members, parts, strict=True):
            found[record["cell"]][seed] = part
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("study", type=Path)
    parser.add_argument("--bank", default="in")
    options = parser.parse_args()
    records = json.loads((options.study / "figures.json").read_text(encoding="utf-8"))["records"]
    for cell, seeds in sorted(by_seed(records, options.bank).items()):
        told = ", ".join(f"{s}: {prompt:.3f} {others:.3f}" for s, (prompt, others) in sorted(seeds.items()))
        print(f"{cell:18s} seed: prompt states, others   {told}")


if __name__ == "__main__":
    main()
