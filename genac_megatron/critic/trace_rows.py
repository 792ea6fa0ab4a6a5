"""What `genac traces` keeps: rows of states, answers and traces, and their way back. No torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from genac_megatron.critic.icc import IccState
from genac_megatron.critic.kept_episodes import episode_row, so_far, with_episode
from genac_megatron.critic.prompt import build_prompt_ids, prompt_text
from genac_megatron.critic.states import state_text
from genac_megatron.critic.traces import learnt_text, to_sample
from genac_megatron.critic.verdicts import Row, monte_carlo
from genac_megatron.errors import InputError
from genac_megatron.escaping import Transcript
from genac_megatron.records import Completion, Prompt, Rollout, Sample, State

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from genac_megatron.recipe.schema import JudgingConfig, TeacherConfig

WAY_OUT = "give the file that `genac traces` has written (OUT/traces.jsonl)"
NEEDED: dict[str, type | tuple[type, ...]] = {
    "actor": str, "p_bar": (int, float), "step": int, "prompt_id": str, "problem": str, "partial": str,
    "used": int, "limit": int, "text": str, "value": (int, float), "monte_carlo": (int, float),
}  # fmt: skip


def state_row(
    state: State, tokenizer: PreTrainedTokenizerBase, most: int | None, actor: str, told: IccState, limit: int
) -> Row:
    """A state as it is kept, with what the critic is told of its actor. most: tokens of a conversation that
    it is shown.
    """
    rollout, count = state.rollout, len(state.rollout.completion.ids)
    prompt, partial = rollout.prompt, state_text(state, tokenizer, most)
    talk: Row = {}
    if prompt.opening:
        begun = {"messages": list(prompt.messages), "tools": list(prompt.tools)}
        whole = {"opening": prompt.opening, "whole": state_text(state, tokenizer)}
        talk = {**begun, **whole, "prompt_ids": list(prompt.ids), **episode_row(so_far(state))}
    return {
        "actor": actor,
        "p_bar": told.p_bar,
        "step": told.step,
        "prompt_id": prompt.id,
        "sample": rollout.sample,
        "index": state.index,
        "ids": list(rollout.completion.ids[: state.cut]),
        "used": state.cut,
        "limit": limit,
        "place": state.cut / count if count else 0.0,
        "length": len(prompt.ids) + state.cut,
        "problem": prompt.problem,
        "success": prompt.success,
        "privileged": dict(prompt.privileged),
        "partial": partial,
        **talk,
    }


def as_state(row: Row, prompt: Prompt) -> State:
    """The state again, its response as far as it goes; what was to follow is not kept."""
    ids = tuple(row["ids"])
    if row.get("opening"):  # as its environment began it
        prompt = replace(
            prompt,
            messages=tuple(row["messages"]),
            tools=tuple(row["tools"]),
            ids=tuple(row["prompt_ids"]),
            opening=row["opening"],
            success=row["success"],
            asked=prompt,
        )
    rollout = Rollout(prompt, row["sample"], Completion(ids, (), "length"), row["partial"])
    return State(with_episode(rollout, row), row["index"], len(ids), len(ids))


def shown_partial(row: Row) -> str:
    """What a critic is shown of a row's response."""
    return Transcript(row["partial"]) if row.get("opening") else str(row["partial"])


def whole_partial(row: Row) -> str:
    """All of it, for who works out a value."""
    return str(row.get("whole", row["partial"]))


def shown_prompt(row: Row) -> Prompt:
    """As much of a row's problem as a critic is shown."""
    return Prompt(
        row["prompt_id"],
        (),
        row["problem"],
        None,
        success=row.get("success", ""),
        privileged=row.get("privileged") or {},
        opening=row.get("opening", ""),
    )


def told(row: Row) -> IccState:
    """What the critic is told of the row's actor."""
    return IccState(float(row["p_bar"]), int(row["step"]), actor=row["actor"])


def critic_prompt(row: Row, tokenizer: PreTrainedTokenizerBase, judging: JudgingConfig) -> tuple[int, ...]:
    """Ids of the critic's prompt for a row's state."""
    prompt = shown_prompt(row)
    partial = shown_partial(row)
    return build_prompt_ids(tokenizer, judging, told(row), prompt, partial, row["used"], row["limit"])


def messages(row: Row, judging: JudgingConfig, as_it_is: bool = False) -> list[dict[str, str]]:
    """The chat that an endpoint is shown; `brief`, for models that are trained on it, as `standard`."""
    if judging.template == "brief" and not as_it_is:
        judging = judging.model_copy(update={"template": "standard"})
    prompt, partial = shown_prompt(row), shown_partial(row)
    parts = prompt_text(judging, told(row), prompt, partial, row["used"], row["limit"])
    return [{"role": "user", "content": "".join(parts)}]


def trace_row(state: Row, answer: Row) -> Row:
    """A state and the answer about it that is learnt."""
    talk = ("messages", "tools", "whole", "prompt_ids", "sampled", "episode")
    unread = ("ids", "outcomes", "round", "drawn", *talk)
    kept = {key: value for key, value in state.items() if key not in unread}
    value = monte_carlo(state)
    more = {key: answer[key] for key in ("text", "reasoning", "value", "judgement")}
    return kept | more | {"monte_carlo": value, "continuations": len(state["outcomes"])}


def read_traces(path: str) -> list[Row]:
    """The rows of a file that `genac traces` has written. Raises InputError that names file and line."""
    try:
        lines = Path(path).expanduser().read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"cannot read the traces: {error}", where=path, way_out="give what `genac traces` has written"
        ) from error
    rows = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            rows.append(_checked(line, f"{path}:{number}"))
    if not rows:
        raise InputError("no trace is in it", where=path, way_out="give what `genac traces` has written")
    return rows


def _checked(line: str, where: str) -> Row:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise InputError(f"not JSON: {error}", where=where, way_out=WAY_OUT) from error
    if not isinstance(row, dict):
        raise InputError("not an object", where=where, way_out=WAY_OUT)
    for name, kind in NEEDED.items():
        if not isinstance(row.get(name), kind) or isinstance(row.get(name), bool):
            raise InputError(
                f"a trace has no {name}, or one of another kind: {row.get(name)!r}",
                where=where,
                way_out=WAY_OUT,
            )
    if not 0 <= row["p_bar"] <= 1:
        raise InputError(f"p_bar {row['p_bar']} is not from 0 to 1", where=where, way_out=WAY_OUT)
    return row


def file_samples(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, judging: JudgingConfig, teacher: TeacherConfig
) -> list[Sample]:
    """Traces as training sequences for this critic; those that it may not write out are left out."""
    samples = []
    for row in rows:
        text = learnt_text(row["text"], str(row.get("reasoning") or ""), teacher.learn_reasoning)
        if text is None:
            continue
        sample = to_sample(tokenizer, critic_prompt(row, tokenizer, judging), text, shown_prompt(row))
        if sample.trained <= judging.max_new_tokens:
            samples.append(sample)
    return samples


def plain(rows: Sequence[Row]) -> str:
    """Rows as lines."""
    return "".join(f"{json.dumps(row, ensure_ascii=False, allow_nan=False)}\n" for row in rows)
