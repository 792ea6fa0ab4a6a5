"""The tutorial's commands, as they stand there and in that order, on a tiny model and a made-up teacher."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conversion.tiny_folder import make_folder, tiny_shape
from tests.unit.fake_chat import FakeChat, reply
from tests.warm import ROOT, genac

pytestmark = [pytest.mark.extended, pytest.mark.timeout(1200)]
PAGE = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
SMALL = [
    "observe.plots=false", "checkpoint.every=0", "judging.max_new_tokens=40", "judging.states.max_states=3",
    "evaluation.prompts=2", "evaluation.samples=2", "evaluation.mc_states=2", "evaluation.mc_continuations=2",
    *(f"roles.{role}.{what}.dtype=fp32" for role in ("actor", "critic") for what in ("training", "engine")),
    "stages.sft-critic.size=12", "stages.sft-critic.teacher.rounds=1",
    "stages.sft-critic.teacher.continuations=2", "stages.sft-critic.gate.action=warn",
    *(f"stages.{stage}.rollout.{what}" for stage in ("sft-critic", "reinforce", "ppo")
      for what in ("prompts=2", "samples=2", "max_new_tokens=12")),
    "stages.reinforce.steps=1", "stages.reinforce.gate.action=warn", "stages.ppo.steps=1",
    "stages.ppo.gate.action=warn",
]  # fmt: skip


def commands() -> list[list[str]]:
    blocks = re.findall(r"^```sh\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)
    return [shlex.split(line) for block in blocks for line in block.splitlines() if line.strip()]


def recipe() -> str:
    return re.findall(r"^```yaml\n# file: mine\.yaml\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)[0]


def test_every_command_of_the_tutorial_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def teach(body: dict[str, Any]) -> tuple[int, Any]:
        assert body["max_completion_tokens"] == 4000
        return 200, reply("It fails. <answer>0</answer>", finish_reason="stop")

    monkeypatch.setenv("TEACHER_KEY", "k")
    make_folder(tmp_path / "model", tiny_shape(max_positions=4096, init_std=0.1))
    question = json.loads(re.findall(r"^```json\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)[0])
    rows = [{**question, "question": f"{n}: {question['question']}"} for n in range(80)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "some.jsonl").write_text(json.dumps({"problem": "2+2?", "response": "2+2\nis 4"}) + "\n")
    server = FakeChat(teach)
    small = [*SMALL, f"stages.sft-critic.teacher.url={server.url}"]
    # The recipe itself is shrunk, so that commands stay as they are.
    (tmp_path / "whole.yaml").write_text(recipe())
    (tmp_path / "mine.yaml").write_text(shrunk(recipe(), small))
    try:
        seen = [words[1] for words in commands()]
        assert seen == ["run", "traces", "traces", "run", "report", "score", "convert", "convert"]
        for words in commands():
            assert words[0] == "genac"
            more = ["--gate", "warn"] if words[1] == "traces" else []
            done = genac(*words[1:], *more, cwd=tmp_path)
            fine = done.returncode == 0 or "no judgement parses" in done.stderr  # of a critic of three steps
            assert fine, f"{words}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    finally:
        server.close()
    assert (tmp_path / "runs/mine/report/index.html").exists()
    assert (tmp_path / "critic-hf/config.json").exists()
    assert (tmp_path / "stricter.jsonl").exists()


def shrunk(text: str, overrides: list[str]) -> str:
    """The recipe with `key.path=value`s in it; stages by name, or by kind where they have none."""
    found = yaml.safe_load(text)
    for one in overrides:
        path, value = one.split("=", 1)
        *keys, last = path.split(".")
        at: Any = found
        for key in keys:
            if isinstance(at, list):
                at = next(stage for stage in at if key in (stage.get("name"), stage["kind"]))
            else:
                at = at.setdefault(key, {})
        at[last] = yaml.safe_load(value)
    return yaml.safe_dump(found)
