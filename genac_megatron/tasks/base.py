"""What a task is: problems in two splits that never meet, a verifier, perhaps an exact teacher."""

from __future__ import annotations

import asyncio
import json
import random
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from genac_megatron.errors import InputError
from genac_megatron.records import Prompt
from genac_megatron.tasks.fields import with_system
from genac_megatron.tasks.tokenizer import chat_ids
from genac_megatron.tasks.workers import BESIDE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Split = Literal["train", "heldout"]
_ANSWER = re.compile(r"^[ \t]*answer\b[ \t:]*(.*)$", re.MULTILINE)
HELD_OUT = 256  # problems, where neither the recipe nor the data say how many
DRAWS_PER_PROBLEM = 200  # tries for one more problem that is new, before the space counts as too small


@dataclass(frozen=True)
class Problem:
    """A problem before tokenization: its plain text, and what the verifier compares with."""

    text: str
    reference: Any
    instruction: str = ""  # shown to the actor after the text, never to the critic
    messages: tuple[dict[str, Any], ...] = ()  # a conversation: shown to the actor as it is
    system: str = ""  # the system message before the text, never shown to the critic
    tools: tuple[dict[str, Any], ...] = ()  # JSON schemas of functions, for the chat template
    where: str = field(default="", compare=False)  # in the user's data: file:line

    @property
    def key(self) -> str:
        """What makes two problems the same one: the text, whatever its white space."""
        return " ".join(self.text.split())


@dataclass(frozen=True)
class Scored:
    """The outcome of a response in [0, 1], and by name what it is made of, where the task says."""

    outcome: float
    parts: Mapping[str, float] = field(default_factory=dict)


class Teacher(ABC):
    """Writes what models are fine-tuned on, from exact knowledge of the task; never sees an outcome."""

    plays = False  # it plays in turns (`turn`) rather than writing a whole response
    # Steps of an average response of the task that p_bar is the success rate at; None: it is read otherwise
    mean_length: float | None = None

    @abstractmethod
    def demonstrate(self, prompt: Prompt, rng: random.Random) -> str:
        """A response to `prompt`, the task's slips included, without an end token."""

    def turn(self, prompt: Prompt, partial: str, rng: random.Random) -> str:
        """The next turn of a conversation, after the transcript of those before; of a teacher that plays."""
        raise NotImplementedError

    @abstractmethod
    def trace(self, prompt: Prompt, partial: str, p_bar: float, rng: random.Random) -> tuple[str, int]:
        """A critic's reasoning about any `partial` response, and its score 0-10.

        `p_bar` is the actor's success rate in [0, 1]. The text ends without a newline and holds no
        answer tag: the caller adds both.
        """

    def value(self, prompt: Prompt, partial: str, p_bar: float) -> float:
        """The chance in [0, 1] that a response which goes on from `partial` succeeds: what `trace` rounds.

        A teacher that knows no more than its scores gives these, in tenths.
        """
        return self.trace(prompt, partial, p_bar, random.Random(0))[1] / 10


