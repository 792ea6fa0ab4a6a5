"""Joint training in other regimes: single rollouts, several critic updates, a teacher, the entry gate."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from tests.e2e.test_gates import SMALL, Done
from tests.warm import genac

ROLLOUT = {"prompts": 4, "samples": 1, "max_new_tokens": 8}


def write(folder: Path, stage: dict[str, Any], **changes: Any) -> str:
    whole = {**SMALL, "stages": [{"kind": "ppo", "eval_every": 0, "rollout": ROLLOUT, **stage}], **changes}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(whole))
    return str(path)


def rows(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "runs/run/metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if "judge/brier" in row]


def ran(done: Done) -> None:
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]


def test_a_critic_that_writes_no_score_stops_the_run_before_a_step(tmp_path: Path) -> None:
    """Bug 9 of the review: it trained with p_bar as every value, and ended with exit code 0."""
    path = write(tmp_path, {"steps": 1})
    done = genac("run", path, cwd=tmp_path)
    assert done.returncode == 3, done.stdout[-3000:] + done.stderr[-5000:]
    for words in ("gate of stage ppo", "none of the critic's judgements can be read", "gate.action=warn"):
        assert words in done.stderr
    summary = json.loads((tmp_path / "runs/run/report/summary.json").read_text())
    assert summary["gate/stopped"] == "ppo"
    assert not list((tmp_path / "runs/run/checkpoints").glob("ppo*")), "nothing was trained"
    # There is nothing to resume: the same run begins again, and goes on as told.
    ran(genac("run", path, "stages.ppo.gate.action=warn", cwd=tmp_path))
    assert len(rows(tmp_path)) == 1
    summary = json.loads((tmp_path / "runs/run/report/summary.json").read_text())
    assert summary["gate/stopped"] is None
    assert "none of the critic's judgements" in summary["gate/failed"]


def test_single_rollouts_with_two_critic_updates_published_every_second_step(tmp_path: Path) -> None:
    roles = {**SMALL["roles"], "critic": {**SMALL["roles"]["critic"], "publication": {"every": 2}}}
    stage = {
        "steps": 4,
        "gate": {"action": "off"},
        "critic_updates": 2,
        "overlong_filter": True,
        "advantage": {"lam": 0.0, "lam_gate": None, "normalise": "centre"},
    }
    states = {"cutter": "fixed", "fixed_length": 2, "max_states": 3, "min_segment": 2}
    judging = {**SMALL["judging"], "states": {**states, "final": True, "final_weight": 4.0}}
    path = write(tmp_path, stage, roles=roles, judging=judging, checkpoint={"every": 0})
    ran(genac("run", path, cwd=tmp_path))
    found = rows(tmp_path)
    assert [row["step"] for row in found] == [1, 2, 3, 4]
    # The critic is published after steps 2 and 4, under the next version.
    versions = [row.get("publish/critic_version") for row in found]
    assert versions[0] in (None, 1.0)  # its first publication may be in this row
    assert versions[1:] == [2.0, None, 3.0]
    # Judgements by the present weights measure parity; those by weights of before, drift.
    for row, fresh in zip(found, (True, False, True, False), strict=True):
        group = "parity" if fresh else "drift"
        assert f"{group}/critic_p99" in row
        assert row[f"{group}/critic_p99"] < (1e-3 if fresh else 1.0)
        assert row["publish/critic_behind"] == (0.0 if fresh else 2.0)
        assert row["judge/staleness"] == 0.0
        assert row["critic/importance"] > 0
        assert 0 <= row["critic/importance_dropped"] < 1
        assert row["actor/lam"] == 0.0
        assert (row["advantage/whitened"], row["advantage/centred"]) == (0.0, 1.0)
        assert 0 <= row["actor/filtered"] <= 1
        assert ("actor/loss" in row) == (row["actor/filtered"] < 1) == ("actor/skipped" not in row)
        assert row["rollout/mixed_groups"] == 0.0, "a group is a single response"
        assert "judge/final_brier" in row


def test_a_teacher_judges_where_there_is_no_critic_and_a_resume_goes_on_alike(tmp_path: Path) -> None:
    stage = {
        "steps": 4,
        "train_critic": False,
        "rollout": {**ROLLOUT, "prompts": 3},
        "advantage": {"readiness": {"steps": 2}},
    }
    changes: dict[str, Any] = {
        "roles": {"actor": SMALL["roles"]["actor"]},
        "judging": {**SMALL["judging"], "teacher": "exact"},
        "task": {**SMALL["task"], "train_size": 6},
        "checkpoint": {"every": 2},
    }
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    for folder in (whole, halves):
        folder.mkdir()
    path = write(whole, stage, **changes)
    ran(genac("run", path, cwd=whole))
    ran(genac("run", path, "stages.ppo.steps=2", cwd=halves))
    ran(genac("run", path, "--resume", cwd=halves))

    def kept(folder: Path) -> list[dict[str, Any]]:
        unequal = ("time", "memory/", "tokens/evaluate", "publish/", "parity/")
        return [
            {k: v for k, v in row.items() if not k.startswith(unequal) and not k.endswith("_s")}
            for row in rows(folder)
        ]

    assert kept(halves) == kept(whole)
    assert len(kept(whole)) == 4
    for row in kept(whole):
        assert row.get("tokens/judge", 0.0) == row.get("tokens/critic_train", 0.0) == 0.0
        assert row["judge/parse_rate"] == 1.0
        assert row["actor/ready"] == 0.0  # such an actor is never right
    states = []
    for folder in (whole, halves):
        manifest = json.loads((folder / "runs/run/checkpoints/ppo-end/manifest.json").read_text())
        states.append(manifest["state"]["at"]["regime"])
    assert states[0] == states[1]
    assert len(states[0]["recent"]) == 2
    assert len(states[0]["problems"]) == 6, "each problem has its last error"
    evaluations = (whole / "runs/run/evaluations.jsonl").read_text().splitlines()
    assert all(json.loads(line)["critic"]["parse_rate"] == 1.0 for line in evaluations)


def test_an_actor_that_is_never_right_is_not_judged_where_certain_outcomes_are_left_out(
    tmp_path: Path,
) -> None:
    """No critic token in training and no update of the critic; its evaluations judge all the same."""
    stage = {"steps": 2, "gate": {"action": "off"}, "rollout": {**ROLLOUT, "prompts": 2, "samples": 3}}
    judging = {**SMALL["judging"], "certain": "left_out"}
    ran(genac("run", write(tmp_path, stage, judging=judging, checkpoint={"every": 0}), cwd=tmp_path))
    lines = (tmp_path / "runs/run/metrics.jsonl").read_text().splitlines()
    found = [row for row in map(json.loads, lines) if "judge/certain" in row]
    assert len(found) == 2
    for row in found:
        assert (row["judge/certain"], row["critic/skipped"], row["rollout/mixed_groups"]) == (1.0, 1.0, 0.0)
        assert row.get("tokens/judge", 0.0) == 0.0
        assert "judge/brier" not in row
        assert row["actor/loss"] == 0.0, "every advantage is 0"
    evaluations = (tmp_path / "runs/run/evaluations.jsonl").read_text().splitlines()
    assert all(json.loads(line)["critic"]["brier"] >= 0 for line in evaluations)
