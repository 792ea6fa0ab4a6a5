"""Another interpreter's process from this side: what it does wrong, and that it ends.

Its part is played by a few lines of Python that answer the protocol (tasks/theirs/main.py) as they are told;
the packages themselves play in tests/e2e/test_package_environments.py.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from genac_megatron.environments import Environments, make_environment
from genac_megatron.environments.host import Answer, Job, digest
from genac_megatron.errors import InputError
from genac_megatron.recipe.environments import EnvironmentConfig
from genac_megatron.recipe.tasks import TextArenaTask
from genac_megatron.records import Prompt
from genac_megatron.tasks import make_task
from genac_megatron.tasks.theirs.process import Failed, Lost, TheirProcess, theirs_of

PROMPT = Prompt("train/0", ({"role": "user", "content": "go"},), "go", {"row": {"n": 1}, "answer": ""})
ANSWERING = """#!{python}
import json, os, sys, time
game, steps = None, 0
come, go = os.fdopen(int(sys.argv[2])), os.fdopen(int(sys.argv[3]), "w")
for line in come:
    asked = json.loads(line)
    said = asked.get("turn", asked.get("id"))
    if said == "hang":
        time.sleep(600)
    if said == "die":
        print("out of luck", file=sys.stderr, flush=True)
        os._exit(7)
    game, steps = asked.get("id", game), steps + (asked["do"] == "step")
    step = {{"observation": f"heard {{said}}"}}
    if said == "end" or (game == "third-is-last" and steps == 3):
        step |= {{"done": True, "reward": 3.0, "parts": {{}}}}
    found = {{"loaded": {{"over": asked["over"]}}, "step": step}}
    found = {{"failed": "no", "way_out": "do"}} if said == "fail" else found
    go.write(("no JSON" if said == "babble" else json.dumps(found)) + "\\n")
    go.flush()
"""


@pytest.fixture
def python(tmp_path: Path) -> str:
    path = tmp_path / "python"
    path.write_text(ANSWERING.format(python=sys.executable))
    path.chmod(0o755)
    return str(path)


def config(python: str, id_: str = "game", **more: Any) -> TextArenaTask:
    return TextArenaTask.model_validate({"kind": "textarena", "id": id_, "python": python, **more})


@pytest.mark.parametrize(
    ("id_", "error", "why"),
    [
        ("hang", Lost, r"took longer than 0\.5 s"),
        ("die", Lost, r"ended its process with 7\n  out of luck"),
        ("babble", Lost, "answered what is no answer: 'no JSON"),
        ("fail", Failed, "no"),
    ],
)
def test_one_that_does_not_load_says_why(python: str, id_: str, error: type[Exception], why: str) -> None:
    theirs = theirs_of(config(python, id_, timeout_s=0.5 if id_ == "hang" else 60.0), 1)
    process = TheirProcess(theirs)
    try:
        with pytest.raises(error, match=why):
            process.load(theirs, rows=True)
    finally:
        process.close()
    with pytest.raises(InputError, match=rf"textarena {id_} {why}"):
        make_task(config(python, id_, timeout_s=theirs.timeout_s), None, 1)


def test_no_interpreter_is_refused_by_where_it_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match=r"task\.python: .*/none is no interpreter"):
        make_task(config(str(tmp_path / "none")), None, 1)
    monkeypatch.setenv("GENAC_ENVIRONMENTS_PYTHON", str(tmp_path / "other"))
    with pytest.raises(InputError, match=r"GENAC_ENVIRONMENTS_PYTHON: .*/other is no interpreter"):
        make_task(TextArenaTask(kind="textarena", id="game"), None, 1)
    bad = tmp_path / "text"
    bad.write_text("no program")
    bad.chmod(0o755)
    with pytest.raises(InputError, match="cannot be started: Exec format error"):
        make_task(config(str(bad)), None, 1)


def test_without_the_package_it_is_said_how_to_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under this interpreter, which is asked where nobody names another: textarena is not in its lock."""
    monkeypatch.delenv("GENAC_ENVIRONMENTS_PYTHON", raising=False)
    with pytest.raises(InputError, match=r"textarena is not installed under (.|\n)*make environments-env"):
        make_task(TextArenaTask(kind="textarena", id="GuessTheNumber-v0"), None, 1)


def test_what_is_over_is_told_with_the_next_request(python: str) -> None:
    theirs = theirs_of(config(python), 1)
    process = TheirProcess(theirs)
    try:
        process.over(process.begin())
        assert process.load(theirs, rows=False) == {"over": [1]}
        assert process.load(theirs, rows=False) == {"over": []}
    finally:
        process.close()


@pytest.fixture
def environment(python: str) -> Iterator[Environments]:
    limits = EnvironmentConfig.model_validate({"kind": "task", "step_s": 5.0, "turns": 3})
    made = make_environment(limits, config(python))
    yield made
    made.close()


def said(answer: Answer) -> str:
    return answer.failure if answer.step is None else answer.step.messages[0][1]


async def talk(environment: Environments, key: str, turns: list[str]) -> list[str]:
    told, seen = list[str](), list[str]()
    for number in range(1, len(turns) + 1):
        job = Job(key, PROMPT, 5, tuple(turns[:number]), digest(None), tuple(seen))
        answer = await environment.ask(job)
        told.append(said(answer).removeprefix("heard "))
        if answer.step is None:
            break
        seen.append(digest(answer.step.messages))
    return told


def test_a_fault_there_fails_its_conversation(environment: Environments) -> None:
    faults = {"fail": "no", "die": "lost 2 processes at it", "hang": "took longer than 5 s"}
    for turn, why in faults.items():
        assert asyncio.run(talk(environment, turn, ["a", turn, "b"])) == ["a", why]
    assert asyncio.run(talk(environment, "next", ["a", "b"])) == ["a", "b"], "in a fresh process"
    assert asyncio.run(talk(environment, "more", ["end"])) == [
        "gave the reward 3, and task.rewards is [0, 1]"
    ]


def test_turns_without_meaning_show_a_fault_before_the_run(environment: Environments, python: str) -> None:
    environment.try_out(Job("tried", PROMPT, 5), "do otherwise")
    limits = EnvironmentConfig.model_validate({"kind": "task", "turns": 3})
    late = make_environment(limits, config(python, "third-is-last"))
    try:
        with pytest.raises(InputError, match=r"task: the environment gave the reward 3(.|\n)*do otherwise"):
            late.try_out(Job("tried", PROMPT, 5), "do otherwise")
    finally:
        late.close()


def test_its_process_ends_with_the_one_that_started_it(environment: Environments) -> None:
    before = set(psutil.Process().children(recursive=True))
    asyncio.run(talk(environment, "a", ["b"]))
    begun = [one for one in psutil.Process().children(recursive=True) if one not in before]
    theirs = [one for one in begun if "main.py" in " ".join(one.cmdline())]
    assert len(theirs) == 1
    theirs[0].parent().kill()  # which asked it, and is not there to end it
    assert psutil.wait_procs(theirs, timeout=20)[1] == []
