"""Harm to real runs at named places. After each: the figures of the run without it, or what a person must do.

Every test begins at the reference's checkpoint after step 2 of ppo and harms step 3 or 4.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.faults.faulty import Ended, check_same, fault, from_step, run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def resumed(folder: Path, reference: Path) -> Ended:
    """The run goes on to its end, and is then the reference."""
    ended = run(folder, "--resume")
    assert ended.code == 0, ended.text[-5000:]
    check_same(folder, reference)
    return ended


def harmed(folder: Path, reference: Path, given: dict[str, str], *arguments: str) -> Ended:
    """The run from step 2 on, with a fault; nothing of it is alive afterwards."""
    from_step(reference, folder, 2)
    ended = run(folder, "--resume", *arguments, **given)
    assert ended.noted, "the fault was not reached:\n" + ended.text[-5000:]
    assert ended.left == [], ended.text[-3000:]
    return ended


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "runs/run/checkpoints").iterdir())


@pytest.mark.parametrize(
    ("where", "rank", "step"),
    [("rollout", 1, 3), ("train", 0, 3), ("train", 1, 3), ("save", 0, 4), ("before-shards", 1, 4)],
)
def test_a_rank_is_killed(reference: Path, tmp_path: Path, where: str, rank: int, step: int) -> None:
    ended = harmed(tmp_path, reference, fault(where, "kill", rank, step))
    assert ended.code == 4, ended.text[-3000:]
    assert f"genac: error: rank {1 - rank}: a peer was lost" in ended.text
    assert "--resume goes on from the newest checkpoint" in ended.text
    assert [name for name in names(tmp_path) if not name.startswith(".")] == ["ppo-00002"]
    torn = where in ("save", "before-shards")
    assert (".part-ppo-00004" in names(tmp_path)) == torn
    text = resumed(tmp_path, reference).text
    assert ("checkpoint ppo-00004 was not finished; going on from ppo-00002" in text) == torn
    assert ".part-ppo-00004" not in names(tmp_path)


def test_the_launcher_is_killed(reference: Path, tmp_path: Path) -> None:
    """Its ranks notice, save and leave."""
    ended = harmed(tmp_path, reference, fault("train", "kill-launcher", 1, 3))
    assert ended.code == -9
    assert "everything is saved" in ended.text
    assert names(tmp_path) == ["ppo-00002", "ppo-00003"]
    resumed(tmp_path, reference)


@pytest.mark.parametrize(("do", "code"), [("kill", 4), ("kill-launcher", -9)])
def test_writers_in_the_background_do_not_outlive_their_rank(
    reference: Path, tmp_path: Path, do: str, code: int
) -> None:
    """Asynchronous checkpoints have a process that writes, and one that starts it."""
    ended = harmed(tmp_path, reference, fault("train", do, 1, 5), "checkpoint.asynchronous=true")
    assert ended.code == code, ended.text[-3000:]
    resumed(tmp_path, reference)


@pytest.mark.parametrize(("where", "step"), [("rollout", 3), ("train", 3), ("save", 4)])
def test_usr1(reference: Path, tmp_path: Path, where: str, step: int) -> None:
    ended = harmed(tmp_path, reference, fault(where, "usr1", 0, step))
    assert ended.code == 75, ended.text[-3000:]
    stopped = 5 if where == "save" else step  # asked amid a save, it stops after the step that follows
    assert f"stopped as asked after step {stopped} of 6 of stage ppo; everything is saved" in ended.text
    resumed(tmp_path, reference)


@pytest.mark.parametrize(("where", "phase"), [("train", "actor_train"), ("rollout", "rollout")])
def test_a_stalled_rank(reference: Path, tmp_path: Path, where: str, phase: str) -> None:
    """SIGSTOP for good: the watchdog names it, the collective's limit ends the run, the stopped rank too."""
    given = {**fault(where, "stop", 1, 3), "GENAC_STALL_S": "8"}
    ended = harmed(tmp_path, reference, given, "world.timeout_s=60")
    assert ended.code == 4, ended.text[-3000:]
    assert "genac: stall: no progress for" in ended.text
    assert "the others wait for rank 1 on" in ended.text
    assert f"phase {phase}" in ended.text
    logs = tmp_path / "runs/run/logs/local"
    assert "stages/ppo.py" in (logs / "stacks/rank-00000.txt").read_text()
    assert "the others wait for rank 1" in json.loads((logs / "stall.json").read_text())["text"]
    resumed(tmp_path, reference)


