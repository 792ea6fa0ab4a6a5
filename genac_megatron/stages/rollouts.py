"""Generation, verification and judging of one batch, overlapped in one asyncio pipeline.

As each response finishes, its states go to the critic; the prompt state is judged once per group.
Every rank drives its own share of the prompts, and keeps what came of it.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Hashable, Iterable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, Any, TypeVar, overload

from genac_megatron.environments import Environments
from genac_megatron.recipe.schema import RolloutConfig
from genac_megatron.records import Completion, Judgement, Prompt, Request, Rollout, SamplingParams, State
from genac_megatron.serving.engine import Engine
from genac_megatron.serving.rounds import rounds
from genac_megatron.stages.certain import Others, PromptState, left_out, let_go
from genac_megatron.stages.conversations import Conversation, need_again, opened
from genac_megatron.stages.judging import StateJudge, need_room
from genac_megatron.stages.seeds import seed_for
from genac_megatron.tasks.base import Task
from genac_megatron.tasks.reasoning import written

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from genac_megatron.stages.runtime import Run

T = TypeVar("T")


@dataclass
class Group:
    """A prompt, its responses, and per response the judgements of its states in order of cut.

    The prompt state's judgement is one object, shared by all responses of the group that are judged.
    """

    prompt: Prompt
    rollouts: list[Rollout] = field(default_factory=list)
    judgements: list[list[Judgement]] = field(default_factory=list)
    # Of the whole responses, where `judging.states.final` asks for them: the critic learns from these, and no
    # segment has them as its baseline.
    finals: list[Judgement] = field(default_factory=list)

    def only(self, kept: Sequence[bool]) -> Group:
        """The group with the `kept` ones of its responses."""
        rollouts = [one for one, keep in zip(self.rollouts, kept, strict=True) if keep]
        judgements = [one for one, keep in zip(self.judgements, kept, strict=bool(self.judgements)) if keep]
        finals = [one for one, keep in zip(self.finals, kept, strict=bool(self.finals)) if keep]
        return Group(self.prompt, rollouts, judgements, finals)


@dataclass
class Generator:
    """Everything needed to roll the actor out on prompts and, where a judge is given, to judge states."""

    engine: Engine
    tokenizer: PreTrainedTokenizerBase
    task: Task
    config: RolloutConfig
    stop_ids: tuple[int, ...]
    seed: tuple[object, ...]
    judge: StateJudge | None = None
    positions: int | None = None  # of the actor's model; None: not checked
    leaves_certain: bool = False  # responses whose outcome is certain are not judged (stages/certain.py)
    environment: Environments | None = None  # what answers the actor's turns
    tag: str = ""  # of its conversations, where those of another may be under way too

    @classmethod
    def of_actor(
        cls, run: Run, config: RolloutConfig, seed: tuple[object, ...], task: Task | None = None, **more: Any
    ) -> Generator:
        """A run's actor as it is now. task: whose prompts they are; None: the run's. more: fields."""
        return cls(
            engine=run.engines["actor"],
            tokenizer=run.tokenizers["actor"],
            task=run.task if task is None else task,
            config=config,
            stop_ids=run.stop_ids("actor"),
            seed=seed,
            positions=run.actor.shape.max_positions,
            **more,
        )

    async def group(self, prompt: Prompt, samples: range) -> Group:
        """All responses to one prompt, by the numbers of their samples."""
        if self.environment is not None:
            async with self.outside():
                prompt = await opened(self.environment, self.tokenizer, prompt, self.seed)
        need_room(prompt, self.config.max_new_tokens, self.positions)
        group = Group(prompt)
        if self.judge is None:
            parts = await all_of(self._unjudged(prompt, s) for s in samples)
        else:
            first = PromptState(self.judge, prompt, samples.start)
            others = Others(samples) if self.leaves_certain else None
            if others is None:
                first.begin()
            try:
                parts = await all_of(self._judged(prompt, s, self.judge, first, others) for s in samples)
            finally:
                await first.end()
        for rollout, judgements in parts:
            if self.judge is not None and self.judge.final:
                group.finals.append(judgements.pop())
            group.rollouts.append(rollout)
            group.judgements.append(judgements)
        return group

    def outside(self) -> AbstractAsyncContextManager[None]:
        """Around an await of the environment."""
        return rounds(asyncio.get_running_loop()).outside() if self.engine.inline else nullcontext()

    async def _sampled(self, prompt: Prompt, sample: int) -> Rollout:
        """A response that is not verified yet."""
        if self.environment is not None:
            return await Conversation(self, self.environment, prompt, sample).play(self._turn)
        params = SamplingParams(self.config.max_new_tokens, self.config.temperature, self.stop_ids)
        seed = seed_for(*self.seed, prompt.id, sample)
        completion = await self.engine.complete(Request(prompt.ids, params, seed, f"{prompt.id}#{sample}"))
        text = written(self.tokenizer, completion.ids, self.task.reasoning_tags)
        return Rollout(prompt, sample, completion, text, limit=self.config.max_new_tokens)

    async def _turn(self, talk: Conversation, most: int) -> Completion:
        """The actor's next turn of a conversation, of at most so many tokens."""
        params = SamplingParams(most, self.config.temperature, self.stop_ids)
        whose = (talk.name,) if talk.name else (talk.prompt.id, talk.sample)
        seed = seed_for(*self.seed, *whose, len(talk.said))
        return await self.engine.complete(Request(talk.ids, params, seed, talk.key))

    async def _unjudged(self, prompt: Prompt, sample: int) -> tuple[Rollout, list[Judgement]]:
        rollout = await self._sampled(prompt, sample)
        await self.verify(rollout)
        return rollout, []

    async def _judged(
        self, prompt: Prompt, sample: int, judge: StateJudge, first: PromptState, others: Others | None
    ) -> tuple[Rollout, list[Judgement]]:
        """A response and its judgements, which its verification need not wait for, nor they for it: but for
        the others' outcomes, where certain ones are left out.
        """
        rollout = await self._sampled(prompt, sample)
        if others is not None:
            await self.verify(rollout)
            others.tell(rollout)
            certain = await others.certain(sample)
            if certain is not None:
                return rollout, left_out(rollout, certain, final=judge.final)
            return rollout, await judge.judge_response(rollout, first.begin())
        judging = asyncio.ensure_future(judge.judge_response(rollout, first.begin()))
        try:
            await self.verify(rollout)
            return rollout, await judging
        finally:
            await let_go(judging)

    async def goes_on(self, state: State, key: str) -> Rollout:
        """A fresh end of the response that a state is of, not verified yet."""
        rollout, limit = state.rollout, self.config.max_new_tokens
        if self.environment is not None:
            talk = Conversation(self, self.environment, rollout.prompt, rollout.sample)
            talk.stand(state, key)
            return await talk.play(self._turn)
        kept = rollout.completion.ids[: state.cut]
        params = SamplingParams(limit - state.cut, self.config.temperature, self.stop_ids)
        request = Request((*rollout.prompt.ids, *kept), params, seed_for(*self.seed, key), key)
        completion = await self.engine.complete(request)
        ids = (*kept, *completion.ids)
        text = written(self.tokenizer, ids, self.task.reasoning_tags)
        return Rollout(rollout.prompt, rollout.sample, Completion(ids, (), completion.finish), text)

    async def verify(self, rollout: Rollout) -> None:
        """Set the rollout's outcome, and the critic's, by the recipe's rules for cut-off responses.

        Of a conversation it is the environment's, where it gave one, and its own rule where it failed.
        """
        episode = rollout.episode
        if episode is not None and self.environment is not None and episode.ended == "failed":
            rollout.outcome = self.environment.config.failed_outcome
            return
        rules = self.config.truncated_outcome, self.config.truncated_critic
        actor, critic = rules if rollout.truncated else ("verify", "same")
        outcome = 0.0
        if "verify" in (actor, critic):
            if episode is not None and episode.outcome is not None:
                outcome, rollout.parts = episode.outcome, episode.parts
            else:
                scored = await self.task.score_beside(rollout.prompt, rollout.text, rollout.truncated)
                outcome, rollout.parts = scored.outcome, scored.parts
        rollout.outcome = outcome if actor == "verify" else 0.0
        if critic != "same":
            rollout.critic_outcome = outcome if critic == "verify" else 0.0


