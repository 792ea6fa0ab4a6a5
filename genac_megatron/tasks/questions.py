"""Tasks over a fixed set of questions with reference answers: what JSONL files and datasets share."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from genac_megatron.errors import InputError
from genac_megatron.recipe.tasks import AnswerForm, DatasetTask, JsonlTask
from genac_megatron.records import Prompt
from genac_megatron.tasks.answers import final_answer, opens_reasoning
from genac_megatron.tasks.base import Problem, Split, Task
from genac_megatron.tasks.grading import make_grader

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROMPT_END = 16  # tokens of a prompt's end in which a template may open the reasoning


class QuestionTask(Task):
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
        super().__init__(tokenizer, len(train), len(heldout))
        self._problems = {"train": train, "heldout": heldout}
        self._grader = make_grader(verifier, answer_forms)

    def _problem(self, split: Split, index: int) -> Problem:
        return self._problems[split][index]

    @property
    def late(self) -> int:
        return self._grader.late

    def verify(self, prompt: Prompt, text: str) -> float:
        return self.verify_many([(prompt, text)])[0]

    def verify_many(self, pairs: Sequence[tuple[Prompt, str]], cut_off: Collection[int] = ()) -> list[float]:
        """Outcomes in order. Of responses that were cut off only what is closed counts (final_answer)."""
        answers = [
            final_answer(text, self._grader.forms, place not in cut_off, self._opened(prompt))
            for place, (prompt, text) in enumerate(pairs)
        ]
        references = [prompt.reference for prompt, _ in pairs]
        return self._grader.grade_answers(list(zip(references, answers, strict=True)))

    def _opened(self, prompt: Prompt) -> bool:
        """Whether the chat template has opened the reasoning that a response then only closes."""
        if self.tokenizer is None or not prompt.ids:
            return False
        return opens_reasoning(str(self.tokenizer.decode(prompt.ids[-PROMPT_END:])))


def need_verifier(config: JsonlTask | DatasetTask) -> str:
    """The recipe's verifier. Raises InputError where it names none: then nothing could be rewarded."""
    if config.verifier is None:
        raise InputError(
            "the task has no verifier, so no response could be rewarded",
            where="task.verifier",
            way_out="set task.verifier to math or exact",
        )
    return config.verifier


def read_field(row: object, key: str, where: str) -> str:
    """The text under `key` of a row; a number counts as text. Raises InputError naming `where`."""
    value = row.get(key) if isinstance(row, dict) else None
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str) or not value.strip():
        have = ", ".join(map(str, row)) if isinstance(row, dict) else type(row).__name__
        raise InputError(
            f"no text under {key!r} (there is: {have})",
            where=where,
            way_out="set task.question_key and task.answer_key to the data's own names",
        )
    return value.strip()