def test_a_rank_sleeps_for_a_while(reference: Path, tmp_path: Path) -> None:
    """SIGSTOP, and SIGCONT after six seconds: the others wait, nothing is lost."""
    ended = harmed(tmp_path, reference, fault("rollout", "nap", 1, 3))
    assert ended.code == 0, ended.text[-3000:]
    check_same(tmp_path, reference)


def test_the_clock_jumps(reference: Path, tmp_path: Path, clock: Path) -> None:
    """Three days ahead, then to three days ago, on one rank: no limit, no heartbeat, no figure goes by it."""
    shift = tmp_path / "shift"
    shift.write_text("0")
    given = {"LD_PRELOAD": str(clock), "FAULT_CLOCK": str(shift), "GENAC_STALL_S": "60"}
    ended = harmed(tmp_path, reference, {**fault("rollout", "jump", 0, 3, shift), **given})
    assert shift.read_text() == str(-3 * 86400)
    assert ended.code == 0, ended.text[-3000:]
    assert "stall" not in ended.text
    check_same(tmp_path, reference)
    lines = (tmp_path / "runs/run/metrics.jsonl").read_text().splitlines()
    times = [row["time"] for row in map(json.loads, lines) if row["stage"] == "ppo"]
    assert max(times) - min(times) > 2 * 86400, "the ranks saw the jump"


def test_a_loss_that_is_not_finite(reference: Path, tmp_path: Path) -> None:
    """NaN out of the actor's model on the rank whose figures are told: it ends, none is saved."""
    ended = harmed(tmp_path, reference, fault("train", "nan", 0, 3))
    assert ended.code == 1, ended.text[-3000:]
    assert "stage ppo: actor/loss is nan at step 3" in ended.text
    assert "lower the learning rate; --resume goes on from the checkpoint ppo-00002" in ended.text
    assert ended.text.count("genac: error") == 1, ended.text[-3000:]
    assert names(tmp_path) == ["ppo-00002"]
    resumed(tmp_path, reference)


def test_weights_that_diverge(reference: Path, tmp_path: Path) -> None:
    """A learning rate of 1e30: the critic's figures stay finite for a step or two, its weights do not.

    Such weights are never saved: the way out is the checkpoint before, and the own rate again.
    """
    from_step(reference, tmp_path, 2)
    endless = ("roles.critic.optimizer.lr=1.0e+30", "roles.critic.optimizer.clip_grad=0")
    ended = run(tmp_path, "--resume", *endless)
    assert ended.code == 1, ended.text[-3000:]
    assert ended.left == []
    assert "holds numbers that are not finite at step 4; nothing of that step is saved" in ended.text
    assert "way out: lower the learning rate; --resume goes on from the checkpoint ppo-00002" in ended.text
    assert ended.text.count("genac: error") == 1, ended.text[-3000:]
    assert names(tmp_path) == ["ppo-00002"]
    resumed(tmp_path, reference)


