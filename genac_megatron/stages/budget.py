"""Tokens that a rank's critic may write in a batch, dealt over its responses before they are written.

What a response may have judged is known by its place alone, and of its states the first ones are judged, in
order of cut. So neither how long it becomes nor when it is done, or others are, decides which of its states
have a value: a budget that is had by whoever comes first starves long responses, and biases their baselines.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from genac_megatron.records import State


class Budget:
    """The tokens of a batch, those that were written of them, and each response's purse."""

    def __init__(self, tokens: int) -> None:
        self.tokens, self.spent = tokens, 0
        self._purses: dict[tuple[str, bool], Purse] = {}

    def deal(self, groups: Sequence[Sequence[str]], longest: int) -> None:
        """A batch begins. `groups`: by prompt the keys of its responses; `longest`: tokens of a judgement.

        Prompts have equal parts, and of each the prompt state comes first. What one does not use is nobody
        else's.
        """
        self.spent, self._purses = 0, {}
        for keys, tokens in zip(groups, dealt(self.tokens, len(groups), longest), strict=True):
            self._purses[keys[0], True] = Purse(min(tokens, longest), longest)
            for key, own in zip(keys, dealt(max(tokens - longest, 0), len(keys), longest), strict=True):
                self._purses[key, False] = Purse(own, longest)

    def purse(self, state: State) -> Purse:
        """What a state's judgement is paid from: its response's, or the group's for a prompt state."""
        return self._purses[state.rollout.key, state.index == 0]


class Purse:
    """What may be written about one response."""

    def __init__(self, tokens: int, longest: int) -> None:
        self._left, self._longest = tokens, longest
        self._under_way = 0
        self._next = asyncio.Lock()  # whoever asked first goes first
        self._changed = asyncio.Event()

    async def take(self) -> bool:
        """Whether the response's next state may be judged; then `give_back`. To be asked in order of cut.

        Where the longest judgement might not fit, those under way are waited for.
        """
        async with self._next:
            while self._left < self._longest and self._under_way:
                self._changed.clear()
                await self._changed.wait()
            if self._left < self._longest:
                return False
            self._left -= self._longest
            self._under_way += 1
            return True

    def give_back(self, written: int) -> None:
        """A judgement that `take` allowed is done, with so many tokens."""
        self._left += self._longest - written
        self._under_way -= 1
        self._changed.set()


def dealt(tokens: int, count: int, least: int) -> list[int]:
    """`tokens` dealt over `count` in equal parts of `least` or more; where there are too few, some that are
    evenly spread have none."""
    served = min(count, tokens // least)
    return [
        tokens // served if (i + 1) * served // count > i * served // count else 0
        for i in range(count)
    ]  # fmt: skip
