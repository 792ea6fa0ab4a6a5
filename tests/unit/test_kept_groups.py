"""Groups through a checkpoint's files, and to another number of ranks."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from genac_megatron.environments.base import Step
from genac_megatron.records import Completion, Judgement, Prompt, Rollout, State
from genac_megatron.stages.ahead import Batches
from genac_megatron.stages.conversations import Conversation
from genac_megatron.stages.kept_groups import group_of, group_row, keep_groups, kept_groups
from genac_megatron.stages.rollouts import Group
from genac_megatron.training.layout import World
from tests.unit.test_conversations import MESSAGES, PROMPT, Direct, actor, turn


def conversation(sample: int, prompt: Prompt) -> Rollout:
    environment = Direct(lambda n, _: Step("on" * n, done=n == 3, outcome=0.25, parts={"seen": 1.0}))

    async def speak(talk: Conversation, most: int) -> Completion:
        said = turn(f"say {sample}", most, version=sample + len(talk.said))
        return dataclasses.replace(said, cached=len(talk.ids) - 2)

    talk = Conversation(actor(), environment, prompt, sample)  # type: ignore[arg-type]
    rollout = asyncio.run(talk.play(speak))
    rollout.outcome, rollout.parts, rollout.critic_outcome = 0.1 + 0.2, {"seen": 3.0}, 0.5
    return rollout


def group(number: int = 0) -> Group:
    """Two conversations, whose prompt state has one judgement."""
    more = {"opening": "abc", "success": "it opens", "ids": (1, 2, 3)}
    prompt = dataclasses.replace(PROMPT, id=f"train/{number}", **more)
    rollouts = [conversation(sample, prompt) for sample in range(2)]
    experts = np.arange(12, dtype=np.uint8).reshape(3, 2, 2)
    said = Completion((5, 6), (-0.125, -1 / 3), "stop", ((2, 1), (3, 1)), experts)
    first = State(Rollout(prompt, 0, Completion((), (), "stop"), ""), 0, 0, 4)
    shared = Judgement(first, (9, 9), said, "7", 0.7, 0.69, 0.7)
    later = [
        [Judgement(State(r, 1, 4, 9), (8,), said, "", None, skipped=True, certain=1.0)] for r in rollouts
    ]
    return Group(prompt, rollouts, [[shared, *own] for own in later], [own[0] for own in later])


def shown(one: Group) -> Any:
    """All that is in it, and what of it is one object."""
    every = [j for judgements in one.judgements for j in judgements] + one.finals
    named = {id(j): n for n, j in enumerate(every)}
    of = [next((n for n, r in enumerate(one.rollouts) if r is j.state.rollout), None) for j in every]
    experts = [None if j.completion.experts is None else j.completion.experts.tolist() for j in every]
    caches = [r.completion.cached for r in one.rollouts]
    return one, [named[id(j)] for j in every], of, experts, caches


def test_a_group_comes_back_as_it_was() -> None:
    wanted = group()
    found = group_of(json.loads(json.dumps(group_row(wanted))), Prompt("train/0", MESSAGES, "begin", ""))
    assert shown(found) == shown(wanted)
    assert found.prompt.opening == "abc"
    assert all(rollout.prompt is found.prompt for rollout in found.rollouts)


def test_another_number_of_ranks_takes_them_over(tmp_path: Path) -> None:
    """Five prompts of two ranks become those of three; counts are taken over once."""
    groups = [group(n) for n in range(5)]
    for rank in range(2):
        keep_groups(tmp_path, World(rank, 2, rank), {7: groups[rank::2]}, {"tokens/rollout": 10.0 + rank})
    counts, found = 0.0, dict[int, str]()
    for rank in range(3):
        steps, spent = kept_groups(tmp_path, World(rank, 3, rank))
        rows = steps[7]
        mine = [rows[place] for place in sorted(rows)][rank::3]
        found |= {rank + 3 * n: row["prompt"]["opening"] for n, row in enumerate(mine)}
        assert [len(row["rollouts"]) for row in mine] == [2] * len(mine)
        assert rows.keys() == set(range(5))
        counts += spent.get("tokens/rollout", 0.0)
    assert sorted(found) == list(range(5))
    assert counts == 21.0


def test_nothing_under_way_leaves_nothing(tmp_path: Path) -> None:
    keep_groups(tmp_path, World(0, 1, 0), {}, {})
    assert list(tmp_path.iterdir()) == []
    assert kept_groups(tmp_path, World(0, 1, 0)) == ({}, {})


def test_late_verifications_of_what_is_under_way_are_in_the_checkpoint(tmp_path: Path) -> None:
    """They are counted where the trainer next waits, or saves. The run is `SimpleNamespace` here."""
    spent: dict[str, float] = {}
    world, task = World(0, 1, 0), SimpleNamespace(late=3)
    run: Any = SimpleNamespace(
        at=SimpleNamespace(cursor=0), serving=SimpleNamespace(), engines={}, task=task, world=world
    )
    run.spent, run.count = spent, lambda figures: spent.update(figures)
    loop: Any = SimpleNamespace(resumed=None)
    batches = Batches(run, SimpleNamespace(overlap=2), loop)  # type: ignore[arg-type]
    batches._mark = 1
    loop.beside(tmp_path)
    assert kept_groups(tmp_path, world)[1] == {"verify/late": 2.0}


@pytest.mark.parametrize(("overlap", "why"), [(0, ", as overlap is off now"), (1, "")])
def test_what_is_not_taken_over_is_said_and_its_cost_counted(tmp_path: Path, overlap: int, why: str) -> None:
    """`overlap` is off, or the recipe has other sizes. The run is `SimpleNamespace` here."""
    world, told, spent = World(0, 1, 0), list[str](), dict[str, float]()
    keep_groups(tmp_path, world, {3: [group()], 4: [group()]}, {"tokens/rollout": 10.0})
    at, progress = SimpleNamespace(cursor=0), SimpleNamespace(note=told.append)
    run: Any = SimpleNamespace(at=at, serving=SimpleNamespace(), world=world, progress=progress)
    run.together, run.count = lambda act: act(), spent.update
    rollout = SimpleNamespace(prompts=5, samples=2)
    stage: Any = SimpleNamespace(overlap=overlap, name="ppo", steps=9, rollout=rollout)
    Batches(run, stage, SimpleNamespace(resumed=tmp_path))  # type: ignore[arg-type]
    assert told == [
        "[ppo] 0 of the 2 batches that were generated ahead are taken over from the checkpoint; the others "
        f"are generated again{why}"
    ]
    assert spent == {"tokens/rollout": 10.0}
