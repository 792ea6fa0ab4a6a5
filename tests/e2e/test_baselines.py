"""Every baseline by the command line, in one run: SFT, value pre-training, then each algorithm in turn."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.e2e.test_run import RECIPE, rows
from tests.warm import Popen, command, environment, genac

ROLLOUT = {"prompts": 4, "samples": 3, "max_new_tokens": 16}
ALGORITHMS: dict[str, dict[str, Any]] = {
    "ppo": {"kind": "ppo"},
    "vc-ppo": {"kind": "vc_ppo"},
    "vapo": {"kind": "vapo"},
    "sp3o": {"kind": "sp3o"},
    "grpo": {"kind": "grpo", "loss": {"kl_coef": 0.04}},
    "dr-grpo": {"kind": "dr_grpo"},
    "dapo": {"kind": "dapo", "rounds": 2, "overlong": {"cache": 4}},
    "rloo": {"kind": "rloo"},
    "reinforce-pp": {"kind": "reinforce_pp"},
    "reinforce-pp-baseline": {"kind": "reinforce_pp", "baseline": True},
}
SCALAR = ("ppo", "vc-ppo", "vapo", "sp3o")


def recipe(folder: Path, stages: list[dict[str, Any]], **changes: Any) -> Path:
    critic = RECIPE["roles"]["critic"]
    roles = {
        "actor": RECIPE["roles"]["actor"],
        "critic": {**critic, "model": {**critic["model"], "head": "value"}},
        "reference": {**critic, "training": {**critic["training"], "frozen": True}},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({**RECIPE, "roles": roles, "stages": stages, **changes}))
    return path


def policy(name: str, **changes: Any) -> dict[str, Any]:
    stage = {"kind": "policy", "name": name, "algorithm": ALGORITHMS[name], "steps": 1, "eval_every": 0}
    return {**stage, "rollout": ROLLOUT, **changes}


SFT = {**RECIPE["stages"][0]}
VALUE = {"kind": "value", "steps": 2, "start_from": "actor", "rollout": ROLLOUT, "minibatches": 2}
LONGER: dict[str, Any] = {
    "vc-ppo": {"steps": 2, "minibatches": 2, "epochs": 2},
    "grpo": {"steps": 2},
    "dapo": {"steps": 2},
}
STAGES = [SFT, VALUE, *(policy(name, **LONGER.get(name, {})) for name in ALGORITHMS)]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("baselines")
    result = genac("run", str(recipe(folder, STAGES)), cwd=folder)
    assert result.returncode == 0, result.stdout + result.stderr
    return folder


def test_every_algorithm_trains_the_actor(done: Path) -> None:
    by_stage: dict[str, list[dict[str, Any]]] = {}
    for row in rows(done):
        by_stage.setdefault(row["stage"], []).append(row)
    for name in ALGORITHMS:
        steps = [row for row in by_stage[name] if "actor/loss" in row]
        assert len(steps) == LONGER.get(name, {}).get("steps", 1)
        assert all(math.isfinite(row["actor/grad_norm"]) for row in steps)
        assert ("critic/loss" in steps[0]) == (name in SCALAR)
        assert steps[0]["parity/actor_p99"] < 1e-3  # fp32 on both sides
    assert {"rollout/rounds", "rollout/groups"} <= by_stage["dapo"][0].keys()
    assert "actor/nll" in by_stage["vapo"][0]
    first, second = (row["actor/kl_reference"] for row in by_stage["grpo"][:2])
    assert abs(first) < 1e-9, "the reference is the actor as the stage found it, in another layout"
    assert second > 0


def test_a_scalar_critic_is_evaluated_as_a_generative_one_is(done: Path) -> None:
    evaluations = rows(done, "evaluations.jsonl")
    ends = {row["stage"]: row for row in evaluations if row["name"] == "end"}
    for name in (*SCALAR, "value"):
        critic = ends[name]["critic"]
        assert 0 <= critic["brier"] <= 1
        assert critic["parse_rate"] == 1.0
        assert critic["tokens_per_state"] == 0.0
        assert math.isfinite(critic["mse"])
    assert all(ends[name]["critic"] is None for name in ALGORITHMS if name not in SCALAR)


def test_a_batch_of_each_algorithm_is_kept_with_its_tokens(done: Path) -> None:
    """Values of every token are a scalar critic's; advantages each algorithm's own."""
    trained = [row for row in rows(done, "rollouts.jsonl") if row["of"] == "training"]
    assert {row["stage"] for row in trained} == {*ALGORITHMS, "value"}
    for row in trained:
        assert ("values" in row["tokens"]) == (row["stage"] in (*SCALAR, "value"))
        assert ("advantages" in row["tokens"]) == (row["stage"] in ALGORITHMS)
        assert {len(figures) for figures in row["tokens"].values()} == {row["length"]}


def test_the_report_of_such_a_run_is_written(done: Path) -> None:
    report = done / "runs" / "run" / "report"
    assert (report / "index.html").stat().st_size > 10_000
    assert json.loads((report / "summary.json").read_text())


# --- a critic of log-odds with frozen attention, one response per prompt -------------------------------

ALONE = {"prompts": 8, "samples": 1, "max_new_tokens": 16}
RIVALS: list[dict[str, Any]] = [
    SFT,
    {"kind": "value", "steps": 2, "start_from": "actor", "rollout": ALONE,
     "value": {"clip": None, "target": "monte_carlo", "continuations": 2, "updates": 2}},
    {"kind": "policy", "name": "pact", "algorithm": {"kind": "pact"}, "minibatches": 2},
    {"kind": "policy", "name": "sao", "algorithm": {"kind": "sao", "value": {"target": "exact"}}},
    {"kind": "policy", "name": "filtered", "algorithm": {"kind": "reinforce_pp"}, "overlong_filter": True},
]  # fmt: skip
RIVALS[2:] = [{**stage, "steps": 2, "eval_every": 0, "rollout": ALONE} for stage in RIVALS[2:]]


def rivals(folder: Path) -> Path:
    path = recipe(folder, RIVALS)
    made = yaml.safe_load(path.read_text())
    made["roles"]["critic"]["model"]["head"] = "logit"
    made["roles"]["critic"]["training"]["frozen_attention"] = True
    path.write_text(yaml.safe_dump(made))
    return path


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rivals")
    result = genac("run", str(rivals(folder)), cwd=folder)
    assert result.returncode == 0, result.stdout + result.stderr
    return folder


def test_one_response_per_prompt_trains_by_a_critic_of_log_odds(alone: Path) -> None:
    by_stage: dict[str, list[dict[str, Any]]] = {}
    for row in rows(alone):
        by_stage.setdefault(row["stage"], []).append(row)
    for row in by_stage["value"][:2]:
        assert 0 < row["critic/value"] < 1
        assert row["tokens/rollout"] > 8 * 2  # continuations too
    for row in by_stage["pact"][:2]:
        assert 0 <= row["critic/dropped_share"] < 1
        assert 0 < row["unique/moved"] <= row["tokens/moved"]
        assert 0 < row["unique/value"] <= row["tokens/value"]
        assert math.isfinite(row["actor/grad_norm"])
    for row in by_stage["sao"][:2]:
        assert {"actor/masked_low_share", "actor/masked_high_share"} <= row.keys()
        assert math.isfinite(row["critic/grad_norm"])
        assert "critic/dropped_share" not in row
    assert all(("actor/loss" in row) != ("actor/skipped" in row) for row in by_stage["filtered"][:2])
    ends = {row["stage"]: row for row in rows(alone, "evaluations.jsonl") if row["name"] == "end"}
    assert all(0 < value < 1 for value in ends["sao"]["critic"]["values"])


@pytest.mark.extended
def test_stopped_in_a_rival_and_resumed_it_ends_the_same(alone: Path, tmp_path: Path) -> None:
    """Parameters that have no optimizer state among those that have."""
    path = str(rivals(tmp_path))
    for stop, (stage, step) in enumerate((("value", 1), ("pact", 1), ("sao", 1))):
        assert stopped_at(path, tmp_path, stage, step, resume=stop > 0) == 75
    result = genac("run", path, "--resume", cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    assert rows(tmp_path) == rows(alone)
    assert rows(tmp_path, "evaluations.jsonl") == rows(alone, "evaluations.jsonl")


@pytest.mark.extended  # test_run.py stops and resumes in shorter runs
def test_stopped_in_a_baseline_and_resumed_it_ends_the_same(done: Path, tmp_path: Path) -> None:
    """Scalar critic, its optimizer, minibatches and dynamic sampling: figures to the last bit."""
    path = str(recipe(tmp_path, STAGES))
    for stop, (stage, step) in enumerate((("value", 1), ("vc-ppo", 1), ("grpo", 1))):
        assert stopped_at(path, tmp_path, stage, step, resume=stop > 0) == 75
    result = genac("run", path, "--resume", cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    assert rows(tmp_path) == rows(done)
    assert rows(tmp_path, "evaluations.jsonl") == rows(done, "evaluations.jsonl")


def stopped_at(path: str, folder: Path, stage: str, step: int, *, resume: bool) -> int:
    """Run until a step is logged, then ask to stop; the exit code."""
    process = Popen(
        command("run", path, *(["--resume"] if resume else [])),
        cwd=folder,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    metrics = folder / "runs" / "run" / "metrics.jsonl"
    give_up = time.monotonic() + 300
    while process.poll() is None and time.monotonic() < give_up:
        if metrics.exists() and any((r["stage"], r["step"]) == (stage, step) for r in rows(folder)):
            process.send_signal(signal.SIGINT)
            break
        time.sleep(0.02)
    return process.wait(timeout=300)


@pytest.mark.parametrize(
    ("stages", "words"),
    [
        ([{**policy("grpo"), "rollout": {**ROLLOUT, "samples": 1}}], ["grpo", "samples"]),
        ([{**policy("dapo"), "overlap": True}], ["dapo", "overlap"]),
        ([{"kind": "reinforce", "steps": 1}], ["roles.critic.model.head", "language model"]),
        ([{**policy("grpo"), "start_from": "actor"}], ["start_from"]),
        ([{**policy("grpo"), "algorithm": {"kind": "grpp"}}], ["grpp"]),
    ],
    ids=["one-sample", "dapo-overlap", "scalar-judges", "start-from", "unknown-algorithm"],
)
def test_bad_input_is_one_message_and_exit_2(
    tmp_path: Path, stages: list[dict[str, Any]], words: list[str]
) -> None:
    result = genac("run", str(recipe(tmp_path, stages)), "--dry-run", cwd=tmp_path)
    assert result.returncode == 2
    assert all(word in result.stderr for word in words), result.stderr
    assert "Traceback" not in result.stderr
