"""Conversations as rows of JSON, and their way back: what states of them need to be shown, and to go on."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from genac_megatron.records import ACTOR, Completion, Episode, Rollout, State, Turn

Row = dict[str, Any]


def episode_row(rollout: Rollout) -> Row:
    """Of a conversation; {} of a single response."""
    episode = rollout.episode
    if episode is None:
        return {}
    return {
        "sampled": [list(both) for both in rollout.completion.sampled],
        "episode": {
            "turns": [[turn.who, turn.text, turn.begin, turn.end] for turn in episode.turns],
            "ended": episode.ended,
            "outcome": episode.outcome,
            "seed": episode.seed,
            "answers": [list(answer) for answer in episode.answers],
        },
    }


def with_episode(rollout: Rollout, row: Row) -> Rollout:
    """The rollout as the conversation that its row tells of, where it does."""
    kept = row.get("episode")
    if kept is None:
        return rollout
    turns = tuple(Turn(who, text, begin, end) for who, text, begin, end in kept["turns"])
    answers = tuple((seen, outcome) for seen, outcome in kept["answers"])
    rollout.episode = Episode(turns, kept["ended"], kept["outcome"], seed=kept["seed"], answers=answers)
    sampled = tuple((begin, end) for begin, end in row["sampled"])
    rollout.completion = replace(rollout.completion, sampled=sampled)
    return rollout


def so_far(state: State) -> Rollout:
    """A state's response as far as the state: nothing of what was to follow is in it."""
    rollout, cut = state.rollout, state.cut
    own = rollout.completion
    ids, episode = own.ids[:cut], rollout.episode
    if episode is None:
        return Rollout(rollout.prompt, rollout.sample, Completion(ids, (), "length"), "")
    turns, taken = list[Turn](), 0
    for turn in episode.turns:
        if turn.begin < cut < turn.end:  # of which it is the beginning: its text and its end are to come
            turns.append(replace(turn, text="", end=cut + 1))
        elif turn.begin < cut:
            turns.append(turn)
            taken += turn.who == ACTOR
    kept = Episode(tuple(turns), "tokens", seed=episode.seed, answers=episode.answers[:taken])
    sampled = tuple((begin, min(end, cut)) for begin, end in own.sampled if begin < cut)
    completion = Completion(ids, (), "length", sampled=sampled)
    return Rollout(rollout.prompt, rollout.sample, completion, "", episode=kept)
