"""A conversation of the actor with an environment: its turns as they were sampled, and what answers them.

Token by token it is what the engine saw: ids that were sampled, and behind each turn what the chat template
writes around the environment's answer (environments/rendering.py). No text is tokenized again, and no earlier
turn is shown otherwise than it was written, whatever the template would do; or, by `history: template`, each
turn stands behind what the template shows then, and what the engine saw is kept with it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, Protocol
from weakref import WeakKeyDictionary

import numpy as np

from genac_megatron.environments import Environments, make_environment
from genac_megatron.environments.host import Answer, Job, digest
from genac_megatron.environments.processes import cannot_again
from genac_megatron.environments.rendering import render, rewrites, shown_ids
from genac_megatron.environments.sandbox import need_sandbox
from genac_megatron.environments.tools import SCHEMAS
from genac_megatron.errors import InputError
from genac_megatron.escaping import transcript
from genac_megatron.recipe.environment_rules import continues
from genac_megatron.recipe.schema import Recipe, RolloutConfig
from genac_megatron.recipe.tasks import PackageTask
from genac_megatron.records import ACTOR, Completion, Episode, Finish, Prompt, Rollout, State, Turn
from genac_megatron.stages.ranks import ALONE, Ranks
from genac_megatron.stages.seeds import seed_for
from genac_megatron.tasks.base import Split, Task
from genac_megatron.tasks.reasoning import written
from genac_megatron.tasks.tokenizer import chat_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from genac_megatron.records import Experts

HISTORIES = {
    "sampled": "conversations keep them as they were sampled, token by token (who serves the model by this "
    "template shows it others; environment.history: template)",
    "template": "each turn stands behind what it shows then, and is trained on as a sequence of its own",
}
THEIRS = "see what it says; task.rewards names its rewards that are worth 0 and 1"
CONTINUING = "a Monte-Carlo value"
LOOKED_AT = 2  # prompts of each split with which a conversation is begun before training
Ended = Literal["done", "turns", "tokens", "failed"]
Speak = Callable[["Conversation", int], Awaitable[Completion]]
_gates: WeakKeyDictionary[asyncio.AbstractEventLoop, dict[int, asyncio.Semaphore]] = WeakKeyDictionary()


class Actor(Protocol):
    """What a conversation needs of who plays it (stages/rollouts.py: Generator)."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase: ...
    @property
    def task(self) -> Task: ...
    @property
    def config(self) -> RolloutConfig: ...
    @property
    def seed(self) -> tuple[object, ...]: ...
    @property
    def tag(self) -> str: ...
    def outside(self) -> AbstractAsyncContextManager[None]: ...


def begun_environment(
    recipe: Recipe, task: Task, tokenizer: PreTrainedTokenizerBase, tell: Callable[[str], None]
) -> Environments | None:
    """The recipe's environment, once it has begun a few conversations; None: there is none.

    tell: is told how the chat template would show earlier turns. Raises InputError where it cannot show a
    conversation, or the environment does not begin one.
    """
    if recipe.environment is None:
        return None
    if how := rewrites(tokenizer):
        tell(f"environment: the chat template {how}; {HISTORIES[recipe.environment.history]}")
    elif recipe.environment.history == "template":
        tell("environment: the chat template shows earlier turns as they were written: there is one history")
    if recipe.environment.tools:
        _need_tools(tokenizer, [SCHEMAS[name] for name in recipe.environment.tools])
    if "python" in recipe.environment.tools:
        need_sandbox(recipe.environment.sandbox_mib)
    environment = make_environment(recipe.environment, recipe.task, recipe.seed)
    sizes: tuple[tuple[Split, int], ...] = (("train", task.train_size), ("heldout", task.heldout_size))
    prompts = [task.prompt(split, n) for split, size in sizes for n in range(min(size, LOOKED_AT))]
    try:
        own = isinstance(recipe.task, PackageTask)
        jobs = [Job(f"{p.id}@check", p, episode_seed(("check",), p)) for p in prompts]
        environment.check(jobs, *([THEIRS] if own else []))
        if own:
            _need_played(environment, task, tokenizer, prompts[0])
        if prompts and continues(recipe):
            need_again(environment, prompts[0])
    except BaseException:
        environment.close()
        raise
    return environment


