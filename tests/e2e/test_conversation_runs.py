"""Runs over an environment by the command line: played demonstrations, RL with and without a value head."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.e2e.test_run import RECIPE, rows
from tests.unit.test_conversations import THINKING
from tests.warm import genac

ROLLOUT = {"prompts": 4, "samples": 2, "max_new_tokens": 80}
LOCK = {"kind": "lock", "min_length": 1, "max_length": 2, "turns": 4, "heldout_size": 16, "slip_rate": 0.3}
ACTOR = RECIPE["roles"]["actor"]


def policy(name: str, **algorithm: Any) -> dict[str, Any]:
    return {
        "kind": "policy", "name": name, "algorithm": {"kind": name, **algorithm}, "steps": 2, "eval_every": 0,
        "rollout": ROLLOUT,
    }  # fmt: skip


def recipe(folder: Path, stages: list[dict[str, Any]], **changes: Any) -> Path:
    critic = {**RECIPE["roles"]["critic"], "model": {**ACTOR["model"], "head": "value"}}
    path = folder / "recipe.yaml"
    whole = {
        **RECIPE, "task": LOCK, "environment": {"kind": "task", "turns": 4, "turn_tokens": 4},
        "roles": {"actor": ACTOR, "critic": critic}, "stages": stages,
        "evaluation": {"prompts": 4, "samples": 2},
        "judging": {"states": {"cutter": "fixed", "min_segment": 1}},
    }  # fmt: skip
    path.write_text(yaml.safe_dump({**whole, **changes}))
    return path


SFT = {
    "kind": "sft", "name": "sft-actor", "role": "actor", "data": "demonstrations", "size": 24, "epochs": 1,
    "batch": 8, "rollout": ROLLOUT,
}  # fmt: skip
VALUE = {"kind": "value", "steps": 1, "rollout": ROLLOUT, "eval_every": 0}


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("conversations")
    stages = [SFT, VALUE, policy("ppo"), policy("grpo"), policy("reinforce_pp")]
    result = genac("run", str(recipe(folder, stages)), cwd=folder)
    assert result.returncode == 0, result.stdout + result.stderr
    return folder


def test_conversations_train_the_actor_by_what_was_sampled(done: Path) -> None:
    by_stage: dict[str, list[dict[str, Any]]] = {}
    for row in rows(done):
        by_stage.setdefault(row["stage"], []).append(row)
    for name in ("ppo", "grpo", "reinforce_pp"):
        steps = [row for row in by_stage[name] if "actor/loss" in row]
        assert len(steps) == 2
        for row in steps:
            assert row["parity/actor_p99"] < 1e-3, "fp32 on both sides: the ids are the engine's own"
            assert math.isfinite(row["actor/grad_norm"])
            assert 1 <= row["rollout/turns_mean"] <= 4
            assert row["rollout/length_mean"] <= 4 * row["rollout/turns_mean"]
            assert row["rollout/observed_mean"] > row["rollout/length_mean"] or row["rollout/turns_mean"] == 1
            assert row["environment/failed"] == 0.0
    assert "critic/loss" in by_stage["ppo"][0]
    assert any(row["actor/grad_norm"] > 0 for name in ("ppo", "grpo") for row in by_stage[name])


def test_demonstrations_have_loss_on_the_teachers_turns(done: Path) -> None:
    kept = (done / "runs" / "run" / "data" / "sft-actor.jsonl").read_text().splitlines()
    samples = [json.loads(line) for line in kept]
    assert len(samples) == 24
    assert any(len(sample["spans"]) > 2 for sample in samples)
    for sample in samples:
        assert all(end - begin == 2 for begin, end in sample["spans"]), "a symbol and the turn's end"
        assert len({tuple(sample["tokens"][begin:end]) for begin, end in sample["spans"]}) <= 2
        assert sample["spans"][-1][1] == len(sample["tokens"])


def test_the_report_shows_conversations(done: Path) -> None:
    folder = done / "runs" / "run"
    shown = [json.loads(line) for line in (folder / "rollouts.jsonl").read_text().splitlines()]
    assert {row["stage"] for row in shown} >= {"value", "ppo", "grpo", "reinforce_pp"}
    for row in shown:
        assert row["response"].startswith("<actor>\n")
        assert "\n<user>\nstep " in row["response"]
        for state in row["states"][1:]:
            before = row["response"][: state["cut_text"]]
            assert before.endswith("\n") or before.rpartition("<")[2].startswith("actor>")
    page = (folder / "report" / "index.html").read_text()
    assert "&lt;actor&gt;" in page
    assert "&lt;user&gt;\nstep " in page


def test_turns_are_sequences_of_their_own_where_the_template_rewrites_them(tmp_path: Path) -> None:
    """Trainer and engine agree on them, over two ranks; what is trained on is what was sampled."""
    model = {**ACTOR["model"], "chat_template": THINKING}
    actor = {**ACTOR, "model": model, "layout": {}}
    block = {"kind": "task", "turns": 4, "turn_tokens": 4, "history": "template"}
    path = recipe(tmp_path, [policy("grpo")], roles={"actor": actor}, environment=block)
    result = genac("run", str(path), cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "each turn stands behind what it shows then" in result.stdout + result.stderr
    steps = [row for row in rows(tmp_path) if "actor/loss" in row]
    assert len(steps) == 2
    for row in steps:
        assert row["parity/actor_p99"] < 1e-3
        assert row["rollout/turns_mean"] > 1


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Traces of the exact teacher, REINFORCE, joint PPO: over states before the actor's turns."""
    folder = tmp_path_factory.mktemp("judged")
    stages: list[dict[str, Any]] = [
        SFT,
        {"kind": "sft", "name": "sft-critic", "role": "critic", "start_from": "actor", "data": "traces",
         "size": 10, "epochs": 1, "batch": 5, "rollout": ROLLOUT, "gate": {"action": "off"}},
        {"kind": "reinforce", "steps": 1, "rollout": ROLLOUT, "eval_every": 0, "gate": {"action": "off"}},
        {"kind": "ppo", "steps": 2, "rollout": ROLLOUT, "eval_every": 0, "gate": {"action": "off"}},
    ]  # fmt: skip
    states = {"cutter": "turns", "min_segment": 1, "max_states": 4}
    judging = {"template": "brief", "max_new_tokens": 40, "transcript_tokens": 40, "states": states}
    roles = {"actor": ACTOR, "critic": RECIPE["roles"]["critic"]}
    more = {"evaluation": {"prompts": 2, "samples": 1}, "checkpoint": {"every": 1, "keep": 9}}
    path = recipe(folder, stages, roles=roles, judging=judging, **more)
    result = genac("run", str(path), cwd=folder)
    assert result.returncode == 0, result.stdout + result.stderr
    return folder


