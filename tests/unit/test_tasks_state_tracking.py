"""State tracking: the answer parser, the verifier, the teacher's exactness against a naive simulation."""

from __future__ import annotations

import random
import re
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genac_megatron.critic.states import cut_states, state_text
from genac_megatron.recipe.schema import StatesConfig
from genac_megatron.recipe.tasks import StateTrackingTask
from genac_megatron.records import Completion, Prompt, Rollout
from genac_megatron.tasks import make_task
from genac_megatron.tasks.base import Teacher
from genac_megatron.tasks.state_tracking import (
    FILLERS,
    Puzzle,
    StateTrackingTeacher,
    overwrite,
    parse_answer,
    parse_puzzle,
    write_line,
)
from genac_megatron.tasks.tokenizer import completion_ids, load_tokenizer

TINY = load_tokenizer("builtin:tiny")
RNG = random.Random(0)


@st.composite
def puzzles(draw: st.DrawFn) -> Puzzle:
    names = "abcdefgh"[: draw(st.integers(2, 8))]
    pair = st.sampled_from(list(combinations(names, 2)))
    return Puzzle(tuple(draw(st.permutations(names))), tuple(draw(st.lists(pair, min_size=1, max_size=12))))


def as_prompt(puzzle: Puzzle) -> Prompt:
    reference = " ".join(simulate(puzzle)[-1])
    return Prompt(id="train/0", messages=(), problem=puzzle.text(), reference=reference)


def simulate(puzzle: Puzzle) -> list[list[str]]:
    """The rows by moving list items: slow and plain, not the way the task does it."""
    row, rows = list(puzzle.start), []
    for first, second in puzzle.swaps:
        i, j = row.index(first), row.index(second)
        row[i], row[j] = row[j], row[i]
        rows.append(list(row))
    return rows


def task(slip_rate: float = 0.0, **more: int):  # type: ignore[no-untyped-def]
    config = StateTrackingTask(
        kind="state_tracking", slip_rate=slip_rate, train_size=200, heldout_size=16, **more
    )
    return make_task(config, TINY, 0)


@given(puzzles())
def test_the_problem_text_says_the_whole_puzzle(puzzle: Puzzle) -> None:
    assert parse_puzzle(puzzle.text()) == puzzle
    assert [list(row) for row in puzzle.rows()] == simulate(puzzle)


@given(
    st.text(),
    st.lists(st.sampled_from("abcd"), min_size=1, max_size=4),
    st.sampled_from(["", "\n", "\nso\n"]),
)
def test_the_last_answer_line_counts(before: str, row: list[str], after: str) -> None:
    text = f"{before}\nanswer {' '.join(row)}{after}"
    assert parse_answer(text) == tuple(row)
    assert parse_answer(f"answer z\n{text}") == tuple(row)


@given(st.text(alphabet="answer abcd:\n\t1", max_size=60))
def test_any_text_has_an_outcome(text: str) -> None:
    problem = task()
    prompt = problem.prompt("train", 0)
    outcome = problem.verify(prompt, text)
    assert outcome in (0.0, 1.0)
    assert outcome == float(parse_answer(text) == tuple(prompt.reference.split()))


def test_the_whole_final_row_must_agree() -> None:
    problem = task(objects=4)
    prompt = problem.prompt("heldout", 3)
    row = prompt.reference.split()
    right = f"answer {prompt.reference}"
    assert problem.verify(prompt, right) == 1.0
    assert problem.verify(prompt, f"answer: {prompt.reference} ") == 1.0
    for wrong in (
        f"answer {' '.join(row[:-1])}",
        f"answer {' '.join([*row, row[0]])}",
        f"answer {' '.join([row[1], row[0], *row[2:]])}",
        f"{right}\nanswer",
        f"answers {prompt.reference}",
        prompt.reference,
        "",
    ):
        assert problem.verify(prompt, wrong) == 0.0


@given(puzzles(), st.integers(0, 2**31))
@settings(deadline=None)
def test_a_demonstration_without_slips_is_exact(puzzle: Puzzle, seed: int) -> None:
    teacher = StateTrackingTeacher(slip_rate=0.0, mean_swaps=3.0)
    start, *lines, answer, nothing = teacher.demonstrate(as_prompt(puzzle), random.Random(seed)).split("\n")
    assert nothing == ""
    assert start == f"start : {' '.join(puzzle.start)}"
    assert answer == f"answer : {' '.join(simulate(puzzle)[-1])}"
    assert [line.split(" : ")[1].split() for line in lines] == simulate(puzzle)
    assert [int(line.split()[0]) for line in lines] == list(range(1, len(puzzle.swaps) + 1))


