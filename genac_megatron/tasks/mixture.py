"""Several tasks in one run: training prompts drawn by weight, each response verified by its own task.

The draw is a function of seed and cursor alone, so a resumed run goes on with the same prompts. In every
BLOCK of prompts each part has its share to within one, spread evenly. A part's prompts come in its own
order, epoch after epoch; the held-out prompts of all parts are interleaved by weight, so that the first few
hold some of each.
"""

from __future__ import annotations

import bisect
import dataclasses
import hashlib
import random
from collections.abc import Callable, Collection, Sequence
from itertools import accumulate

from genac_megatron.errors import InputError
from genac_megatron.recipe.tasks import MixtureTask, PartTask
from genac_megatron.records import Prompt
from genac_megatron.tasks.base import DRAWS_PER_PROBLEM, Problem, Scored, Split, Task, Teacher

BLOCK = 1000  # draws in which every part has its share


def make_mixture(config: MixtureTask, make: Callable[[PartTask], Task]) -> Mixture:
    """The mixture of the tasks that `make` makes. Raises InputError as they do, naming the part."""
    tasks: list[Task] = []
    try:
        for part in config.parts:
            told = part.task.success or config.success
            try:
                tasks.append(make(part.task.model_copy(update={"success": told})))
            except InputError as error:
                named = f"part '{part.name}' of the mixture: {error.what}"
                raise InputError(named, where=error.where, way_out=error.way_out) from error
        names, weights = [part.name for part in config.parts], [part.weight for part in config.parts]
        phases = [(one.until, [one.weights[name] for name in names]) for one in config.phases]
        return Mixture(names, tasks, weights, phases)
    except BaseException:
        for task in tasks:
            task.close()
        raise


