"""Questions of benchmarks are kept out of a task (`task.decontaminate`), counted, and told with examples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from genac_megatron.errors import InputError
from genac_megatron.recipe.data import BenchmarkSource, DecontaminateConfig
from genac_megatron.tasks.base import Problem
from genac_megatron.tasks.filters import SHOWN, shown
from genac_megatron.tasks.overlap import Found, Looked


def benchmark_texts(sources: Sequence[BenchmarkSource]) -> list[tuple[str, list[str]]]:
    """The questions of benchmarks, by name. Raises InputError where one is unknown or its data is missing."""
    from genac_megatron.tasks.benchmarks import make_benchmark  # which are tasks over questions themselves

    found = []
    for source in sources:
        task = make_benchmark(source.name, source.path, None)
        try:
            texts = [task._problem("heldout", index).text for index in range(task.heldout_size)]
        finally:
            task.close()
        found.append((source.name, texts))
    return found


def without_benchmarks(
    problems: Sequence[Problem], config: DecontaminateConfig | None, notes: list[str]
) -> list[Problem]:
    """The problems that are no benchmark's. What is found is told in `notes`, also where it is nothing.

    Raises InputError where something is found and the recipe says `found: error`, or where nothing is left.
    """
    if config is None:
        return list(problems)
    looked = Looked(benchmark_texts(config.against), config.ngram, config.overlap)
    seen: dict[str, Found | None] = {}
    for problem in problems:
        if problem.key not in seen:
            seen[problem.key] = looked.find(problem.text)
    kept = [problem for problem in problems if seen[problem.key] is None]
    named = ", ".join(source.name for source in config.against)
    if len(kept) == len(problems):
        notes.append(f"none of {len(problems):,} rows is a question of {named}")
        return kept
    what = told_overlap([(p, found) for p in problems if (found := seen[p.key]) is not None], len(problems))
    if config.found == "error" or not kept:
        raise InputError(
            what,
            where="task.decontaminate",
            way_out="leave them out (task.decontaminate.found: drop)"
            if kept
            else "name another data set to train on: this one is the benchmark",
        )
    notes.append(f"{what}; they are left out (task.decontaminate)")
    return kept


def told_overlap(pairs: Sequence[tuple[Problem, Found]], total: int) -> str:
    """How many of `total` questions are those of which sets, and the first few in full."""
    counts = Counter(found.name for _, found in pairs)
    exact = sum(found.share >= 1.0 for _, found in pairs)
    by_set = ", ".join(f"{name} {count:,}" for name, count in counts.most_common())
    examples = "".join(
        f"\n  {shown(problem)} is {found.name}'s {' '.join(found.text.split())[:70]!r} "
        f"({'whole' if found.share >= 1.0 else f'{found.share:.0%} of its n-grams'})"
        for problem, found in pairs[:SHOWN]
    )
    more = f"\n  and {len(pairs) - SHOWN:,} more" if len(pairs) > SHOWN else ""
    return (
        f"{len(pairs):,} of {total:,} rows are questions of a benchmark ({by_set}; {exact:,} whole, "
        f"{len(pairs) - exact:,} by n-grams):{examples}{more}"
    )
