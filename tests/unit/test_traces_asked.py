"""A teacher is asked, and no answer that was paid for is lost: real sockets and kills, a made-up endpoint."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_chat import FakeChat, question, reply

from genac_megatron.critic.score import parse_score
from genac_megatron.errors import InputError, PeerLost
from genac_megatron.evaluation.ask import Spent, ask_endpoint_about, ask_exact_about
from genac_megatron.evaluation.parts import Parts
from genac_megatron.recipe.schema import JudgingConfig, TeacherConfig
from genac_megatron.recipe.tasks import StateTrackingTask
from genac_megatron.serving import chat
from genac_megatron.tasks import make_task
from genac_megatron.tasks.tokenizer import load_tokenizer

Row = dict[str, Any]
JUDGING = JudgingConfig(template="brief", max_new_tokens=32)


def teacher(server: FakeChat, **changes: Any) -> TeacherConfig:
    block = {"kind": "endpoint", "url": server.url, "model": "wise", "attempts": 2, **changes}
    return TeacherConfig.model_validate(block)


def asked(count: int) -> list[tuple[Row, int]]:
    return [
        ({"state": n, "prompt_id": f"train/{n}", "problem": f"number {n}?", "partial": "so", "used": 2,
          "limit": 9, "actor": "early", "p_bar": 0.25, "step": 3}, 0)
        for n in range(count)
    ]  # fmt: skip


def number(body: dict[str, Any]) -> int:
    return int(question(body).split("number ")[1].split("?")[0])


def thinks(text: str, reasoning: str = "") -> dict[str, Any]:
    message = {"role": "assistant", "content": text, "reasoning_content": reasoning}
    return {
        "choices": [{"message": message, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 100, "completion_tokens": 20},
    }


def test_a_model_that_reasons_is_asked_by_its_own_names_and_its_words_are_kept_apart(
    fake_chat: Callable[..., FakeChat],
) -> None:
    server = fake_chat(lambda body: (200, thinks("<answer>7</answer>", "hm, 7")))
    kept: list[Row] = []
    config = teacher(server, reasoning_effort="low", max_tokens=500, price=(2.0, 8.0))
    ask_endpoint_about(asked(3), config, JUDGING, 2, kept.append)
    assert sorted(row["state"] for row in kept) == [0, 1, 2]
    assert {(row["value"], row["reasoning"], row["tokens"], row["finish"]) for row in kept} == {
        (0.7, "hm, 7", 20, "stop")
    }
    for body in server.bodies:
        assert body["max_completion_tokens"] == 500
        assert body["reasoning_effort"] == "low"
        assert not {"max_tokens", "temperature"} & body.keys()
        assert "Success rate of early at present: 0.25" in question(body)
    spent = Spent(config)
    for row in kept:
        spent.add(row)
    assert spent.dollars == pytest.approx((300 * 2 + 60 * 8) / 1e6)
    assert spent.figures()["teacher/dollars"] == spent.dollars
    plain = teacher(server, max_tokens=None)
    ask_endpoint_about(asked(1), plain, JUDGING, 1, kept.append)
    assert {"max_tokens": 32, "temperature": 1.0}.items() <= server.bodies[-1].items()
    assert "reasoning_effort" not in server.bodies[-1]


def test_refusals_are_kept_and_what_had_no_answer_is_asked_again(
    fake_chat: Callable[..., FakeChat], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat, "FIRST_WAIT_S", 0.01)
    down = {3}

    def answer(body: dict[str, Any]) -> tuple[int, Any]:
        n = number(body)
        return (
            (503, "busy")
            if n in down
            else (400, "too long")
            if n == 1
            else (200, reply("<answer>1</answer>"))
        )

    server, kept = fake_chat(answer), dict[int, Row]()

    def keep(row: Row) -> None:
        kept[row["state"]] = row

    with pytest.raises(PeerLost, match=r"did not answer 1 of 5 requests(.|\n)*the same command goes on"):
        ask_endpoint_about(asked(5), teacher(server), JUDGING, 2, keep)
    assert sorted(kept) == [0, 1, 2, 4]
    assert kept[1]["refused"].startswith("status 400")
    down.clear()
    left = [one for one in asked(5) if one[0]["state"] not in kept]
    ask_endpoint_about(left, teacher(server), JUDGING, 2, keep)
    assert sorted(kept) == list(range(5))
    kept.clear()
    with pytest.raises(InputError, match="refused each of 2 requests"):
        ask_endpoint_about([asked(2)[1]] * 2, teacher(server), JUDGING, 2, keep)
    assert not kept  # it is the endpoint's fault, and may be mended


def test_a_refused_key_ends_it_and_what_is_under_way_is_kept(fake_chat: Callable[..., FakeChat]) -> None:
    def answer(body: dict[str, Any]) -> tuple[int, Any]:
        time.sleep(0.3 if number(body) == 0 else 0.0)
        return (401, "no") if number(body) == 1 else (200, reply("<answer>1</answer>"))

    kept: list[Row] = []
    server = fake_chat(answer)
    with pytest.raises(InputError, match="401"):
        ask_endpoint_about(asked(40), teacher(server), JUDGING, 2, kept.append)
    assert 0 in {row["state"] for row in kept}
    assert len(server.bodies) < 10


def test_the_exact_teacher_reads_the_rate_of_the_rows_actor() -> None:
    config = StateTrackingTask(kind="state_tracking", objects=3, heldout_size=4)
    task = make_task(config, load_tokenizer("builtin:tiny"), 0)
    rows = [
        {"state": n, "prompt_id": f"train/{n}", "partial": "", "p_bar": rate}
        for n in range(3)
        for rate in (0.2, 0.9)
    ]
    kept: list[Row] = []
    ask_exact_about(task, [(row, 0) for row in rows], ("s",), kept.append, JUDGING)
    for row, answer in zip(rows, kept, strict=True):
        value = answer["value"]
        assert parse_score(answer["text"]) == value
        exact = task.teacher.value(task.prompt("train", row["state"]), "", row["p_bar"])  # type: ignore[union-attr]
        assert abs(value - exact) <= 0.05 + 1e-9
        assert f"p {row['p_bar']:.2f}" in answer["text"]
    assert all(kept[n]["value"] < kept[n + 1]["value"] for n in (0, 2, 4))


KILLED = """
import json, sys
from pathlib import Path
from genac_megatron.evaluation.parts import Parts
from genac_megatron.recipe.schema import JudgingConfig, TeacherConfig
from genac_megatron.evaluation.ask import ask_endpoint_about
given = json.loads(sys.argv[1])
parts = Parts(Path(given["folder"]), "answers.jsonl", ("state", "judgement"))
there = parts.begin({"plan": 1})
left = [(row, n) for row, n in given["asked"] if (row["state"], n) not in there]
config = TeacherConfig.model_validate(given["teacher"])
ask_endpoint_about(left, config, JudgingConfig(template="brief"), 2, lambda row: parts.append([row], 0))
"""


def test_a_kill_loses_no_answer_but_those_under_way(
    fake_chat: Callable[..., FakeChat], tmp_path: Path
) -> None:
    def answer(body: dict[str, Any]) -> tuple[int, Any]:
        time.sleep(0.05)
        return 200, reply("<answer>1</answer>")

    server = fake_chat(answer)
    given = {"folder": str(tmp_path / "answers"), "asked": asked(40)}
    given["teacher"] = teacher(server).model_dump(mode="json")
    command = [sys.executable, "-c", KILLED, json.dumps(given)]
    process = subprocess.Popen(command)
    until = time.monotonic() + 120
    while len(server.bodies) < 12 and time.monotonic() < until:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = Counter(map(number, server.bodies))
    subprocess.run(command, check=True, timeout=120)
    after = Counter(map(number, server.bodies))
    again = {n for n in before if after[n] > 1}
    assert set(after) == set(range(40))
    assert 10 <= len(before) < 40
    assert len(again) <= 2  # concurrency: no more were under way
    parts = Parts(tmp_path / "answers", "answers.jsonl", ("state", "judgement"))
    assert {row["state"] for row in parts.so_far()} == set(range(40))
