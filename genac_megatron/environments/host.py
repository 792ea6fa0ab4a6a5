"""The inside of an environment's process: the episodes that live in it, brought back where they are gone."""

from __future__ import annotations

import asyncio
import hashlib
import inspect
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from genac_megatron.environments.base import (
    Checked,
    EnvironmentFault,
    Message,
    NotAgain,
    checked_messages,
    checked_step,
)
from genac_megatron.records import Prompt

LIVE = 4096  # episodes that a process keeps; the one that is not asked for longest goes first


@dataclass(frozen=True)
class Job:
    """An episode and all turns that the actor has taken in it; none: what it begins with is asked for."""

    key: str
    prompt: Prompt
    seed: int
    turns: tuple[str, ...] = ()
    opening: str = ""  # a digest of what the episode began with
    seen: tuple[str, ...] = ()  # and of what was answered to each turn but the last
    over: bool = False  # the episode is: nothing is asked for


@dataclass(frozen=True)
class Answer:
    """What became of a job."""

    step: Checked | None = None  # of the last turn
    opening: tuple[Message, ...] | None = None  # where it was asked for; None: the prompt's own messages
    failure: str = ""  # why there is none
    not_again: bool = False  # as the episode could not be brought back


@dataclass
class _Live:
    environment: Any
    taken: int = 0
    seen: list[str] = field(default_factory=list)


def digest(messages: tuple[Message, ...] | None) -> str:
    """Of messages, to tell whether they are the same ones again."""
    return hashlib.sha256(repr(messages).encode()).hexdigest()[:16]


class Host:
    """Answers jobs, one after another. An environment that raises is let go of."""

    def __init__(self, make: Callable[[], Any], chars: int, told: Callable[[BaseException], str]) -> None:
        """chars: of a message, at most. told: an error of the environment's in a line."""
        self._make, self._chars, self._told = make, chars, told
        self._live: OrderedDict[str, _Live] = OrderedDict()
        self._loop = asyncio.new_event_loop()

    def __call__(self, job: Job) -> Answer:
        if job.over:
            self._live.pop(job.key, None)
            return Answer()
        try:
            if not job.turns:
                return Answer(opening=self._begin(job)[1])
            return Answer(step=self._step(job))
        except KeyboardInterrupt:
            raise
        except EnvironmentFault as error:
            self._live.pop(job.key, None)
            return Answer(failure=str(error), not_again=isinstance(error, NotAgain))
        except BaseException as error:  # SystemExit too
            self._live.pop(job.key, None)
            return Answer(failure=self._told(error))

    def _step(self, job: Job) -> Checked:
        """The answer to the job's last turn, in the episode that lives here, or is brought back."""
        live = self._live.pop(job.key, None)
        if live is None or live.taken != len(job.turns) - 1:
            live = self._again(job)
        done = self._take(live, job.turns[-1])
        if not done.done:
            self._live[job.key] = live
            if len(self._live) > LIVE:
                self._live.popitem(last=False)
        return done

    def _again(self, job: Job) -> _Live:
        """The episode as its turns have left it. Raises NotAgain where it goes otherwise."""
        environment, opening = self._begin(job)
        if digest(opening) != job.opening:
            raise NotAgain("began otherwise with the same prompt and seed")
        live = _Live(environment)
        if not getattr(environment, "remembers", True):
            live.taken = len(job.turns) - 1
            return live
        if len(job.turns) > 1 and not getattr(environment, "replays", True):
            raise NotAgain("cannot be brought back by its turns (replays is False)")
        for turn, seen in zip(job.turns[:-1], job.seen, strict=True):
            if digest(self._take(live, turn).messages) != seen:
                raise NotAgain(
                    "answers the same turns otherwise when it is brought back by them (a class that cannot "
                    "be says replays = False)"
                )
        return live

    def _begin(self, job: Job) -> tuple[Any, tuple[Message, ...] | None]:
        environment = self._make()
        asked = job.prompt.asked or job.prompt  # the same whenever it is begun
        given = self._awaited(environment.reset(asked, job.seed))
        return environment, None if given is None else checked_messages(given, self._chars)[0]

    def _take(self, live: _Live, turn: str) -> Checked:
        done = checked_step(self._awaited(live.environment.step(turn)), self._chars)
        live.taken += 1
        return done

    def _awaited(self, given: Any) -> Any:
        async def wait() -> Any:
            return await given

        return self._loop.run_until_complete(wait()) if inspect.isawaitable(given) else given
