"""Splits never meet, training order is a seeded permutation per epoch."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genac_megatron.errors import InputError
from genac_megatron.recipe.tasks import StateTrackingTask
from genac_megatron.tasks import make_task
from genac_megatron.tasks.base import GeneratedProblems, Problem, split_problems
from genac_megatron.tasks.tokenizer import load_tokenizer

TINY = load_tokenizer("builtin:tiny")


@given(seed=st.integers(0, 2**31), space=st.integers(8, 40), heldout=st.integers(1, 6))
@settings(deadline=None)
def test_generated_splits_never_meet_in_a_small_space(seed: int, space: int, heldout: int) -> None:
    def draw(n: int) -> Problem:
        return Problem(f"problem  {(n * 7919 + seed) % space}", reference=n)

    problems = GeneratedProblems(draw, train_size=300, heldout_size=heldout)
    held = {problem.key for problem in problems.heldout}
    trained = {problems.train(index).key for index in range(300)}
    assert len(held) == heldout
    assert not held & trained
    assert len(trained) == space - heldout  # what is not held out is trained on
    assert problems.train(17) == problems.train(17)


def test_a_space_that_is_too_small_is_an_input_error() -> None:
    def three(n: int) -> Problem:
        return Problem(str(n % 3), reference=0)

    with pytest.raises(InputError, match="3 found for heldout_size 4"):
        GeneratedProblems(three, train_size=10, heldout_size=4)
    with pytest.raises(InputError, match="none is left to train on"):
        GeneratedProblems(three, train_size=10, heldout_size=3).train(0)


texts = st.lists(st.text(alphabet="ab \n", max_size=4), max_size=30)


@given(train=texts, heldout=texts, size=st.integers(1, 5), seed=st.integers(0, 99))
def test_fixed_splits_never_meet(train: list[str], heldout: list[str], size: int, seed: int) -> None:
    for given_heldout in (None, heldout):
        problems = [Problem(text, 0) for text in train]
        held = None if given_heldout is None else [Problem(text, 0) for text in given_heldout]
        try:
            kept, out = split_problems(problems, held, size, seed, "here", [])
        except InputError:
            held_keys = set() if held is None else {p.key for p in held}
            left = {p.key for p in problems} - held_keys
            assert not left or held == [] or len(left) <= size  # it had a reason
            continue
        kept_keys, out_keys = [p.key for p in kept], [p.key for p in out]
        assert kept
        assert out
        assert len(out) <= size
        assert not set(kept_keys) & set(out_keys)
        assert len(set(kept_keys)) == len(kept)
        assert len(set(out_keys)) == len(out)


def test_train_index_is_a_new_permutation_each_epoch() -> None:
    config = StateTrackingTask(kind="state_tracking", train_size=50, heldout_size=4)
    task = make_task(config, TINY, 0)
    first = [task.train_index(3, cursor) for cursor in range(50)]
    second = [task.train_index(3, cursor) for cursor in range(50, 100)]
    assert sorted(first) == sorted(second) == list(range(50))
    assert first != second != [task.train_index(4, cursor) for cursor in range(50, 100)]
    assert [task.train_index(3, cursor) for cursor in range(50)] == first  # going back gives the same
    fresh = make_task(config, TINY, 0)
    assert fresh.train_index(3, 77) == second[27]  # a resumed run needs no history


def test_prompts_outside_the_split_are_index_errors() -> None:
    task = make_task(StateTrackingTask(kind="state_tracking", train_size=5, heldout_size=4), TINY, 0)
    with pytest.raises(IndexError):
        task.prompt("heldout", 4)
    with pytest.raises(IndexError):
        task.prompt("train", -1)
