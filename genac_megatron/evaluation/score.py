"""`genac score`: a critic's values of any transcripts, JSONL in and out.

A row has `problem` (or `question`) and `response`, or chat `messages` that end with the assistant's; perhaps
`tokens` (of the response), `limit`, and what the critic is told: `actor`, `p_bar`, `step`. Out comes the row
with `value`, and with `values` of its prefixes where they are asked for.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from genac_megatron.critic.icc import IccState
from genac_megatron.critic.states import spread
from genac_megatron.critic.verdicts import Row
from genac_megatron.errors import InputError, on_all_ranks
from genac_megatron.evaluation.ask import Asked, ask_critic_about, ask_endpoint_about
from genac_megatron.evaluation.parts import Parts
from genac_megatron.evaluation.session import identity, stop_if_asked, with_role
from genac_megatron.observe.manifest import find_checkpoint, read_manifest
from genac_megatron.observe.runinfo import write_text_atomic
from genac_megatron.recipe.schema import Recipe, TeacherConfig
from genac_megatron.recipe.tasks import StateTrackingTask
from genac_megatron.records import Prompt
from genac_megatron.tasks.tokenizer import role_tokenizer
from genac_megatron.training.agreement import from_first

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from genac_megatron.stages.runtime import Run
    from genac_megatron.stages.stopping import StopFlag
    from genac_megatron.training.layout import World

PIECE = 256  # requests of a rank at a time


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
        raise InputError(f"cannot read the transcripts: {error}", where=str(path)) from error
    found = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            found.append(_transcript(line, f"{path}:{number}"))
    if not found:
        raise InputError("no transcript is in it", where=str(path))
    return found


def _transcript(line: str, where: str) -> Row:
    way_out = 'for example {"problem": "2+2?", "response": "4"}'
    try:
        row = json.loads(line)
    except ValueError as error:
        raise InputError(f"not JSON: {error}", where=where, way_out=way_out) from error
    if not isinstance(row, dict):
        raise InputError("not an object", where=where, way_out=way_out)
    problem, response = row.get("problem", row.get("question")), row.get("response")
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
        ("step", 0, math.inf),
        ("tokens", 0, math.inf),
        ("limit", 1, math.inf),
    ):
        value = row.get(name)
        if value is not None and (
            isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high
        ):
            raise InputError(f"{name} is {value!r}", where=where, way_out="correct it, or leave it out")
    return {**row, "problem": problem, "response": response}


def text_row(number: int, prompt: Prompt, text: str, used: int, limit: int, told: IccState) -> Row:
    """A text as a row that a critic can be asked about (critic/trace_rows.py)."""
    return {
        "state": number,
        "actor": told.actor,
        "p_bar": told.p_bar,
        "step": told.step,
        "prompt_id": prompt.id,
        "problem": prompt.problem,
        "success": prompt.success,
        "privileged": dict(prompt.privileged),
        "partial": text,
        "used": used,
        "limit": max(limit, used),
    }


def prefixes(text: str, most: int) -> list[str]:
    """Of a text "", prefixes that end with lines, evenly spread, and the whole: at most `most`, or two."""
    lines = text.splitlines(keepends=True)
    cuts = ["".join(lines[:n]) for n in range(1, len(lines))]
    return ["", *(cuts[place] for place in spread(len(cuts), max(most - 2, 0))), text]


def state_rows(
    rows: Sequence[Row],
    options: ScoreOptions,
    told: IccState,
    tokenizer: PreTrainedTokenizerBase,
    max_states: int,
) -> tuple[list[Row], list[int]]:
    """(rows to ask about, which transcript each is of), a transcript's prefixes in order."""
    found: list[Row] = []
    owners: list[int] = []
    for place, row in enumerate(rows):
        said = IccState(
            float(row.get("p_bar", told.p_bar)),
            int(row.get("step", told.step)),
            actor=row.get("actor", told.actor),
        )
        prompt = Prompt(f"score/{place}", (), row["problem"], None, success=str(row.get("success") or ""))
        texts = prefixes(row["response"], max_states) if options.lines else [row["response"]]
        for text in texts:
            whole = text == row["response"] and row.get("tokens") is not None
            used = row["tokens"] if whole else len(tokenizer(text, add_special_tokens=False)["input_ids"])
            found.append(
                text_row(len(found), prompt, text, int(used), int(row.get("limit", options.limit)), said)
            )
            owners.append(place)
    return found, owners


def scored(
    rows: Sequence[Row], asked: Sequence[Row], owners: Sequence[int], values: dict[int, float]
) -> list[Row]:
    """The transcripts with their values; None where no judgement parses."""
    by_row: dict[int, list[Row]] = defaultdict(list)
    for row, owner in zip(asked, owners, strict=True):
        by_row[owner].append({"characters": len(row["partial"]), "value": values.get(row["state"])})
    out = []
    for place, row in enumerate(rows):
        found = by_row[place]
        more = {"values": found} if len(found) > 1 else {}
        out.append({**row, "value": found[-1]["value"], **more})
    return out


