"""`genac evaluate task --url`: a fake server that answers as told; real SGLang is in tests/serving."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_chat import Answer, FakeChat, question, reply

from genac_megatron.cli import main
from genac_megatron.errors import InputError, PeerLost
from genac_megatron.evaluation.trial import ServerOptions, TrialOptions, paths_of, try_server

Say = Callable[[str, int], str | None]  # (question, how often it was asked before) -> answer; None: a failure


def telling(say: Say) -> Answer:
    """Answers to questions' first lines; "so" is one that was cut off."""
    times, lock = Counter[str](), threading.Lock()

    def answer(body: dict[str, Any]) -> tuple[int, Any]:
        asked = question(body).split("\n")[0]
        with lock:
            before = times[asked]
            times[asked] += 1
        text = say(asked, before)
        return 503 if text is None else 200, reply(text, finish_reason="length" if text == "so" else "stop")

    return answer


@pytest.fixture
def serve(fake_chat: Callable[[Answer], FakeChat]) -> Callable[[Say], FakeChat]:
    return lambda say: fake_chat(telling(say))


@pytest.fixture
def questions(tmp_path: Path) -> str:
    path = tmp_path / "amc.jsonl"
    path.write_text("".join(json.dumps({"question": f"q{n}", "answer": str(n)}) + "\n" for n in range(4)))
    return str(path)


def options(out: Path, path: str, **more: Any) -> TrialOptions:
    return TrialOptions(["amc23"], out, {"amc23": path}, samples=4, **more)


def say_some(question: str, before: int) -> str:
    """q0 is always right, q1 once in four, q2 twice in four, q3 never, and is cut off once."""
    number = int(question[1:])
    right = {0: 4, 1: 1, 2: 2, 3: 0}[number]
    if number == 3 and before == 0:
        return "so"
    return f"\\boxed{{{number if before < right else 77}}}"


def test_figures_are_those_of_the_answers(serve: Any, tmp_path: Path, questions: str) -> None:
    server = serve(say_some)
    out = tmp_path / "out"
    text = try_server(ServerOptions(server.url, "m", concurrency=3), options(out, questions, temperature=0.6))
    report = json.loads((out / "amc23" / "results.json").read_text())
    figures = {name: figure["value"] for name, figure in report["figures"].items()}
    shares = (1.0, 0.25, 0.5, 0.0)
    assert figures["avg@4"] == figures["pass@1"] == pytest.approx(sum(shares) / 4)
    assert figures["pass@2"] == pytest.approx((1 + 1 / 2 + 5 / 6 + 0) / 4)
    assert figures["pass@4"] == pytest.approx(3 / 4)
    assert figures["truncated"] == pytest.approx(1 / 16)
    assert figures["tokens"] == 5
    interval = report["figures"]["avg@4"]
    assert 0.0 < interval["low"] < figures["avg@4"] < interval["high"] < 1.0
    assert "| AMC 2023" in text
    assert (out / "results.md").read_text() == text
    assert len(server.bodies) == 16
    assert all(body["temperature"] == 0.6 and body["max_tokens"] == 4096 for body in server.bodies)
    assert len({body["seed"] for body in server.bodies}) == 16
    try_server(ServerOptions(server.url, "m"), options(out, questions, temperature=0.6))
    assert len(server.bodies) == 16, "a finished benchmark asks nothing again"


def test_what_failed_is_asked_again_and_nothing_else(serve: Any, tmp_path: Path, questions: str) -> None:
    down = True

    def say(question: str, before: int) -> str | None:
        return None if down and question in ("q1", "q3") else f"\\boxed{{{question[1:]}}}"

    server = serve(say)
    out = tmp_path / "out"
    with pytest.raises(PeerLost, match="8 of 16 requests failed, each 2 times") as error:
        try_server(ServerOptions(server.url, "m", attempts=2), options(out, questions))
    assert "same command" in str(error.value)
    assert len(server.bodies) == 8 + 8 * 2
    down = False
    server.bodies.clear()
    try_server(ServerOptions(server.url, "m", attempts=2), options(out, questions))
    assert sorted(body["messages"][0]["content"][:2] for body in server.bodies) == ["q1"] * 4 + ["q3"] * 4
    rows = [json.loads(line) for line in (out / "amc23" / "samples.jsonl").read_text().splitlines()]
    assert [(row["index"], row["sample"]) for row in rows] == [(i, s) for i in range(4) for s in range(4)]
    assert all(row["outcome"] == 1.0 for row in rows)
    with pytest.raises(InputError, match=r"another .*model"):
        try_server(ServerOptions(server.url, "other"), options(out, questions))


def test_the_command_line_wants_a_recipe_or_a_server(
    tmp_path: Path, questions: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", "task", "amc23", "--out", str(tmp_path / "o"), "--path", questions]) == 2
    assert "give a recipe, or --url and --model" in capsys.readouterr().err
    assert main(["evaluate", "task", "amc32", "--out", "o", "--url", "http://127.0.0.1:9/v1"]) == 2
    assert "did you mean amc23" in capsys.readouterr().err
    assert main(["evaluate", "task", "amc23", "--out", "o", "--url", "http://127.0.0.1:9/v1"]) == 2
    assert "--url.model" not in (shown := capsys.readouterr().err)
    assert "--model" in shown


def test_paths_name_their_benchmark() -> None:
    assert paths_of(["f.jsonl"], ["amc23"]) == {"amc23": "f.jsonl"}
    assert paths_of(["aime24=a", "amc23=b"], ["aime24", "amc23"]) == {"aime24": "a", "amc23": "b"}
    with pytest.raises(InputError, match=r"for none of aime24, amc23"):
        paths_of(["f.jsonl"], ["aime24", "amc23"])
