"""The tutorial's commands, as they stand there and in that order: its small part with few steps, and the
second on a tiny model and a made-up teacher.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conversion.tiny_folder import make_folder, tiny_shape
from tests.unit.fake_chat import FakeChat, reply
from tests.warm import ROOT, genac

pytestmark = pytest.mark.timeout(1200)
PAGE = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
FIRST, SECOND = PAGE.split("# Then: ")
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
FEW = [
    "world.ranks=1", "observe.plots=false", "evaluation.prompts=4", "evaluation.samples=2",
    "evaluation.mc_states=2", "evaluation.mc_continuations=2",
    *(f"stages.{stage}.{what}" for stage in ("sft-actor", "sft-critic")
      for what in ("size=32", "heldout.size=8", "heldout.cooldown=2", "optimizer.warmup_steps=2")),
    "stages.reinforce.steps=1", "stages.ppo.steps=1",
    *(f"stages.{stage}.{what}" for stage in ("sft-actor", "sft-critic", "reinforce", "ppo")
      for what in ("rollout.prompts=2", "gate.action=warn")),
]  # fmt: skip


def commands(part: str) -> list[list[str]]:
    blocks = re.findall(r"^```sh\n(.*?)^```$", part, flags=re.MULTILINE | re.DOTALL)
    return [shlex.split(line) for block in blocks for line in block.splitlines() if line.strip()]


def files(part: str) -> dict[str, str]:
    """What the part's blocks name as files."""
    return dict(re.findall(r"^```\w+\n# file: (\S+)\n(.*?)^```$", part, flags=re.MULTILINE | re.DOTALL))


def test_the_small_part_runs_as_it_stands(tmp_path: Path) -> None:
    """Its files written, its script run, its recipe looked at whole and run with few steps."""
    for name, text in files(FIRST).items():
        (tmp_path / name).write_text(text)
    seen = [" ".join(words[:2]) for words in commands(FIRST)]
    assert [*seen[:2], *(words.split("=")[0] for words in seen[2:])] == [
        "git clone", "cd GenAC-Megatron", "alias genac", "genac doctor", "mkdir ~/first",
        "python3.11 cups.py", "genac run", "genac run",
    ]  # fmt: skip
    subprocess.run([sys.executable, "cups.py"], cwd=tmp_path, check=True, timeout=60)
    few = [f"stages.{stage}.size=64" for stage in ("sft-actor", "sft-critic")]  # of 15,000, for the time
    look, run = commands(FIRST)[-2:]
    done = genac(*look[1:], *few, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "all of them have room in the model of actor and critic" in done.stdout
    done = genac(*run[1:], *FEW, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    summary = json.loads((tmp_path / "runs/first/report/summary.json").read_text())
    assert {"actor/accuracy_ppo", "critic/brier_sft", "critic/brier_ppo"} <= set(summary)


@pytest.mark.extended
def test_every_command_of_the_second_part_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def teach(body: dict[str, Any]) -> tuple[int, Any]:
        assert body["max_completion_tokens"] == 4000
        return 200, reply("It fails. <answer>0</answer>", finish_reason="stop")

    monkeypatch.setenv("TEACHER_KEY", "k")
    make_folder(tmp_path / "model", tiny_shape(max_positions=4096, init_std=0.1))
    question = json.loads(re.findall(r"^```json\n(.*?)^```$", SECOND, flags=re.MULTILINE | re.DOTALL)[0])
    rows = [{**question, "question": f"{n}: {question['question']}"} for n in range(80)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "some.jsonl").write_text(json.dumps({"problem": "2+2?", "response": "2+2\nis 4"}) + "\n")
    server = FakeChat(teach)
    small = [*SMALL, f"stages.sft-critic.teacher.url={server.url}"]
    # The recipe itself is shrunk, so that commands stay as they are.
    (tmp_path / "mine.yaml").write_text(shrunk(files(SECOND)["mine.yaml"], small))
    try:
        seen = [words[1] for words in commands(SECOND)]
        assert seen == ["run", "traces", "traces", "run", "report", "score", "convert", "convert"]
        for words in commands(SECOND):
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
