"""Which of a group's responses are judged, where those whose outcome is certain are left out.

A response's outcome counts as certain where all *other* responses of its group ended alike. What they ended
with is then its baseline, without a word of the critic. Neither the choice nor that baseline looks at the
response's own outcome: so the actor's gradient has no bias by it, and of the responses that it meets the
critic still learns their mean outcome. A group that all ended alike teaches the actor nothing, judged or not;
but to leave out the responses of those groups alone would be to choose by their own outcomes
(tests/unit/test_certain.py sums over every group of a small policy).
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from genac_megatron.records import Completion, Judgement, Prompt, Rollout, State
from genac_megatron.stages.judging import StateJudge


class Others:
    """The outcomes of a group's responses, as they become known."""

    def __init__(self, samples: Sequence[int]) -> None:
        self._missing = set(samples)
        self._known: dict[int, tuple[float, float]] = {}  # by sample: for the actor, for critics
        self._changed = asyncio.Event()

    def tell(self, rollout: Rollout) -> None:
        """A response was verified."""
        self._missing.discard(rollout.sample)
        self._known[rollout.sample] = rollout.outcome, rollout.target
        self._changed.set()
        self._changed = asyncio.Event()

    async def certain(self, sample: int) -> float | None:
        """What critics would have to predict of all others, if they ended alike; None once two differ."""
        while True:
            found = {known for other, known in self._known.items() if other != sample}
            if len(found) > 1:
                return None
            if not self._missing - {sample}:
                return next(iter(found))[1]
            await self._changed.wait()


class PromptState:
    """The judgement of a group's prompt state: one for all its responses, begun when it is first needed."""

    def __init__(self, judge: StateJudge, prompt: Prompt, first: int) -> None:
        self._judge, self._prompt, self._first = judge, prompt, first
        self._begun: asyncio.Future[Judgement] | None = None

    def begin(self) -> asyncio.Future[Judgement]:
        """The judgement under way."""
        if self._begun is None:
            self._begun = asyncio.ensure_future(self._judge.judge_prompt(self._prompt, self._first))
        return self._begun

    async def end(self) -> None:
        """Let go of it."""
        await let_go(self._begun)


async def let_go(task: asyncio.Future[Judgement] | asyncio.Future[list[Judgement]] | None) -> None:
    """Cancel a task: one that nobody waits for any more would tell of its failure on its own."""
    if task is not None:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def left_out(rollout: Rollout, certain: float, *, final: bool) -> list[Judgement]:
    """In the place of a response's judgements: one segment, whose baseline is the outcome that is certain.

    final: and one of the whole response.
    """
    whole = len(rollout.completion.ids)
    states = [State(rollout, 0, 0, whole), *([State(rollout, 1, whole, whole)] if final else [])]
    nothing = Completion((), (), "abort")
    return [
        Judgement(state, (), nothing, "", None, used=certain, skipped=True, certain=certain)
        for state in states
    ]
