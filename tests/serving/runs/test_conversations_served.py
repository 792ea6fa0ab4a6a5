"""Conversations of a whole run on real servers of both roles, begun ahead of their steps: how old tokens are,
what a checkpoint holds, and that a resumed run trains on it.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.serving.runs.test_runs_on_servers import RECIPE, finish, pytestmark, rows, start  # noqa: F401
from tests.warm import Popen, command, environment

AHEAD, STEPS = 2, 5
LOCK = {"kind": "lock", "min_length": 2, "max_length": 2, "turns": 4, "train_size": 1000, "heldout_size": 8}
STAGE = {"steps": STEPS, "overlap": AHEAD, "rollout": {"prompts": 4, "samples": 1, "max_new_tokens": 96}}
# Of a step what its responses decide, whoever trains on them.
FIGURES = ("rollout/outcome_mean", "rollout/length_mean", "rollout/observed_mean", "rollout/turns_mean",
           "judge/states", "judge/length_mean", "rollout/staleness_mean")  # fmt: skip


def recipe() -> dict[str, Any]:
    states = {"cutter": "turns", "min_segment": 1, "max_states": 4}
    return {
        "task": LOCK,
        "environment": {"kind": "task", "turns": 4, "turn_tokens": 4},
        "judging": {**RECIPE["judging"], "states": states},
        "roles": {
            name: {**role, "layout": {}, "publication": {"mode": "in_flight"}}
            for name, role in RECIPE["roles"].items()
        },
        "checkpoint": {"every": 2, "keep": 9},
        "evaluation": {"prompts": 2, "samples": 1},
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ahead")
    code, output = finish(start(folder, STAGE, **recipe()))
    assert code == 0, output
    return folder


def steps(folder: Path) -> list[dict[str, Any]]:
    return [row for row in rows(folder) if "rollout/staleness" in row]


def kept(folder: Path, checkpoint: str) -> dict[str, list[Any]]:
    """By step what a checkpoint holds of both ranks."""
    found: dict[str, list[Any]] = {}
    for path in sorted((folder / "run" / "checkpoints" / checkpoint / "queue").glob("*.json")):
        for step, groups in json.loads(path.read_text())["steps"].items():
            found.setdefault(step, []).extend(groups)
    return found


def test_conversations_begun_ahead_are_as_old_as_that_at_most(whole: Path) -> None:
    found = steps(whole)
    assert [row["step"] for row in found] == list(range(1, STEPS + 1))
    for row in found:
        assert row["rollout/staleness"] <= AHEAD
        assert row["judge/staleness"] <= AHEAD
        assert row["rollout/staleness_mean"] <= row["rollout/staleness"]
        assert row["environment/failed"] == 0.0
        assert row["queue/ready"] + row["queue/under_way"] <= 4 * (AHEAD + 1), "what waits is bounded"
        assert 0.0 <= row["rollout/turns_cached"] <= 1.0
    assert found[0]["rollout/staleness"] == 0
    assert {row["rollout/staleness"] for row in found[2:]} == {AHEAD}, "a checkpoint waits: they are as old"
    assert max(row["rollout/turns_cached"] for row in found) > 0.9
    assert all("drift/actor_p99" in row for row in found[1:])
    assert rows(whole)[-1]["parity/actor_p99"] < 1e-4


def test_a_checkpoint_holds_what_is_under_way(whole: Path) -> None:
    found = kept(whole, "ppo-00002")
    assert sorted(found) == ["3", "4"]
    for groups in found.values():
        assert sorted(place for place, _ in groups) == list(range(4))
        assert all(len(group["rollouts"]) == 1 for _, group in groups)
    assert kept(whole, "ppo-end") == {}


@pytest.mark.extended  # tests/unit/test_kept_groups.py and test_queue.py have its parts
def test_a_resumed_run_trains_on_what_the_checkpoint_holds(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    for path in (tmp_path / "run" / "checkpoints").iterdir():
        if path.name != "ppo-00002":
            shutil.rmtree(path)
    words = command("run", str(tmp_path / "recipe.yaml"), f"runs={tmp_path}", "--resume")
    process = Popen(words, cwd=tmp_path, env=environment(), stdout=-1, stderr=-2, text=True)
    code, output = finish(process)
    assert code == 0, output
    assert "2 of the 2 batches that were generated ahead are taken over" in output
    again, first = steps(tmp_path), steps(whole)
    assert [row["step"] for row in again] == list(range(1, STEPS + 1))
    for number in (2, 3):  # steps 3 and 4: the very same conversations, with the same judgements
        assert {k: again[number][k] for k in FIGURES} == {k: first[number][k] for k in FIGURES}
