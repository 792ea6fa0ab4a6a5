"""Chained arithmetic: verifier, parser, and the teacher's exactness against plain computing and counting."""

from __future__ import annotations

import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genac_megatron.recipe.tasks import ChainedArithmeticTask
from genac_megatron.records import Prompt
from genac_megatron.tasks import make_task
from genac_megatron.tasks.chained_arithmetic import (
    Chain,
    ChainedArithmeticTeacher,
    Standing,
    chances,
    parse_chain,
    survey,
)
from genac_megatron.tasks.tokenizer import completion_ids, load_tokenizer

TINY = load_tokenizer("builtin:tiny")
RNG = random.Random(0)
DIGIT = st.integers(0, 9)


@st.composite
def chains(draw: st.DrawFn, signs: str = "+-*") -> Chain:
    step = st.tuples(st.sampled_from(signs), DIGIT)
    return Chain(draw(DIGIT), tuple(draw(st.lists(step, min_size=1, max_size=8))))


def computed(chain: Chain, value: int, steps: int | None = None) -> int:
    """Python's own arithmetic, not the task's."""
    for sign, operand in chain.steps[:steps]:
        value = eval(f"{value} {sign} {operand}") % 10
    return value


def as_prompt(chain: Chain) -> Prompt:
    return Prompt("train/0", (), chain.text(), str(computed(chain, chain.start)))


def task(**more: object):  # type: ignore[no-untyped-def]
    config = {"kind": "chained_arithmetic", "train_size": 200, "heldout_size": 16, **more}
    return make_task(ChainedArithmeticTask.model_validate(config), TINY, 0)


@given(chains())
def test_the_problem_text_says_the_whole_chain(chain: Chain) -> None:
    assert parse_chain(chain.text()) == chain
    assert chain.values() == [computed(chain, chain.start, n) for n in range(len(chain.steps) + 1)]


@given(chains(), st.integers(0, 2**31))
def test_a_demonstration_without_slips_is_exact(chain: Chain, seed: int) -> None:
    teacher, prompt = ChainedArithmeticTeacher(0.0, 3.0), as_prompt(chain)
    start, *lines, answer, nothing = teacher.demonstrate(prompt, random.Random(seed)).split("\n")
    assert nothing == ""
    assert start == f"start : {chain.start}"
    assert answer == f"answer : {prompt.reference}"
    for number, (line, (sign, operand)) in enumerate(zip(lines, chain.steps, strict=True), 1):
        assert line == f"{number} {sign} {operand} : {computed(chain, chain.start, number)}"


def test_the_last_answer_line_is_verified() -> None:
    problem = task()
    prompt = problem.prompt("heldout", 3)
    wrong = str((int(prompt.reference) + 1) % 10)
    assert problem.verify(prompt, f"answer : {prompt.reference}\n") == 1.0
    assert problem.verify(prompt, f"answer {wrong}\nanswer: {prompt.reference} ") == 1.0
    for text in (
        "",
        prompt.reference,
        f"answer : {wrong}",
        f"answer : {prompt.reference}\nanswer",
        "answer : ",
    ):
        assert problem.verify(prompt, text) == 0.0


def test_slips_make_the_share_of_right_answers_that_they_should() -> None:
    """Without products a slip is undone by another alone: by 1/9 of the second, by 8/81 of the third."""
    problem = task(slip_rate=0.2, min_steps=3, max_steps=3, operations="+-")
    rng = random.Random(1)
    prompts = [problem.prompt("train", i % 200) for i in range(4000)]
    right = sum(problem.verify(p, problem.teacher.demonstrate(p, rng)) for p in prompts) / 4000
    assert abs(right - (0.512 + 0.096 / 9 + 0.008 * 8 / 81)) < 0.032  # 4 deviations of 4000 draws


@given(chains(), st.floats(0.3, 1.0), st.data())
@settings(max_examples=60, deadline=None)
def test_chances_are_those_of_the_demonstrations_that_go_on_from_there(
    chain: Chain, sure: float, data: st.DataObject
) -> None:
    """By every way that lines can come out: their chances, summed."""
    short = Chain(chain.start, chain.steps[:3])
    step = data.draw(st.integers(0, len(short.steps)))
    value = data.draw(DIGIT)
    right = computed(short, short.start)

    def counted(number: int, value: int) -> float:
        if number > len(short.steps):
            return float(value == right)
        after = computed(Chain(0, short.steps[number - 1 : number]), value)
        weights = [sure if digit == after else (1 - sure) / 9 for digit in range(10)]
        return sum(weight * counted(number + 1, digit) for digit, weight in enumerate(weights))

    assert chances(short, sure)[step][value] == pytest.approx(counted(step + 1, value), abs=1e-12)


