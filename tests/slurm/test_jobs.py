"""Real jobs on a real Slurm of two nodes: requeue, loss of a rank, stalls, bad nodes, smoke."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from genac_megatron.observe.runinfo import read_jsonl
from tests import warm
from tests.slurm.cluster import Cluster, ours
from tests.slurm.conftest import NODES, ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
LIMIT_S = 900.0  # for a job, on a busy machine
LOOK_S = 3.0  # between two looks at whether a job is over
OVERRIDES = ("seed=3", "stages.ppo.steps=8")  # USR1 comes after the first, and takes seconds
MEASURED = re.compile(r"^time|^memory/|^share/time|_s(_mean)?$|peak_bytes|^run/(attempts|command)$")
Settings = dict[str, str]
AT_ONCE = {"GENAC_PREFLIGHT": "off"}  # where the nodes' check is not what is tested
Output = Callable[[], str]
Short = Callable[[int], None]


def genac(*arguments: str, cwd: Path, environ: dict[str, str]) -> subprocess.CompletedProcess[str]:
    given = {**environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return warm.run(warm.command(*arguments), cwd=cwd, env=given, timeout=LIMIT_S)


def rows(run: Path, log: str = "metrics.jsonl") -> list[dict[str, Any]]:
    """Rows without what time and machine decide."""
    path = run / log
    return [_untimed(row) for row in read_jsonl(path)[0]]  # but for a line that is being written


def _untimed(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if not MEASURED.search(key)}


def until(
    done: Callable[[], bool], what: str, limit_s: float = LIMIT_S, *, over: Callable[[], str] = str
) -> None:
    """`over` says why it cannot come any more, or nothing."""
    give_up, look = time.monotonic() + limit_s, 0.0
    while not done():
        now = time.monotonic()
        assert now < give_up, f"{what}: not within {limit_s:.0f} s"
        if now >= look:
            why = over()
            assert not why or done(), f"{what}: {why}"
            look = time.monotonic() + LOOK_S
        time.sleep(0.05)


def ending(cluster: Cluster, job: int, output: Output) -> Callable[[], str]:
    """For `until`: that a job is over, and what it wrote."""
    return lambda: f"{said}\n{output()}" if (said := cluster.over(job)) else ""


def reached(run: Path, stage: str, step: int) -> bool:
    return any((row["stage"], row["step"]) == (stage, step) for row in rows(run))


def rank_pid(run: Path, rank: int) -> int:
    return int(json.loads((run / f"logs/latest/heartbeats/rank-{rank:05d}.json").read_text())["pid"])


def last_words(text: str) -> list[list[Any]]:
    """Of each attempt: what happened (not how long), the run folder, what comes next. Its report is there."""
    found: list[list[Any]] = []
    for what, rest in re.findall(r"^genac: (.+?)(?: after .*)?\n((?:  .*\n)+)", text, re.MULTILINE):
        if "  run folder: " not in rest:
            continue  # what is told of a run that goes on
        lines = [line.strip() for line in rest.splitlines() if "no rank began the run" not in line]
        folder = Path(lines[0].removeprefix("run folder: "))
        assert lines[1] == f"report:     {folder}/report/index.html"
        assert (folder / "report" / "index.html").is_file()
        found.append([what, folder, *lines[2:]])
    return found


def gone(job: int) -> None:
    until(lambda: not ours(job), f"processes of job {job} to be gone: {ours(job)}", 30.0)


def test_requeued_by_usr1_it_ends_like_an_uninterrupted_run(
    cluster: Cluster, recipe: Path, settings: Settings, tmp_path: Path, output: Output
) -> None:
    """USR1 amid PPO: both roles saved, exit 75, requeued, resumed under the same W&B id, the same figures."""
    script = str(ROOT / "slurm" / "genac_ppo.sh")
    given = {**settings, **AT_ONCE, "RECIPE": "recipe.yaml"}
    job = cluster.submit(*NODES, script, "--", *OVERRIDES, cwd=tmp_path, **given)
    run = tmp_path / "runs" / "run"
    over = ending(cluster, job, output)
    until(lambda: reached(run, "ppo", 1), "the first step of ppo", over=over)
    assert cluster.run("scancel", "--batch", "--signal=USR1", str(job)).returncode == 0
    until(lambda: cluster.job(job)["Restarts"] == "1", "the requeue", over=over)
    gone(job)
    manifest = json.loads(max(run.glob("checkpoints/ppo-*/manifest.json")).read_text())
    assert sorted(manifest["roles"]) == ["actor", "critic"]
    seen = cluster.wait(job, LIMIT_S)
    text = output()
    assert (seen["JobState"], seen["ExitCode"], seen["Restarts"]) == ("COMPLETED", "0:0", "1"), text
    gone(job)
    words = ("asked to stop", "requeue (restart 1)", f"job {job}-r1", "resuming after ppo", "done: ")
    assert [said for said in words if said not in text] == [], text
    again = f"Slurm starts it again, and it goes on from its checkpoint; to end it: scancel {job}"
    first, last = last_words(text)
    assert first == ["stopped as asked, with a checkpoint", run, again], text
    assert last == ["done", run, f"its actor:  sbatch {ROOT}/slurm/convert.sh to-hf {run} run-hf"], text
    _check_logs(run, job)
    _check_against_uninterrupted(run, recipe, tmp_path)
    again = genac("status", str(run), cwd=tmp_path, environ=cluster.environ)
    assert again.returncode == 0, again.stdout + again.stderr
    assert f"attempt {job}-r1, 2 rank(s)" in again.stdout
    assert again.stdout.count("done") >= 2


def _check_logs(run: Path, job: int) -> None:
    assert (run / "logs" / "latest").resolve().name == f"{job}-r1"
    for attempt in (f"{job}-r0", f"{job}-r1"):
        names = {path.name for path in (run / "logs" / attempt).iterdir()}
        assert "heartbeats" in names
        assert sum(name.startswith("trainer-node") for name in names) == 2, names
    ids = {path.name.rsplit("-", 1)[1] for path in run.glob("wandb/offline-run-*")}
    assert len(list(run.glob("wandb/offline-run-*"))) == 2
    assert len(ids) == 1, "the same W&B run before and after"


def _check_against_uninterrupted(run: Path, recipe: Path, folder: Path) -> None:
    given = [*OVERRIDES, f"runs={folder}/whole", "observe.wandb.mode=off"]
    done = genac("run", str(recipe), *given, cwd=folder, environ=dict(os.environ))
    assert done.returncode == 0, done.stdout + done.stderr
    whole = folder / "whole" / "run"
    for log in ("metrics.jsonl", "evaluations.jsonl", "rollouts.jsonl"):
        ours, theirs = rows(run, log), rows(whole, log)
        assert len(ours) == len(theirs), log
        for index, (left, right) in enumerate(zip(ours, theirs, strict=True)):
            differ = {k: (left.get(k), right.get(k)) for k in left | right if left.get(k) != right.get(k)}
            assert not differ, f"{log}:{index + 1}"
    summaries = [_untimed(json.loads((r / "report/summary.json").read_text())) for r in (run, whole)]
    assert summaries[0] == summaries[1]


def test_a_stalled_rank_is_named_and_a_killed_one_ends_the_job(
    cluster: Cluster, recipe: Path, settings: Settings, tmp_path: Path, output: Output
) -> None:
    """Submitted by `genac slurm`. SIGSTOP: phase, rank and stacks are told; SIGKILL: exit 4, no orphan."""
    environ = {**cluster.environ, **settings, **AT_ONCE, "GENAC_STALL_S": "15"}
    done = genac("slurm", "recipe.yaml", "stages.ppo.steps=50", cwd=tmp_path, environ=environ)
    assert done.returncode == 0, done.stderr
    job = int(done.stdout.split()[1].rstrip(":"))
    run = tmp_path / "runs" / "run"
    over = ending(cluster, job, output)
    until(lambda: reached(run, "ppo", 2), "the second step of ppo", over=over)
    stopped = psutil.Process(rank_pid(run, 1))
    stopped.suspend()
    told = re.compile(r"genac: stall: no progress for \d+ s; stage ppo, step")
    until(lambda: bool(told.search(output())), "the stall to be told", 240.0, over=over)
    text = output()
    assert "the others wait for rank 1 on n2: stage" in text, text
    assert "when last heard of" in text, text
    stack = (run / "logs/latest/stacks/rank-00000.txt").read_text()
    assert "Current thread" in stack
    assert "stages/ppo.py" in stack, "the main thread's stack is there too"
    assert genac("status", str(run), cwd=tmp_path, environ=environ).returncode == 4
    os.kill(stopped.pid, signal.SIGKILL)
    seen = cluster.wait(job, LIMIT_S)
    assert (seen["JobState"], seen["ExitCode"], seen["Restarts"]) == ("FAILED", "4:0", "0"), output()
    assert "sbatch the same again, it resumes" in output()
    again = f"  to go on:   genac slurm {recipe.resolve()} stages.ppo.steps=50\n"
    assert last_words(output()) == [["ended: an engine or a rank was lost", run, again.strip()]], output()
    assert output().endswith(again), output()
    gone(job)


def test_a_bad_node_is_named_before_the_run(
    cluster: Cluster, recipe: Path, settings: Settings, tmp_path: Path, output: Output
) -> None:
    """nvidia-smi is the one tool that this machine lacks: one that finds an ECC error on n2."""
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "nvidia-smi").write_text(
        '#!/bin/sh\n[ "$SLURMD_NODENAME" = n2 ] && errors=3 || errors=0\n'
        'echo "0, NVIDIA H100 80GB HBM3, 580.95, 81559, 4, $errors"\n'
    )
    (tools / "nvidia-smi").chmod(0o755)
    path = f"{tools}{os.pathsep}{cluster.environ['PATH']}"
    script = str(ROOT / "slurm" / "genac_pipeline.sh")
    job = cluster.submit(*NODES, script, cwd=tmp_path, RECIPE=str(recipe), **settings, PATH=path)
    seen = cluster.wait(job, LIMIT_S)
    assert seen["ExitCode"] == "2:0", output()
    assert "n2: GPU 0: 3 uncorrected ECC error(s)" in output()
    assert "n1: GPU" not in output()
    assert output().endswith(f"  run folder: {tmp_path}/runs/run\n  to go on:   genac slurm {recipe}\n"), (
        output()
    )
    assert not (tmp_path / "runs/run/metrics.jsonl").exists()
    gone(job)


def test_an_allocation_that_is_not_the_recipes(
    cluster: Cluster, recipe: Path, settings: Settings, tmp_path: Path, output: Output
) -> None:
    script = str(ROOT / "slurm" / "genac_ppo.sh")
    one = ("--nodes=1", *NODES[1:])
    job = cluster.submit(*one, script, cwd=tmp_path, RECIPE=str(recipe), **settings)
    assert cluster.wait(job, LIMIT_S)["ExitCode"] == "2:0"
    assert "the recipe needs 2 node(s) of 1 rank(s)" in output()
    assert "sbatch --nodes=2 --ntasks-per-node=1" in output()


@pytest.mark.extended  # a rank's code through srun: the killed one above; a gate's: e2e/test_gates.py
def test_a_gate_that_fails_ends_with_3(
    cluster: Cluster, recipe: Path, settings: Settings, tmp_path: Path, output: Output
) -> None:
    """Whichever rank leaves first, and although srun ends the other."""
    script = str(ROOT / "slurm" / "genac_reinforce.sh")
    gate = ("stages.reinforce.gate.action=stop", "stages.reinforce.gate.auc=1.0")
    given = {**settings, **AT_ONCE, "RECIPE": str(recipe)}
    job = cluster.submit(*NODES, script, *gate, cwd=tmp_path, **given)
    seen = cluster.wait(job, LIMIT_S)
    assert (seen["JobState"], seen["ExitCode"]) == ("FAILED", "3:0"), output()
    assert "a gate failed" in output()
    again = f"genac slurm {recipe} {gate[0]} {gate[1]}"
    [[what, run, *ways]] = last_words(output())
    assert (what, run) == ("ended: a gate is not reached", tmp_path / "runs/run"), output()
    assert ways[0].startswith(f"to go on:   {again} stages.reinforce.steps="), output()
    assert ways[-1] == f"or: {again} stages.reinforce.gate.action=warn", output()
    assert output().rstrip().endswith(ways[-1])


def test_smoke(cluster: Cluster, settings: Settings, tmp_path: Path, output: Output) -> None:
    """sbatch slurm/smoke.sh, from a folder that is not the repository."""
    one = ("--nodes=1", "--ntasks-per-node=2", "--cpus-per-task=1", "--gpus-per-node=0")
    job = cluster.submit(*one, str(ROOT / "slurm" / "smoke.sh"), cwd=tmp_path, **settings)
    seen = cluster.wait(job, LIMIT_S)
    assert seen["JobState"] == "COMPLETED", output()
    assert "your cluster works" in output()
    gone(job)


def test_a_chain_goes_on_without_requeue(
    cluster: Cluster, short: Short, settings: Settings, tmp_path: Path, output: Output
) -> None:
    """Jobs of one name: the first is stopped and not requeued, the second resumes and ends the run, the third
    finds nothing left to do.

    One rank on one node: the nodes are not the point.
    """
    short(50)
    done = cluster.run(
        str(ROOT / "slurm" / "chain.sh"), "3", "--parsable", "--nodes=1", *NODES[1:],
        str(ROOT / "slurm" / "genac_ppo.sh"), "--", "stages.ppo.steps=12", "world.ranks=1",
        cwd=tmp_path, RECIPE="recipe.yaml", **settings, **AT_ONCE,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    first, second, third = map(int, done.stdout.split())
    # At once: the first could end while a busy machine looks.
    waiting = cluster.job(second)
    assert (waiting["JobState"], waiting["Dependency"]) == ("PENDING", "singleton(unfulfilled)"), output()
    run = tmp_path / "runs" / "run"
    until(lambda: reached(run, "ppo", 1), "the first step of ppo", over=ending(cluster, first, output))
    assert cluster.run("scancel", "--batch", "--signal=USR1", str(first)).returncode == 0
    assert cluster.wait(first, LIMIT_S)["ExitCode"] == "75:0", output()
    assert cluster.wait(second, LIMIT_S)["JobState"] == "COMPLETED", output()
    assert "GENAC_REQUEUE is off" in output()
    assert cluster.wait(third, LIMIT_S)["JobState"] == "COMPLETED", output()
    assert "this run is finished: nothing to do" in output()
    again = "to go on:   genac slurm recipe.yaml stages.ppo.steps=12 world.ranks=1"
    its_actor = f"its actor:  sbatch {ROOT}/slurm/convert.sh to-hf {run} run-hf"
    assert last_words(output()) == [
        ["stopped as asked, with a checkpoint", run, again],
        ["done", run, its_actor],
        ["done", run, its_actor],
    ], output()
    assert reached(run, "ppo", 12)
    gone(first)
    gone(second)
