"""tools/first_errors.py on a bank of chained arithmetic, made by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from genac_megatron.evaluation.bank import (
    FORMAT,
    BankPrompt,
    BankState,
    bank_parts,
    no_response,
    to_row,
)
from genac_megatron.records import Completion, Prompt, Rollout, State
from genac_megatron.tasks.tokenizer import completion_ids, load_tokenizer
from tools.first_errors import main

PROBLEM = "start : 7\nq + 4\nc * 5\nm - 8"
RESPONSE = "start : 7\nq + 4 : 3\nc * 5 : 5\nm - 8 : 7\nanswer : 7\n"  # q is a slip, which c forgets
OF_PROMPT = "start value 7\nstart : 7\nvalue - 7 : 0 ok\nleft q c m\np 0.5\n<answer>6</answer>"
OF_SLIP = "step q value 3\nstart : 7\nq + 4 : 1\nvalue - 3 : 8 bad\nc * 5 : 0 ok\nleft c m"


@pytest.fixture
def bank(tmp_path: Path) -> Path:
    prompt = Prompt("heldout/0", ({"role": "user", "content": PROBLEM},), PROBLEM, "7", (1,))
    tokenizer = load_tokenizer("builtin:tiny")
    ids = completion_ids(tokenizer, RESPONSE)
    cut = next(n for n in range(len(ids)) if tokenizer.decode(list(ids[:n])).endswith("q + 4 : 3\n"))
    whole = Rollout(prompt, 0, Completion(ids, (0.0,) * len(ids), "stop"), RESPONSE, 1.0)
    states = (
        BankState(State(no_response(prompt), 0, 0, cut), None, (1.0,)),
        BankState(State(whole, 1, cut, len(ids)), 0, (1.0,)),
    )
    task = {"kind": "chained_arithmetic", "min_steps": 3, "max_steps": 3}
    plan = {"seed": 1, "continuations": 1, "rollout": {"max_new_tokens": 64}, "task": task}
    parts = bank_parts(tmp_path / "bank")
    parts.begin(plan)
    row = to_row(0, BankPrompt(prompt, (1.0,), None, (whole, whole), states))
    parts.finish([row], {"format": FORMAT, "kind": "bank", "plan": plan, "p_bar": 0.5, "step": 0})
    return tmp_path / "bank"


def scored(bank: Path, *texts: str) -> None:
    folder = bank / "scores" / "mine"
    folder.mkdir(parents=True)
    (folder / "states.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("", "", "all right 1.000"),
        ("q + 4 : 1", "q + 4 : 2", "x + 0 : 0, miscomputed 0.500"),
        ("q + 4 : 1", "z + 4 : 1", "x + 0 : 0, misread 0.500"),
        ("step q value 3", "step m value 7", "step x value 0, misread 0.500"),
        ("start : 7\nq", "start : 2\nq", "start : 0, misread 0.500"),
        ("8 bad\nc", "9 bad\nc", "value + 0 : 0 bad, miscomputed 0.500"),
        ("\nleft c m", "\nleft c m m", "left x, misread 0.500"),
        ("\nleft c m", "", "left x, misread 0.500"),
    ],
)
def test_the_first_wrong_line_is_told(
    bank: Path, capsys: pytest.CaptureFixture[str], old: str, new: str, told: str
) -> None:
    scored(bank, OF_PROMPT, OF_SLIP.replace(old, new) if old else OF_SLIP)
    assert main([str(bank), "mine", "--places"]) == 0
    first, *places = capsys.readouterr().out.splitlines()
    assert told in first
    assert [line.split()[0] for line in places] == ["0", "2"]


def test_what_is_not_scored_is_said(bank: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scored(bank, OF_PROMPT)
    assert main([str(bank), "mine"]) == 2
    assert "1 of the bank's 2 states are scored" in capsys.readouterr().err