def test_a_critic_judges_between_turns(judged: Path) -> None:
    found = [row for row in rows(judged) if row["stage"] == "ppo" and "actor/loss" in row]
    assert len(found) == 2
    for row in found:
        assert math.isfinite(row["actor/grad_norm"])
        assert row["parity/actor_p99"] < 1e-3
        assert row["parity/critic_p99"] < 1e-3
        assert row["judge/states"] > 4, "more than the prompts' own"
        assert row["judge/too_long"] == 0.0
    shown = rows(judged, "rollouts.jsonl")
    asked = [row["judge_prompt"] for row in shown if "judge_prompt" in row]
    assert any("<actor>\n" in prompt and "<user>\nstep " in prompt for prompt in asked)


def test_a_run_over_conversations_resumes_byte_for_byte(judged: Path, tmp_path: Path) -> None:
    """From inside the joint stage: figures, evaluations, rollouts and weights are those of the whole run."""
    shutil.copytree(judged, tmp_path, dirs_exist_ok=True)
    for path in (tmp_path / "runs" / "run" / "checkpoints").iterdir():
        if path.name in ("ppo-00002", "ppo-end"):
            shutil.rmtree(path)
    assert (tmp_path / "runs" / "run" / "checkpoints" / "ppo-00001").is_dir()
    result = genac("run", str(tmp_path / "recipe.yaml"), "--resume", cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    for log in ("metrics.jsonl", "evaluations.jsonl", "rollouts.jsonl"):
        assert rows(tmp_path, log) == rows(judged, log), log
    ends = [sorted((f / "runs/run/checkpoints/ppo-end/weights").glob("*.distcp")) for f in (tmp_path, judged)]
    assert ends[0]
    assert [path.name for path in ends[0]] == [path.name for path in ends[1]]
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(*ends, strict=True))
