"""A task whose prompts a Python function of the user's own gives.

It gives dicts, in any iterable: `prompt` (text, or chat messages that end with the user's) and perhaps
`reference` (any plain data) and `split` (train or heldout). It runs before training, in a process with a time
limit, and twice: prompts that differ from one process to the next would be others on each rank and after a
resume.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from genac_megatron.errors import InputError
from genac_megatron.recipe.own_code import Named, parse_named
from genac_megatron.tasks.base import Problem, split_problems
from genac_megatron.tasks.own_code import Called, OwnCodeError, run_jobs, told
from genac_megatron.tasks.workers import Pool

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from genac_megatron.recipe.tasks import PythonTask
    from genac_megatron.tasks.questions import QuestionTask

ARGUMENTS = ("seed",)
KEYS = ("prompt", "reference", "split")
FORM = (
    'each is {"prompt": "..." or [{"role": "user", "content": "..."}, ...], "reference": plain data, '
    '"split": "train" or "heldout"}; only prompt is needed'
)


@dataclass(frozen=True)
class Given:
    """What the function gave, as a line of JSON each; or why that cannot be used."""

    rows: tuple[str, ...] = ()
    failure: str = ""

    @property
    def digest(self) -> str:
        return hashlib.sha256("\n".join(self.rows).encode()).hexdigest()


def make_python_task(
    config: PythonTask, tokenizer: PreTrainedTokenizerBase | None, seed: int
) -> QuestionTask:
    """The task. Raises InputError, naming the function and the prompt, where what it gives is wrong."""
    from genac_megatron.recipe.tasks import OwnReward  # not in the function's process
    from genac_megatron.tasks.questions import QuestionTask

    named = parse_named(f"{config.path}:{config.prompts}", "task.prompts")
    given = _given(config, named, seed)
    train: list[Problem] = []
    heldout: list[Problem] = []
    for number, line in enumerate(given.rows):
        where = f"{named}, prompt {number}"
        row = json.loads(line)
        problem = _problem(row, config, where)
        split = row.get("split", "train")
        if split not in ("train", "heldout"):
            raise InputError(f"its split is {split!r}", where=where, way_out="say train or heldout")
        (heldout if split == "heldout" else train).append(problem)
    notes: list[str] = []
    splits = split_problems(train, heldout or None, config.heldout_size, seed, str(named), notes)
    verifier = config.verifier
    assert verifier is not None  # recipe/rules.py
    task = QuestionTask(*splits, "exact" if isinstance(verifier, OwnReward) else verifier, tokenizer)
    task.digest, task.notes = given.digest, notes
    return task


def _given(config: PythonTask, named: Named, seed: int) -> Given:
    def one(_: int) -> Given:
        pool = Pool(partial(_giver, named), _failed, 1, config.timeout_s, str(named))
        try:
            return run_jobs(pool, [seed], named)[0]
        finally:
            pool.close()

    with ThreadPoolExecutor(2) as threads:
        first, second = threads.map(one, range(2))
    for given in (first, second):
        if given.failure:
            raise InputError(given.failure, where=str(named), way_out=f"it gives prompts: {FORM}")
    if first != second:
        pairs = enumerate(zip(first.rows, second.rows, strict=False))
        shorter = min(len(first.rows), len(second.rows))
        differ = next((number for number, (one, other) in pairs if one != other), shorter)
        raise InputError(
            f"two processes were given other prompts, from prompt {differ} on",
            where=str(named),
            way_out="draw by random.Random(seed), which the function may take as `seed`, and sort what comes "
            "from a set or a folder: ranks and resumed runs must have the same prompts",
        )
    return first


def _failed(why: str) -> Given:
    return Given(failure=why)


def _giver(named: Named) -> Callable[[int], Given]:
    """In a worker's process: all that the function gives, as plain data."""
    try:
        called = Called(named, ARGUMENTS)
    except OwnCodeError as error:
        why = str(error)
        return lambda job: _failed(why)

    def give(seed: int) -> Given:
        try:
            return Given(tuple(_lines(called({"seed": seed}), named)))
        except OwnCodeError as error:
            return _failed(str(error))

    return give