class Asked(Sequence[Prompt]):
    """Training prompts of a task, made when they are read: a rank reads those of its share."""

    def __init__(self, task: Task, indices: Sequence[int]) -> None:
        self.task, self.indices = task, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[Prompt]:
        # Sequence's own would take an IndexError of a task for the end.
        return (self.task.prompt("train", index) for index in self.indices)

    @overload
    def __getitem__(self, at: int) -> Prompt: ...

    @overload
    def __getitem__(self, at: slice) -> list[Prompt]: ...

    def __getitem__(self, at: int | slice) -> Prompt | list[Prompt]:
        if isinstance(at, slice):
            return [self.task.prompt("train", index) for index in self.indices[at]]
        return self.task.prompt("train", self.indices[at])


def repeats(prompts: Sequence[Hashable]) -> list[int]:
    """How often each prompt of a batch (what tells it from others) stands before its place there."""
    seen: Counter[Hashable] = Counter()
    turns = []
    for prompt in prompts:
        turns.append(seen[prompt])
        seen[prompt] += 1
    return turns


@dataclass
class Lot:
    """Prompts that this rank plays together."""

    prompts: Sequence[Prompt]
    samples: int  # responses each
    turns: Sequence[int]  # `repeats` of the whole batch, of these prompts
    places: Sequence[int]  # where they stand among those of all ranks
    done: int = 0  # groups

    @property
    def numbers(self) -> list[range]:
        """The numbers of each prompt's samples: one that a batch repeats goes on counting."""
        return [range(turn * self.samples, (turn + 1) * self.samples) for turn in self.turns]

    @property
    def keys(self) -> list[list[str]]:
        """By prompt those of its responses."""
        pairs = zip(self.prompts, self.numbers, strict=True)
        return [[f"{prompt.id}#{sample}" for sample in own] for prompt, own in pairs]

    @property
    def homes(self) -> dict[str, int]:
        """What the actor's requests share, and by which number servers share it."""
        return {prompt.id: place for prompt, place in zip(self.prompts, self.places, strict=True)}

    @property
    def response_homes(self) -> dict[str, int]:
        """The same of the critic's requests."""
        firsts = (place * self.samples + n for place in self.places for n in range(self.samples))
        return dict(zip(chain.from_iterable(self.keys), firsts, strict=True))