def _need_played(
    environment: Environments, task: Task, tokenizer: PreTrainedTokenizerBase, prompt: Prompt
) -> None:
    """Raise InputError where another package's environment cannot be played as the recipe says."""
    if task.turns is not None and task.turns > environment.config.turns:
        raise InputError(
            f"the environment plays {task.turns} turns, and environment.turns ends a conversation after "
            f"{environment.config.turns}, without a reward",
            where="environment.turns",
            way_out=f"set it to {task.turns}, or have the environment play fewer (task.args)",
        )
    if prompt.tools:
        _need_tools(tokenizer, prompt.tools)
    job = Job(f"{prompt.id}@tried", prompt, episode_seed(("tried",), prompt))
    environment.try_out(job, THEIRS)


def need_again(environment: Environments, prompt: Prompt) -> None:
    """Raise InputError where conversations cannot be brought back by their turns. Looked at once."""
    environment.need_again(Job(f"{prompt.id}@again", prompt, episode_seed(("again",), prompt)), CONTINUING)


def _need_tools(tokenizer: PreTrainedTokenizerBase, tools: Sequence[dict[str, Any]]) -> None:
    """Raise InputError where the chat template shows no tools, or not what they answer."""
    chat_ids(tokenizer, [{"role": "user", "content": "?"}], tools)
    render(tokenizer, [("tool", "1")], ended=True, limit=1)


def conversation_figures(rollouts: Sequence[Rollout], ranks: Ranks = ALONE) -> dict[str, float]:
    """Of a batch's conversations, which all `ranks` have; {} where there are none."""
    both = [(rollout, rollout.episode) for rollout in rollouts if rollout.episode is not None]
    known = [(episode.again, episode.cached) for _, episode in both if episode.cached is not None]
    count, answers, shortened, again, cached = ranks.totals(
        len(both),
        sum(turn.who != ACTOR for _, episode in both for turn in episode.turns),
        sum(episode.shortened for _, episode in both),
        sum(tokens for tokens, _ in known),
        sum(found for _, found in known),
    )
    if not count:
        return {}
    figures = ranks.means(
        {
            "rollout/turns_mean": [episode.taken for _, episode in both],
            "rollout/observed_mean": [len(r.completion.ids) - r.completion.written for r, _ in both],
            "environment/failed": [episode.ended == "failed" for _, episode in both],
            "environment/out_of_turns": [episode.ended == "turns" for _, episode in both],
            "environment/out_of_tokens": [episode.ended == "tokens" for _, episode in both],
        }
    )
    figures["environment/shortened"] = shortened / max(answers, 1.0)
    return figures | ({"rollout/turns_cached": cached / again} if again else {})


async def opened(
    environment: Environments,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    seed: tuple[object, ...],
) -> Prompt:
    """The prompt with what its conversations begin with: the same for all of a group.

    Where the environment fails the prompt is as it was: the conversations say so.
    """
    key = f"{prompt.id}@opening"
    answer = await environment.ask(Job(key, prompt, episode_seed(seed, prompt)))
    await environment.end(key, prompt)
    if answer.failure:
        return prompt
    success = environment.config.success or prompt.success or "the environment says so"
    most = f"in at most {environment.config.turns} turns"
    prompt = replace(
        prompt, opening=digest(answer.opening), success=f"{success} ({most})", asked=prompt.asked or prompt
    )
    tools = tuple(SCHEMAS[name] for name in environment.config.tools)
    if answer.opening is None and not tools:
        return prompt
    messages = prompt.messages
    if answer.opening is not None:
        messages = tuple({"role": role, "content": content} for role, content in answer.opening)
    prompt = replace(prompt, tools=(*prompt.tools, *tools))
    ids = chat_ids(tokenizer, messages, prompt.tools, where=prompt.where)
    return replace(prompt, messages=messages, ids=ids)


def episode_seed(seed: tuple[object, ...], prompt: Prompt) -> int:
    """An environment's seed: one for all conversations of a group, which so begin alike."""
    return seed_for(*seed, "environment", prompt.id)