def judged_texts(
    run: Run, parts: Parts, plan: Row, rows: Sequence[Row], judgements: int, name: str
) -> dict[int, float]:
    """By state the mean of what the run's critic says of each row; without those of which nothing parses.
    What is there already is not asked again. Collective.
    """
    known = set(from_first(lambda: sorted(parts.begin(plan))))
    left: list[Asked] = [
        (row, n) for row in rows for n in range(judgements) if (row["state"], n) not in known
    ]
    total = len(rows) * judgements
    run.progress.stage(name, total, total - len(left))
    mine, seed = run.share(left), (run.recipe.seed, "score")
    for at in range(0, math.ceil(len(left) / run.world.size), PIECE):
        piece = mine[at : at + PIECE]
        kept: list[Row] = []
        with run.phase("judge"):
            run.generating(partial(ask_critic_about, run, piece, seed, kept.append))
        run.together(partial(parts.append, kept, run.world.rank))
        done = min(total - len(left) + (at + PIECE) * run.world.size, total)
        run.progress.step(done, {})
        stop_if_asked(run, f"{done} of {total} judgements")
    return mean_values(from_first(lambda: list(parts.begin(plan).values())))


def mean_values(answers: Sequence[Row]) -> dict[int, float]:
    """By state the mean of the judgements that parse."""
    said: dict[int, list[float]] = defaultdict(list)
    for answer in answers:
        if answer["value"] is not None:
            said[answer["state"]].append(answer["value"])
    return {state: math.fsum(values) / len(values) for state, values in said.items()}


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


def score(recipe: Recipe, world: World, stop: StopFlag, options: ScoreOptions, folder: Path) -> None:
    """Value every transcript by the recipe's critic and its engine. Collective. Raises InputError."""
    from genac_megatron.stages.session import session

    needs_critic(recipe)
    told = from_first(lambda: told_by(recipe, options))
    reader = recipe.roles.get("actor") or recipe.roles["critic"]
    alone = with_role(recipe, "critic", options.checkpoint)
    # No prompt of a task is asked: the smallest one stands in.
    alone = alone.model_copy(update={"task": StateTrackingTask(kind="state_tracking", heldout_size=1)})
    with session(alone, world, stop, "score", folder) as run:
        run.publish("critic")
        rows = run.together(lambda: read_transcripts(options.source))
        tokenizer = run.together(lambda: role_tokenizer("actor", reader.model))
        asked, owners = state_rows(rows, options, told, tokenizer, recipe.judging.states.max_states)
        plan = {
            "kind": "score",
            "rows": asked,
            "critic": identity(run, "critic"),
            "times": options.judgements,
        }
        plan["judging"] = recipe.judging.model_dump(mode="json")
        values = judged_texts(run, _parts(options), plan, asked, options.judgements, "score")
        run.together(lambda: _write(options, rows, asked, owners, values) if world.rank == 0 else None)
        if not values:
            raise on_all_ranks(InputError("no judgement parses: it is no critic", where="roles.critic"))


def score_by_server(recipe: Recipe, options: ScoreOptions, teacher: TeacherConfig) -> None:
    """The same by a critic behind an endpoint, from this process. Raises InputError, PeerLost."""
    told = told_by(recipe, options)
    rows, reader = read_transcripts(options.source), recipe.roles.get("actor") or recipe.roles["critic"]
    tokenizer = role_tokenizer("actor", reader.model)
    asked, owners = state_rows(rows, options, told, tokenizer, recipe.judging.states.max_states)
    judging = recipe.judging.model_copy(update={})
    parts = _parts(options)
    plan: Row = {"kind": "score", "rows": asked, "model": teacher.model, "times": options.judgements}
    plan["judging"] = judging.model_dump(mode="json")
    known = parts.begin(plan)
    left = [(row, n) for row in asked for n in range(options.judgements) if (row["state"], n) not in known]
    ask_endpoint_about(
        left, teacher, judging, teacher.concurrency, lambda row: parts.append([row], 0), as_it_is=True
    )
    _write(options, rows, asked, owners, mean_values(list(parts.begin(plan).values())))


def _parts(options: ScoreOptions) -> Parts:
    return Parts(options.out.with_name(f"{options.out.name}.parts"), "values.jsonl", ("state", "judgement"))


def _write(
    options: ScoreOptions,
    rows: Sequence[Row],
    asked: Sequence[Row],
    owners: Sequence[int],
    values: dict[int, float],
) -> None:
    out = scored(rows, asked, owners, values)
    text = "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in out)
    write_text_atomic(options.out, text)
    known = [row["value"] for row in out if row["value"] is not None]
    mean = f", mean value {math.fsum(known) / len(known):.3f}" if known else ""
    print(f"{options.out}: {len(known)} of {len(out)} transcripts have a value{mean}", flush=True)
