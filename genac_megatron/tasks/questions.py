"""Tasks over a fixed set of questions with reference answers: what JSONL files and datasets share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from genac_megatron.errors import InputError
from genac_megatron.recipe.tasks import DatasetTask, JsonlTask
from genac_megatron.records import Prompt
from genac_megatron.tasks.base import Problem, Split, Task
from genac_megatron.tasks.grading import make_grader

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class QuestionTask(Task):
    """Fixed questions; a grader compares a response's final answer with the reference."""

    def __init__(
        self,
        train: Sequence[Problem],
        heldout: Sequence[Problem],
        verifier: str,
        tokenizer: PreTrainedTokenizerBase | None,
    ) -> None:
        super().__init__(tokenizer, len(train), len(heldout))
        self._problems = {"train": train, "heldout": heldout}
        self._grader = make_grader(verifier)

    def _problem(self, split: Split, index: int) -> Problem:
        return self._problems[split][index]

    @property
    def late(self) -> int:
        return self._grader.late

    def verify(self, prompt: Prompt, text: str) -> float:
        return self.verify_many([(prompt, text)])[0]

    def verify_many(self, pairs: Sequence[tuple[Prompt, str]]) -> list[float]:
        return self._grader.grade([(prompt.reference, text) for prompt, text in pairs])


def need_verifier(config: JsonlTask | DatasetTask) -> str:
    """The recipe's verifier. Raises InputError where it names none: then nothing could be rewarded."""
    if not isinstance(config.verifier, str):
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
