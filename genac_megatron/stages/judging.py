"""The critic at work: one completion for one state, in an order that serves a prefix cache."""

from __future__ import annotations

import asyncio
import random
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from genac_megatron.critic.icc import IccState
from genac_megatron.critic.prompt import build_prompt_ids
from genac_megatron.critic.score import answer_candidates, parse_score, soft_score
from genac_megatron.critic.states import cut_states, state_text
from genac_megatron.errors import InputError
from genac_megatron.recipe.schema import JudgingConfig
from genac_megatron.records import Completion, Judgement, Prompt, Request, Rollout, SamplingParams, State
from genac_megatron.serving.engine import Engine
from genac_megatron.stages.budget import Budget
from genac_megatron.stages.seeds import seed_for
from genac_megatron.tasks.base import Teacher
from genac_megatron.tasks.reasoning import Tags, opened_reasoning, usual, written

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def need_room(prompt: Prompt, new: int, positions: int | None) -> None:
    """Raise InputError where an actor's prompt and as many new tokens do not fit into its model."""
    if positions is not None and len(prompt.ids) + new > positions:
        source = f" ({prompt.where})" if prompt.where else ""
        raise InputError(
            f"the actor's prompt has {len(prompt.ids)} tokens, and with {new} new ones it does not fit into "
            f"its model's {positions} positions",
            where=f"prompt {prompt.id}{source}",
            way_out="lower the stage's rollout.max_new_tokens, leave such prompts out of the task, or use a "
            "model with more positions (max_positions)",
        )


class StateJudge(ABC):
    """What gives states their values."""

    actor_tokenizer: PreTrainedTokenizerBase
    config: JudgingConfig
    icc: IccState
    budget: Budget | None
    final: bool  # whole responses are judged too

    @abstractmethod
    async def judge(self, state: State) -> Judgement:
        """The judgement of one state."""

    async def judge_prompt(self, prompt: Prompt, first: int = 0) -> Judgement:
        """The judgement of the prompt state, which a whole group shares; `first`: its first sample."""
        nothing = Rollout(prompt, first, Completion((), (), "stop"), "")
        return await self.judge(State(nothing, 0, 0, 0))

    async def judge_response(self, rollout: Rollout, shared: asyncio.Future[Judgement]) -> list[Judgement]:
        """Judgements of all states of a response, in order; the first is the group's.

        With `final` one more, of the state after its last token, when its outcome is not known yet.
        """
        states = cut_states(rollout, self.actor_tokenizer, self.config.states)
        if self.final:
            whole = len(rollout.completion.ids)
            states.append(State(rollout, len(states), whole, whole))
        if len(states) > 2:
            await self.read_ahead(states[-1])
        later = await asyncio.gather(*(self.judge(state) for state in states[1:]))
        return [await shared, *later]

    async def read_ahead(self, longest: State) -> None:  # noqa: B027  for what has a prefix cache
        """A response's states are about to be judged, up to this one."""

    def deal(self, places: Mapping[str, int]) -> None:  # noqa: B027  for what has servers
        """Where responses stand among those of all ranks, by their keys."""


