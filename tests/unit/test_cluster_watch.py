"""Heartbeats, the watchdog and `genac status`, with real threads and files."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from genac_megatron.cluster import status
from genac_megatron.cluster.heartbeat import (
    BEATS,
    PACKAGE,
    SILENT_S,
    Heartbeat,
    attempt_folder,
    behind,
    logs_folder,
    place_of,
    read_beats,
    stall_text,
    write,
)
from genac_megatron.errors import InputError
from genac_megatron.observe.progress import Progress

LIMIT_S = 30.0
ROOT = Path(__file__).resolve().parents[2]


def beat(rank: int, **changes: Any) -> dict[str, Any]:
    return {
        "rank": rank, "node": f"n{rank // 2 + 1}", "pid": 100 + rank, "time": time.time(), "state": "running",
        "ticks": 9, "stage": "ppo", "step": 2, "steps": 5, "stages": ["sft", "ppo"], "phases": ["rollout"],
        "idle_s": 700.0, "step_s": 30.0, "eta_s": 90.0, "rss_gib": 1.5,
        "where": "stages/ppo.py:30 in joint_ppo", "in_collective": True, "stalled": False, **changes,
    }  # fmt: skip


def folder_of(run: Path, beats: list[dict[str, Any]]) -> None:
    for one in beats:
        write(run / "logs" / "7-r0" / BEATS / f"rank-{one['rank']:05d}.json", one)
    (run / "logs" / "latest").symlink_to("7-r0")


def until(done: Callable[[], bool]) -> None:
    give_up = time.monotonic() + LIMIT_S
    while not done():
        assert time.monotonic() < give_up
        time.sleep(0.02)


def test_a_heart_beats_and_tells_where_the_rank_is(tmp_path: Path) -> None:
    heart = Heartbeat(tmp_path, 3, beat_s=0.05, stall_s=60.0)
    with Progress(False, stages=["sft", "ppo"]) as progress:
        progress.stage("ppo", 5, 2)
        with progress.phase("rollout"), progress.phase("judge"):
            heart.start()
            until(lambda: bool(read_beats(tmp_path)))
            seen = read_beats(tmp_path)[0]
    assert (seen["rank"], seen["stage"], seen["step"], seen["phases"]) == (3, "ppo", 2, ["rollout", "judge"])
    assert seen["state"] == "running"
    heart.stop("done")
    assert read_beats(tmp_path)[0]["state"] == "done"
    assert read_beats(tmp_path)[0]["stage"] == "ppo", "where it ended"


def test_a_folder_that_is_removed_is_not_made_again(tmp_path: Path) -> None:
    heart = Heartbeat(tmp_path / "run" / "logs", 0, beat_s=0.02, stall_s=60.0)
    heart.start()
    until(lambda: bool(read_beats(tmp_path / "run" / "logs")))
    until(lambda: not shutil.rmtree(tmp_path / "run", ignore_errors=True) and not (tmp_path / "run").exists())
    time.sleep(0.3)
    assert not (tmp_path / "run").exists()
    heart.stop("done")
    assert not (tmp_path / "run").exists()


def test_what_a_larger_world_has_left_is_none_of_the_runs_ranks(tmp_path: Path) -> None:
    """A run of four that was killed, resumed with two: they share logs/local."""
    old = [beat(rank, world=4, time=time.time() - SILENT_S - 900) for rank in range(4)]
    folder_of(tmp_path, old)
    folder = tmp_path / "logs" / "7-r0"
    for one in (beat(0, world=2), beat(1, world=2)):
        write(folder / BEATS / f"rank-{one['rank']:05d}.json", one)
    assert [one["rank"] for one in read_beats(folder)] == [0, 1]
    text, code = status.status(tmp_path)
    assert code == 0
    assert "SILENT" not in text


def test_a_command_beside_the_run_has_logs_of_its_own_in_the_runs_job(tmp_path: Path) -> None:
    """Its heartbeats and servers' logs would be taken for those of the ranks that train."""
    run = tmp_path / "runs" / "big"
    job = {"GENAC_RUN": str(run), "GENAC_LOGS": str(run / "logs" / "7-r0")}
    evaluation = run / "evaluate" / "score-0a1b2c3d"
    assert attempt_folder(run, job) == logs_folder(run, job) == run / "logs" / "7-r0"
    assert attempt_folder(evaluation, job) is None
    assert logs_folder(evaluation, job) == evaluation / "logs" / "local"
    assert attempt_folder(run, {}) is None
    assert attempt_folder(run, {"GENAC_LOGS": "/logs"}) == Path("/logs"), "a script of one's own"


