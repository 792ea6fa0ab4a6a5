"""Judges, teachers and servers that are down are told of before anything is begun."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_chat import FakeChat, reply

from genac_megatron import cli
from genac_megatron.errors import InputError
from genac_megatron.recipe.loader import load_recipe
from genac_megatron.serving import there
from genac_megatron.stages.endpoints import need_endpoints

JUDGED = """
name: judged
task: &rubric
  kind: rubric
  path: rows.jsonl
  heldout_size: 1
  rubric: "polite"
  judge: {url: "URL", model: m}
roles:
  actor: &role
    model:
      family: qwen3
      tokenizer: builtin:tiny
      shape: {layers: 1, hidden: 32, ffn: 64, heads: 2, kv_heads: 2}
    training: {dtype: fp32}
    engine: {dtype: fp32}
stages: [{kind: policy, name: pg, steps: 1, algorithm: {kind: grpo}}]
"""


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(there, "WAIT_S", 0.0)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text("".join(f'{{"prompt": "say {n}"}}\n' for n in range(4)))


def nobody() -> str:
    """An address on which nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"http://127.0.0.1:{server.getsockname()[1]}/v1"


def recipe(url: str) -> Path:
    path = Path("judged.yaml")
    path.write_text(JUDGED.replace("URL", url))
    return path


def test_a_judge_that_is_down_is_told_of_before_anything_begins(capsys: pytest.CaptureFixture[str]) -> None:
    url = nobody()
    path = recipe(url)
    before = sorted(Path.cwd().iterdir())
    assert cli.main(["run", str(path)]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"genac: error: task.judge.url: the judge does not answer at {url}: ConnectError")
    assert said.endswith("way out: start it, or correct the address; nothing was begun\n")
    assert len(said.splitlines()) == 2
    assert sorted(Path.cwd().iterdir()) == before
    assert cli.main(["run", str(path), "--dry-run"]) == 0, "a login node may not see it"


def test_a_key_that_is_not_set_is_told_beside_an_address_where_nobody_is(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NOBODYS_KEY", raising=False)
    path = recipe(url := nobody())
    assert cli.main(["run", str(path), "task.judge.api_key_env=NOBODYS_KEY"]) == 2
    said = capsys.readouterr().err
    assert "task.judge.api_key_env: the environment variable NOBODYS_KEY is not set" in said
    assert f"task.judge.url: the judge does not answer at {url}" in said
    assert "way out: export it, or leave task.judge.api_key_env out" in said
    assert said.count("genac: error: ") == 1


def test_a_dry_run_asks_nobody_and_names_keys_that_are_not_set(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NOBODYS_KEY", raising=False)
    words = ["run", str(recipe(nobody())), "--dry-run", "task.judge.api_key_env=NOBODYS_KEY"]
    line = "judge: NOBODYS_KEY is not set here; the run needs it in its environment\n"
    assert cli.main(words) == 0
    assert line in capsys.readouterr().out
    monkeypatch.setenv("NOBODYS_KEY", " ")
    assert cli.main(words) == 0
    assert line in capsys.readouterr().out, "which a run refuses"
    monkeypatch.setenv("NOBODYS_KEY", "k")
    assert cli.main(words) == 0
    assert line not in capsys.readouterr().out
    assert cli.main([*words, "task.judge.url=nowhere"]) == 2
    assert "way out: set task.judge.url to the base" in capsys.readouterr().err


def test_one_that_takes_requests_and_says_nothing_is_down(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(there, "LIMIT_S", 0.3)
    with socket.create_server(("127.0.0.1", 0), backlog=8) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}/v1"
        with pytest.raises(InputError, match=r"no answer within 0.3 s"):
            there.need_there(url, "judge", "task.judge.url")


def test_one_that_answers_is_there_whatever_it_says(fake_chat: Callable[..., FakeChat]) -> None:
    server = fake_chat(lambda body: (200, reply("x")))  # it knows no GET: status 501
    there.need_there(server.url, "judge", "task.judge.url")
    assert server.bodies == [], "nothing that costs was asked"


def test_teachers_of_stages_and_sources_judges_of_mixtures_and_servers_are_asked() -> None:
    asks = {"kind": "endpoint", "model": "m"}
    sources = [
        {"share": 0.5},
        {"share": 0.5, "teacher": {**asks, "url": nobody()}},
    ]
    stage: dict[str, Any] = {"kind": "sft", "role": "critic", "data": "traces"}
    own, theirs = ({**stage, "teacher": {**asks, "url": nobody()}}, {**stage, "sources": sources})
    path = recipe(nobody())
    mixture = {
        "kind": "mixture",
        "parts": [{"name": "a", "task": {"kind": "state_tracking"}},
                  {"name": "b", "task": load_recipe(path).task.model_dump(mode="json")}],
    }  # fmt: skip
    cases = [
        ([f"task={json.dumps(mixture)}"], "task.parts.1.task.judge.url: the judge"),
        (["task={kind: state_tracking}", f"stages.0={json.dumps(own)}"],
         "stages.0.teacher.url: the teacher"),
        (["task={kind: state_tracking}", f"stages.0={json.dumps(theirs)}"],
         "stages.0.sources.1.teacher.url: the teacher"),
        (["task={kind: state_tracking}", f"roles.actor.engine={{kind: sglang, urls: ['{nobody()}']}}"],
         "roles.actor.engine.urls: the SGLang server"),
    ]  # fmt: skip
    role = json.dumps(load_recipe(path).roles["actor"].model_dump(mode="json"))
    for overrides, said in cases:
        found = load_recipe(path, [f"roles.critic={role}", *overrides])
        with pytest.raises(InputError) as caught:
            need_endpoints(found, teachers=True)
        assert str(caught.value).startswith(said)
        if "teacher" in said:
            need_endpoints(found, teachers=False)  # as a resumed run, which may have all answers
