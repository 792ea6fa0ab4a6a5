"""The budget of critic tokens: never exceeded; neither length nor speed decides which states are judged."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genac_megatron.critic.icc import IccState
from genac_megatron.recipe.schema import JudgingConfig, StatesConfig
from genac_megatron.records import Completion, Judgement, Prompt, Request, Rollout
from genac_megatron.stages.budget import Budget, dealt
from genac_megatron.stages.judging import Judge
from genac_megatron.tasks.tokenizer import load_tokenizer

TINY = load_tokenizer("builtin:tiny")
LONGEST = 9


@given(st.integers(0, 500), st.integers(1, 40), st.integers(1, 30))
def test_dealing_gives_equal_parts_or_to_some(tokens: int, count: int, least: int) -> None:
    parts = dealt(tokens, count, least)
    assert len(parts) == count
    assert sum(parts) <= tokens
    given_to = [part for part in parts if part]
    assert len(given_to) == min(count, tokens // least)
    assert len(set(given_to)) < 2
    assert all(part >= least for part in given_to)
    if given_to:
        assert tokens - sum(parts) < len(given_to)


class StandInCritic:
    """A critic's engine: how much it says of a state is the state's, how soon it says it is `delay`'s."""

    def __init__(self, delay: random.Random) -> None:
        self.delay = delay

    async def complete(self, request: Request) -> Completion:
        for _ in range(self.delay.randrange(8)):
            await asyncio.sleep(0)
        ids = (5,) * random.Random(f"{request.key}").randint(1, LONGEST)
        return Completion(ids, (-1.0,) * len(ids), "stop")

    async def warm(self, ids: tuple[int, ...], key: str) -> None:
        pass


def judged(tokens: int, lines: list[list[int]], order: int) -> tuple[list[list[Judgement]], Budget]:
    """Judgements of groups of responses of so many lines, which come and are answered in a chance order."""
    chance = random.Random(order)
    config = JudgingConfig(
        template="brief", max_new_tokens=LONGEST, states=StatesConfig(min_segment=2, max_states=9)
    )
    engine: Any = StandInCritic(chance)
    judge = Judge(engine, TINY, TINY, config, IccState(0.5), (), 64, (0,), budget=Budget(tokens))
    groups = []
    for number, counts in enumerate(lines):
        prompt = Prompt(f"train/{number}", (), "p", None)
        ids = [tuple(TINY.encode("a b\n" * count, add_special_tokens=False)) for count in counts]
        groups.append(
            [
                Rollout(prompt, n, Completion(each, (-1.0,) * len(each), "stop"), "")
                for n, each in enumerate(ids)
            ]
        )

    async def one(rollout: Rollout, shared: asyncio.Future[Judgement]) -> list[Judgement]:
        for _ in range(chance.randrange(20)):
            await asyncio.sleep(0)
        return await judge.judge_response(rollout, shared)

    async def run() -> list[list[Judgement]]:
        assert judge.budget is not None
        judge.budget.deal([[r.key for r in group] for group in groups], LONGEST)
        waiting = []
        for group in groups:
            shared = asyncio.ensure_future(judge.judge_prompt(group[0].prompt, group[0].sample))
            waiting += [one(rollout, shared) for rollout in group]
        return list(await asyncio.gather(*waiting))

    assert judge.budget is not None
    return asyncio.run(run()), judge.budget


def taken(judgements: list[Judgement]) -> list[bool]:
    return [not judgement.skipped for judgement in judgements]


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 900),
    st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=4), min_size=1, max_size=4),
    st.integers(0, 99),
)
def test_neither_order_nor_length_decides_with_a_stand_in_for_the_critic(
    tokens: int, lines: list[list[int]], order: int
) -> None:
    found, budget = judged(tokens, lines, order)
    every = {id(j): j for judgements in found for j in judgements}.values()
    assert sum(len(j.completion.ids) for j in every) == budget.spent <= tokens
    again, _ = judged(tokens, lines, order + 1)
    assert [taken(a) for a in found] == [taken(b) for b in again], "whoever comes first"
    for judgements in found:
        asked = taken(judgements[1:])
        assert asked == sorted(asked, reverse=True), "the first ones, in order of cut"
    # The first response goes on for three more lines: what it had judged before stays as it was.
    longer, _ = judged(tokens, [[lines[0][0] + 3, *lines[0][1:]], *lines[1:]], order)
    shorter = taken(found[0])
    assert taken(longer[0])[: len(shorter)] == shorter
    assert [taken(a) for a in found[1:]] == [taken(b) for b in longer[1:]]


@pytest.mark.parametrize("order", range(4))
def test_late_finishers_have_as_much_as_early_ones_with_a_stand_in_for_the_critic(order: int) -> None:
    found, _ = judged(4 * (LONGEST + 3 * 2 * LONGEST), [[6, 2, 6]] * 4, order)
    for judgements in found:
        asked = sum(taken(judgements))
        assert asked >= min(len(judgements), 3), "two judgements each at their longest, and the prompt's"


def test_with_too_little_for_all_some_prompts_are_judged_with_a_stand_in_for_the_critic() -> None:
    found, _ = judged(2 * LONGEST, [[3, 3]] * 4, 0)
    assert sum(taken(judgements)[0] for judgements in found[::2]) == 2
    assert not any(any(taken(judgements)[1:]) for judgements in found)