def _lines(found: Any, named: Named) -> list[str]:
    if isinstance(found, str | Mapping) or not isinstance(found, Iterable):
        raise OwnCodeError(f"gave a {type(found).__name__}, not a list of prompts")
    lines: list[str] = []
    rows = iter(found)
    while True:
        try:
            row = next(rows)
        except StopIteration:
            break
        except Exception as error:
            raise OwnCodeError(f"raised {told(error, named)} at prompt {len(lines)}") from error
        where = f"prompt {len(lines)}"
        if isinstance(row, str):
            row = {"prompt": row}
        if not isinstance(row, Mapping):
            raise OwnCodeError(f"{where} is a {type(row).__name__}, not a dict")
        lines.append(json.dumps(_plain(dict(row), where), sort_keys=True, ensure_ascii=False))
    if not lines:
        raise OwnCodeError("gave no prompt")
    return lines


def _plain(value: Any, where: str) -> Any:
    """`value` as JSON holds it, with nothing changed on the way. Raises OwnCodeError."""
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        if math.isfinite(value):
            return value
        raise OwnCodeError(f"{where} holds {value}")
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise OwnCodeError(f"{where} holds text that is no Unicode: {error.reason}") from error
        return value
    if isinstance(value, list | tuple):
        return [_plain(part, where) for part in value]
    if isinstance(value, dict):
        if odd := [key for key in value if not isinstance(key, str)]:
            raise OwnCodeError(f"{where} has the key {odd[0]!r}, which is no text")
        return {key: _plain(part, f"{where}, {key}") for key, part in value.items()}
    raise OwnCodeError(f"{where} holds a {type(value).__name__}, which is no plain data")


def _problem(row: dict[str, Any], config: PythonTask, where: str) -> Problem:
    if more := [key for key in row if key not in KEYS]:
        raise InputError(
            f"it has {', '.join(more)}, which nothing would read",
            where=where,
            way_out=f"put what the verifier needs into reference; {FORM}",
        )
    messages = _messages(row.get("prompt"), where)
    reference = _reference(row.get("reference"), config, where)
    if len(messages) == 1:
        return Problem(messages[0]["content"], reference, config.instruction)
    text = "\n\n".join(f"{message['role']}: {message['content']}" for message in messages)
    if config.instruction:
        last = {**messages[-1], "content": f"{messages[-1]['content']}\n\n{config.instruction}"}
        messages = (*messages[:-1], last)
    return Problem(text, reference, messages=messages)


def _messages(prompt: Any, where: str) -> tuple[dict[str, str], ...]:
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    right = isinstance(messages, list) and all(
        isinstance(m, dict) and set(m) == {"role", "content"} and all(isinstance(v, str) for v in m.values())
        for m in messages
    )
    if not right or not messages or messages[-1]["role"] != "user" or not messages[-1]["content"].strip():
        raise InputError(
            "no text and no chat messages that end with the user's under 'prompt'", where=where, way_out=FORM
        )
    return tuple({"role": m["role"], "content": m["content"].strip()} for m in messages)


def _reference(reference: Any, config: PythonTask, where: str) -> Any:
    """As the verifier needs it: math and exact compare text. Raises InputError where there is none."""
    from genac_megatron.recipe.tasks import OwnReward

    if isinstance(config.verifier, OwnReward):
        return reference
    if isinstance(reference, int | float) and not isinstance(reference, bool):
        reference = str(reference)
    if not isinstance(reference, str) or not reference.strip():
        raise InputError(
            f"its reference is {reference!r}, and the verifier '{config.verifier}' compares with a text",
            where=where,
            way_out="give each prompt a reference, or a verifier of your own",
        )
    return reference.strip()
