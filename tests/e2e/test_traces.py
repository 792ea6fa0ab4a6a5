"""`genac traces` by the command line, about two actors: killed, gone on with, filtered, and trained on."""

from __future__ import annotations

import json
import shutil
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from genac_megatron.critic.judged import read_judged
from tests.e2e.test_gates import SMALL
from tests.e2e.test_run import rows
from tests.unit.fake_chat import FakeChat, question, reply
from tests.warm import Popen, command, environment, genac

pytestmark = pytest.mark.timeout(900)
ROLLOUT = {"prompts": 2, "samples": 2, "max_new_tokens": 12}
ACTORS = [{"name": "early", "checkpoint": "runs/early"}, {"name": "actor"}]
EARLY: dict[str, Any] = {
    **SMALL,
    "name": "early",
    "stages": [{"kind": "sft", "name": "sft-actor", "role": "actor", "data": "demonstrations", "size": 4,
                "epochs": 1, "batch": 2, "rollout": ROLLOUT}],
}  # fmt: skip


def asking(url: str) -> dict[str, Any]:
    teacher = {"kind": "endpoint", "url": url, "model": "wise", "continuations": 2, "rounds": 2,
               "concurrency": 2, "price": [1.0, 1.0]}  # fmt: skip
    sft = {"kind": "sft", "name": "sft-critic", "role": "critic", "data": "traces", "size": 16, "epochs": 1,
           "batch": 4, "rollout": ROLLOUT, "actors": ACTORS, "teacher": teacher,
           "gate": {"action": "off"}}  # fmt: skip
    return {**SMALL, "judging": {**SMALL["judging"], "max_new_tokens": 40}, "stages": [sft]}


def write(folder: Path, name: str, recipe: dict[str, Any]) -> str:
    (folder / name).write_text(yaml.safe_dump(recipe))
    return name


def test_two_actors_states_are_asked_about_killed_and_trained_on(tmp_path: Path) -> None:
    def answer(body: dict[str, Any]) -> tuple[int, Any]:
        time.sleep(0.1)
        return 200, reply("It will fail. <answer>0</answer>", finish_reason="stop")

    server = FakeChat(answer)
    try:
        done = genac("run", write(tmp_path, "early.yaml", EARLY), cwd=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
        words = ["traces", "ask", write(tmp_path, "ask.yaml", asking(server.url)), "--out", "asked"]
        with Popen([*command(*words, "--gate", "warn")], cwd=tmp_path, env=environment()) as process:
            until = time.monotonic() + 300
            while len(server.bodies) < 5 and time.monotonic() < until and process.poll() is None:
                time.sleep(0.01)
            process.send_signal(signal.SIGKILL)
        paid = Counter(map(question, server.bodies))
        time.sleep(0.5)
        done = genac(*words, "--gate", "warn", cwd=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "answers are there already" in done.stdout
        again = Counter(map(question, server.bodies))
    finally:
        server.close()
    # States of one prompt may read alike: requests are counted, not told apart.
    kept = [json.loads(line) for file in (tmp_path / "asked/answers/parts").glob("*.jsonl")
            for line in file.read_text().splitlines()]  # fmt: skip
    assert len(kept) == len({row["state"] for row in kept})
    assert sum(again.values()) - len(kept) <= 2 + 1  # those under way at the kill
    assert sum(paid.values()) >= 5
    judged = read_judged(str(tmp_path / "asked/judged.jsonl"))  # for a value head
    assert len(judged) == len({row["state"] for row in kept})
    assert {len(state.outcomes) for state in judged} == {2}
    traces = [json.loads(line) for line in (tmp_path / "asked/traces.jsonl").read_text().splitlines()]
    assert {row["actor"] for row in traces} == {"early", "actor"}
    assert all("Success rate of early" in text or "Success rate of actor" in text for text in again)
    assert "dollars" in done.stdout

    done = genac("traces", "filter", "asked", "--out", "fewer.jsonl", "--size", "5", cwd=tmp_path)
    assert done.returncode == 3
    assert "cannot teach values" in done.stderr
    done = genac(
        "traces", "filter", "asked", "--out", "fewer.jsonl", "--size", "5", "--gate", "off", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert 1 <= len((tmp_path / "fewer.jsonl").read_text().splitlines()) <= 5
    _train(tmp_path, len(traces))


def _train(folder: Path, count: int) -> None:
    """SFT on the file, then REINFORCE on both actors in turn; a resume inside it ends alike."""
    recipe = asking("http://127.0.0.1:9/v1")
    recipe["stages"][0]["teacher"] = {"kind": "file", "path": "asked/traces.jsonl"}
    recipe["stages"][0]["batch"] = 2
    del recipe["stages"][0]["actors"]
    recipe["stages"] += [{"kind": "reinforce", "steps": 3, "rollout": ROLLOUT, "eval_every": 0,
                          "actors": ACTORS, "gate": {"action": "off"}}]  # fmt: skip
    recipe["checkpoint"] = {"every": 1, "keep": 50}
    done = genac("run", write(folder, "train.yaml", recipe), cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"of {count} traces of asked/traces.jsonl" in done.stdout
    assert "early: success rate" in done.stdout
    whole = rows(folder)
    steps = [row for row in whole if row["stage"] == "reinforce" and "critic/lr" in row]
    assert len(steps) == 3
    # Resumed behind the first step of the other actor: as if it had not been stopped.
    for path in (folder / "runs/run/checkpoints").iterdir():
        if path.name.startswith("reinforce-") and not path.name.endswith("00001"):
            shutil.rmtree(path)
    done = genac("run", "train.yaml", "--resume", cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "early: success rate" not in done.stdout  # it is in the checkpoint
    assert rows(folder) == whole
    _after_training(folder)


def _after_training(folder: Path) -> None:
    """The run's critic values transcripts, and votes on a benchmark's samples."""
    (folder / "some.jsonl").write_text(
        "".join(json.dumps({"problem": f"{n}?", "response": f"is {n}"}) + "\n" for n in range(3))
    )
    done = genac(
        "score", "some.jsonl", "train.yaml", "--checkpoint", "runs/run", "--out", "scored.jsonl", cwd=folder
    )
    # A critic of a few steps may write no score at all: then that is said.
    assert done.returncode == 0 or "no judgement parses" in done.stderr, done.stdout + done.stderr
    found = [json.loads(line) for line in (folder / "scored.jsonl").read_text().splitlines()]
    assert [row["problem"] for row in found] == ["0?", "1?", "2?"]
    assert all(row["value"] is None or 0 <= row["value"] <= 1 for row in found)
    questions = "".join(json.dumps({"question": f"{n}+1?", "answer": str(n + 1)}) + "\n" for n in range(2))
    (folder / "q.jsonl").write_text(questions)
    done = genac(
        "evaluate", "task", "gsm8k", "train.yaml", "--checkpoint", "runs/run", "--critic", "runs/run",
        "--path", "q.jsonl", "--samples", "2", "--max-new-tokens", "8", "--out", "bench", cwd=folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "weighted@k" in done.stdout
    votes = json.loads((folder / "bench/gsm8k/votes.json").read_text())
    assert votes["k"] == 2
    assert set(votes) >= {"best@2", "maj@2", "weighted@2", "parsed"}
    plan = json.loads((folder / "bench/gsm8k/values/plan.json").read_text())
    assert plan["judging"]["max_new_tokens"] == 40
    assert plan["step"] is not None
