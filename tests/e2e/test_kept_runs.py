"""A run keeps what it saved: beside another start of it, after its end, and where NaN comes."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.e2e.test_gates import MODEL
from tests.e2e.test_run import RECIPE
from tests.warm import Popen, command, environment, genac
from tests.warm import run as run_words

SMALL: dict[str, Any] = {
    **RECIPE,
    "world": {"ranks": 1},
    "roles": {
        "actor": {
            "model": MODEL,
            "training": {"dtype": "fp32"},
            "engine": {"dtype": "fp32"},
            "optimizer": {"lr": 1e-3, "schedule": "constant"},
        }
    },
    "stages": [
        {"kind": "sft", "name": "sft", "role": "actor", "data": "demonstrations", "size": 4, "epochs": 1,
         "batch": 2, "rollout": {"prompts": 2, "samples": 2, "max_new_tokens": 8}},
        {"kind": "policy", "name": "pg", "steps": 2, "algorithm": {"kind": "grpo"}, "eval_every": 0,
         "rollout": {"prompts": 2, "samples": 2, "max_new_tokens": 8}},
    ],
    "evaluation": {"prompts": 2, "samples": 1, "mc_states": 0},
    "checkpoint": {"every": 1},
    "observe": {"tensorboard": False, "plots": False},
}  # fmt: skip
# A finite loss whose gradient is NaN, at the n-th minibatch of the actor's policy stage.
NAN_AT = """
import sys
import genac_megatron.stages.ppo as ppo
from genac_megatron import cli
make, calls = ppo.make_ppo_loss, [0]
def made(config):
    inner = make(config)
    def loss(logp, entropy, fields):
        value, stats = inner(logp, entropy, fields)
        if logp.requires_grad:
            calls[0] += 1
            if calls[0] == int(sys.argv[1]):
                value = value + ((logp - logp.detach()).abs().sqrt() * 0.0).sum()
        return value, stats
    return loss
