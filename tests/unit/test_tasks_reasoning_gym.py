"""reasoning-gym tasks: names, options, splits, scores."""

from __future__ import annotations

import time

import pytest

from genac_megatron.errors import InputError
from genac_megatron.recipe.tasks import ReasoningGymTask
from genac_megatron.tasks import make_task
from genac_megatron.tasks.reasoning_gym import ReasoningGym
from genac_megatron.tasks.tokenizer import load_tokenizer

TINY = load_tokenizer("builtin:tiny")
SMALL = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}  # a few hundred problems in all


def config(**more: object) -> ReasoningGymTask:
    fields = {"kind": "reasoning_gym", "name": "chain_sum", "train_size": 400, "heldout_size": 32, **more}
    return ReasoningGymTask.model_validate(fields)


def test_a_small_problem_space_is_split_without_overlap() -> None:
    task = make_task(config(options=SMALL), TINY, 0)
    train = {task.prompt("train", index).problem for index in range(400)}
    heldout = {task.prompt("heldout", index).problem for index in range(32)}
    assert len(heldout) == 32
    assert len(train) < 400  # the space repeats itself, so the split had something to keep apart
    assert not train & heldout


def test_the_same_seed_gives_the_same_prompts() -> None:
    first, again, other = (make_task(config(), TINY, seed).prompt("train", 5) for seed in (0, 0, 9))
    assert first == again
    assert first.problem != other.problem


def test_scores_become_outcomes() -> None:
    task = make_task(config(), TINY, 0)
    prompt = task.prompt("heldout", 0)
    answer = prompt.reference["answer"]
    assert task.verify(prompt, f"<answer>1</answer> no: <answer> {answer} </answer>") == 1.0
    assert task.verify(prompt, f"the answer is {answer}") == 0.0
    assert task.verify(prompt, f"<answer>about {answer}, I think</answer>") == 0.0
    graded = make_task(config(binary=False), TINY, 0)
    assert 0.0 < graded.verify(prompt, f"<answer>about {answer}, I think</answer>") < 1.0


@pytest.mark.parametrize("name", ["countdown", "game_of_life", "propositional_logic", "simple_equations"])
def test_a_scorer_takes_any_text(name: str) -> None:
    task = make_task(config(name=name, train_size=4, heldout_size=2), TINY, 0)
    prompt = task.prompt("train", 0)
    for junk in ("", "{", "[[", "1/0", "x" * 1000, "\x00"):
        assert task.verify(prompt, f"<answer>{junk}</answer>") == 0.0


def test_an_unknown_name_names_the_nearest() -> None:
    with pytest.raises(InputError, match="chain_sum"):
        make_task(config(name="chainsum"), TINY, 0)


def test_wrong_options_are_input_errors() -> None:
    with pytest.raises(InputError, match="terms_min"):
        make_task(config(options={"terms_min": 2}), TINY, 0)
    with pytest.raises(InputError, match=r"task\.options"):
        make_task(config(options={"min_terms": 9, "max_terms": 2}), TINY, 0)


def test_a_hostile_answer_costs_its_time_limit_and_nothing_else(caplog: pytest.LogCaptureFixture) -> None:
    """countdown has sympy evaluate the answer; a tower of powers keeps it busy for hours."""
    task = ReasoningGym(config(name="countdown", train_size=4, heldout_size=2), TINY, 0, limit_s=2.0)
    prompt = task.prompt("train", 0)
    right = f"<answer>{prompt.reference['metadata']['expression']}</answer>"
    began = time.monotonic()
    hostile = "<answer>9**9**9**9</answer>"
    assert [task.verify(prompt, text) for text in (right, hostile, right)] == [1.0, 0.0, 1.0]
    assert time.monotonic() - began < 90  # the limit, and two process starts on a busy machine
    assert task.late == 1
    assert "countdown took longer than 2 s and counts as 0" in caplog.text