@dataclass
class Judge(StateJudge):
    """Everything needed to have the critic judge states."""

    engine: Engine
    tokenizer: PreTrainedTokenizerBase  # the critic's
    actor_tokenizer: PreTrainedTokenizerBase
    config: JudgingConfig
    icc: IccState
    stop_ids: tuple[int, ...]
    limit: int  # the actor's token limit, part of the critic's prompt
    seed: tuple[object, ...]
    positions: int | None = None  # of the critic's model; None: not checked
    budget: Budget | None = None
    final: bool = False
    reasoning_tags: Tags | None = None  # the critic's

    async def judge(self, state: State) -> Judgement:
        """One critic completion for one state, parsed; none where the budget is spent, or where the prompt
        leaves no room for one: then the state takes the fallback value.
        """
        prompt_ids = self.prompt_ids(state)
        if not self.has_room(prompt_ids):
            nothing = Completion((), (), "abort")
            return Judgement(state, (), nothing, "", None, skipped=True, too_long=True)
        completion = await self._paid(state, prompt_ids)
        if completion is None:
            return Judgement(state, (), Completion((), (), "abort"), "", None, skipped=True)
        text = written(self.tokenizer, completion.ids, self.reasoning_tags)
        opened = opened_reasoning(self.tokenizer, prompt_ids, self.reasoning_tags)
        value = parse_score(usual(text, self.reasoning_tags), opened)
        judgement = Judgement(state, prompt_ids, completion, text, value)
        if self.config.score == "soft":
            judgement.soft = await self._soft(judgement)
        return judgement

    async def _paid(self, state: State, prompt_ids: tuple[int, ...]) -> Completion | None:
        """What the critic says to a prompt, within the budget; None where that has nothing left for it."""
        if self.budget is None:
            return await self._ask(state, prompt_ids)
        purse, written = self.budget.purse(state), 0
        if not await purse.take():
            return None
        try:
            completion = await self._ask(state, prompt_ids)
            written = len(completion.ids)
        finally:  # after a failure too: others wait for room
            purse.give_back(written)
            self.budget.spent += written
        return completion

    async def _ask(self, state: State, prompt_ids: tuple[int, ...]) -> Completion:
        """What the critic says to a prompt."""
        key = _key(state)
        params = SamplingParams(self.config.max_new_tokens, self.config.temperature, self.stop_ids)
        return await self.engine.complete(Request(prompt_ids, params, seed_for(*self.seed, key), key))

    def has_room(self, prompt_ids: tuple[int, ...]) -> bool:
        """Whether a judgement behind this prompt fits into the critic's model."""
        return self.positions is None or len(prompt_ids) + self.config.max_new_tokens <= self.positions

    def prompt_ids(self, state: State) -> tuple[int, ...]:
        """The critic's prompt for a state."""
        partial = state_text(state, self.actor_tokenizer, self.config.transcript_tokens)
        prompt = state.rollout.prompt
        return build_prompt_ids(self.tokenizer, self.config, self.icc, prompt, partial, state.cut, self.limit)

    async def read_ahead(self, longest: State) -> None:
        """The states nest, and requests in flight together share no prefix: the longest is read first."""
        if self.has_room(ids := self.prompt_ids(longest)):
            await self.engine.warm(ids, _key(longest))

    def deal(self, places: Mapping[str, int]) -> None:
        """A response's states share their prefix, so they go to one server."""
        self.engine.deal(places)

    async def _soft(self, judgement: Judgement) -> float | None:
        """The expected score over the eleven answers, after the reasoning that was sampled.

        Of the critic as it is sampled, so at the judging temperature: the expectation of `value`.
        """
        ids = judgement.completion.ids
        found = answer_candidates(self.tokenizer, ids)
        if found is None or judgement.value is None:
            return None
        keep, candidates = found
        before = (*judgement.prompt_ids, *ids[:keep])
        return soft_score(await self.engine.score(before, candidates, temperature=self.config.temperature))


@dataclass
class TeacherJudge(StateJudge):
    """The task's exact teacher in the critic's place: its scores, in tenths as a critic gives them, or with
    `judging.score: soft` the values that it rounds.

    It reads what the critic would: problem, partial response and p_bar, never the outcome. No token is
    generated.
    """

    teacher: Teacher
    actor_tokenizer: PreTrainedTokenizerBase
    config: JudgingConfig
    icc: IccState
    seed: tuple[object, ...]
    final: bool = False
    budget: Budget | None = None

    async def judge(self, state: State) -> Judgement:
        """The teacher's score of one state."""
        partial = state_text(state, self.actor_tokenizer)
        rng = random.Random(seed_for(*self.seed, _key(state)))
        words, score = self.teacher.trace(state.rollout.prompt, partial, self.icc.p_bar, rng)
        judgement = Judgement(state, (), Completion((), (), "stop"), words, score / 10)
        if self.config.score == "soft":
            judgement.soft = self.teacher.value(state.rollout.prompt, partial, self.icc.p_bar)
        return judgement


def _key(state: State) -> str:
    return f"{state.rollout.key}@{state.index}"
