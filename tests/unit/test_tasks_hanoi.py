"""The exact teacher of tower_of_hanoi, against reasoning-gym's own execution of plans."""

from __future__ import annotations

import random

import pytest

from genac_megatron.recipe.tasks import ReasoningGymTask
from genac_megatron.records import Prompt
from genac_megatron.tasks import make_task
from genac_megatron.tasks.base import Task
from genac_megatron.tasks.hanoi import HanoiTeacher, Puzzle, read_plan
from genac_megatron.tasks.tokenizer import load_tokenizer

TINY = load_tokenizer("builtin:tiny")
TEACHER = HanoiTeacher()


@pytest.fixture(scope="module")
def task() -> Task:
    config = ReasoningGymTask.model_validate(
        {"kind": "reasoning_gym", "name": "tower_of_hanoi", "binary": False, "train_size": 200,
         "heldout_size": 30, "options": {"min_disks": 2, "max_disks": 4, "min_pegs": 3, "max_pegs": 4}}
    )  # fmt: skip
    return make_task(config, TINY, 3)


def prompts(task: Task) -> list[Prompt]:
    return [task.prompt("heldout", index) for index in range(task.heldout_size)]


def test_a_demonstration_is_a_shortest_plan(task: Task) -> None:
    assert isinstance(task.teacher, HanoiTeacher)
    for prompt in prompts(task):
        text = TEACHER.demonstrate(prompt, random.Random(0))
        assert task.verify(prompt, text) == 1.0
        assert len(read_plan(text)) <= prompt.reference["metadata"]["solution_length"]


def test_random_plans_are_judged_as_reasoning_gym_executes_them(task: Task) -> None:
    """It gives 0 for an illegal move, 0.05 where the end is not reached, else fewest / made."""
    rng = random.Random(1)
    seen = set()
    for prompt in prompts(task) * 4:
        puzzle = Puzzle.of(prompt)
        at, lines, legal = puzzle.first, [], True
        for _ in range(rng.randint(1, 6)):
            disk = rng.randint(1, puzzle.disks)
            move = (disk, at[disk - 1] if rng.random() < 0.9 else 1, rng.randint(1, puzzle.pegs))
            lines.append("Move disk {} from Peg {} to Peg {}".format(*move))
            after = puzzle.apply(at, move)
            legal = legal and after is not None
            if after is None:
                break
            at = after
        text = "\n".join(("<answer>", *lines, "</answer>"))
        score = task.verify(prompt, text)
        solved = legal and not puzzle.solve(at)
        assert (score > 0) == legal, text
        assert (score > 0.05) == solved
        seen.add((legal, solved))
        words, verdict = TEACHER.trace(prompt, text, 0.7, rng)
        assert ("illegal" in words) != legal
        if not solved:
            assert verdict == 0  # the plan is closed
    assert {(True, False), (False, False)} <= seen


def test_a_plan_that_goes_well_is_worth_more_with_every_move(task: Task) -> None:
    for prompt in prompts(task):
        text = TEACHER.demonstrate(prompt, random.Random(0))
        lines = text.split("\n")
        parts = ["\n".join(lines[:n]) + "\n" for n in range(len(lines))]
        scores = [TEACHER.trace(prompt, part, 0.5, random.Random(0))[1] for part in parts]
        assert scores == sorted(scores)
        assert scores[0] == 5, "the prompt state is worth p_bar"
        assert scores[-1] == 10


def test_a_detour_costs_its_share_and_half_a_line_is_not_read(task: Task) -> None:
    prompt = next(p for p in prompts(task) if p.reference["metadata"]["num_pegs"] == 3)
    puzzle = Puzzle.of(prompt)
    first, second, third = ((1, puzzle.start, puzzle.target), (1, puzzle.target, puzzle.start), None)
    lines = ["Move disk {} from Peg {} to Peg {}".format(*move) for move in (first, second)]
    there_and_back = "<answer>\n" + "\n".join(lines) + "\n"
    assert read_plan(there_and_back) == [first, second]
    assert read_plan(there_and_back + "Move disk 1 fr") == [first, second]
    assert read_plan(there_and_back + "Move it\n") == [first, second, third]
    best = len(puzzle.solve(puzzle.first))
    _, straight = TEACHER.trace(prompt, "", 0.98, random.Random(0))
    _, detour = TEACHER.trace(prompt, there_and_back, 0.98, random.Random(0))
    assert straight == 10
    assert detour == round(10 * 0.98 * best / (best + 2))