def test_slips_make_the_share_of_right_answers_that_they_should() -> None:
    problem = task(slip_rate=0.2, objects=4, min_swaps=3, max_swaps=3)
    rng = random.Random(1)
    prompts = [problem.prompt("train", i % 200) for i in range(2000)]
    right = sum(problem.verify(p, problem.teacher.demonstrate(p, rng)) for p in prompts) / 2000
    # A lost object never comes back: right are those without a slip, 0.8^3 = 0.512; a slip on a pair of
    # which one is lost already needs a slip before it. 4 deviations of 2000 draws are 0.045.
    assert abs(right - 0.512) < 0.045


@given(puzzles(), st.data())
@settings(deadline=None, max_examples=200)
def test_the_trace_says_how_far_it_is_what_is_there_and_whether_all_is_right(
    puzzle: Puzzle, data: st.DataObject
) -> None:
    prompt = as_prompt(puzzle)
    slips = random.Random(data.draw(st.integers(0, 2**31)))
    text = StateTrackingTeacher(0.3, 3.0).demonstrate(prompt, slips)
    kept = data.draw(st.integers(0, len(puzzle.swaps) + 1))  # whole lines, the start line among them
    partial = "".join(f"{line}\n" for line in text.splitlines()[:kept])
    trace, score = StateTrackingTeacher(0.3, 3.0).trace(prompt, partial, 0.6, RNG)

    done = max(kept - 1, 0)
    rows = [line.split(" : ")[1].split() for line in partial.splitlines()]
    bad = rows[1:] != simulate(puzzle)[:done]
    row = rows[-1] if rows else list(puzzle.start)
    call = " ".join(f"{name} {'+' if name in row else '-'}" for name in sorted(puzzle.start))
    wanted = [
        f"step {done} of {len(puzzle.swaps)} row {' '.join(row)}",
        f"has {call} {'bad' if bad else 'ok'}",
    ]
    left = len(puzzle.swaps) - done
    if not bad:
        wanted.append(f"left {left}")
    assert trace.split("\n") == wanted
    assert score == (0 if bad else round(10 * 0.6 ** (left / 3.0)))


def test_a_slip_loses_one_object_of_the_pair() -> None:
    assert overwrite(("a", "b", "c"), ("a", "b")) == ("b", "b", "c")
    assert overwrite(("a", "b", "c"), ("b", "a")) == ("a", "a", "c")


@given(puzzles(), st.text(alphabet="answer abcd:\n\t123<>/", max_size=80), st.floats(0, 1))
def test_the_trace_takes_any_partial_text(puzzle: Puzzle, partial: str, p_bar: float) -> None:
    trace, score = StateTrackingTeacher(0.0, 3.0).trace(as_prompt(puzzle), partial, p_bar, RNG)
    assert trace
    assert "<" not in trace
    assert not trace.endswith("\n")
    assert 0 <= score <= 10
    for line in trace.split("\n"):
        form = r"step \d+ of \d+ row [\w ]+|has( \w [+-])+ (ok|bad)|left \d+"
        assert re.fullmatch(form, line), line
    assert (score == 0) >= trace.endswith("bad")


def test_a_line_that_is_cut_is_not_bad_while_it_is_right_so_far() -> None:
    puzzle = Puzzle(("a", "b", "c"), (("a", "b"), ("b", "c")))
    teacher, prompt = StateTrackingTeacher(0.0, 2.0), as_prompt(puzzle)
    start, first = "start : a b c", write_line(1, ("a", "b"), ("b", "a", "c"))
    has = "has a + b + c + ok\nleft"
    for partial in ("", "s", "start : a b", f"{start}\n", f"{start}\n1", f"{start}\n1 ab : b a"):
        assert teacher.trace(prompt, partial, 0.49, RNG) == (f"step 0 of 2 row a b c\n{has} 2", 5)
    done = f"{start}\n{first}"
    for partial in (done, f"{done}\n", f"{done}\n2 bc : c"):
        assert teacher.trace(prompt, partial, 0.49, RNG) == (f"step 1 of 2 row b a c\n{has} 1", 7)
    assert teacher.trace(prompt, f"{done}\n2 bc : b", 0.49, RNG)[1] == 0
    whole = f"{done}\n2 bc : c a b\nanswer c a b"
    assert teacher.trace(prompt, whole, 0.49, RNG) == (f"step 2 of 2 row c a b\n{has} 0", 10)
    assert teacher.trace(prompt, f"{whole}\nanswer a b c", 0.49, RNG)[1] == 0


