"""Conversations that another package's environment answers (tasks/theirs), in that package's interpreter."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable
from typing import Any

from genac_megatron.environments.base import ROUNDING, EnvironmentFault, Step
from genac_megatron.environments.tools import CALL, calls
from genac_megatron.errors import EXIT_LOST
from genac_megatron.records import Prompt
from genac_megatron.tasks.theirs.process import Failed, Lost, TheirProcess, Theirs


def make_theirs(theirs: Theirs) -> Callable[[], TheirEpisode]:
    """What makes an episode. The process is started here, and ends with this one."""
    process = TheirProcess(theirs)
    try:
        process.load(theirs, rows=False)
    except (Failed, Lost) as error:
        why = f"{theirs.name} {error}"

        def fails() -> TheirEpisode:
            raise EnvironmentFault(why)

        return fails
    return lambda: TheirEpisode(process, theirs.rewards)


class TheirEpisode:
    """One conversation there."""

    def __init__(self, process: TheirProcess, rewards: tuple[float, float]) -> None:
        self._process, self._rewards = process, rewards
        self._number = process.begin()

    def reset(self, prompt: Prompt, seed: int) -> None:
        """The prompt's own messages, which are the row's. seed: of what the environment draws by chance."""
        self._ask({"do": "begin", "row": prompt.reference["row"], "seed": seed})
        self._tools = bool(prompt.tools)

    def step(self, turn: str) -> Step:
        """What the environment makes of a turn; at its end its reward, as an outcome."""
        content, found = tool_calls(turn) if self._tools else (turn, [])
        asked = {"do": "step", "turn": turn, "content": content, "calls": found}
        given: dict[str, Any] = self._ask(asked)["step"]
        done, parts = bool(given.get("done")), given.get("parts", {})
        outcome = self._outcome(given["reward"], bool(given.get("least"))) if done else None
        return Step(given["observation"], done, outcome, parts)

    def _outcome(self, reward: Any, least: bool) -> float:
        """least: one below the range counts as its lower end."""
        low, high = self._rewards
        if not isinstance(reward, int | float) or not math.isfinite(reward):
            raise EnvironmentFault(f"gave the reward {reward!r:.40}, which is no finite number")
        worth = ((max(reward, low) if least else reward) - low) / (high - low)
        if not -ROUNDING <= worth <= 1.0 + ROUNDING:
            raise EnvironmentFault(f"gave the reward {reward:g}, and task.rewards is [{low:g}, {high:g}]")
        return min(max(worth, 0.0), 1.0)

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        try:
            return self._process.ask({**request, "episode": self._number})
        except Failed as error:
            raise EnvironmentFault(str(error)) from None
        except Lost as error:
            # As an environment that ends its own process does: others are brought back in a fresh one.
            print(f"the environment {error}", file=sys.stderr, flush=True)
            os._exit(EXIT_LOST)

    def __del__(self) -> None:
        self._process.over(self._number)


def tool_calls(turn: str) -> tuple[str, list[dict[str, str]]]:
    """(what a turn says before its first call, its calls); one that cannot be read is text like any other."""
    found = calls(turn)
    if not found or any(isinstance(call, str) for call in found):
        return turn, []
    named = [call for call in found if not isinstance(call, str)]
    first = CALL.search(turn)
    return turn[: first.start()].rstrip() if first else "", [
        {"id": f"call_{number}", "name": name, "arguments": json.dumps(arguments, ensure_ascii=False)}
        for number, (name, arguments) in enumerate(named)
    ]