class Mixture(Task):
    """Prompts of several tasks; `Prompt.source` names the one that it is of."""

    def __init__(
        self,
        names: Sequence[str],
        tasks: Sequence[Task],
        weights: Sequence[float],
        phases: Sequence[tuple[int | None, Sequence[float]]] = (),
    ) -> None:
        """weights: of the parts. phases: until how many draws, a multiple of BLOCK, other weights hold; the
        last one's None is to the end.
        """
        super().__init__(tasks[0].tokenizer, 0, 0)
        self._names, self._tasks = list(names), dict(zip(names, tasks, strict=True))
        self._weights = list(weights)
        # By phase: the block that it ends before, and how many draws of a block each part has in it
        self._phases = [
            (None if until is None else until // BLOCK, block_counts(shares))
            for until, shares in phases or [(None, weights)]
        ]
        self._drawn: tuple[tuple[int, int], list[tuple[int, int]]] | None = None
        self.resized()
        digests = [task.digest for task in tasks]
        self.digest = hashlib.sha256("\n".join(digests).encode()).hexdigest() if any(digests) else ""
        self._read_alike()
        if all(task.teacher is not None for task in tasks):
            self.teacher = _Teachers(
                {name: task.teacher for name, task in self._tasks.items() if task.teacher}
            )

    def _read_alike(self) -> None:
        """Parts of one kind have one success rate, the mixture's: at the mean length of all of them."""
        kinds: dict[type[Teacher], list[tuple[float, Teacher]]] = {}
        for task, weight in zip(self.parts, self._weights, strict=True):
            if task.teacher is not None and task.teacher.mean_length is not None:
                kinds.setdefault(type(task.teacher), []).append((weight, task.teacher))
        for several in kinds.values():
            whole = sum(weight for weight, _ in several)
            mean = sum(weight * (teacher.mean_length or 0.0) for weight, teacher in several) / whole
            for _, teacher in several:
                teacher.mean_length = mean

    @property
    def parts(self) -> Sequence[Task]:
        return list(self._tasks.values())

    def resized(self) -> None:
        tasks = self.parts
        for task in tasks:
            task.resized()
        self._ends = list(accumulate(task.train_size for task in tasks))
        self.train_size, self.heldout_size = self._ends[-1], sum(task.heldout_size for task in tasks)
        self._heldout = sorted(
            ((n + 0.5) / weight, part, n)
            for part, (task, weight) in enumerate(zip(tasks, self._weights, strict=True))
            for n in range(task.heldout_size)
        )
        self._heldout_keys = {
            task._problem("heldout", n).key for task in tasks for n in range(task.heldout_size)
        }

    def train_index(self, seed: int, cursor: int) -> int:
        """The index of the `cursor`-th training prompt, by weight; within a part by its own order."""
        number, offset = divmod(cursor, BLOCK)
        if self._drawn is None or self._drawn[0] != (seed, number):
            self._drawn = ((seed, number), draw_block(self._counts(number), seed, number))
        part, nth = self._drawn[1][offset]
        index = self._tasks[self._names[part]].train_index(seed, self._before(number, part) + nth)
        return self._first(part) + index

    def _counts(self, number: int) -> list[int]:
        """How many draws each part has in block `number`."""
        return next(counts for end, counts in self._phases if end is None or number < end)

    def _before(self, number: int, part: int) -> int:
        """How many draws a part has had before block `number`."""
        had, begin = 0, 0
        for end, counts in self._phases:
            until = number if end is None else min(end, number)
            had += max(0, until - begin) * counts[part]
            begin = until
        return had

    def prompt(self, split: Split, index: int) -> Prompt:
        """The prompt at `index`, its id under its part's name. Raises IndexError outside the split's size."""
        name, number = self._place(split, index)
        return self._of_part(name, self._tasks[name].prompt(split, number))

    def named(self, prompt_id: str) -> Prompt:
        """As Task.named: ids are `prompt`'s, under a part's name."""
        name, *rest = prompt_id.rsplit("/", 2)
        return self._of_part(name, self._tasks[name].named("/".join(rest)))

    def _of_part(self, name: str, prompt: Prompt) -> Prompt:
        return dataclasses.replace(prompt, id=f"{name}/{prompt.id}", source=name)

    def _problem(self, split: Split, index: int) -> Problem:
        name, number = self._place(split, index)
        return self._tasks[name]._problem(split, number)

    def _first(self, part: int) -> int:
        return self._ends[part - 1] if part else 0

    def _place(self, split: Split, index: int) -> tuple[str, int]:
        """(part, index in it). A training problem that a part holds out gives way to another of its part."""
        size = self.train_size if split == "train" else self.heldout_size
        if not 0 <= index < size:
            raise IndexError(f"{split} has {size} prompts, no index {index}")
        if split == "heldout":
            _, part, number = self._heldout[index]
            return self._names[part], number
        part = bisect.bisect_right(self._ends, index)
        name, number = self._names[part], index - self._first(part)
        task, rng = self._tasks[name], random.Random(index)
        for _ in range(DRAWS_PER_PROBLEM):
            if task._problem("train", number).key not in self._heldout_keys:
                return name, number
            number = rng.randrange(task.train_size)
        raise InputError(
            f"(nearly) every training problem of the part '{name}' is held out by another part",
            where="task.parts",
            way_out="do not name the same data twice, or hold fewer problems out",
        )

    # --- outcomes: each part's own ---------------------------------------------------------------

    @property
    def late(self) -> int:
        return sum(task.late for task in self._tasks.values())

    def verify(self, prompt: Prompt, text: str) -> float:
        return self._tasks[prompt.source].verify(prompt, text)

    async def verify_beside(self, prompt: Prompt, text: str, cut_off: bool = False) -> float:
        return await self._tasks[prompt.source].verify_beside(prompt, text, cut_off)

    async def score_beside(self, prompt: Prompt, text: str, cut_off: bool = False) -> Scored:
        return await self._tasks[prompt.source].score_beside(prompt, text, cut_off)

    def verify_many(self, pairs: Sequence[tuple[Prompt, str]], cut_off: Collection[int] = ()) -> list[float]:
        found: dict[int, float] = {}
        for name, task in self._tasks.items():
            mine = [at for at, (prompt, _) in enumerate(pairs) if prompt.source == name]
            cut = {place for place, at in enumerate(mine) if at in cut_off}
            found |= zip(mine, task.verify_many([pairs[at] for at in mine], cut), strict=True)
        return [found[at] for at in range(len(pairs))]

    def close(self) -> None:
        for task in self._tasks.values():
            task.close()


class _Teachers(Teacher):
    """Each part's own teacher."""

    def __init__(self, teachers: dict[str, Teacher]) -> None:
        self._teachers = teachers

    def demonstrate(self, prompt: Prompt, rng: random.Random) -> str:
        return self._teachers[prompt.source].demonstrate(prompt, rng)

    def trace(self, prompt: Prompt, partial: str, p_bar: float, rng: random.Random) -> tuple[str, int]:
        return self._teachers[prompt.source].trace(prompt, partial, p_bar, rng)

    def value(self, prompt: Prompt, partial: str, p_bar: float) -> float:
        return self._teachers[prompt.source].value(prompt, partial, p_bar)


def block_counts(weights: Sequence[float]) -> list[int]:
    """How many of BLOCK draws each part has, by largest remainder; at least one unless its weight is 0."""
    exact = [BLOCK * weight / sum(weights) for weight in weights]
    counts = [max(1, int(share)) if share else 0 for share in exact]
    by_remainder = sorted((i for i, share in enumerate(exact) if share), key=lambda i: counts[i] - exact[i])
    for i in range(BLOCK - sum(counts)):
        counts[by_remainder[i % len(by_remainder)]] += 1
    while sum(counts) > BLOCK:  # many parts with a tiny weight
        counts[counts.index(max(counts))] -= 1
    return counts


def draw_block(counts: Sequence[int], seed: int, number: int) -> list[tuple[int, int]]:
    """The draws of block `number`, as (part, how many of the part come before in the block).

    A part's n-th draw falls at random into the n-th of as many equal stretches as it has draws.
    """
    rng = random.Random(f"mixture/{seed}/{number}")
    placed = [
        ((nth + rng.random()) / count, part, nth) for part, count in enumerate(counts) for nth in range(count)
    ]
    return [(part, nth) for _, part, nth in sorted(placed)]