class Conversation:
    """One conversation under way."""

    def __init__(self, actor: Actor, environment: Environments, prompt: Prompt, sample: int) -> None:
        self.actor, self.environment, self.prompt, self.sample = actor, environment, prompt, sample
        self.limit = actor.config.max_new_tokens
        self.seed = episode_seed(actor.seed, prompt)
        self.name = ""  # of one that goes on from a state (`stand`)
        self.begun: tuple[int, ...] = ()  # of the turn that is next, what stands already
        self.said: list[Completion] = []  # the actor's turns
        self.ids = prompt.ids  # what the actor's next turn stands behind
        self._afresh = environment.config.history == "template" and bool(rewrites(actor.tokenizer))
        self._behind: list[tuple[int, ...]] = []  # the same of each turn, where it is no beginning
        self.turns: list[Turn] = []
        self._response: list[int] = []
        self._ranges: list[tuple[int, int]] = []
        self._experts: list[Experts | None] = []
        self._answers: list[tuple[str, float | None]] = []
        self._outcome: float | None = None
        self._parts: dict[str, float] = {}
        self._shortened, self._failure = 0, ""
        self._again, self._cached = 0, list[int | None]()

    @property
    def key(self) -> str:
        return self.name or f"{self.prompt.id}#{self.sample}"

    @property
    def job(self) -> str:
        """What its environment knows it by."""
        return f"{self.key}{self.actor.tag}"

    @property
    def transcript(self) -> str:
        """The same as it is shown to who judges it."""
        return transcript((turn.who, turn.text) for turn in self.turns)

    async def play(self, speak: Speak) -> Rollout:
        """To its end. speak: gives the actor's next turn."""
        async with _gate(self.environment):
            try:
                ended = await self._play(speak)
            finally:
                async with self.actor.outside():
                    await self.environment.end(self.job, self.prompt)
        finish: dict[Ended, Finish] = {"done": "stop", "failed": "abort"}
        completion = Completion(
            tuple(self._response),
            tuple(x for one in self.said for x in one.logprobs),
            finish.get(ended, "length"),
            tuple(span for one in self.said for span in one.spans),
            _joined(self._experts),
            tuple(self._ranges),
        )
        last = next(turn.text for turn in reversed(self.turns) if turn.who == ACTOR)
        cached = None if None in self._cached else sum(found or 0 for found in self._cached)
        episode = Episode(
            *(tuple(self.turns), ended, self._outcome, self._parts, self._shortened, self._failure),
            *(self._again, cached, self.seed, tuple(self._answers)),
        )
        behind = tuple(self._behind)
        return Rollout(
            self.prompt, self.sample, completion, last, limit=self.limit, episode=episode, behind=behind
        )

    async def _play(self, speak: Speak) -> Ended:
        config, tokenizer = self.environment.config, self.actor.tokenizer
        for number in range(len(self.said) + 1, config.turns + 1):
            self._look_back()
            behind, stands = self.ids, len(self.begun)
            room = self.limit - max(len(self._response), len(behind) - len(self.prompt.ids)) - stands
            if room < 1:  # the template has more to say than was sampled
                self._take_back()
                return "tokens"
            most = room if config.turn_tokens is None else config.turn_tokens - stands
            self.ids += self.begun
            said = self._whole(await speak(self, min(most, room)))
            self._add(said, behind)
            if said.finish == "length" and len(self._response) >= self.limit:
                return "tokens"
            answer = await self._answer()
            if answer.step is None:
                if answer.not_again and self.name:
                    raise cannot_again(answer, CONTINUING)
                self._failure = answer.failure
                return "failed"
            shown = render(
                tokenizer,
                answer.step.messages,
                ended=said.finish == "stop",
                limit=config.observation_tokens,
            )
            self._shortened += bool(shown.left_out or answer.step.shortened)
            begin = len(self._response)
            over = answer.step.done or number == config.turns
            fits = begin + len(shown.ids) < self.limit
            if not over and fits:
                self._response += shown.ids
            self._show(answer, shown.texts, begin)
            if answer.step.done:
                return "done"
            if not fits:
                return "tokens"
        return "turns"

    def _look_back(self) -> None:
        """What the next turn stands behind."""
        if not self._afresh:
            self.ids = (*self.prompt.ids, *self._response)
        elif self.turns:
            since = [("assistant" if turn.who == ACTOR else turn.who, turn.text) for turn in self.turns]
            prompt = self.prompt
            self.ids = shown_ids(self.actor.tokenizer, prompt.messages, since, prompt.tools)

    def _whole(self, said: Completion) -> Completion:
        """A turn with what stood of it already, of which nobody asks for log-probs."""
        begun, self.begun = self.begun, ()
        if not begun:
            return said
        blank = (0.0,) * len(begun)
        return replace(said, ids=(*begun, *said.ids), logprobs=(*blank, *said.logprobs))

    def stand(self, state: State, name: str) -> None:
        """Let it stand where a state is, under a name of its own: what was said and answered is so again, and
        the environment is brought back by the turns.
        """
        rollout, cut, self.name = state.rollout, state.cut, name
        episode, ids = rollout.episode, rollout.completion.ids
        if episode is None:  # of the prompt
            return
        self.seed = episode.seed
        for turn in episode.turns:
            if turn.begin < cut < turn.end:
                self.begun = tuple(ids[turn.begin : cut])
            elif turn.begin < cut:
                self.turns.append(turn)
                if turn.who == ACTOR:
                    own = ids[turn.begin : turn.end]
                    self.said.append(Completion(own, (0.0,) * len(own), "stop"))
                    self._ranges.append((turn.begin, turn.end))
        self._response = list(ids[: cut - len(self.begun)])
        self._behind = list(rollout.behind[: len(self.said)])
        self._answers = list(episode.answers[: len(self.said)])
        self._outcome = next((given for _, given in reversed(self._answers) if given is not None), None)

    def _take_back(self) -> None:
        """No turn follows the last answer: it has no tokens."""
        end = self._ranges[-1][1]
        del self._response[end:]
        kept = (replace(one, begin=min(one.begin, end), end=min(one.end, end)) for one in self.turns)
        self.turns = list(kept)

    def _add(self, said: Completion, behind: tuple[int, ...]) -> None:
        """A turn of the actor's, and what it stands behind."""
        begin, end = len(self._response), len(self._response) + len(said.ids)
        text = written(self.actor.tokenizer, said.ids, self.actor.task.reasoning_tags)
        self.turns.append(Turn(ACTOR, text, begin, end))
        if self._afresh:
            self._behind.append(behind)
        elif self._ranges:  # the last token that was sampled is read for the first time now
            read = len(self.prompt.ids) + self._ranges[-1][1] - 1
            self._again += read
            self._cached.append(None if said.cached is None else min(said.cached, read))
        if said.experts is not None:  # of what earlier turns have read already they are those of then
            read = sum(0 if one is None else len(one) for one in self._experts)
            self._experts.append(said.experts[read:])
        self._response += said.ids
        self._ranges.append((begin, end))
        self.said.append(said)

    async def _answer(self) -> Answer:
        """What the environment says to the turns so far."""
        said = tuple(turn.text for turn in self.turns if turn.who == ACTOR)
        seen = tuple(one for one, _ in self._answers)
        async with self.actor.outside():
            answer = await self.environment.ask(
                Job(self.job, self.prompt, self.seed, said, self.prompt.opening, seen)
            )
        if answer.step is not None:
            step = answer.step
            self._answers.append((digest(step.messages), step.outcome))
            self._outcome = step.outcome if step.outcome is not None else self._outcome
            self._parts = {
                name: self._parts.get(name, 0.0) + step.parts.get(name, 0.0)
                for name in {**self._parts, **step.parts}
            }
        return answer

    def _show(self, answer: Answer, texts: Sequence[str], begin: int) -> None:
        """Note what was answered; its tokens are those from `begin` on, none where no turn follows."""
        assert answer.step is not None
        end = len(self._response)
        for number, ((role, _), text) in enumerate(zip(answer.step.messages, texts, strict=True), start=1):
            if text or end > begin:
                last = number == len(texts)
                self.turns.append(Turn(role, text, begin, end if last else begin))
                begin = end if last else begin


def _gate(environment: Environments) -> asyncio.Semaphore:
    """As many conversations at a time as the recipe says."""
    here = _gates.setdefault(asyncio.get_running_loop(), {})
    return here.setdefault(id(environment), asyncio.Semaphore(environment.config.concurrency))


def _joined(experts: Sequence[Experts | None]) -> Experts | None:
    found = [one for one in experts if one is not None]
    return np.concatenate(found) if found else None