@pytest.mark.parametrize("where", ["before-shards", "shards"])
def test_no_space_left_amid_a_save(reference: Path, tmp_path: Path, mounted: Path, where: str) -> None:
    """A file system that is full once the folder is made; the checkpoint before stands.

    Before any shard rank 0 fails alone, while the other makes the folder again: that goes at the resume.
    Amid shards writers fail, which all ranks learn, and nothing of it stays.
    """
    ended = harmed(tmp_path, reference, fault(where, "fill", 0, 4, mounted))
    assert ended.code == 1, ended.text[-3000:]
    said = ended.text[ended.text.index("the checkpoint ppo-00004 could not be written: ") :]
    assert "no space left on" in said.lower()
    assert "free space there" in ended.text
    assert "then go on from the newest complete checkpoint with --resume" in ended.text
    remains = {".part-ppo-00004"} if where == "before-shards" else set()
    assert set(names(tmp_path)) - remains == {"ppo-00002"}
    (mounted / "filler").unlink()
    resumed(tmp_path, reference)
    assert ".part-ppo-00004" not in names(tmp_path)


@pytest.mark.parametrize(("where", "step"), [("log", 3), ("before-shards", 4)])
def test_read_only_for_a_while(reference: Path, tmp_path: Path, mounted: Path, where: str, step: int) -> None:
    ended = harmed(tmp_path, reference, fault(where, "read-only", 0, step, mounted))
    assert ended.code == 1, ended.text[-3000:]
    assert "Read-only file system" in ended.text
    assert "way out: " in ended.text
    assert "--resume" in ended.text
    assert "Traceback" not in ended.text.split("genac: error")[-1]
    subprocess.run(["mount", "-o", "remount,rw", str(mounted)], check=True)
    resumed(tmp_path, reference)


def truncate(path: Path) -> None:
    file = max((path / "weights").glob("*.distcp"), key=lambda file: file.stat().st_size)
    with file.open("r+b") as stream:
        stream.truncate(file.stat().st_size // 2)


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (truncate, "ppo-00004 is damaged: weights/"),
        (lambda path: (path / "manifest.json").unlink(), "ppo-00004 is damaged: no manifest.json"),
        (
            lambda path: (path / "manifest.json").write_text('{"format": 1, "ser'),
            "ppo-00004 is damaged: the man",
        ),
        (lambda path: (path / "common.pt").unlink(), "ppo-00004 is damaged: common.pt is missing"),
    ],
    ids=["truncated", "partial", "half-manifest", "missing-file"],
)
def test_a_damaged_checkpoint(reference: Path, tmp_path: Path, harm: object, said: str) -> None:
    """The one before is used, and said."""
    folder = from_step(reference, tmp_path, 4)
    harm(folder / "checkpoints" / "ppo-00004")  # type: ignore[operator]
    ended = resumed(tmp_path, reference)
    assert f"genac: warning: checkpoint {said}" in ended.text
    assert "going on from ppo-00002" in ended.text


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["seed=6"], "the checkpoint was made with seed 5, the recipe says 6"),
        (
            [f"roles.{role}.model.shape.layers=4" for role in ("actor", "critic")],
            "its actor is another model: layers 2 (the recipe: 4)",
        ),
        (["judging.icc=off"], "the checkpoint was made with judging"),
    ],
    ids=["seed", "model", "judging"],
)
def test_a_foreign_checkpoint(reference: Path, tmp_path: Path, changes: list[str], said: str) -> None:
    from_step(reference, tmp_path, 2)
    ended = run(tmp_path, "--resume", *changes)
    assert ended.code == 2, ended.text[-3000:]
    assert said in ended.text
    assert "way out: " in ended.text
    assert ended.text.count("genac: error") == 1
    assert "Traceback" not in ended.text
    resumed(tmp_path, reference)


def test_nothing_but_damage(reference: Path, tmp_path: Path) -> None:
    """Neither --resume nor a new beginning touches it: a person must look."""
    folder = from_step(reference, tmp_path, 2)
    for path in (folder / "checkpoints").iterdir():
        if path.name != "ppo-00002":
            shutil.rmtree(path)
    truncate(folder / "checkpoints" / "ppo-00002")
    for given in (["--resume"], []):
        ended = run(tmp_path, *given)
        assert ended.code == 2, ended.text[-3000:]
        assert "ppo-00002 is damaged: weights/" in ended.text
    assert names(tmp_path) == ["ppo-00002"]