def test_without_progress_the_stack_is_dumped_and_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    heart = Heartbeat(tmp_path, 0, beat_s=0.05, stall_s=0.3)
    with Progress(False, stages=["ppo"]) as progress:
        progress.stage("ppo", 5)
        with progress.phase("train"):
            heart.start()
            until(lambda: (tmp_path / "stall.json").exists())
        text = json.loads((tmp_path / "stall.json").read_text())["text"]
        progress.step(1, {})
        until(lambda: not read_beats(tmp_path)[0]["stalled"])
    heart.stop("done")
    assert "stage ppo, step 1 of 5, phase train" in text
    assert text in capsys.readouterr().err
    stack = (tmp_path / "stacks" / "rank-00000.txt").read_text()
    assert "test_cluster_watch.py" in stack
    assert stack.startswith("rank 0 on ")


STOPPED = """
import os, signal, sys, time
from pathlib import Path
from genac_megatron.cluster.heartbeat import Heartbeat
signal.signal(signal.SIGUSR1, lambda *_: sys.exit(75))
Heartbeat(Path(sys.argv[1]), 0, beat_s=0.1, asks=True).start()
time.sleep(30)
"""


def test_a_request_to_stop_becomes_a_signal_to_this_process_alone(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", STOPPED, str(tmp_path)], env={"PYTHONPATH": str(ROOT)})
    until(lambda: bool(read_beats(tmp_path)))
    (tmp_path / "stop").touch()
    assert process.wait(LIMIT_S) == 75
    assert signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({2: {"time": time.time() - SILENT_S - 900}}, [2]),
        ({2: {"ticks": 8}, 3: {"ticks": 8}}, [2, 3]),
        ({1: {"in_collective": False}}, [1]),
        ({}, []),
        ({0: {"state": "done", "ticks": 1}}, []),
    ],
    ids=["silent", "fewer-phases", "in-no-collective", "alike", "ended"],
)
def test_who_is_behind(changes: dict[int, dict[str, Any]], named: list[int]) -> None:
    beats = [beat(rank, **changes.get(rank, {})) for rank in range(4)]
    assert [one["rank"] for one in behind(beats)] == named


def test_a_stall_names_phase_rank_and_node(tmp_path: Path) -> None:
    beats = [
        beat(rank, **({"ticks": 8, "phases": ["rollout", "judge"]} if rank == 2 else {})) for rank in range(4)
    ]
    text = stall_text(beats, tmp_path)
    assert "no progress for 700 s; stage ppo, step 3 of 5, phase rollout\n" in text
    assert "last heard" not in text
    assert "the others wait for rank 2 on n2: stage ppo, step 3 of 5, phase rollout > judge" in text
    assert str(tmp_path / "stacks") in text


def test_status(tmp_path: Path) -> None:
    folder_of(tmp_path, [beat(0), beat(1)])
    role = {"model": {"hf": "elsewhere"}, "training": {"adapter": {"rank": 8, "targets": ["q_proj"]}}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"roles": {"actor": role}}))
    text, code = status.status(tmp_path)
    assert code == 0
    assert "attempt 7-r0, 2 rank(s)" in text
    assert "actor: adapters of rank 8 on 1 projections, its model is frozen" in text
    assert "[2/2] stage ppo, step 3 of 5, phase rollout; 30 s/step; stage ends in 1m30s" in text


def test_status_of_a_run_with_a_silent_rank(tmp_path: Path) -> None:
    folder_of(tmp_path, [beat(rank) for rank in range(40)] + [beat(40, time=time.time() - 600)])
    text, code = status.status(tmp_path)
    assert code == 4
    assert "rank   40 n21 pid 140: SILENT" in text
    assert "and 39 more ranks" in text


def test_the_line_says_what_comes_first() -> None:
    soon = status.line([beat(0)], until=time.time() + 60.5)
    assert "job ends in 1m00s; which is sooner: it will be requeued" in soon
    assert "sooner" not in status.line([beat(0)], until=time.time() + 900)


def test_status_of_nothing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no such folder"):
        status.status(tmp_path / "none")
    with pytest.raises(InputError, match="no rank has left a heartbeat"):
        status.status(tmp_path)


def test_a_place_is_told_by_the_stage_too() -> None:
    frames = [
        ("/usr/lib/torch/nn.py", 5, "forward"),
        (f"{PACKAGE}/serving/generation.py", 221, "run"),
        (f"{PACKAGE}/stages/batch.py", 110, "next_batch"),
        (f"{PACKAGE}/stages/ppo.py", 30, "joint_ppo"),
    ]
    assert place_of(frames) == "serving/generation.py:221 in run, for stages/batch.py:110 in next_batch"
    assert place_of(frames[2:]) == "stages/batch.py:110 in next_batch"
    assert place_of(frames[:1]) == "/usr/lib/torch/nn.py:5 in forward"
    assert place_of([]) == ""