def generate(
    generator: Generator,
    prompts: Sequence[Prompt],
    samples: int,
    turns: Sequence[int] | None = None,
    places: Sequence[int] | None = None,
) -> list[Group]:
    """Roll out `prompts` on this rank, `samples` responses each.

    A prompt that a batch repeats goes on numbering its samples, so that they are drawn apart. `turns`:
    `repeats` of the whole batch, of these prompts; None where they are the whole batch. `places`: where the
    prompts stand among those of all ranks (`Run.places`), by which servers share them; None: from 0 on.
    """
    turns = repeats([prompt.id for prompt in prompts]) if turns is None else turns
    lot = Lot(prompts, samples, turns, range(len(prompts)) if places is None else places)
    return asyncio.run(groups_of(generator, lot))


async def all_of(works: Iterable[Awaitable[T]]) -> list[T]:
    """What all give; where one fails the others are ended first: in a loop that goes on they would, too, and
    answer in the place of those that are begun anew.
    """
    made = [asyncio.ensure_future(work) for work in works]
    try:
        return await asyncio.gather(*made)
    except BaseException:
        for task in made:
            task.cancel()
        await asyncio.gather(*made, return_exceptions=True)
        raise


async def groups_of(generator: Generator, lot: Lot, beside: Sequence[Lot] = ()) -> list[Group]:
    """`generate` for an event loop of one's own. beside: what else is under way there."""
    judge, lots, lot.done = generator.judge, (*beside, lot), 0
    generator.engine.deal({key: place for one in lots for key, place in one.homes.items()})
    if judge is not None:
        judge.deal({key: place for one in lots for key, place in one.response_homes.items()})
        if judge.budget is not None:
            judge.budget.deal(lot.keys, judge.config.max_new_tokens)

    async def one(prompt: Prompt, samples: range) -> Group:
        group = await generator.group(prompt, samples)
        lot.done += 1
        return group

    return await all_of(one(p, n) for p, n in zip(lot.prompts, lot.numbers, strict=True))


async def _judged(judge: StateJudge, group: Group) -> Group:
    shared = asyncio.ensure_future(judge.judge_prompt(group.prompt, group.rollouts[0].sample))
    try:
        judgements = await all_of(judge.judge_response(r, shared) for r in group.rollouts)
    finally:
        await let_go(shared)
    return Group(group.prompt, group.rollouts, list(judgements))


def judge_groups(
    judge: StateJudge, groups: Sequence[Group], places: Sequence[int] | None = None
) -> list[Group]:
    """The same responses with fresh judgements of all their states. `places`: as for `generate`."""
    firsts = range(len(groups)) if places is None else places
    each = max((len(group.rollouts) for group in groups), default=0)
    judge.deal(
        {
            r.key: first * each + n
            for g, first in zip(groups, firsts, strict=True)
            for n, r in enumerate(g.rollouts)
        }
    )

    async def run() -> list[Group]:
        return list(await asyncio.gather(*(_judged(judge, group) for group in groups)))

    return asyncio.run(run())


def continue_states(generator: Generator, states: Sequence[State], count: int) -> list[list[float]]:
    """Targets of `count` fresh continuations of the actor from each state, within its token limit.

    A conversation's environment is brought back by its turns, with the seed that it had: what it hides is as
    it was. Raises InputError where it is not the same again.
    """
    environment = generator.environment
    if environment is not None and states:
        need_again(environment, states[0].rollout.prompt)

    async def one(state: State, sample: int) -> float:
        key = f"{state.rollout.key}@{state.index}+{sample}"
        whole = await generator.goes_on(state, key)
        await generator.verify(whole)
        return whole.target

    async def run() -> list[list[float]]:
        flat = await asyncio.gather(*(one(state, k) for state in states for k in range(count)))
        return [list(flat[i * count : (i + 1) * count]) for i in range(len(states))]

    return asyncio.run(run())
