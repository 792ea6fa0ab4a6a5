"""Plays a lock (tasks/lock.py)."""

from __future__ import annotations

from genac_megatron.environments.base import Step
from genac_megatron.records import Prompt
from genac_megatron.tasks.lock import answer, parse_lock


class LockGame:
    """One lock: each turn is a try, the code opens it."""

    def reset(self, prompt: Prompt, seed: int) -> None:
        """The prompt says everything that the actor is told."""
        self._code, self._left = str(prompt.reference), parse_lock(prompt.problem).turns
        self._stands = 0

    def step(self, turn: str) -> Step:
        """Whether the turn is the code's next symbol; else nothing of it stands any more."""
        right = turn.strip() == self._code[self._stands]
        self._stands = self._stands + 1 if right else 0
        self._left -= 1
        opened = self._stands == len(self._code)
        shown = answer(self._stands, right, self._left)
        return Step(shown, done=opened or self._left == 0, outcome=float(opened))
