"""The state bank: states of one actor's responses with Monte-Carlo values, frozen, to judge critics by.

    BANK/
        bank.jsonl       one object per prompt, in order
        manifest.json    what made it; its `plan` is the bank's identity, `sha256` that of bank.jsonl
        plan.json        the same plan, while the bank is being built (evaluation/parts.py)
        scores/NAME/     what critics made of it (evaluation/scoring.py)

A line of bank.jsonl:

    prompt      id, problem, messages, ids, reference, success: as the task gave it
    outcomes    of the actor's responses to it, in order of their numbers; the first `samples` of them
                make the success rate
    skipped     null; "right" or "wrong" where `limit` responses were all of that kind (no states then)
    responses   one right (outcome >= 0.5), one wrong: sample, ids, logprobs, finish, text, outcome; of a
                conversation sampled and episode too (critic/kept_episodes.py)
    seed        of conversations: what their environment began with
    states      response (its place in `responses`; null: the prompt state, which both share), index, cut,
                end, and draws: the outcomes of K fresh continuations by the actor

manifest.json: format, sha256, plan (seed, task, digest of the prompts' texts, sampling, states, prompts,
continuations, digests of the actor), success_rate, p_bar and step (what ICC tells of the actor; p_bar is the
success rate, or that of another bank), prompts, states, skipped, and `made_from`, for people.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from genac_megatron.critic.kept_episodes import episode_row, with_episode
from genac_megatron.errors import InputError
from genac_megatron.evaluation.parts import Parts, Row
from genac_megatron.observe.runinfo import jsonable
from genac_megatron.records import Completion, Episode, Prompt, Rollout, State

FORMAT = 1
ROWS = "bank.jsonl"
RIGHT = 0.5  # outcomes from here on are right


@dataclass(frozen=True)
class BankState:
    """A state and the outcomes of the actor's fresh continuations from it."""

    state: State
    response: int | None  # of the prompt's responses; None: the prompt state
    draws: tuple[float, ...]

    @property
    def prompt(self) -> Prompt:
        return self.state.rollout.prompt

    @property
    def value(self) -> float:
        """The Monte-Carlo value."""
        return sum(self.draws) / len(self.draws)


@dataclass(frozen=True)
class Valued:
    """A critic's answer to one state. value: in [0, 1]; None where none parsed."""

    value: float | None
    tokens: int = 0  # that the critic wrote
    text: str = ""


@dataclass(frozen=True)
class BankPrompt:
    """A prompt of the bank. `states`: the prompt state first, then each response's in order of cut."""

    prompt: Prompt
    outcomes: tuple[float, ...]
    skipped: str | None = None
    responses: tuple[Rollout, ...] = ()
    states: tuple[BankState, ...] = ()
    seed: int | None = None  # of conversations: what their environment began with


@dataclass(frozen=True)
class Bank:
    """A finished bank."""

    folder: Path
    manifest: Row
    prompts: list[BankPrompt] = field(repr=False)

    @property
    def states(self) -> list[BankState]:
        """All states, in order."""
        return [state for prompt in self.prompts for state in prompt.states]

    @property
    def limit(self) -> int:
        """Response tokens that the actor was allowed."""
        return int(self.manifest["plan"]["rollout"]["max_new_tokens"])


def bank_parts(folder: Path) -> Parts:
    """The bank's folder as work in pieces, a prompt each."""
    return Parts(folder, ROWS, ("number",))


def read_bank(folder: Path) -> Bank:
    """Read and check a bank. Raises InputError where it is none, unfinished, damaged or of another format."""
    manifest, rows = bank_parts(folder).read()
    if manifest.get("format") != FORMAT or manifest.get("kind") != "bank":
        raise InputError(
            f"no state bank of format {FORMAT} (it says {manifest.get('kind')}, {manifest.get('format')})",
            where=str(folder),
            way_out="give a folder that `genac evaluate bank build` has made",
        )
    return Bank(folder, manifest, [from_row(row) for row in rows])