@given(chains(), st.integers(0, 2**31), st.data())
@settings(deadline=None, max_examples=200)
def test_the_trace_goes_both_ways_and_says_whether_they_end_the_same(
    chain: Chain, seed: int, data: st.DataObject
) -> None:
    teacher, prompt = ChainedArithmeticTeacher(0.4, 3.0), as_prompt(chain)
    text = teacher.demonstrate(prompt, random.Random(seed))
    kept = data.draw(st.integers(1, len(chain.steps) + 1))  # whole lines, the start line among them
    partial = "".join(f"{line}\n" for line in text.splitlines()[:kept])
    step, value, count = kept - 1, int(partial.split()[-1]), len(chain.steps)
    right = ChainedArithmeticTeacher(0.0, 3.0).demonstrate(prompt, RNG).splitlines()[:-1]
    off = value != int(right[step].split()[-1])
    rest = Chain(value, chain.steps[step:])
    end = computed(rest, value)
    fine = end == int(prompt.reference)

    wanted = [f"step {step} of {count} value {value}", *right[:kept]]
    wanted[-1] += f" {value} bad" if off else f" {value} ok"
    if off and step < count:
        wanted += [*right[kept:], f"value {value}"]
        wanted += [chain.line(step + n, computed(rest, value, n)) for n in range(1, count - step + 1)]
        wanted[-1] += f" {prompt.reference} ok" if fine else f" {prompt.reference} bad"
    if fine:
        wanted.append(f"left {count - step}")
    trace, score = teacher.trace(prompt, partial, 0.6, RNG)
    assert trace.split("\n") == wanted
    assert score == round(10 * chances(chain, 0.6 ** (1 / 3.0))[step][value])


def test_a_slip_that_a_product_forgets_is_seen_to_be_none() -> None:
    chain = Chain(7, (("+", 4), ("*", 5), ("-", 8)))  # 1, 5, 7
    teacher, prompt = ChainedArithmeticTeacher(0.0, 3.0), as_prompt(chain)
    odd, even = "start : 7\n1 + 4 : 3\n", "start : 7\n1 + 4 : 2\n"
    right = "start : 7\n1 + 4 : 1 %d bad\n2 * 5 : 5\n3 - 8 : 7"
    assert teacher.trace(prompt, odd, 0.512, RNG) == (
        f"step 1 of 3 value 3\n{right % 3}\nvalue 3\n2 * 5 : 5\n3 - 8 : 7 7 ok\nleft 2",
        round(10 * (0.8**2 + 0.2 * 0.2 / 9)),  # both lines right, or a second slip undoes the first
    )
    trace, score = teacher.trace(prompt, even, 0.99, RNG)
    assert trace == f"step 1 of 3 value 2\n{right % 2}\nvalue 2\n2 * 5 : 0\n3 - 8 : 2 7 bad"
    assert score == 0
    done = f"{odd}2 * 5 : 5\n3 - 8 : 7\nanswer : 7"
    words = "step 3 of 3 value 7\nstart : 7\n1 + 4 : 1\n2 * 5 : 5\n3 - 8 : 7 7 ok\nleft 0"
    assert teacher.trace(prompt, done, 0.1, RNG) == (words, 10)
    assert teacher.trace(prompt, done[:-1] + "8", 0.9, RNG)[1] == 0


def test_a_line_that_is_cut_is_not_looked_at() -> None:
    chain = Chain(7, (("+", 4), ("*", 5)))
    assert survey(chain, "") == Standing(0, 7)
    assert survey(chain, "start : 7\n1 + 4") == Standing(0, 7)
    assert survey(chain, "start : 7\n1 + 4 : 3") == Standing(1, 3)
    assert survey(chain, "start : 7\n2 + 4 : 3\n") == Standing(0, 7, sound=False)
    whole = "start : 7\n1 + 4 : 1\n2 * 5 : 5\nanswer : 5"
    assert survey(chain, whole) == survey(chain, whole + "\n") == Standing(2, 5, ended=True)
    assert not survey(chain, whole + "\nanswer : 5\n").sound


@given(chains(), st.text(alphabet="answer start:\n\t0123456789+-*<>", max_size=80), st.floats(0, 1))
def test_the_trace_takes_any_partial_text(chain: Chain, partial: str, p_bar: float) -> None:
    trace, score = ChainedArithmeticTeacher(0.0, 3.0).trace(as_prompt(chain), partial, p_bar, RNG)
    assert 0 <= score <= 10
    for line in trace.split("\n"):
        form = r"step \d+ of \d+ value \d|start : \d( \d (ok|bad))?|\d+ [-+*] \d : \d( \d (ok|bad))?"
        form += r"|value \d|left \d+|part bad"
        assert re.fullmatch(form, line), line


def test_the_longest_judgement_has_room_in_the_study() -> None:
    """Off in the first line, back in the end: what judging.max_new_tokens must hold, answer tag included."""
    chain = Chain(1, (("+", 1),) * 4 + (("*", 5),))
    trace, _ = ChainedArithmeticTeacher(0.0, 3.5).trace(as_prompt(chain), "start : 3\n", 0.5, RNG)
    assert trace.endswith("left 5")
    assert len(completion_ids(TINY, f"{trace}\n<answer>10</answer>")) <= 112
