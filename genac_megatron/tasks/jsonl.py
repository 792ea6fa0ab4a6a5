"""A task from JSON lines: a question and a reference answer in each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from genac_megatron.errors import InputError
from genac_megatron.recipe.tasks import JsonlTask
from genac_megatron.tasks.base import Problem, split_problems
from genac_megatron.tasks.questions import QuestionTask, need_verifier, read_field

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPLIT_KEY = "split"
HELDOUT_NAMES = ("heldout", "test", "validation")


def make_jsonl_task(config: JsonlTask, tokenizer: PreTrainedTokenizerBase, seed: int) -> QuestionTask:
    """The task of `config.path`.

    Held out are the problems of `heldout_path`, else the lines whose "split" is heldout, test or
    validation, else a seeded share of the file. Raises InputError naming file and line.
    """
    verifier = need_verifier(config)
    train, heldout = read_problems(config.path, config)
    if config.heldout_path is not None:
        first, second = read_problems(config.heldout_path, config)
        heldout = first + second
    given = heldout if heldout or config.heldout_path is not None else None
    splits = split_problems(train, given, config.heldout_size, seed, config.path)
    return QuestionTask(*splits, verifier, tokenizer, config.answer_forms)


def read_problems(path: str, config: JsonlTask) -> tuple[list[Problem], list[Problem]]:
    """(training, held-out) problems of the file by their "split"; blank lines are skipped."""
    train: list[Problem] = []
    heldout: list[Problem] = []
    try:
        lines = Path(path).expanduser().read_bytes().split(b"\n")
    except OSError as error:
        raise InputError(
            f"cannot be read: {error.strerror}", where=path, way_out="set task.path to a JSONL file"
        ) from error
    for number, line in enumerate(lines, 1):
        if line.strip():
            row = _parse(line, f"{path}:{number}")
            where = f"{path}:{number}"
            problem = Problem(
                text=read_field(row, config.question_key, where),
                reference=read_field(row, config.answer_key, where),
                instruction=config.instruction,
            )
            held = row.get(SPLIT_KEY) in HELDOUT_NAMES
            (heldout if held else train).append(problem)
    return train, heldout


def _parse(line: bytes, where: str) -> dict[str, object]:
    way_out = "each line is one JSON object, in UTF-8"
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise InputError(f"not UTF-8: {error.reason}", where=where, way_out=way_out) from error
    except json.JSONDecodeError as error:
        raise InputError(
            f"not JSON: {error.msg} at column {error.colno}", where=where, way_out=way_out
        ) from error
    if not isinstance(row, dict):
        raise InputError(f"a {type(row).__name__}, not an object", where=where, way_out=way_out)
    return row
