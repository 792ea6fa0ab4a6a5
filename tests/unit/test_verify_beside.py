"""Verifying holds nothing up: neither the event loop, nor other responses, nor the critic's requests."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from genac_megatron.critic.icc import IccState
from genac_megatron.recipe.schema import JudgingConfig, RolloutConfig, StatesConfig
from genac_megatron.records import Completion, Prompt, Request
from genac_megatron.stages.judging import Judge
from genac_megatron.stages.rollouts import Generator, generate
from genac_megatron.tasks.base import FixedTask, Problem
from genac_megatron.tasks.tokenizer import load_tokenizer
from genac_megatron.tasks.workers import BESIDE

TINY = load_tokenizer("builtin:tiny")
LIMIT_S = 60.0


class WaitingTask(FixedTask):
    """A task whose verifier is done when the event loop has got on, and two responses are at it."""

    def __init__(self) -> None:
        super().__init__(TINY, [Problem("a problem", "1")], [])
        self.go = threading.Event()  # set from the event loop
        self.both = threading.Barrier(BESIDE)

    def verify(self, prompt: Prompt, text: str) -> float:
        self.both.wait(LIMIT_S)
        return float(self.go.wait(LIMIT_S))


@pytest.fixture
def task() -> Iterator[WaitingTask]:
    made = WaitingTask()
    yield made
    made.close()


def test_the_event_loop_goes_on_and_responses_are_verified_beside_one_another(task: WaitingTask) -> None:
    async def run() -> list[float]:
        verified = asyncio.gather(
            *(task.verify_beside(task.prompt("train", 0), "x") for _ in range(2 * BESIDE))
        )
        for _ in range(20):
            await asyncio.sleep(0.001)
        assert not verified.done()
        task.go.set()
        return list(await verified)

    assert BESIDE > 1
    assert asyncio.run(run()) == [1.0] * 2 * BESIDE


class StandInEngine:
    """What an actor's and a critic's engine answer; `told` after each request."""

    def __init__(self, text: str, told: Callable[[int], None] = lambda count: None) -> None:
        self.ids = (*TINY.encode(text, add_special_tokens=False), TINY.eos_token_id)
        self.asked: list[str] = []
        self.told = told

    async def complete(self, request: Request) -> Completion:
        self.asked.append(request.key)
        self.told(len(self.asked))
        return Completion(self.ids, (-0.5,) * len(self.ids), "stop", ((1, len(self.ids)),))

    async def warm(self, ids: tuple[int, ...], key: str) -> None:
        pass

    def deal(self, places: dict[str, int]) -> None:
        pass


def test_the_critic_is_asked_before_any_verifier_is_done_with_stand_ins_for_engines(
    task: WaitingTask,
) -> None:
    every = 1 + 4 * 3  # the prompt state, and three more of each response
    critic = StandInEngine("<answer>5</answer>", lambda count: task.go.set() if count == every else None)
    states = StatesConfig(min_segment=2, max_states=4)
    config = JudgingConfig(template="brief", max_new_tokens=9, states=states)
    judge: Any = Judge(critic, TINY, TINY, config, IccState(0.5), (), 64, (0, "judge"))  # type: ignore[arg-type]
    actor: Any = StandInEngine("a b c\nd a b\nc d a\nb c d\n")
    made = Generator(actor, TINY, task, RolloutConfig(max_new_tokens=17), (), (0,), judge)
    (group,) = generate(made, [task.prompt("train", 0)], 4)
    assert [len(judgements) for judgements in group.judgements] == [4] * 4
    assert len(critic.asked) == every
    assert [r.outcome for r in group.rollouts] == [1.0] * 4, "no verifier waited in vain for the critic's"
