"""Graders: math-verify in processes with a time limit of ours, exact match, answer extraction."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from genac_megatron.tasks.answers import final_answer
from genac_megatron.tasks.grading import ExactGrader, MathGrader, make_grader

RIGHT = [
    ("72", "Natalia sold 48 + 24 = 72 clips. The answer is \\boxed{72}."),
    ("1/2", "so it is $\\boxed{\\frac{1}{2}}$"),
    ("0.5", "\\boxed{\\frac{1}{2}}"),
    ("\\frac{3}{4}", "\\boxed{3/4}"),
    ("1,000", "\\boxed{1000}"),
    ("x^2+2x+1", "\\boxed{(x+1)^2}"),
]
WRONG = [
    ("72", "The answer is \\boxed{71}."),
    ("72", ""),
    ("72", "\\boxed{"),
    ("72", "no idea"),
    ("(1,2)", "\\boxed{(2,1)}"),
]

IN_E_NOTATION = [  # as Minerva's references are
    ("3.83e35", "\\boxed{3.83 \\times 10^{35}}", 1.0),
    ("3.83e35", "\\boxed{3.83e35}", 1.0),
    ("3.83e35", "\\boxed{3.83E+35 \\text{ erg}}", 1.0),
    ("3.83e35", "\\boxed{3.83}", 0.0),
    ("3.83e35", "\\boxed{3.84 \\times 10^{35}}", 0.0),
    ("1e-4", "\\boxed{10^{-4}}", 1.0),
    ("1e-4", "\\boxed{0.0001}", 1.0),
    ("1e-4", "\\boxed{1e-4}", 1.0),
    ("1e-4", "\\boxed{e - 4}", 0.0),
    ("-4.5e33", "\\boxed{-4.5 \\cdot 10^{33}}", 1.0),
    ("6.6e-8", "\\boxed{6.7e-8}", 0.0),
    ("10^{-4}", "\\boxed{1e-4}", 1.0),
    ("2e", "\\boxed{2e}", 1.0),  # Euler's
    ("2e-1+x", "\\boxed{2e-1+x}", 1.0),
]


@pytest.fixture(scope="module")
def grader() -> Iterator[MathGrader]:
    grader = MathGrader(workers=1)
    yield grader
    grader.close()


def test_math_verdicts_in_order(grader: MathGrader) -> None:
    pairs = [pair for both in zip(RIGHT, WRONG, strict=False) for pair in both]
    expected = [1.0, 0.0] * len(WRONG)
    assert grader.grade(pairs) == expected
    assert grader.grade([RIGHT[-1]]) == [1.0]
    assert grader.grade([]) == []


def test_numbers_in_e_notation_are_powers_of_ten(grader: MathGrader) -> None:
    verdicts = grader.grade([(reference, text) for reference, text, _ in IN_E_NOTATION])
    wrong = [row for row, verdict in zip(IN_E_NOTATION, verdicts, strict=True) if verdict != row[2]]
    assert not wrong


def test_grading_works_outside_the_main_thread(grader: MathGrader) -> None:
    results: list[float] = []
    thread = threading.Thread(target=lambda: results.extend(grader.grade(RIGHT[:1])))
    thread.start()
    thread.join(60)
    assert results == [1.0]


def test_a_hostile_answer_costs_its_time_limit_and_nothing_else() -> None:
    grader = MathGrader(workers=1, limit_s=2.0)
    hostile = ("7", "\\boxed{9^{9^{9^{9}}}}")
    started = time.monotonic()
    # What comes before and after in the same batch is graded all the same.
    assert grader.grade([RIGHT[0], hostile, RIGHT[0]]) == [1.0, 0.0, 1.0]
    # The limit, and two process starts on a busy machine.
    assert time.monotonic() - started < 90
    assert grader.late == 1
    grader.close()


def test_nothing_is_said_of_the_time_limit_that_math_verify_lacks(capfd: pytest.CaptureFixture[str]) -> None:
    with_limit = MathGrader(workers=1)
    assert with_limit.grade(RIGHT[:1]) == [1.0]
    with_limit.close()
    assert capfd.readouterr().err == ""


def test_exact_match_is_about_the_final_answer() -> None:
    pairs = [
        ("a  b", "first c\n\\boxed{a b}"),
        ("yes", "<answer>no</answer> wait <answer> yes </answer>"),
        ("12", "so it is\n12\n\n"),
        ("12", "12\n13"),
        ("12", ""),
    ]
    assert ExactGrader().grade(pairs) == [1.0, 1.0, 1.0, 0.0, 0.0]


def test_no_process_is_asked_about_a_response_without_an_answer() -> None:
    grader = MathGrader(workers=1)
    far_too_long = f"\\boxed{{{'1' * 30_000}}}"
    assert grader.grade([("12", "4 + 8 = 12 and then"), ("12", ""), ("1", far_too_long)]) == [0.0, 0.0, 0.0]
    assert not any(pool._workers for pool in grader.workers.pools)


def test_a_recipe_says_which_forms_count() -> None:
    text = "so it is\n#### 12\nas was to be shown"
    assert make_grader("exact").grade([("12", text)]) == [0.0]
    assert make_grader("exact", ["hashes"]).grade([("12", text), ("12", "\\boxed{12}")]) == [1.0, 0.0]


def test_exact_compares_with_what_a_whole_solution_says() -> None:
    solutions = ["9 * 2 = <<9*2=18>>18\n#### 18", "so it is \\boxed{18}", "18"]
    assert make_grader("exact").grade([(each, "\\boxed{18}") for each in solutions]) == [1.0, 1.0, 1.0]
    assert make_grader("exact").grade([(each, "\\boxed{9}") for each in solutions]) == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("cut_off", [False, True])
def test_a_lucky_number_pays_nothing_and_other_writings_pay_all(cut_off: bool) -> None:
    """What a review of the method graded: work that is cut off, guesses in a row, a wrong box."""
    cases = [
        ("18", "She sells the rest, so each day she makes 9 * 2 = 18", 0.0),
        ("18", "I think the answer is 20. There are 18", 0.0),
        ("18", "we get 18 eggs. \\boxed{20}", 0.0),
        ("18", "\\boxed{18} or maybe \\boxed{20}", 0.0),
        ("18", "\\boxed{18, 20, 22}", 0.0),
        ("18", "it is one of 16, 17, 18", 0.0),
        ("18", "<think>\nHmm, so 9 times 2 is 18", 0.0),
        ("57,500", "\\boxed{57500}", 1.0),
        ("57,500", "\\boxed{57,500}", 1.0),
        ("18", "\\boxed{18 \\text{ dollars}}", 1.0),
        ("18", "\\boxed{\\$18}", 1.0),
        ("\\frac{1}{2}", "\\boxed{0.5}", 1.0),
        ("\\text{Evelyn}", "\\boxed{Evelyn}", 1.0),
    ]
    grader = MathGrader(workers=1, limit_s=60.0)
    answers = [(reference, final_answer(text, grader.forms, not cut_off)) for reference, text, _ in cases]
    assert grader.grade_answers(answers) == [wanted for *_, wanted in cases]
    grader.close()
