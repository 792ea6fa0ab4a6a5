"""Tasks over a fixed set of questions with reference answers: what JSONL files and datasets share."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from genac_megatron.errors import InputError
from genac_megatron.recipe.tasks import BOXED, AnswerForm, DatasetTask, JsonlTask
from genac_megatron.records import Prompt
from genac_megatron.tasks.answers import final_answer, referred
from genac_megatron.tasks.base import FixedTask, Problem, split_problems
from genac_megatron.tasks.clean import without_benchmarks
from genac_megatron.tasks.fields import (
    MISSING,
    Messages,
    from_json,
    is_heldout,
    look_up,
    read_field,
    read_messages,
    read_tools,
    shown_text,
    with_system,
)
from genac_megatron.tasks.filters import keep_lengths, keep_pass_rates, known_rates, problem_digest, rank_by
from genac_megatron.tasks.grading import make_grader
from genac_megatron.tasks.reasoning import opened_reasoning, usual
from genac_megatron.tasks.rows import Located, Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Of a recipe that leaves the names at their defaults, the first that a row has: the second ones are verl's.
QUESTION_KEYS = ("question", "prompt")
ANSWER_KEYS = ("answer", "reward_model.ground_truth")
SHOWN_CONFLICTS = 3
BySplit = Literal["yes", "known", "no"]
CHOICES_KEYS = ("choices", "options")
LETTER = re.compile(r"\(?[A-J]\)?", re.IGNORECASE)
# A list of messages as Python writes it, which is no JSON.
PYTHONS = re.compile(r"\[\{'(?:role|content|from|value)':")


class QuestionTask(FixedTask):
    """Fixed questions; a grader compares a response's final answer with the reference."""

    def __init__(
        self,
        train: Sequence[Problem],
        heldout: Sequence[Problem],
        verifier: str,
        tokenizer: PreTrainedTokenizerBase | None,
        answer_forms: Sequence[AnswerForm] | None = None,
    ) -> None:
        """`answer_forms`: where a final answer may stand; None: the verifier's own (tasks/answers.py)."""
        super().__init__(tokenizer, train, heldout)
        self._grader = make_grader(verifier, answer_forms)
        self.rank: Callable[[Problem], float] | None = None  # the first pass goes by it; None: shuffled
        self._sorted: tuple[tuple[int, int], list[int]] | None = None

    def train_index(self, seed: int, cursor: int) -> int:
        """As of any task; in the first pass by `rank`, equal ones in the order that they have without it."""
        if self.rank is None or cursor >= self.train_size:
            return super().train_index(seed, cursor)
        if self._sorted is None or self._sorted[0] != (seed, self.train_size):
            rank, problems = self.rank, self.problems("train")
            order = [super(QuestionTask, self).train_index(seed, at) for at in range(self.train_size)]
            self._sorted = (seed, self.train_size), sorted(order, key=lambda index: rank(problems[index]))
        return self._sorted[1][cursor]

    @property
    def late(self) -> int:
        return self._grader.late

    @property
    def forms(self) -> Sequence[AnswerForm]:
        """Where a final answer may stand."""
        return self._grader.forms

    def verify(self, prompt: Prompt, text: str) -> float:
        return self.verify_many([(prompt, text)])[0]

    def verify_many(self, pairs: Sequence[tuple[Prompt, str]], cut_off: Collection[int] = ()) -> list[float]:
        """Outcomes in order. Of responses that were cut off only what is closed counts (final_answer)."""
        answers = [
            final_answer(
                usual(text, self.reasoning_tags),
                self._grader.forms,
                place not in cut_off,
                self._opened(prompt),
            )
            for place, (prompt, text) in enumerate(pairs)
        ]
        references = [prompt.reference for prompt, _ in pairs]
        return self._grader.grade_answers(list(zip(references, answers, strict=True)))

    def _opened(self, prompt: Prompt) -> bool:
        """Whether the chat template has opened the reasoning that a response then only closes."""
        if self.tokenizer is None or not prompt.ids:
            return False
        return opened_reasoning(self.tokenizer, prompt.ids, self.reasoning_tags)


def need_verifier(config: JsonlTask | DatasetTask) -> str:
    """The recipe's verifier. Raises InputError where it names none: then nothing could be rewarded."""
    if not isinstance(config.verifier, str):
        raise InputError(
            "the task has no verifier, so no response could be rewarded",
            where="task.verifier",
            way_out="set task.verifier to math or exact",
        )
    return config.verifier


