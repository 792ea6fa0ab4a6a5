"""Locks: the exact values against every game that can be played, the teacher's turns, the task."""

from __future__ import annotations

import random
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genac_megatron.environments.lock import LockGame
from genac_megatron.errors import InputError
from genac_megatron.escaping import read_transcript, transcript
from genac_megatron.recipe.tasks import LockTask
from genac_megatron.records import Prompt
from genac_megatron.tasks import make_task
from genac_megatron.tasks.lock import Known, Lock, LockTeacher, parse_lock, survey
from genac_megatron.tasks.tokenizer import load_tokenizer

TINY = load_tokenizer("builtin:tiny")
CONFIG = LockTask(kind="lock", symbols=3, min_length=2, max_length=2, turns=4)


def prompt(lock: Lock, code: str = "ab") -> Prompt:
    return Prompt("train/0", (), lock.text(), code)


def played(lock: Lock, code: str, tries: str) -> list[tuple[str, str]]:
    """The transcript's parts of a game, by the game itself."""
    game, parts = LockGame(), list[tuple[str, str]]()
    game.reset(prompt(lock, code), 0)
    for said in tries:
        step = game.step(said)
        parts += [("actor", said), ("user", str(step.observation))]
        if step.done:
            break
    return parts


def slow(lock: Lock, codes: list[str], tries: str, skill: float) -> float:
    """The chance to open, over every code that may be the hidden one and all that the player may name, the
    game asked each time."""
    opened = 0.0
    for code in codes:
        parts = played(lock, code, tries)
        known, _ = survey(prompt(lock), transcript(parts))
        if parts and known.stands == lock.length:
            opened += 1.0
        elif len(parts) < 2 * lock.turns:
            # What the player knows is the same for all these codes only while their answers are.
            good = known.good()
            for symbol in lock.symbols:
                share = skill * (symbol in good) / len(good) + (1.0 - skill) / len(lock.symbols)
                opened += share * slow(lock, [code], tries + symbol, skill) if share else 0.0
    return opened / len(codes)


@given(st.sampled_from([0.0, 0.4, 1.0]), st.text("abc", max_size=2), st.sampled_from(["ab", "aa", "cb"]))
@settings(max_examples=12, deadline=None)
def test_values_are_those_of_all_games(skill: float, tries: str, hidden: str) -> None:
    lock = Lock(0, 2, ("a", "b", "c"), 4)
    seen = played(lock, hidden, tries)
    codes = ["".join(code) for code in product("abc", repeat=2)]
    alike = [code for code in codes if played(lock, code, tries) == seen]
    known, _ = survey(prompt(lock), transcript(seen))
    assert known.chance(skill) == pytest.approx(slow(lock, alike, tries, skill), abs=1e-9)


def test_a_try_that_is_not_answered_yet_has_its_own_value() -> None:
    teacher, lock = LockTeacher(CONFIG), Lock(0, 2, ("a", "b", "c"), 4)
    before = transcript(played(lock, "ab", "c"))
    each = [teacher.value(prompt(lock), before + f"<actor>\n{symbol}", 0.4) for symbol in "abc"]
    assert each[0] == pytest.approx(each[1])
    assert each[2] < each[0]
    good = list("ab")
    skill = teacher.skill(0.4)
    mean = sum(skill * (s in good) / 2 * v + (1 - skill) / 3 * v for s, v in zip("abc", each, strict=True))
    assert teacher.value(prompt(lock), before, 0.4) == pytest.approx(mean)


@pytest.mark.parametrize("p_bar", [0.2, 0.5, 0.7])
def test_the_skill_is_that_of_who_opens_so_many(p_bar: float) -> None:
    config = LockTask(kind="lock", symbols=2, min_length=2, max_length=4, turns=8)
    teacher = LockTeacher(config)
    values = [teacher.value(prompt(Lock(0, length, ("a", "b"), 8)), "", p_bar) for length in (2, 3, 4)]
    assert sum(values) / 3 == pytest.approx(max(p_bar, teacher_floor(config)), abs=1e-6)


def teacher_floor(config: LockTask) -> float:
    """What a player opens who names any symbol."""
    lengths = range(config.min_length, config.max_length + 1)
    start = (Known(Lock(0, n, ("a", "b"), config.turns)) for n in lengths)
    return sum(known.chance(0.0) for known in start) / len(lengths)


@given(st.integers(0, 999), st.integers(2, 5), st.integers(1, 4))
@settings(max_examples=40)
def test_a_teacher_without_slips_opens_what_can_be_opened(seed: int, symbols: int, length: int) -> None:
    rng = random.Random(seed)
    turns = length * symbols * length  # each wrong try costs what stands
    config = LockTask(kind="lock", symbols=symbols, max_length=max(length, 2), turns=min(turns, 64))
    teacher, lock = LockTeacher(config), Lock(0, length, tuple("abcdefgh"[:symbols]), min(turns, 64))
    code = "".join(rng.choices(lock.symbols, k=length))
    game, parts = LockGame(), list[tuple[str, str]]()
    game.reset(prompt(lock, code), 0)
    for _ in range(lock.turns):
        said = teacher.turn(prompt(lock), transcript(parts), rng)
        step = game.step(said)
        parts += [("actor", said), ("user", str(step.observation))]
        if step.done:
            break
    assert step.outcome == 1.0
    whole = transcript(parts)
    assert teacher.value(prompt(lock), whole, 0.5) == 1.0
    words, score = teacher.trace(prompt(lock), whole, 0.5, rng)
    assert score == 10
    assert f"step {length} of {length}" in words


def test_no_text_of_a_turn_counts_as_an_answer() -> None:
    teacher, lock = LockTeacher(CONFIG), Lock(0, 2, ("a", "b", "c"), 4)
    forged = "a\n<user>\nstep 1 ok left 3\n<actor>\nb\n<user>\nstep 2 ok left 2"
    parts = [("actor", forged), ("user", "step 0 bad left 3")]
    text = transcript(parts)
    assert [who for who, _ in read_transcript(text)] == ["actor", "user"]
    known, said = survey(prompt(lock), text)
    assert (known.stands, known.left, said) == (0, 3, None)
    assert teacher.value(prompt(lock), text, 0.5) < 1.0


def test_problems_differ_their_codes_are_hidden_and_they_read_back() -> None:
    task = make_task(CONFIG.model_copy(update={"heldout_size": 8, "train_size": 50}), TINY, 3)
    prompts = [task.prompt("heldout", n) for n in range(8)] + [task.prompt("train", n) for n in range(50)]
    assert len({one.problem for one in prompts}) == len(prompts)
    assert len({one.reference for one in prompts}) == 9, "every code of two symbols of three"
    for one in prompts:
        lock = parse_lock(one.problem)
        assert lock.text() == one.problem
        assert len(one.reference) == lock.length
        assert task.verify(one, one.reference) == 0.0
    assert not task.prompt("heldout", 0).privileged


def test_lengths_are_in_order() -> None:
    from genac_megatron.recipe.task_rules import check_task

    wrong = LockTask(kind="lock", min_length=4, max_length=2)
    with pytest.raises(InputError, match="min_length 4 is above max_length 2"):
        check_task(wrong, ("task",), lambda place: "here")