@given(puzzles(), st.integers(1, 4), st.data())
@settings(deadline=None, max_examples=100)
def test_fillers_change_no_row_no_outcome_and_no_value(
    puzzle: Puzzle, fillers: int, data: st.DataObject
) -> None:
    """Of a demonstration with slips: the same text without them has the same rows and values."""
    prompt, teacher = as_prompt(puzzle), StateTrackingTeacher(0.2, 3.0, fillers)
    text = teacher.demonstrate(prompt, random.Random(data.draw(st.integers(0, 2**31))))
    head, *lines, answer, _ = text.split("\n")
    words = [line.split(" : ")[0].split()[2:] for line in lines]
    assert all(len(each) == fillers and set(each) <= set(FILLERS) for each in words)
    bare = "\n".join((head, *(re.sub(r"^(\d+ \w+)[^:]* :", r"\1 :", line) for line in lines), answer, ""))
    assert parse_answer(bare) == parse_answer(text)
    kept = data.draw(st.integers(0, len(puzzle.swaps) + 1))
    whole, plain = ("".join(f"{line}\n" for line in some.splitlines()[:kept]) for some in (text, bare))
    assert teacher.trace(prompt, whole, 0.6, RNG) == teacher.trace(prompt, plain, 0.6, RNG)
    # Cut within the next line, before its row: it is not bad yet.
    if 0 < kept <= len(puzzle.swaps):
        begun = " ".join(lines[kept - 1].split()[: data.draw(st.integers(1, 2 + fillers))])
        assert teacher.trace(prompt, whole + begun, 0.6, RNG) == teacher.trace(prompt, plain, 0.6, RNG)


def test_fillers_are_one_token_each_and_none_are_drawn_without_them() -> None:
    assert [len(TINY.encode(f" {word}", add_special_tokens=False)) for word in FILLERS] == [1] * 8
    puzzle = Puzzle(("a", "b"), (("a", "b"),) * 3)
    some, none = (
        StateTrackingTeacher(0.5, 3.0, n).demonstrate(as_prompt(puzzle), random.Random(3)) for n in (2, 0)
    )
    assert len(some.split()) == len(none.split()) + 6
    assert not set(none.split()) & set(FILLERS)
    assert task(fillers=3).teacher.fillers == 3


@given(puzzles(), st.floats(0, 1), st.floats(0, 1))
def test_a_better_actor_scores_no_lower_and_fewer_lines_left_score_no_lower(
    puzzle: Puzzle, one: float, two: float
) -> None:
    prompt, teacher = as_prompt(puzzle), StateTrackingTeacher(0.0, 3.0)
    low, high = sorted((one, two))
    assert teacher.trace(prompt, "", low, RNG)[1] <= teacher.trace(prompt, "", high, RNG)[1]
    text = teacher.demonstrate(prompt, RNG).splitlines()
    scores = [
        teacher.trace(prompt, "".join(f"{line}\n" for line in text[:n]), low, RNG)[1]
        for n in range(len(text) + 1)
    ]
    assert scores == sorted(scores)
    assert scores[-1] == 10


@pytest.mark.parametrize("objects", [2, 8])
def test_extreme_sizes_work(objects: int) -> None:
    config = StateTrackingTask(
        kind="state_tracking",
        objects=objects,
        min_swaps=8,
        max_swaps=12,
        train_size=50,
        heldout_size=8,
        slip_rate=0.5,
    )
    problem = make_task(config, TINY, 0)
    assert isinstance(problem.teacher, Teacher)
    prompt = problem.prompt("train", 7)
    assert problem.teacher.demonstrate(prompt, random.Random(0)).startswith("start : ")


def test_a_response_line_is_token_thrifty() -> None:
    # number, pair, colon, four names, newline
    assert len(completion_ids(TINY, "3 ac : d b c a\n")) - 1 == 8


def test_with_segments_of_a_line_the_state_before_the_answer_is_one() -> None:
    prompt = as_prompt(Puzzle(("a", "b", "c", "d"), (("a", "b"), ("b", "c"))))
    text = StateTrackingTeacher(0.0, 2.0).demonstrate(prompt, RNG)
    ids = completion_ids(TINY, text)
    rollout = Rollout(prompt, 0, Completion(tuple(ids), (0.0,) * len(ids), "stop"), text)
    states = cut_states(rollout, TINY, StatesConfig(max_states=6, min_segment=8))
    before = [state_text(state, TINY) for state in states]
    assert [shown.count("\n") for shown in before] == [0, 2, 3]  # the prompt, and after each swap
    assert text.startswith(before[-1] + "answer")


def test_the_prompt_holds_the_problem_and_the_same_seed_gives_the_same() -> None:
    one, again = task().prompt("train", 11), task().prompt("train", 11)
    assert one == again
    assert one.id == "train/11"
    assert TINY.decode(one.ids).count(one.problem) == 1
