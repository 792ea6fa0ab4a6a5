"""A task from JSON lines: a question and a reference answer in each."""

from __future__ import annotations

from typing import TYPE_CHECKING

from genac_megatron.errors import InputError
from genac_megatron.recipe.tasks import JsonlTask
from genac_megatron.tasks.filters import kept_rows
from genac_megatron.tasks.questions import QuestionTask, make_question_task, need_verifier, read_problems
from genac_megatron.tasks.rows import read_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def make_jsonl_task(config: JsonlTask, tokenizer: PreTrainedTokenizerBase | None, seed: int) -> QuestionTask:
    """The task of `config.path`.

    Held out are the problems of `heldout_path`, else the lines whose split says so (tasks/fields.py:
    HELD_OUT), else a seeded share of the file. Raises InputError naming file and line.
    """
    need_verifier(config)
    notes: list[str] = []
    rows = kept_rows(read_rows(config.path), config, notes)
    train, heldout = read_problems(rows, config, by_split="yes")
    given = heldout or None
    if config.heldout_path is not None:
        if given:
            raise InputError(
                f"its {config.split_key!r} names a held-out split, and task.heldout_path another file",
                where=given[0].where,
                way_out="leave task.heldout_path out, so that rows name their split, or set task.split_key: "
                "null where it says something else",
            )
        rows = kept_rows(read_rows(config.heldout_path), config, notes)
        first, second = read_problems(rows, config, by_split="yes")
        given = first + second
    return make_question_task(config, train, given, tokenizer, seed, config.path, notes)
