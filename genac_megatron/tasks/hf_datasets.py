"""A task from a Hugging Face dataset: by name, a local folder, or a local file."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from genac_megatron.errors import InputError
from genac_megatron.recipe.tasks import DatasetTask
from genac_megatron.tasks.base import Problem, split_problems
from genac_megatron.tasks.questions import QuestionTask, need_verifier, read_field

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


def make_dataset_task(config: DatasetTask, tokenizer: PreTrainedTokenizerBase, seed: int) -> QuestionTask:
    """The task of `config.name`; held out are `heldout_split`'s problems, else a seeded share.

    Raises InputError where the dataset, the split, a column or a pattern's match is missing.
    """
    verifier = need_verifier(config)
    pattern = _pattern(config)
    train = _problems(config, config.split, pattern)
    heldout = None if config.heldout_split is None else _problems(config, config.heldout_split, pattern)
    splits = split_problems(train, heldout, config.heldout_size, seed, config.name)
    return QuestionTask(*splits, verifier, tokenizer, config.answer_forms)


def _pattern(config: DatasetTask) -> re.Pattern[str] | None:
    return None if config.answer_pattern is None else compiled(config.answer_pattern)


def compiled(text: str) -> re.Pattern[str]:
    """A pattern whose group 1 is the reference. Raises InputError."""
    try:
        pattern = re.compile(text)
    except re.error as error:
        raise InputError(f"not a regular expression: {error}", where="task.answer_pattern") from error
    if pattern.groups < 1:
        raise InputError(
            "the pattern has no group", where="task.answer_pattern", way_out="put the answer in a (group)"
        )
    return pattern


def _problems(config: DatasetTask, split: str, pattern: re.Pattern[str] | None) -> list[Problem]:
    """The problems of one split. `pattern`'s first group cuts the reference out of the answer column."""
    problems = []
    for number, row in enumerate(load_rows(config, split)):
        where = f"{config.name}[{split}], row {number}"
        answer = read_field(row, config.answer_key, where)
        if pattern is not None:
            match = pattern.search(answer)
            if match is None or not match.group(1):
                raise InputError(
                    f"answer_pattern {pattern.pattern!r} finds nothing in {answer[-60:]!r}", where=where
                )
            answer = match.group(1).strip()
        problems.append(Problem(read_field(row, config.question_key, where), answer, config.instruction))
    return problems


def load_rows(config: DatasetTask, split: str) -> Any:
    """The rows of a split as `datasets` gives them: dicts, by iteration. Raises InputError."""
    import datasets

    path = Path(config.name).expanduser()
    try:
        if path.is_file():
            builder = BUILDERS.get(path.suffix)
            if builder is None:
                known = ", ".join(BUILDERS)
                raise InputError(f"a file that is none of {known}", where=config.name)
            return datasets.load_dataset(builder, data_files={split: str(path)}, split=split)
        return datasets.load_dataset(str(path) if path.is_dir() else config.name, config.config, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise InputError(
            f"cannot load split {split!r}: {str(error).splitlines()[0]}",
            where=config.name,
            way_out="give a local file or folder, or the name of a dataset on its hub or in its cache",
        ) from error