class Task(ABC):
    """Problems by split and index, and their verifier.

    Subclasses give `_problem` and `verify`, which threads may call. A text in the held-out split is in no
    training prompt.
    `tokenizer`: the actor's; None where a server reads the prompts' messages, which then have no ids.
    """

    teacher: Teacher | None = None
    success: str = ""  # what counts as success, as the critic is told
    reasoning_tags: tuple[str, str] | None = None  # the actor's own, beside those of known families
    reveals = False  # whether prompts carry what a privileged critic is shown
    turns: int | None = None  # of its own environment's conversations, at most, where that is known
    digest = ""  # of prompts that another's code makes: ranks and resumed runs must have the same ones

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None, train_size: int, heldout_size: int) -> None:
        self.tokenizer = tokenizer
        self.train_size = train_size
        self.heldout_size = heldout_size
        self.notes: list[str] = []  # what people should know about its data, told when a run begins
        self._order: tuple[tuple[int, int], list[int]] | None = None

    @abstractmethod
    def _problem(self, split: Split, index: int) -> Problem:
        """The problem at `index`, which is within the split's size."""

    @abstractmethod
    def verify(self, prompt: Prompt, text: str) -> float:
        """The outcome in [0, 1] of the response `text`. Any text is legal."""

    async def verify_beside(self, prompt: Prompt, text: str, cut_off: bool = False) -> float:
        """`verify` in a thread: generation and judging go on meanwhile, and a few other responses'."""
        loop, cut = asyncio.get_running_loop(), (0,) if cut_off else ()
        found = await loop.run_in_executor(self._beside, self.verify_many, [(prompt, text)], cut)
        return found[0]

    @cached_property
    def _beside(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(BESIDE, thread_name_prefix="verify")

    async def score_beside(self, prompt: Prompt, text: str, cut_off: bool = False) -> Scored:
        """`verify_beside`, with the outcome's parts."""
        return Scored(await self.verify_beside(prompt, text, cut_off))

    def verify_many(self, pairs: Sequence[tuple[Prompt, str]], cut_off: Collection[int] = ()) -> list[float]:
        """`verify` for each (prompt, response text), in order.

        `cut_off`: the places of those that ended at their token limit, for tasks where it matters.
        """
        return [self.verify(prompt, text) for prompt, text in pairs]

    @property
    def late(self) -> int:
        """Responses that could not be verified so far (its time limit, a judge's failure); each counted as 0,
        or as the task says."""
        return 0

    @property
    def parts(self) -> Sequence[Task]:
        """The tasks that it is of: a mixture's parts, else itself."""
        return (self,)

    @property
    def fixed(self) -> FixedTask | None:
        """The task with the rows that it is over, where all are known."""
        return None

    def resized(self) -> None:  # noqa: B027  most wrap none
        """Take over the sizes of the tasks that it wraps: some of their problems were left out."""

    def close(self) -> None:
        """End what the task has started: processes, threads, connections."""
        if "_beside" in self.__dict__:
            self._beside.shutdown(wait=False, cancel_futures=True)

    def prompt(self, split: Split, index: int) -> Prompt:
        """The prompt at `index` of `split`, its ids by the tokenizer's chat template.

        Raises IndexError outside the split's size.
        """
        size = self.train_size if split == "train" else self.heldout_size
        if not 0 <= index < size:
            raise IndexError(f"{split} has {size} prompts, no index {index}")
        problem = self._problem(split, index)
        content = f"{problem.text}\n\n{problem.instruction}" if problem.instruction else problem.text
        messages = problem.messages or with_system(({"role": "user", "content": content},), problem.system)
        ids: tuple[int, ...] = ()
        if self.tokenizer is not None:
            ids = chat_ids(self.tokenizer, messages, problem.tools, where=problem.where)
        return Prompt(
            id=f"{split}/{index}",
            messages=messages,
            problem=problem.text,
            reference=problem.reference,
            ids=ids,
            success=self.success,
            tools=problem.tools,
            where=problem.where,
            privileged=self.reveal(problem) if self.reveals else {},
        )

    def named(self, prompt_id: str) -> Prompt:
        """The prompt with this `Prompt.id`. Raises KeyError, ValueError or IndexError where there is none."""
        split, _, index = prompt_id.rpartition("/")
        splits: dict[str, Split] = {"train": "train", "heldout": "heldout"}
        return self.prompt(splits[split], int(index))

    def reveal(self, problem: Problem) -> dict[str, str]:
        """What a privileged critic is shown of a problem: `reference` or `rubric`; {} where there is none."""
        reference = problem.reference
        if isinstance(reference, dict | list):
            reference = json.dumps(reference, ensure_ascii=False)
        shown = "" if reference is None else str(reference).strip()
        return {"reference": shown} if shown else {}

    def train_index(self, seed: int, cursor: int) -> int:
        """The index of the `cursor`-th training prompt of a run: a seeded permutation per epoch."""
        epoch, offset = divmod(cursor, self.train_size)
        if self._order is None or self._order[0] != (seed, epoch):
            order = list(range(self.train_size))
            random.Random(f"order/{seed}/{epoch}").shuffle(order)
            self._order = ((seed, epoch), order)
        return self._order[1][offset]


def read_alike(task: Task, recipes: Task) -> None:
    """Have the teachers of `task` read p_bar as the success rate at `recipes`, of which critics are told it:
    at the mean length there, where both are of one kind. One of another kind goes on by its own.
    """
    lengths = {type(part.teacher): part.teacher.mean_length for part in recipes.parts if part.teacher}
    for part in task.parts:
        if part.teacher is not None:
            part.teacher.mean_length = lengths.get(type(part.teacher), part.teacher.mean_length)


class FixedTask(Task):
    """A task whose problems are all known: subclasses give `verify`."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | None,
        train: Sequence[Problem],
        heldout: Sequence[Problem],
    ) -> None:
        super().__init__(tokenizer, len(train), len(heldout))
        self._problems: dict[str, list[Problem]] = {"train": list(train), "heldout": list(heldout)}

    def _problem(self, split: Split, index: int) -> Problem:
        return self._problems[split][index]

    @property
    def fixed(self) -> FixedTask | None:
        return self

    def problems(self, split: Split) -> Sequence[Problem]:
        """The problems of a split, in order."""
        return self._problems[split]

    def leave_out(self, split: Split, indices: Iterable[int]) -> None:
        """Drop the problems at `indices`; those behind them move up."""
        out = frozenset(indices)
        self._problems[split] = [p for index, p in enumerate(self._problems[split]) if index not in out]
        self.train_size, self.heldout_size = len(self._problems["train"]), len(self._problems["heldout"])


class GeneratedProblems:
    """Problems of a generator, split so that no held-out text is ever trained on.

    The held-out problems are the generator's first different ones. A training problem is a function of
    its index alone; where the generator repeats a held-out text there, another problem, chosen by the
    index, takes its place.
    """

    def __init__(self, draw: Callable[[int], Problem], train_size: int, heldout_size: int) -> None:
        """`draw(n)` is the generator's n-th problem. Raises InputError for too few different ones."""
        self._draw, self._train_size = draw, train_size
        found: dict[str, Problem] = {}
        drawn = 0
        while len(found) < heldout_size and drawn < heldout_size * DRAWS_PER_PROBLEM:
            problem = draw(drawn)
            found.setdefault(problem.key, problem)
            drawn += 1
        if len(found) < heldout_size:
            raise InputError(
                f"too few different problems: {len(found)} found for heldout_size {heldout_size}",
                where="task.heldout_size",
                way_out="make the task larger, or heldout_size smaller",
            )
        self._first_train = drawn
        self.heldout: list[Problem] = list(found.values())
        self._heldout_keys = frozenset(found)

    def train(self, index: int) -> Problem:
        """The training problem at `index`. Raises InputError where the held-out split takes all problems."""
        problem = self._draw(self._first_train + index)
        if problem.key not in self._heldout_keys:
            return problem
        rng = random.Random(index)  # made only where it is needed: a run looks at every training problem
        for _ in range(DRAWS_PER_PROBLEM - 1):
            # Beyond the other training problems, at no fixed stride: a generator may repeat in a cycle.
            problem = self._draw(self._first_train + self._train_size + rng.getrandbits(24))
            if problem.key not in self._heldout_keys:
                return problem
        raise InputError(
            "the held-out split takes (nearly) every problem of the task: none is left to train on",
            where="task.heldout_size",
            way_out="make the task larger, or heldout_size smaller",
        )


class GeneratedTask(Task):
    """A task whose problems a generator makes: subclasses give `draw` and `verify`."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None, train_size: int, heldout_size: int) -> None:
        super().__init__(tokenizer, train_size, heldout_size)
        self._problems = GeneratedProblems(self.draw, train_size, heldout_size)

    @abstractmethod
    def draw(self, number: int) -> Problem:
        """The generator's problem `number`, the same each time."""

    def _problem(self, split: Split, index: int) -> Problem:
        return self._problems.train(index) if split == "train" else self._problems.heldout[index]


def answer_line(text: str) -> str | None:
    """What the last line of `text` that starts with "answer" says; None where no line does."""
    lines = _ANSWER.findall(text)
    return str(lines[-1]).strip() if lines else None


def split_problems(
    problems: Iterable[Problem],
    heldout: Iterable[Problem] | None,
    heldout_size: int | None,
    seed: int,
    where: str,
    notes: list[str],
) -> tuple[list[Problem], list[Problem]]:
    """(train, held-out) of a fixed set: the given held-out problems, else a seeded share of `problems`.

    heldout_size: at most so many of the given ones, shuffled, and `notes` says what is left aside; None: all
    of them, or a share of HELD_OUT.
    A text that occurs twice counts once, and one that is held out leaves the training split.
    Raises InputError where nothing is left to train on or to hold out, or where a text has two references.
    """
    unique = _unique(problems)
    if heldout is None:
        heldout_size = heldout_size or HELD_OUT
        random.Random(f"split/{seed}").shuffle(unique)
        if len(unique) <= heldout_size:
            raise InputError(
                f"{len(unique)} different problems do not suffice for heldout_size {heldout_size}",
                where=where,
                way_out="lower task.heldout_size, or name held-out data",
            )
        return unique[heldout_size:], unique[:heldout_size]
    held = _unique(heldout)
    random.Random(f"split/{seed}").shuffle(held)
    keys = {problem.key for problem in held}
    train = [problem for problem in unique if problem.key not in keys]
    if heldout_size is not None and len(held) > heldout_size:
        notes.append(
            f"{len(held) - heldout_size:,} of {len(held):,} held-out questions are left aside "
            f"(task.heldout_size {heldout_size})"
        )
        held = held[:heldout_size]
    if not train or not held:
        raise InputError(
            f"{len(train)} training and {len(held)} held-out problems are left after removing repeats",
            where=where,
            way_out="check that both files hold problems, and different ones",
        )
    return train, held


def _unique(problems: Iterable[Problem]) -> list[Problem]:
    """The problems, each text once. Raises InputError where one stands there with different references."""
    found: dict[str, Problem] = {}
    for problem in problems:
        first = found.setdefault(problem.key, problem)
        if _said(first.reference) != _said(problem.reference):
            places = " and ".join(filter(None, (first.where, problem.where)))
            raise InputError(
                f"the same prompt stands there with different references: {problem.key[:80]!r}",
                where=places or "task",
                way_out="keep one of them: nobody knows which is right",
            )
    return list(found.values())


def _said(reference: Any) -> Any:
    return " ".join(reference.split()) if isinstance(reference, str) else reference