ppo.make_ppo_loss = made
sys.exit(cli.main(sys.argv[2:]))
"""


def recipe(folder: Path) -> str:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(SMALL))
    return str(path)


def rows(folder: Path, log: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "runs/run" / log).read_text().splitlines()]


def trained(folder: Path) -> list[tuple[int, float, float]]:
    return [
        (row["step"], row["actor/loss"], row["actor/grad_norm"])
        for row in rows(folder)
        if row["stage"] == "pg" and "actor/loss" in row
    ]


def judged(folder: Path) -> list[tuple[str, str, int]]:
    return [(row["stage"], row["name"], row["step"]) for row in rows(folder, "evaluations.jsonl")]


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "runs/run/checkpoints").iterdir())


@pytest.fixture
def living(tmp_path: Path) -> Iterator[Popen]:
    """A long run, once it has a checkpoint of its second stage."""
    words = command("run", recipe(tmp_path), "stages.pg.steps=100000")
    with (tmp_path / "log").open("w") as log, Popen(
        words, cwd=tmp_path, env=environment(), stdout=log, stderr=log, text=True
    ) as process:  # fmt: skip
        until = time.monotonic() + 300
        while not list(tmp_path.glob("runs/run/checkpoints/pg-*")):
            assert process.poll() is None, (tmp_path / "log").read_text()[-3000:]
            assert time.monotonic() < until
            time.sleep(0.1)
        yield process
        process.kill()


def test_a_second_start_of_a_living_run_is_refused(tmp_path: Path, living: Popen) -> None:
    for more in ((), ("--resume",)):
        done = genac("run", recipe(tmp_path), *more, cwd=tmp_path)
        assert done.returncode == 2, done.stderr[-3000:]
        assert "the run is under way: process " in done.stderr
        assert "another name=" in done.stderr
    # Also by a rank that no launcher of this machine has started, and so none could tell.
    port = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "RANK": "0", "WORLD_SIZE": "1"}
    alone = run_words(
        [sys.executable, "-m", "genac_megatron", "run", recipe(tmp_path), "--resume"],
        cwd=tmp_path,
        env=environment(**{**port, "MASTER_PORT": str(free_port())}),
    )
    assert alone.returncode == 2, alone.stderr[-3000:]
    assert "the run is under way" in alone.stderr
    (holder,) = (tmp_path / "runs/run/.lock").glob("*.json")
    os.kill(json.loads(holder.read_text())["pid"], signal.SIGKILL)  # its rank
    assert living.wait(60) == 128 + signal.SIGKILL, (tmp_path / "log").read_text()[-3000:]
    steps = [step for step, *_ in trained(tmp_path)]
    assert steps == list(range(1, len(steps) + 1)), "no step twice"
    done = genac("run", recipe(tmp_path), f"stages.pg.steps={len(steps) + 1}", "--resume", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [step for step, *_ in trained(tmp_path)] == [*steps, len(steps) + 1]
    assert not (tmp_path / "runs/run/.lock").exists()


def free_port() -> int:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def test_a_finished_run_trains_the_steps_that_it_is_given_more(tmp_path: Path) -> None:
    short, long = tmp_path / "short", tmp_path / "long"
    for folder in (short, long):
        folder.mkdir()
    assert genac("run", recipe(short), cwd=short).returncode == 0
    first = trained(short)
    again = genac("run", recipe(short), "--resume", cwd=short)
    assert again.returncode == 0, again.stderr[-3000:]
    assert "has finished (pg-end): nothing to do; --resume with more of stages.pg.steps" in again.stdout
    assert trained(short) == first
    fewer = genac("run", recipe(short), "stages.pg.steps=1", "--resume", cwd=short)
    assert fewer.returncode == 2
    assert "stage pg is over, after steps 2; the recipe says 1" in fewer.stderr
    more = genac("run", recipe(short), "stages.pg.steps=4", "--resume", cwd=short)
    assert more.returncode == 0, more.stderr[-3000:]
    assert genac("run", recipe(long), "stages.pg.steps=4", cwd=long).returncode == 0
    assert trained(short) == trained(long)
    assert len(trained(short)) == 4
    assert judged(short) == judged(long), "no end is judged twice"
    state = json.loads((short / "runs/run/checkpoints/pg-end/manifest.json").read_text())["state"]
    assert state["position"] == ["pg", 4]


@pytest.mark.parametrize(("at", "stands"), [(2, "sft-end"), (4, "pg-00001")])
def test_nan_in_the_last_minibatch_is_never_saved(tmp_path: Path, at: int, stands: str) -> None:
    """The first minibatch's gradient is finite: `max` would lose the second's."""
    world = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    words = [sys.executable, "-c", NAN_AT, str(at), "run", recipe(tmp_path), "stages.pg.minibatches=2"]
    done = run_words(words, cwd=tmp_path, env=environment(**world))
    assert done.returncode == 1, done.stdout[-2000:] + done.stderr[-3000:]
    assert f"stage pg: actor/grad_norm is nan at step {at // 2}; nothing of that step is saved" in done.stderr
    assert f"--resume goes on from the checkpoint {stands}" in done.stderr
    assert stands in checkpoints(tmp_path)
    assert f"pg-{at // 2:05d}" not in checkpoints(tmp_path)
    done = genac("run", recipe(tmp_path), "stages.pg.minibatches=2", "--resume", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert all(torch.isfinite(torch.tensor(figures)).all() for _, *figures in trained(tmp_path))


def test_the_schedule_ends_with_the_updates_that_there_are(tmp_path: Path) -> None:
    """4 responses give 4 minibatches, however many are asked for."""
    falls = "roles.actor.optimizer={lr: 1.0e-3, schedule: linear, min_lr: 0.0}"
    last = {}
    for parts in (4, 8):
        folder = tmp_path / str(parts)
        folder.mkdir()
        done = genac("run", recipe(folder), falls, f"stages.pg.minibatches={parts}", cwd=folder)
        assert done.returncode == 0, done.stderr[-3000:]
        last[parts] = [row["actor/lr"] for row in rows(folder) if "actor/lr" in row][-1]
    assert last[8] == last[4] == pytest.approx(1e-3 * (4 + 3 + 2 + 1) / 4 / 8)


def test_sft_that_has_finished_trains_more_epochs(tmp_path: Path) -> None:
    """Up to the figures of a run that had them from the start; the samples are kept, not made again."""
    short, long = tmp_path / "short", tmp_path / "long"
    alone = f"stages=[{json.dumps(SMALL['stages'][0])}]"
    for folder, epochs in ((short, 1), (long, 3)):
        folder.mkdir()
        done = genac("run", recipe(folder), alone, f"stages.sft.epochs={epochs}", cwd=folder)
        assert done.returncode == 0, done.stderr[-3000:]
    done = genac("run", recipe(short), alone, "stages.sft.epochs=3", "--resume", cwd=short)
    assert done.returncode == 0, done.stderr[-3000:]
    losses = [[row["actor/loss"] for row in rows(folder) if "actor/lr" in row] for folder in (short, long)]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 6
    assert judged(short) == judged(long)


def test_a_world_that_a_platform_has_preset(tmp_path: Path) -> None:
    """Told at once, also by the process of a RANK other than 0 where it may be the only one."""
    for rank, port in (("0", "29500"), ("1", "")):
        world = {"RANK": rank, "WORLD_SIZE": "4", "MASTER_ADDR": "10.255.255.1", "MASTER_PORT": port}
        words = [sys.executable, "-m", "genac_megatron", "run", recipe(tmp_path)]
        done = run_words(words, cwd=tmp_path, env=environment(**world))
        assert done.returncode == 2, done.stderr[-3000:]
        assert "unset RANK WORLD_SIZE LOCAL_RANK MASTER_ADDR MASTER_PORT" in done.stderr
    assert not (tmp_path / "runs").exists()