def read_problems(
    rows: Iterable[Located], config: JsonlTask | DatasetTask, *, by_split: BySplit
) -> tuple[list[Problem], list[Problem]]:
    """(training, held-out) problems of rows. `by_split`: rows may name their split under `config.split_key`;
    `known`: it may say something else.

    Raises InputError naming the row's place.
    """
    pattern = None
    if isinstance(config, DatasetTask) and config.answer_pattern is not None:
        pattern = compiled(config.answer_pattern)
    train: list[Problem] = []
    heldout: list[Problem] = []
    for where, row in rows:
        problem = read_problem(row, config, pattern, where)
        held = by_split != "no" and is_heldout(row, config.split_key, where, strict=by_split == "yes")
        (heldout if held else train).append(problem)
    return train, heldout


def read_problem(
    row: Row, config: JsonlTask | DatasetTask, pattern: re.Pattern[str] | None, where: str
) -> Problem:
    """A row's problem: a question that is text or chat messages, and a reference answer."""
    question = _chosen(row, config.question_key, QUESTION_KEYS)
    reference = read_field(row, _chosen(row, config.answer_key, ANSWER_KEYS), where)
    if pattern is not None:
        reference = _matched(pattern, reference, where)
    if config.solution:
        reference = _answered(reference, where)
    tools = () if config.tools_key is None else read_tools(row, config.tools_key, where)
    value = _listed(look_up(row, question), question, where)
    if isinstance(value, list):
        messages = with_system(_chat(value, question, where), config.system)
        text = shown_text(_chat(value, question, where))
        _need_shown_choices(row, text, reference, where)
        if config.instruction:
            messages = (*messages[:-1], _instructed(messages[-1], config.instruction))
        return Problem(text, reference, messages=messages, tools=tools, where=where)
    text = read_field(row, question, where)
    _need_shown_choices(row, text, reference, where)
    return Problem(
        text=text,
        reference=reference,
        instruction=BOXED if config.instruction is None else config.instruction,
        system=config.system,
        tools=tools,
        where=where,
    )


def _need_shown_choices(row: Row, text: str, reference: str, where: str) -> None:
    """Raise InputError where an answer is the number or letter of choices that the question does not show, as
    in MMLU's rows: nothing could be right but by luck.
    """
    shown = " ".join(text.split())
    for key in CHOICES_KEYS:
        choices = _choices(look_up(row, key))
        number = reference.isdecimal() and len(reference) < 4 and int(reference) <= len(choices)
        named = LETTER.fullmatch(reference) or number
        if len(choices) < 2 or not named or reference in choices:
            continue
        if unseen := next((choice for choice in choices if choice not in shown), None):
            raise InputError(
                f"the answer {reference!r} names one of its {key!r}, which the question does not show: "
                f"{unseen[:60]!r}",
                where=where,
                way_out="write the choices into the question, and the right one's letter as its answer",
            )


def _choices(value: object) -> list[str]:
    """The texts of choices: a list, {"text": [...], "label": [...]}, {"A": ...}, or a list of objects; [] of
    anything else.
    """
    if isinstance(value, str):
        value = from_json(value)
    if isinstance(value, Mapping):
        labelled = all(LETTER.fullmatch(str(key)) or str(key).isdecimal() for key in value)
        value = list(value.values()) if labelled else value.get("text")
    parts = value if isinstance(value, list) else []
    texts = [part.get("text") if isinstance(part, Mapping) else part for part in parts]
    return [
        " ".join(str(text).split()) for text in texts if isinstance(text, str | int | float) and text != ""
    ]


def _chosen(row: Row, key: str, known: Sequence[str]) -> str:
    """The key to read: the recipe's; where that is left at its default, the first known one that is there."""
    if key != known[0]:
        return key
    return next((name for name in known if look_up(row, name) not in (MISSING, None)), key)


def _listed(value: object, key: str, where: str) -> object:
    """A list of messages that is written as JSON text, as cells of CSV have it; other values as they are."""
    if not isinstance(value, str) or not value.lstrip().startswith("[{"):
        return value
    if PYTHONS.match(value.lstrip()):
        what = f"{key!r} holds messages as Python prints them"
        raise InputError(what, where=where, way_out="write them as JSON, or as a column of lists (Parquet)")
    try:
        found = json.loads(value)
    except (ValueError, RecursionError):
        return value
    said = isinstance(found, list) and all(
        isinstance(m, Mapping) and ("role" in m or {"from", "value"} <= m.keys()) for m in found
    )
    return found if said else value


def _chat(value: list[object], key: str, where: str) -> Messages:
    form = f'{key} is text, or [{{"role": "user", "content": "..."}}, ...] that ends with the user\'s'
    messages = read_messages(value, where, form)
    if messages[-1]["role"] not in ("user", "tool") or not messages[-1]["content"].strip():
        raise InputError(
            f"the messages under {key!r} end with the {messages[-1]['role']}'s, so there is nothing to answer"
            if messages[-1]["content"].strip()
            else f"the last message under {key!r} is empty",
            where=where,
            way_out=form,
        )
    return messages