def texts_digest(prompts: Sequence[Prompt]) -> str:
    """The digest of what prompts say and are verified by; their ids are the tokenizer's matter."""
    digest = hashlib.sha256()
    for prompt in prompts:
        texts = jsonable([prompt.problem, prompt.messages, prompt.reference, prompt.success])
        digest.update(json.dumps(texts, sort_keys=True).encode() + b"\n")
    return digest.hexdigest()


def rendered_digest(prompts: Sequence[Sequence[int]]) -> str:
    """The digest of prompts as token ids."""
    return hashlib.sha256(json.dumps([list(ids) for ids in prompts]).encode()).hexdigest()


def to_row(number: int, found: BankPrompt) -> Row:
    """A prompt as its line of bank.jsonl."""
    prompt = found.prompt
    return {
        "number": number,
        "prompt": {
            "id": prompt.id,
            "problem": prompt.problem,
            "messages": list(prompt.messages),
            "ids": list(prompt.ids),
            "reference": prompt.reference,
            "success": prompt.success,
            **({"source": prompt.source} if prompt.source else {}),
            **({"privileged": dict(prompt.privileged)} if prompt.privileged else {}),
            **({"opening": prompt.opening} if prompt.opening else {}),
        },
        **({} if found.seed is None else {"seed": found.seed}),
        "outcomes": list(found.outcomes),
        "skipped": found.skipped,
        "responses": [
            {
                "sample": rollout.sample,
                "ids": list(rollout.completion.ids),
                "logprobs": list(rollout.completion.logprobs),
                "finish": rollout.completion.finish,
                "text": rollout.text,
                "outcome": rollout.outcome,
                **episode_row(rollout),
            }
            for rollout in found.responses
        ],
        "states": [
            {
                "response": state.response,
                "index": state.state.index,
                "cut": state.state.cut,
                "end": state.state.end,
                "draws": list(state.draws),
            }
            for state in found.states
        ],
    }


def from_row(row: Row, begun: Prompt | None = None) -> BankPrompt:
    """The inverse of `to_row`. begun: of states that go on, the prompt as its environment began it."""
    given = row["prompt"]
    prompt = Prompt(
        given["id"],
        tuple(given["messages"]),
        given["problem"],
        given["reference"],
        tuple(given["ids"]),
        given["success"],
        source=given.get("source", ""),
        privileged=given.get("privileged", {}),
        opening=given.get("opening", ""),
        tools=() if begun is None else begun.tools,
        asked=None if begun is None else begun.asked,
    )
    responses = tuple(_response(prompt, one) for one in row["responses"])
    whole = no_response(prompt, row.get("seed"))
    states = tuple(
        BankState(
            State(
                whole if one["response"] is None else responses[one["response"]],
                one["index"],
                one["cut"],
                one["end"],
            ),
            one["response"],
            tuple(one["draws"]),
        )
        for one in row["states"]
    )
    return BankPrompt(prompt, tuple(row["outcomes"]), row["skipped"], responses, states, row.get("seed"))


def no_response(prompt: Prompt, seed: int | None = None) -> Rollout:
    """What the prompt state is a prefix of. seed: of the conversations' environment."""
    episode = None if seed is None else Episode((), "tokens", seed=seed)
    return Rollout(prompt, 0, Completion((), (), "stop"), "", episode=episode)


def _response(prompt: Prompt, given: dict[str, Any]) -> Rollout:
    completion = Completion(tuple(given["ids"]), tuple(given["logprobs"]), given["finish"])
    rollout = Rollout(prompt, given["sample"], completion, given["text"], given["outcome"])
    return with_episode(rollout, given)


def by_response(found: BankPrompt) -> list[list[int]]:
    """Per response the places in `states` of its states in order, the shared prompt state first."""
    shared = [place for place, state in enumerate(found.states) if state.response is None]
    return [
        shared + [place for place, state in enumerate(found.states) if state.response == which]
        for which in range(len(found.responses))
    ]


def choose_pair(rollouts: Sequence[Rollout]) -> tuple[Rollout, Rollout] | None:
    """The first right and the first wrong response; None where either is missing."""
    right = next((rollout for rollout in rollouts if rollout.outcome >= RIGHT), None)
    wrong = next((rollout for rollout in rollouts if rollout.outcome < RIGHT), None)
    return (right, wrong) if right is not None and wrong is not None else None
