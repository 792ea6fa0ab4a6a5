"""A critic's values of any transcripts: by the recipe's critic and its engine, or by a server that has it."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from genac_megatron.critic.icc import IccState
from genac_megatron.critic.prompt import load_template
from genac_megatron.critic.states import spread
from genac_megatron.critic.verdicts import Row
from genac_megatron.errors import InputError, on_all_ranks
from genac_megatron.evaluation.ask import Asked, ask_critic_about, ask_endpoint_about
from genac_megatron.evaluation.parts import Parts
from genac_megatron.evaluation.session import identity, stop_if_asked, template_digest, with_role
from genac_megatron.evaluation.transcripts import ScoreOptions, needs_critic, read_transcripts, told_by
from genac_megatron.observe.runinfo import write_text_atomic
from genac_megatron.recipe.schema import Recipe, TeacherConfig
from genac_megatron.recipe.tasks import StateTrackingTask
from genac_megatron.records import Prompt
from genac_megatron.serving.chat import read_key
from genac_megatron.serving.there import need_there
from genac_megatron.tasks.tokenizer import role_tokenizer
from genac_megatron.training.agreement import from_first

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from genac_megatron.stages.runtime import Run
    from genac_megatron.stages.stopping import StopFlag
    from genac_megatron.training.layout import World

PIECE = 256  # requests of a rank at a time


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
) -> list[Row]:
    """What the run's critic says of each row. What is there already is not asked again. Collective."""
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
    return from_first(lambda: list(parts.begin(plan).values()))


def mean_values(answers: Sequence[Row]) -> dict[int, float]:
    """By state the mean of the judgements that parse; without those of which none does."""
    said: dict[int, list[float]] = defaultdict(list)
    for answer in answers:
        if answer["value"] is not None:
            said[answer["state"]].append(answer["value"])
    return {state: math.fsum(values) / len(values) for state, values in said.items()}


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
        asker = {"critic": identity(run, "critic"), "seed": recipe.seed}
        plan = run.together(lambda: _plan(recipe, options, asked, asker))
        answers = judged_texts(run, _parts(options), plan, asked, options.judgements, "score")
        line = run.together(
            lambda: _write(options, rows, asked, owners, answers) if world.rank == 0 else None
        )
        if line:
            print(line, flush=True)
        need_values(answers, "roles.critic")


def score_by_server(recipe: Recipe, options: ScoreOptions, teacher: TeacherConfig) -> str:
    """The same by a critic behind an endpoint, from this process; a line that says what came of it.

    Raises InputError, PeerLost.
    """
    load_template.cache_clear()  # a session of Python may have read it before it was edited
    told = told_by(recipe, options)
    rows, reader = read_transcripts(options.source), recipe.roles.get("actor") or recipe.roles["critic"]
    tokenizer = role_tokenizer("actor", reader.model)
    asked, owners = state_rows(rows, options, told, tokenizer, recipe.judging.states.max_states)
    parts = _parts(options)
    plan = _plan(recipe, options, asked, {"model": teacher.model})
    known = {key for key, row in parts.begin(plan).items() if not row.get("refused")}
    left = [(row, n) for row in asked for n in range(options.judgements) if (row["state"], n) not in known]
    if left:
        if teacher.api_key_env is not None:
            read_key(teacher.api_key_env, "--api-key-env")
        need_there(teacher.url or "", "critic", "--url")
    ask_endpoint_about(
        left, teacher, recipe.judging, teacher.concurrency, lambda row: parts.append([row], 0), as_it_is=True
    )
    answers = list(parts.begin(plan).values())
    line = _write(options, rows, asked, owners, answers)
    need_values(answers, f"the model {teacher.model} of {teacher.url}")
    return line


def need_values(answers: Sequence[Row], where: str) -> None:
    """Raise InputError where no judgement has a value."""
    if any(answer["value"] is not None for answer in answers):
        return
    what = "no judgement parses: it is no critic"
    way_out = "name a model that was trained as a critic (--checkpoint RUN), or raise judging.max_new_tokens"
    if refused := refused_of(answers):
        what = f"no judgement has a value: {refused}"
        way_out = (
            "give it room: a longer context, a lower judging.max_new_tokens, shorter transcripts; what a "
            "server refused is asked again by the same command"
        )
    raise on_all_ranks(InputError(what, where=where, way_out=way_out))


def refused_of(answers: Sequence[Row]) -> str:
    """How many judgements were refused, and why the last; nothing where none was."""
    found = [answer["refused"] for answer in answers if answer.get("refused")]
    return f"{len(found)} of {len(answers)} refused, the last: {found[-1]}" if found else ""


def _plan(recipe: Recipe, options: ScoreOptions, asked: Sequence[Row], asker: Row) -> Row:
    """What the judgements depend on. Raises InputError where the template cannot be read."""
    return {
        "kind": "score",
        "rows": asked,
        **asker,
        "times": options.judgements,
        "judging": recipe.judging.model_dump(mode="json"),
        "template": template_digest(recipe.judging),
    }


def _parts(options: ScoreOptions) -> Parts:
    folder = options.out.with_name(f"{options.out.name}.parts")
    return Parts(folder, "values.jsonl", ("state", "judgement"), "name another file by --out")


def _write(
    options: ScoreOptions,
    rows: Sequence[Row],
    asked: Sequence[Row],
    owners: Sequence[int],
    answers: Sequence[Row],
) -> str:
    """Write the rows with their values; how many have one, in words."""
    out = scored(rows, asked, owners, mean_values(answers))
    text = "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in out)
    write_text_atomic(options.out, text)
    known = [row["value"] for row in out if row["value"] is not None]
    mean = f", mean value {math.fsum(known) / len(known):.3f}" if known else ""
    refused = refused_of(answers)
    lost = f"; of the judgements {refused}" if refused else ""
    return f"{options.out}: {len(known)} of {len(out)} transcripts have a value{mean}{lost}"