def _instructed(message: dict[str, object], instruction: str) -> dict[str, object]:
    return {**message, "content": f"{message['content']}\n\n{instruction}"}


def compiled(text: str) -> re.Pattern[str]:
    """A pattern whose group 1 is the reference. Raises InputError."""
    try:
        pattern = re.compile(text)
    except re.error as error:
        raise InputError(
            f"not a regular expression: {error}",
            where="task.answer_pattern",
            way_out=r"one of Python's, such as '#### (\S+)'",
        ) from error
    if pattern.groups < 1:
        raise InputError(
            "the pattern has no group", where="task.answer_pattern", way_out="put the answer in a (group)"
        )
    return pattern


def _matched(pattern: re.Pattern[str], answer: str, where: str) -> str:
    match = pattern.search(answer)
    found = None if match is None else match.group(1)
    if not found or not found.strip():
        raise InputError(
            f"answer_pattern {pattern.pattern!r} finds nothing in {answer[-60:]!r}",
            where=where,
            way_out="correct task.answer_pattern, or leave it out where the field is the bare answer",
        )
    return found.strip()


def _answered(solution: str, where: str) -> str:
    """The final answer of a whole solution. Raises InputError where it has none."""
    answer = referred(solution)
    if answer == solution and len(answer.split()) > 1:
        raise InputError(
            f"the solution has no \\boxed{{}} and no last line '#### X': {solution[-60:]!r}",
            where=where,
            way_out="set task.solution: false where the field is the answer itself",
        )
    return answer


def without_conflicts(
    problems: Sequence[Problem], config: JsonlTask | DatasetTask
) -> tuple[list[Problem], str]:
    """The problems, and what to tell, after the recipe's rule for questions that stand there with several
    answers: nobody knows which is right.

    Raises InputError naming their places, where the rule is `error`.
    """
    by_key: dict[str, list[Problem]] = {}
    for problem in problems:
        by_key.setdefault(problem.key, []).append(problem)
    torn = {k: same for k, same in by_key.items() if len({" ".join(p.reference.split()) for p in same}) > 1}
    if not torn:
        return list(problems), ""
    shown = "; ".join(_places(same) for same in list(torn.values())[:SHOWN_CONFLICTS])
    more = f"; and {len(torn) - SHOWN_CONFLICTS} more" if len(torn) > SHOWN_CONFLICTS else ""
    what = f"{len(torn)} questions stand there with different answers: {shown}{more}"
    if config.conflicting == "error":
        raise InputError(
            what,
            where="task",
            way_out="keep one answer of each, or leave these questions out by task.conflicting: drop",
        )
    kept = [problem for problem in problems if problem.key not in torn]
    return kept, f"{what}; they are left out (task.conflicting: drop)"


def _places(same: Sequence[Problem]) -> str:
    first = same[0]
    other = next(p for p in same if p.reference.split() != first.reference.split())
    return f"{first.where} ({first.reference[:40]!r}) and {other.where} ({other.reference[:40]!r})"


def make_question_task(
    config: JsonlTask | DatasetTask,
    train: Sequence[Problem],
    heldout: Sequence[Problem] | None,
    tokenizer: PreTrainedTokenizerBase | None,
    seed: int,
    where: str,
    notes: Sequence[str] = (),
) -> QuestionTask:
    """The task of problems that were read; `heldout` None: a seeded share of them. Raises InputError.

    notes: what was told of the rows so far. The task's say besides what is left out of the problems.
    """
    if not train and not heldout:
        raise InputError("no row in it", where=where, way_out="see that it is the right file, and whole")
    told = list(notes)
    found, conflicts = without_conflicts([*train, *(heldout or ())], config)
    told += [conflicts] if conflicts else []
    repeats = len(found) - len({problem.key for problem in found})
    if repeats:
        told.append(f"{repeats:,} of {len(found):,} rows ask a question again: each counts once")
    found = without_benchmarks(found, config.decontaminate, told)
    kept = {id(problem) for problem in found}
    train = [problem for problem in train if id(problem) in kept]
    if heldout is not None:
        heldout = [problem for problem in heldout if id(problem) in kept]
    splits = split_problems(train, heldout, config.heldout_size, seed, where, told)
    task = QuestionTask(*splits, need_verifier(config), tokenizer, config.answer_forms)
    task.notes = told
    keep_lengths(task, config.filter.prompt_tokens)
    rates = known_rates(task, config.filter)
    keep_pass_rates(task, config.filter, rates)
    task.rank = rank_by(config.order, rates)
    if config.filter.pass_rates is not None:  # another file would give a resumed run other questions
        known = "\n".join(f"{problem.key} {rates.get(problem_digest(problem.text))}" for problem in train)
        task.digest = hashlib.sha256(known.encode("utf-8", "surrogatepass")).hexdigest()
    return task
