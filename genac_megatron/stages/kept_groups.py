"""Groups in a checkpoint: what was generated ahead and is not trained on yet, as plain JSON.

    queue/rank-00000.json    {"spent": {figure: count}, "steps": {"7": [[place, group], ...]}}

A place is a group's among those of all ranks, so that another number of ranks can take them over. Prompts are
the task's, with what their environment made of them.
"""

from __future__ import annotations

import base64
import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from genac_megatron.records import Completion, Episode, Judgement, Prompt, Rollout, State, Turn
from genac_megatron.stages.rollouts import Group
from genac_megatron.training.layout import World

FOLDER = "queue"
OF_PROMPT = ("messages", "ids", "success", "tools", "opening")
Row = dict[str, Any]


def keep_groups(
    folder: Path, world: World, steps: Mapping[int, Sequence[Group]], spent: Mapping[str, float]
) -> None:
    """Write this rank's groups by step, and what is counted and not logged yet; nothing of nothing."""
    if not steps and not spent:
        return
    (folder / FOLDER).mkdir(exist_ok=True)
    rows = {
        str(step): [[world.rank + n * world.size, group_row(group)] for n, group in enumerate(groups)]
        for step, groups in steps.items()
    }
    text = json.dumps({"spent": dict(spent), "steps": rows})
    (folder / FOLDER / f"rank-{world.rank:05d}.json").write_text(text, encoding="utf-8")


def kept_groups(checkpoint: Path, world: World) -> tuple[dict[int, dict[int, Row]], dict[str, float]]:
    """(by step the groups of all ranks that made it, by place; this rank's part of the counts)."""
    steps: dict[int, dict[int, Row]] = {}
    spent: dict[str, float] = {}
    for number, path in enumerate(sorted((checkpoint / FOLDER).glob("rank-*.json"))):
        kept = json.loads(path.read_text(encoding="utf-8"))
        for step, rows in kept["steps"].items():
            steps.setdefault(int(step), {}).update((place, row) for place, row in rows)
        if number % world.size == world.rank:
            for key, value in kept["spent"].items():
                spent[key] = spent.get(key, 0.0) + value
    return steps, spent


def group_row(group: Group) -> Row:
    """A group that is verified and judged. What several of its responses share is written once."""
    judged = [*(j for judgements in group.judgements for j in judgements), *group.finals]
    unique = list({id(j): j for j in judged}.values())
    number = {id(j): n for n, j in enumerate(unique)}
    own = {id(rollout): n for n, rollout in enumerate(group.rollouts)}
    return {
        "prompt": {key: getattr(group.prompt, key) for key in OF_PROMPT},
        "rollouts": [_rollout_row(rollout) for rollout in group.rollouts],
        "unique": [_judgement_row(judgement, own) for judgement in unique],
        "judgements": [[number[id(j)] for j in judgements] for judgements in group.judgements],
        "finals": [number[id(j)] for j in group.finals],
    }


def group_of(row: Row, prompt: Prompt) -> Group:
    """The group again; prompt: the task's."""
    kept = row["prompt"]
    prompt = dataclasses.replace(prompt, **{key: _tuple(kept[key]) for key in OF_PROMPT})
    rollouts = [_rollout_of(one, prompt) for one in row["rollouts"]]
    unique = [_judgement_of(one, rollouts, prompt) for one in row["unique"]]
    judgements = [[unique[n] for n in own] for own in row["judgements"]]
    return Group(prompt, rollouts, judgements, [unique[n] for n in row["finals"]])


def _tuple(given: Any) -> Any:
    return tuple(given) if isinstance(given, list) else given


def _plain(one: Any, *, without: Sequence[str] = ()) -> Row:
    """A record's own fields, none of them followed."""
    return {f.name: getattr(one, f.name) for f in dataclasses.fields(one) if f.name not in without}


def _completion_row(completion: Completion) -> Row:
    experts = completion.experts
    kept = None
    if experts is not None:
        raw = base64.b64encode(np.ascontiguousarray(experts).tobytes()).decode()
        kept = {"dtype": str(experts.dtype), "shape": experts.shape, "bytes": raw}
    numbers = {"ids": list(completion.ids), "logprobs": list(completion.logprobs)}
    return {**_plain(completion), **numbers, "experts": kept}


def _completion_of(row: Row) -> Completion:
    kept, experts = row["experts"], None
    if kept is not None:
        raw = np.frombuffer(base64.b64decode(kept["bytes"]), np.dtype(kept["dtype"]))
        experts = raw.reshape(kept["shape"]).copy()
    pairs = {key: tuple(tuple(pair) for pair in row[key]) for key in ("spans", "sampled")}
    ids, logprobs = tuple(row["ids"]), tuple(row["logprobs"])
    return Completion(**{**row, "ids": ids, "logprobs": logprobs, "experts": experts, **pairs})


def _rollout_row(rollout: Rollout) -> Row:
    plain = _plain(rollout, without=("prompt", "advantages", "values"))
    episode = rollout.episode
    if episode is not None:
        plain["episode"] = {
            **_plain(episode),
            "turns": [_plain(turn) for turn in episode.turns],
            "parts": dict(episode.parts),
        }
    return {**plain, "completion": _completion_row(rollout.completion), "parts": dict(rollout.parts)}


def _rollout_of(row: Row, prompt: Prompt) -> Rollout:
    episode = row["episode"]
    if episode is not None:
        turns = tuple(Turn(**turn) for turn in episode["turns"])
        answers = tuple(tuple(answer) for answer in episode["answers"])
        episode = Episode(**{**episode, "turns": turns, "answers": answers})
    behind = tuple(tuple(ids) for ids in row["behind"])
    completion = _completion_of(row["completion"])
    return Rollout(prompt, **{**row, "completion": completion, "episode": episode, "behind": behind})


def _judgement_row(judgement: Judgement, own: Mapping[int, int]) -> Row:
    state = judgement.state
    of = own.get(id(state.rollout))  # None: the prompt state's, of no response
    return {
        **_plain(judgement, without=("state",)),
        "prompt_ids": list(judgement.prompt_ids),
        "completion": _completion_row(judgement.completion),
        "state": [of, state.rollout.sample, state.index, state.cut, state.end],
    }


def _judgement_of(row: Row, rollouts: Sequence[Rollout], prompt: Prompt) -> Judgement:
    of, sample, index, cut, end = row["state"]
    rollout = Rollout(prompt, sample, Completion((), (), "stop"), "") if of is None else rollouts[of]
    ids, completion = tuple(row["prompt_ids"]), _completion_of(row["completion"])
    state = State(rollout, index, cut, end)
    return Judgement(**{**row, "state": state, "prompt_ids": ids, "completion": completion})
