"""What an environment is: `reset` and `step`, sync or async, or a function of the transcript.

    class Echo:
        def reset(self, prompt, seed): ...  # messages that a conversation begins with; None: the prompt's
        def step(self, turn): ...  # a Step, or a dict of its fields

Each episode has an instance of its own. A function takes (messages, prompt, seed): all messages so far, the
actor's last, and gives the same.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from genac_megatron.escaping import cut_middle
from genac_megatron.records import Prompt

Message = tuple[str, str]  # role, content
ROLES = ("user", "tool", "system")
MOST = 256  # messages, or parts of an outcome, at a time
ROUNDING = 1e-6  # beyond [0, 1], of a sum of floats


class EnvironmentFault(Exception):
    """An environment did what it may not; the text says what."""


class NotAgain(EnvironmentFault):
    """An episode cannot be brought back by its turns."""


@dataclass(frozen=True)
class Step:
    """An environment's answer to a turn of the actor."""

    observation: str | Sequence[Mapping[str, str]] = ""  # what the actor is shown: text, or chat messages
    done: bool = False
    # In [0, 1]: what the episode is worth so far, the last one counts. None at its end: the task's verifier
    # is asked about the actor's last turn
    outcome: float | None = None
    parts: Mapping[str, float] = field(default_factory=dict)  # by name, added up over the episode


@dataclass(frozen=True)
class Checked:
    """A Step that is as it must be."""

    messages: tuple[Message, ...]
    done: bool
    outcome: float | None
    parts: dict[str, float]
    shortened: int = 0  # characters that were left out


KEYS = tuple(one.name for one in fields(Step))


def checked_step(given: Any, limit: int) -> Checked:
    """What an environment gave, each message cut to `limit` characters. Raises EnvironmentFault."""
    if isinstance(given, Mapping):
        unknown = [str(key) for key in given if key not in KEYS]
        if unknown:
            raise EnvironmentFault(f"gave {', '.join(unknown)}: a step has {', '.join(KEYS)}")
        given = Step(**given)
    if not isinstance(given, Step):
        raise EnvironmentFault(f"gave {type(given).__name__}: a step is a Step, or a dict of its fields")
    if not isinstance(given.done, bool):
        raise EnvironmentFault(f"gave done {given.done!r:.40}: it is True or False")
    outcome = None if given.outcome is None else _figure("outcome", given.outcome)
    if outcome is not None:
        if not -ROUNDING <= outcome <= 1.0 + ROUNDING:
            raise EnvironmentFault(f"gave the outcome {outcome:g}, which is not in [0, 1]")
        outcome = min(max(outcome, 0.0), 1.0)
    if not isinstance(given.parts, Mapping):
        raise EnvironmentFault(f"gave parts {given.parts!r:.40}: they are figures by name")
    if len(given.parts) > MOST:
        raise EnvironmentFault(f"gave {len(given.parts)} parts: {MOST} at most")
    parts = {str(name): _figure(f"part {name}", value) for name, value in given.parts.items()}
    messages, shortened = checked_messages(given.observation, limit)
    return Checked(messages, given.done, outcome, parts, shortened)


def checked_messages(given: Any, limit: int) -> tuple[tuple[Message, ...], int]:
    """(messages, each cut to `limit` characters; characters left out). Raises EnvironmentFault."""
    if isinstance(given, str):
        given = [{"role": "user", "content": given}]
    if not isinstance(given, Sequence):
        raise EnvironmentFault(f"gave {type(given).__name__} to be shown: it is text, or chat messages")
    if len(given) > MOST:
        raise EnvironmentFault(f"gave {len(given)} messages to be shown: {MOST} at most")
    found, left_out = [], 0
    for message in given:
        role, content = (
            (message.get("role"), message.get("content")) if isinstance(message, Mapping) else (None, None)
        )
        if role not in ROLES or not isinstance(content, str):
            raise EnvironmentFault(
                f"gave the message {message!r:.60}: a message has a role ({', '.join(ROLES)}) and content"
            )
        shown = content.encode("utf-8", "replace").decode("utf-8")  # half of a surrogate pair has no ids
        kept = cut_middle(shown, limit)
        left_out += max(0, len(shown) - limit)
        found.append((str(role), kept))
    return tuple(found), left_out


def _figure(name: str, value: Any) -> float:
    if isinstance(value, bool | int | float) and math.isfinite(value):
        return float(value)
    raise EnvironmentFault(f"gave the {name} {value!r:.40}, which is no finite number")


class OfTranscript:
    """A function of the transcript as an environment."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self._messages: list[dict[str, Any]] = []
        self._prompt: Prompt | None = None
        self._seed = 0

    def reset(self, prompt: Prompt, seed: int) -> None:
        """Begin with the prompt's messages."""
        self._messages, self._prompt, self._seed = [dict(m) for m in prompt.messages], prompt, seed

    async def step(self, turn: str) -> Any:
        """What the function gives, having seen the turn."""
        self._messages.append({"role": "assistant", "content": turn})
        given = self._function(list(self._messages), self._prompt, self._seed)
        if inspect.isawaitable(given):
            given = await given
        if not isinstance(given, Mapping | Step):
            return given  # which is told as what it is
        shown = given.get("observation", "") if isinstance(given, Mapping) else given.observation
        told = [{"role": "user", "content": shown}] if isinstance(shown, str) else list(shown)
        self._messages += [dict(message) for message in told]
        return given
