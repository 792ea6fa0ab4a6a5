"""Chained arithmetic: verifier, parser, and the teacher's exactness against plain computing and counting."""

from __future__ import annotations

import random
import re
import string

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
    steps = tuple(draw(st.lists(step, min_size=1, max_size=8)))
    return Chain(draw(DIGIT), steps, "".join(draw(st.permutations(string.ascii_lowercase)))[: len(steps)])


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
        assert line == f"{chain.names[number - 1]} {sign} {operand} : {computed(chain, chain.start, number)}"


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
def test_the_trace_says_whether_the_response_would_still_end_right(
    chain: Chain, seed: int, data: st.DataObject
) -> None:
    """Against both ways computed to the end; every line of it is right arithmetic from the line before."""
    teacher, prompt = ChainedArithmeticTeacher(0.4, 3.0), as_prompt(chain)
    text = teacher.demonstrate(prompt, random.Random(seed))
    kept = data.draw(st.integers(1, len(chain.steps) + 1))  # whole lines, the start line among them
    partial = "".join(f"{line}\n" for line in text.splitlines()[:kept])
    step, value = kept - 1, int(partial.split()[-1])
    right = ChainedArithmeticTeacher(0.0, 3.0).demonstrate(prompt, RNG).splitlines()[:-1]
    fine = computed(Chain(value, chain.steps[step:]), value) == int(prompt.reference)

    trace, score = teacher.trace(prompt, partial, 0.6, RNG)
    head, *lines = trace.split("\n")
    assert head == f"{'step ' + chain.names[step - 1] if step else 'start'} value {value}"
    assert lines[:kept] == right[:kept]
    assert lines[kept].startswith(f"value - {value} : ")
    assert (lines[-1] == f"left {' '.join(chain.names[step:]) or '-'}") == fine
    digit = chain.start
    for number, line in enumerate(lines[1:-1] if fine else lines[1:], 1):
        _, sign, operand, _, after, *verdict = line.split()
        assert int(after) == computed(Chain(0, ((sign, int(operand)),)), digit)
        digit = int(after)
        assert verdict == ([] if number < kept else ["bad" if digit else "ok"])
        if number > kept:
            assert line[0] == chain.names[number - 2]
    assert score == round(10 * chances(chain, 0.6 ** (1 / 3.0))[step][value])


def test_a_slip_that_a_product_forgets_is_seen_to_be_none() -> None:
    chain = Chain(7, (("+", 4), ("-", 6), ("*", 5), ("-", 8)))  # 1, 5, 5, 7
    teacher, prompt = ChainedArithmeticTeacher(0.0, 4.0), as_prompt(chain)
    odd, even = "start : 7\na + 4 : 3\n", "start : 7\na + 4 : 2\n"
    right = "start : 7\na + 4 : 1"
    chance = chances(chain, 0.9)[1][3]
    assert 0.7 < chance < 0.9
    assert teacher.trace(prompt, odd, 0.9**4, RNG) == (
        f"step a value 3\n{right}\nvalue - 3 : 8 bad\nb - 0 : 8 bad\nc * 5 : 0 ok\nleft b c d",
        round(10 * chance),
    )
    trace, score = teacher.trace(prompt, even, 0.99, RNG)
    assert trace == f"step a value 2\n{right}\nvalue - 2 : 9 bad\nb - 0 : 9 bad\nc * 5 : 5 bad\nd - 0 : 5 bad"
    assert score == 0
    done = f"{odd}b - 6 : 7\nc * 5 : 5\nd - 8 : 7\nanswer : 7"
    words = f"step d value 7\n{right}\nb - 6 : 5\nc * 5 : 5\nd - 8 : 7\nvalue - 7 : 0 ok\nleft -"
    assert teacher.trace(prompt, done, 0.1, RNG) == (words, 10)
    assert teacher.trace(prompt, done[:-1] + "8", 0.9, RNG)[1] == 0


def test_a_line_that_is_cut_is_not_looked_at() -> None:
    chain = Chain(7, (("+", 4), ("*", 5)))
    assert survey(chain, "") == Standing(0, 7)
    assert survey(chain, "start : 7\na + 4") == Standing(0, 7)
    assert survey(chain, "start : 7\na + 4 : 3") == Standing(1, 3)
    assert survey(chain, "start : 7\nb + 4 : 3\n") == Standing(0, 7, sound=False)
    whole = "start : 7\na + 4 : 1\nb * 5 : 5\nanswer : 5"
    assert survey(chain, whole) == survey(chain, whole + "\n") == Standing(2, 5, ended=True)
    assert not survey(chain, whole + "\nanswer : 5\n").sound


@given(chains(), st.text(alphabet="answer start:\n\t0123456789+-*<>", max_size=80), st.floats(0, 1))
def test_the_trace_takes_any_partial_text(chain: Chain, partial: str, p_bar: float) -> None:
    trace, score = ChainedArithmeticTeacher(0.0, 3.0).trace(as_prompt(chain), partial, p_bar, RNG)
    assert 0 <= score <= 10
    for line in trace.split("\n"):
        form = r"(step [a-z]|start) value \d|start : \d|([a-z]|value) [-+*] \d : \d( ok| bad)?"
        form += r"|left( [a-z])+|left -|part bad"
        assert re.fullmatch(form, line), line


def test_the_longest_judgement_has_room_in_the_study() -> None:
    """Off in the first line, back in the end: what judging.max_new_tokens must hold, p and score too."""
    chain = Chain(1, (("+", 1),) * 4 + (("*", 5),))
    trace, _ = ChainedArithmeticTeacher(0.0, 3.5).trace(as_prompt(chain), "start : 3\n", 0.5, RNG)
    assert trace.endswith("left a b c d e")
    assert len(completion_ids(TINY, f"{trace}\np 0.50\n<answer>10</answer>")) <= 72
