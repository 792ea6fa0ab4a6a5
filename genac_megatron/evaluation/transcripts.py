"""What `genac score` reads, and what is looked at before a critic is asked. No torch.

A row has `problem` (or `question`) and `response`, or chat `messages` that end with the assistant's; perhaps
`tokens` (of the response), `limit`, and what the critic is told: `actor`, `p_bar`, `step`. Out comes the row
with `value`, and with `values` of its prefixes where they are asked for.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from genac_megatron.critic.icc import IccState
from genac_megatron.critic.verdicts import Row
from genac_megatron.errors import InputError
from genac_megatron.observe.manifest import find_checkpoint, read_manifest
from genac_megatron.recipe.schema import Recipe

LARGEST = 2**53  # a count; JSON's Infinity is none
OPTIONAL = ("tokens", "limit", "actor", "p_bar", "step", "success")  # null, as tables write it, is none


@dataclass(frozen=True)
class ScoreOptions:
    """What is valued, and what the critic is told where rows do not say."""

    source: Path
    out: Path
    checkpoint: str | None = None
    p_bar: float | None = None  # None: as the checkpoint's run told its critic
    step: int | None = None
    limit: int = 4096  # tokens that a response may have
    judgements: int = 1  # of a state, whose mean is its value
    lines: bool = False  # prefixes too, at line ends


def read_transcripts(path: Path) -> list[Row]:
    """Rows with `problem` and `response` as text. Raises InputError that names file and line."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        way_out = "give a JSONL file of problems and responses"
        raise InputError(f"cannot read the transcripts: {why}", where=str(path), way_out=way_out) from error
    found = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            found.append(_transcript(line, f"{path}:{number}"))
    if not found:
        raise InputError(
            "no transcript is in it",
            where=str(path),
            way_out="write a line for each: problem and response",
        )
    return found


def _transcript(line: str, where: str) -> Row:
    way_out = 'for example {"problem": "2+2?", "response": "4"}'
    try:
        row = json.loads(line)
    except ValueError as error:
        raise InputError(f"not JSON: {error}", where=where, way_out=way_out) from error
    if not isinstance(row, dict):
        raise InputError("not an object", where=where, way_out=way_out)
    problem, response = row.get("problem"), row.get("response")
    problem = row.get("question") if problem is None else problem
    messages = row.get("messages")
    if problem is None and isinstance(messages, list) and len(messages) > 1:
        *asked, last = [one if isinstance(one, dict) else {} for one in messages]
        if last.get("role") == "assistant":
            response = last.get("content")
            problem = "\n\n".join(str(one.get("content", "")) for one in asked)
    if not isinstance(problem, str) or not isinstance(response, str) or not problem.strip():
        raise InputError(
            "it has no problem and response that are text, nor messages that end with the assistant's",
            where=where,
            way_out=way_out,
        )
    for name, low, high in (
        ("p_bar", 0, 1),
        ("step", 0, LARGEST),
        ("tokens", 0, LARGEST),
        ("limit", 1, LARGEST),
    ):
        value = row.get(name)
        if value is not None and (
            isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high
        ):
            raise InputError(f"{name} is {value!r}", where=where, way_out="correct it, or leave it out")
    _need_unicode({**row, "problem": problem, "response": response}, where)
    given = {name: value for name, value in row.items() if value is not None or name not in OPTIONAL}
    return {**given, "problem": problem, "response": response}


def _need_unicode(row: Row, where: str) -> None:
    """Raise InputError where a name or a value of the row, which comes out again, cannot be written."""
    for name, value in row.items():
        shown = name.encode("utf-8", "backslashreplace").decode("utf-8")
        for text in (name, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)):
            try:
                text.encode("utf-8")
            except UnicodeEncodeError as error:
                raise InputError(
                    f"its {shown} is no Unicode text: half of a surrogate pair at character {error.start}",
                    where=where,
                    way_out="write it anew as UTF-8",
                ) from error


def told_by(recipe: Recipe, options: ScoreOptions) -> IccState:
    """What the critic is told where a row does not say. Raises InputError where nobody knows the rate."""
    name, p_bar, step = recipe.judging.actor_name, options.p_bar, options.step
    checkpoint = options.checkpoint or recipe.roles["critic"].model.checkpoint
    if checkpoint is not None and (p_bar is None or step is None):
        state = read_manifest(find_checkpoint(Path(checkpoint))).get("state") or {}
        icc = (state.get("at") or {}).get("icc") or {}
        p_bar = icc.get("p_bar") if p_bar is None else p_bar
        step = icc.get("step") if step is None else step
    if p_bar is None:
        raise InputError(
            "the critic is told the actor's success rate, and nothing here says it",
            where="--p-bar",
            way_out="give it, from 0 to 1; a checkpoint of a run that has judged knows its own",
        )
    return IccState(float(p_bar), int(step or 0), actor=name)


def needs_critic(recipe: Recipe) -> None:
    """Raise InputError where the recipe has no critic that writes."""
    if "critic" not in recipe.roles or recipe.roles["critic"].model.head != "lm":
        raise InputError(
            "the recipe has no generative critic",
            where="roles.critic",
            way_out="name a recipe that has one; a scalar critic's values: genac evaluate bank score",
        )


def need_scorable(recipe: Recipe, options: ScoreOptions) -> None:
    """Raise InputError where something is missing that scoring needs, before anything is begun."""
    needs_critic(recipe)
    if options.p_bar is not None and not 0 <= options.p_bar <= 1:
        raise InputError(f"{options.p_bar} is no success rate", where="--p-bar", way_out="from 0 to 1")
    if options.step is not None and options.step < 0:
        raise InputError(f"{options.step} is no step of training", where="--step", way_out="0, or above")
    told_by(recipe, options)
    read_transcripts(options.source)
    if options.out.is_dir():
        raise InputError("a folder, and no file", where=str(options.out), way_out="name a file with --out")
