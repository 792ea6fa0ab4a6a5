"""What the final answer is, and whether it is right: the table answers.yaml, and any text at all."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from genac_megatron.tasks.answers import (
    EXACT,
    MARKED,
    after_reasoning,
    final_answer,
    last_tagged,
    opens_reasoning,
)
from genac_megatron.tasks.grading import MathGrader
from genac_megatron.tasks.writing import tidy

TABLE: list[dict[str, Any]] = yaml.safe_load((Path(__file__).parent / "answers.yaml").read_text())
DOCS = Path(__file__).parents[2] / "docs" / "tasks.md"
HARMONY = "<|start|>user<|message|>3?<|end|><|start|>assistant<|channel|>"
ALL_FORMS = (*EXACT, "hashes", "number")


@pytest.fixture(scope="module")
def grader() -> Iterator[MathGrader]:
    grader = MathGrader(workers=1, limit_s=60.0)  # of a machine that may be busy
    yield grader
    grader.close()


def test_the_table_is_large_and_has_both_verdicts() -> None:
    pairs = [pair for kind in TABLE for pair in kind["pairs"]]
    assert len(pairs) >= 150
    assert len({(reference, text) for reference, text, _ in pairs}) > 0.97 * len(pairs)
    assert all(kind["source"] for kind in TABLE)
    right = sum(pair[2] for pair in pairs)
    assert 0.3 < right / len(pairs) < 0.75


@pytest.mark.parametrize("kind", [k for k in TABLE if not k.get("missed")], ids=lambda kind: kind["kind"])
def test_each_pair_gets_its_verdict(kind: dict[str, Any], grader: MathGrader) -> None:
    grader.forms = kind.get("forms", MARKED)
    pairs = [(reference, text) for reference, text, _ in kind["pairs"]]
    verdicts = grader.grade(pairs)
    wrong = [row for row, verdict in zip(kind["pairs"], verdicts, strict=True) if verdict != float(row[2])]
    assert not wrong


def test_what_is_known_to_be_missed_still_is(grader: MathGrader) -> None:
    """Where this fails, a pair has become right: move it to its kind."""
    [missed] = [kind for kind in TABLE if kind.get("missed")]
    grader.forms = MARKED
    verdicts = grader.grade([(reference, text) for reference, text, _ in missed["pairs"]])
    assert verdicts == [float(not right) for _, _, right in missed["pairs"]]


def test_the_documented_examples_are_true(grader: MathGrader) -> None:
    """The tables of docs/tasks.md: `reference` | `response` | outcome."""
    section = DOCS.read_text().partition("## What the final answer is")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `(.*?)` \| `(.*?)` \| ([01]) \|$", section, re.MULTILINE)
    assert len(rows) >= 12
    pairs = [(reference, text.replace("⏎", "\n")) for reference, text, _ in rows]
    grader.forms = MARKED
    verdicts = grader.grade(pairs)
    wrong = [row for row, verdict in zip(rows, verdicts, strict=True) if verdict != float(row[2])]
    assert not wrong


CUT_OFF = [  # what counts in a response that was cut off at this place, and where it ended by itself
    ("so \\boxed{34} and then", "34", "34"),
    ("so <answer>34</answer>", "34", "34"),
    ("so \\boxed{34", None, None),
    ("Answer: 34", None, "34"),
    ("Answer: 34\nLet me check", "34", "34"),
    ("Answer:\n34", None, "34"),
    ("\\boxed{30}? No.\nAnswer: 34", None, "34"),
    ("The answer is 34.", None, "34"),
    ("4 + 8 = 12", None, None),
]


@pytest.mark.parametrize(("text", "cut", "whole"), CUT_OFF)
def test_in_a_cut_off_response_only_what_is_closed_counts(
    text: str, cut: str | None, whole: str | None
) -> None:
    assert final_answer(text, ended=False) == cut
    assert final_answer(text) == whole


def test_luck_pays_nothing_in_a_cut_off_response() -> None:
    for form in ("number", "last_line"):
        assert final_answer("4 + 8 = 12", (form,)) is not None
        assert final_answer("4 + 8 = 12", (form,), ended=False) is None


def test_reasoning_that_the_prompt_opened_has_to_be_closed() -> None:
    assert final_answer("it is \\boxed{34}", opened=True) is None
    assert final_answer("it is 34</think> \\boxed{35}", opened=True) == "35"
    assert after_reasoning("a <think> b") is None
    assert opens_reasoning(f"{HARMONY}analysis<|message|>")
    assert not opens_reasoning(f"{HARMONY}final<|message|>")
    assert not opens_reasoning(f"{HARMONY}commentary to=f<|message|>{{}}<|call|><|start|>assistant")
    assert last_tagged("<think><answer>5</answer></think> done") is None
    assert last_tagged("<think>5</think><answer> 6 </answer>") == " 6 "
    assert last_tagged("<answer>5</answer> no: <answer>6") is None


@given(
    st.text(alphabet="\\boxed{}<answer>/ \n1:#*$Answeristh.think答案|channelfm", max_size=120), st.booleans()
)
def test_any_text_has_an_answer_or_none(text: str, ended: bool) -> None:
    answer = final_answer(text, ALL_FORMS, ended)
    assert answer is None or answer.strip()
    if answer is not None and ended:
        tidy(answer)


@given(st.text(alphabet="ab{} ", min_size=1, max_size=20), st.text(alphabet="ab }{$\\\n.,0", max_size=20))
def test_a_balanced_box_is_found_whatever_precedes_it(inner: str, before: str) -> None:
    depth = 0
    for character in inner:
        depth += {"{": 1, "}": -1}.get(character, 0)
        if depth < 0:
            return
    if depth == 0 and inner.strip():
        assert final_answer(f"{before}\\boxed{{{inner}}} so") == inner.strip()


@pytest.mark.parametrize(
    "piece",
    [
        "\\boxed{",
        "\\boxed{1}, ",
        "<answer>",
        "Answer:\n",
        "Answer:\n\\[",
        "The answer is $$",
        "<think>",
        "<|channel|>",
        "<|channel|>final<|message|>",
        "analysis",
        "assistantfinal",
        "{",
        "1 ",
    ],
)
def test_time_grows_with_the_length_alone(piece: str) -> None:
    """200,000 characters of the same: seconds at most, where a quadratic scan would take minutes."""
    text = piece * (200_000 // len(piece))
    started = time.process_time()
    final_answer(text, ALL_FORMS)
    final_answer(f"{text}\nAnswer: 5", ALL_FORMS)
    assert time.process_time() - started < 10


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("Answer: St. Louis", "St. Louis"),
        ("Answer: Dr. Seuss. He wrote it.", "Dr. Seuss"),
        ("Answer: approx. 5", "approx. 5"),
        ("Answer: No. 1", "No. 1"),
        ("Answer: No. The two differ.", "No"),
        ("Answer: 2; 3", "2; 3"),
        ("Answer: (1; 2)", "(1; 2)"),
        ("Answer: x = 1; y = 2", "x = 1; y = 2"),
        ("Answer: 5; that is all", "5"),
        ("Answer: B; I think so", "B"),
        ("Answer: twice as much as before", "twice as much as before"),
        ("Answer: 5, as it is odd", "5"),
        ("Answer: 5 as required", "5"),
    ],
)
def test_where_a_lines_answer_ends(text: str, said: str) -> None:
    assert final_answer(text) == said


def test_a_sentence_may_hold_an_abbreviation() -> None:
    assert final_answer("The answer is St. Louis.", ("sentence",)) == "St. Louis"
