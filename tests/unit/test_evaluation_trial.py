"""`genac evaluate task --url`: a fake server that answers as told; real SGLang is in tests/serving."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_chat import Answer, FakeChat, question, reply

from genac_megatron.cli import main
from genac_megatron.errors import InputError, PeerLost, StopRequested
from genac_megatron.evaluation.parts import Parts
from genac_megatron.evaluation.trial import Trial, TrialOptions, paths_of
from genac_megatron.evaluation.trial_server import ServerOptions, try_server
from genac_megatron.tasks.benchmarks import make_benchmark

pytestmark = pytest.mark.usefixtures("one_math_process")
ROOT = Path(__file__).resolve().parents[2]

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


def options(out: Path, path: str, name: str = "amc23", **more: Any) -> TrialOptions:
    return TrialOptions([name], out, {name: path}, **{"samples": 4, **more})


def right(body: dict[str, Any]) -> dict[str, Any]:
    return reply(f"\\boxed{{{question(body)[1]}}}")


def kept(folder: Path) -> list[dict[str, Any]]:
    """The samples of unfinished work."""
    files = sorted((folder / "parts").glob("*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


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


def test_a_server_that_was_started_again_elsewhere_goes_on(
    fake_chat: Any, tmp_path: Path, questions: str
) -> None:
    first = fake_chat(lambda body: (200 if question(body)[:2] != "q1" else 503, right(body)))
    with pytest.raises(PeerLost):
        # Not 1: a connection that a busy machine breaks would cost an answer that is to be kept.
        try_server(ServerOptions(first.url, "m", attempts=2), options(tmp_path / "out", questions))
    second = fake_chat(lambda body: (200, right(body)))
    assert second.url != first.url
    text = try_server(ServerOptions(second.url, "m"), options(tmp_path / "out", questions))
    assert len(second.bodies) == 4
    folder = tmp_path / "out" / "amc23"
    for name in ("results.json", "manifest.json"):
        assert json.loads((folder / name).read_text())["made_from"] == {"model": "m", "url": second.url}
    assert f"url {second.url}" in text
    try_server(ServerOptions(first.url, "m"), options(tmp_path / "out", questions))
    assert json.loads((folder / "results.json").read_text())["made_from"]["url"] == second.url


def test_a_refused_question_leaves_the_others_alone(fake_chat: Any, tmp_path: Path, questions: str) -> None:
    short = True

    def answer(body: dict[str, Any]) -> tuple[int, Any]:
        if short and question(body)[:2] == "q2":
            return 400, {"error": {"message": "maximum context length is 9 tokens"}}
        return 200, right(body)

    server = fake_chat(answer)
    out = tmp_path / "out"
    with pytest.raises(PeerLost, match=r"4 of 16 requests were refused \(problems 2\)") as error:
        try_server(ServerOptions(server.url, "m"), options(out, questions))
    assert "status 400" in str(error.value)
    assert "maximum context length is 9" in str(error.value)
    assert len(server.bodies) == 16, "nothing is asked twice"
    rows = kept(out / "amc23")
    assert sorted({row["index"] for row in rows}) == [0, 1, 3]
    assert len(rows) == 12
    with pytest.raises(InputError, match=r"refused each of 4 requests, the last with status 400.*context"):
        try_server(ServerOptions(server.url, "m"), options(out, questions))
    short = False
    try_server(ServerOptions(server.url, "m"), options(out, questions))
    assert len(server.bodies) == 16 + 4 + 4


def test_a_refused_key_ends_all_but_answers_under_way_are_kept(
    fake_chat: Any, tmp_path: Path, questions: str
) -> None:
    first = threading.Lock()

    def answer(body: dict[str, Any]) -> tuple[int, Any]:
        if first.acquire(blocking=False):
            time.sleep(0.3)
            return 401, {"error": "bad key"}
        time.sleep(1.0)
        return 200, right(body)

    server = fake_chat(answer)
    with pytest.raises(InputError, match=r"status 401.*bad key") as error:
        try_server(ServerOptions(server.url, "m", concurrency=4), options(tmp_path / "out", questions))
    assert "check --url, --model and the key" in str(error.value)
    assert len(server.bodies) < 16
    assert len(kept(tmp_path / "out" / "amc23")) == len(server.bodies) - 1


def test_the_table_has_all_that_is_finished_in_the_folder(serve: Any, tmp_path: Path, questions: str) -> None:
    server, out = serve(say_some), tmp_path / "out"
    first = try_server(ServerOptions(server.url, "m"), options(out, questions, samples=1))
    second = try_server(ServerOptions(server.url, "m"), options(out, questions, "aime24", samples=1))
    assert "AIME 2024" not in first
    assert second.index("AIME 2024") < second.index("AMC 2023")
    assert second.count("avg@k") == 1
    other = try_server(ServerOptions(server.url, "n"), options(out, questions, "aime25", samples=1))
    assert other.count("avg@k") == 2, "a table for each model"
    assert all(title in other for title in ("AIME 2024", "AIME 2025", "AMC 2023", "model m,", "model n,"))
    assert (out / "results.md").read_text() == other
    (out / "aime25" / "manifest.json").unlink()  # as where it was killed
    assert try_server(ServerOptions(server.url, "m"), options(out, questions, samples=1)) == second
    (out / "aime24" / "results.json").write_text("{}")
    with pytest.raises(InputError, match=r"aime24/results\.json: not a results file"):
        try_server(ServerOptions(server.url, "m"), options(out, questions, samples=1))


def test_damaged_samples_are_no_figures(serve: Any, tmp_path: Path, questions: str) -> None:
    server, out = serve(lambda asked, before: None if asked == "q3" else "\\boxed{1}"), tmp_path / "out"
    told = options(out, questions, samples=2)
    with pytest.raises(PeerLost):
        try_server(ServerOptions(server.url, "m", attempts=1), told)
    task = make_benchmark("amc23", questions, None)
    sampling = {"max_new_tokens": 4096, "temperature": 1.0}
    trial = Trial(told, "amc23", task, {"model": "m"}, sampling, {})
    with pytest.raises(InputError, match=r"not there.* index 3"):
        trial.finish()
    [file] = (out / "amc23" / "parts").glob("*.jsonl")
    sound = file.read_text()
    missing = [{"index": 3, "sample": n, "outcome": 0.0, "finish": "stop", "tokens": 1} for n in (0, 1)]
    for last in (
        {**missing[1], "outcome": None},
        {**missing[1], "outcome": 2.0},
        {**missing[1], "tokens": "5"},
        {"index": 3, "sample": 1},
        {"sample": 1},
    ):
        file.write_text(sound + "".join(json.dumps(row) + "\n" for row in (missing[0], missing[1], last)))
        with pytest.raises(InputError, match="damaged"):
            trial.finish()
    surplus = {**missing[0], "index": 4}
    file.write_text(sound + "".join(json.dumps(row) + "\n" for row in (*missing, surplus)))
    with pytest.raises(InputError, match=r"not planned.* index 4"):
        trial.finish()
    assert not (out / "amc23" / "results.json").exists()
    file.write_text(sound + "".join(json.dumps(row) + "\n" for row in missing))
    trial.finish()
    rows = (out / "amc23" / "samples.jsonl").read_text().splitlines(keepends=True)
    (out / "amc23" / "samples.jsonl").write_text("".join(rows[:-2]))
    with pytest.raises(InputError, match="not the file that its manifest names"):
        try_server(ServerOptions(server.url, "m"), told)


def test_ctrl_c_behind_a_write_doubles_no_answer(
    fake_chat: Any, tmp_path: Path, questions: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, append, times = fake_chat(lambda body: (200, right(body))), Parts.append, Counter[str]()

    def interrupted(self: Parts, rows: Any, rank: int) -> None:
        append(self, rows, rank)
        times["writes"] += 1
        if times["writes"] == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(Parts, "append", interrupted)
    told = TrialOptions(["amc23"], tmp_path / "out", {"amc23": questions}, samples=8)
    with pytest.raises(StopRequested):
        try_server(ServerOptions(server.url, "m", concurrency=4), told)
    rows = [(row["index"], row["sample"]) for row in kept(tmp_path / "out" / "amc23")]
    assert len(rows) >= 16
    assert len(rows) == len(set(rows))


def test_ctrl_c_costs_no_right_answer(fake_chat: Any, tmp_path: Path, questions: str) -> None:
    """To the whole group of processes, as a terminal sends it: grading goes on until all is kept."""
    asked, go_on, lock = Counter[int](), threading.Event(), threading.Lock()

    def answer(body: dict[str, Any]) -> tuple[int, Any]:
        with lock:
            asked[0] += 1
            late = asked[0] > 20
        if late:
            go_on.wait(60)
        return 200, right(body)

    server = fake_chat(answer)
    given = ["evaluate", "task", "amc23", "--path", questions, "--out", "out", "--samples", "8"]
    given += ["--url", server.url, "--model", "m", "--concurrency", "4"]
    command = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "genac_megatron", *given],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # Started in a shell's background, we ignore SIGINT, and so would it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    until = time.monotonic() + 120
    while len(kept(tmp_path / "out" / "amc23")) < 16 or asked[0] < 24:
        assert time.monotonic() < until
        assert command.poll() is None
        time.sleep(0.05)
    os.killpg(command.pid, signal.SIGINT)
    # What was not begun is taken back first, then what is answered is kept, and then the others waited for.
    while len(kept(tmp_path / "out" / "amc23")) < 20:
        assert time.monotonic() < until
        time.sleep(0.05)
    go_on.set()
    _, said = command.communicate(timeout=60)
    assert command.returncode == 75, said
    assert "the same command goes on from here" in said
    assert "Traceback" not in said
    rows = kept(tmp_path / "out" / "amc23")
    assert len(rows) == 24, "20 that were answered, 4 that were under way"
    assert all(row["outcome"] == 1.0 for row in rows)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--url", "http://127.0.0.1:9/v1", "--model", "m", "--checkpoint", "r"], "no --checkpoint"),
        (["--url", "http://127.0.0.1:9/v1", "--model", "m", "--override", "a.b=1"], "no --override"),
        (["recipe.yaml", "--model", "m"], "a recipe takes no --model"),
        (["recipe.yaml", "--api-key-env", "KEY"], "a recipe takes no --api-key-env"),
        (["recipe.yaml", "--concurrency", "32"], "a recipe takes no --concurrency"),
        (["recipe.yaml", "--timeout", "1800"], "a recipe takes no --timeout"),
        (["recipe.yaml", "--p-bar", "0.5"], "a critic is told it, and none is asked"),
        (["--url", "http://host:port/v1", "--model", "m"], "not an http address: Invalid port: 'port'"),
        (["--url", "127.0.0.1:9/v1", "--model", "m"], "not an http address"),
        (["--url", "http://127.0.0.1:9/v1", "--model", "m", "--api-key-env", "ABSENT"], "--api-key-env: the"),
    ],
)
def test_what_would_be_ignored_or_cannot_be_is_refused(
    tmp_path: Path,
    questions: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    given: list[str],
    message: str,
) -> None:
    monkeypatch.delenv("ABSENT", raising=False)
    out = tmp_path / "o"
    assert main(["evaluate", "task", "amc23", *given, "--out", str(out), "--path", questions]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert "server." not in said
    assert "--" in said.split("way out")[1]
    assert not out.exists()


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
