"""A tiny run of two real ranks, what harms it, and how two runs are compared."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
INJECT = Path(__file__).parent / "inject"
LIMIT_S = 600.0  # for a run, on a busy machine
GONE_S = 60.0  # for what it leaves to end: after a launcher's death ranks still save
MEASURED = re.compile(
    r"^time|^memory/|^share/time|_s(_mean)?$|peak_bytes|^tokens/evaluate|^unique/|^run/(attempts|command)$"
)
LOGS = ("metrics.jsonl", "evaluations.jsonl", "rollouts.jsonl")
ROLE = {
    "model": {
        "family": "qwen3",
        "tokenizer": "builtin:tiny",
        "shape": {"layers": 2, "hidden": 64, "ffn": 128, "heads": 2, "kv_heads": 2, "init_std": 0.1},
    },
    "training": {"dtype": "fp32", "tokens_per_microbatch": 512},
    "engine": {"dtype": "fp32"},
    "optimizer": {"lr": 1e-3},
}
ROLLOUT = {"prompts": 8, "samples": 4, "max_new_tokens": 40}
SFT = {"kind": "sft", "epochs": 1, "batch": 16, "gate": {"action": "off"}, "rollout": ROLLOUT,
       "optimizer": {"lr": 4.0e-3, "schedule": "cosine", "warmup_steps": 10}}  # fmt: skip
RECIPE: dict[str, Any] = {
    "name": "run",
    "seed": 5,
    "world": {"ranks": 2, "timeout_s": 120},
    "task": {"kind": "state_tracking", "objects": 3, "min_swaps": 1, "max_swaps": 2, "heldout_size": 16},
    "roles": {"actor": {**ROLE, "layout": {"tp": 2}}, "critic": {**ROLE, "layout": {"pp": 2}}},
    "judging": {"template": "brief", "max_new_tokens": 40, "states": {"max_states": 3, "min_segment": 4}},
    # Enough SFT that rewards and scores differ: a run in which nothing is learnt would resume to anything.
    "stages": [
        {**SFT, "name": "sft-actor", "role": "actor", "data": "demonstrations", "size": 1600},
        {**SFT, "name": "sft-critic", "role": "critic", "start_from": "actor", "data": "traces", "size": 480},
        {"kind": "ppo", "steps": 6, "rollout": ROLLOUT, "gate": {"action": "off"}},
    ],
    "evaluation": {"prompts": 4, "samples": 2},
    # At the save, which a fault's step names; what is written in the background has tests that ask for it.
    "checkpoint": {"every": 2, "keep": 4, "asynchronous": False},
    "observe": {"tensorboard": False},
}
CALLS = {
    # One response is done and is being verified; the others are still sampled or judged.
    "rollout": "genac_megatron.stages.rollouts:Generator.verify",
    # Between a micro-batch's forward and backward pass, the other rank inside a collective.
    "train": "genac_megatron.training.role:_apply_loss",
    # The folder is there, no shard is.
    "before-shards": "genac_megatron.training.checkpoint:keep_write_errors",
    # Rank 0 has written what is common, and no shard. In torch: Megatron's own modules have a loader of ours.
    "shards": "torch.distributed.checkpoint.filesystem:_FileSystemWriter.prepare_local_plan",
    # Every shard is written, the manifest is not.
    "save": "genac_megatron.training.checkpoint:_seal",
    "log": "genac_megatron.observe.metrics:MetricsLog.log",
}


SAVING = ("before-shards", "shards", "save")


@dataclass
class Ended:
    """How a run ended, and what it said on stdout and stderr together."""

    code: int
    text: str
    noted: bool  # whether the harm was done
    left: list[str] = field(default_factory=list)  # command lines of processes that outlived it


def fault(where: str, do: str, rank: int, step: int, path: Path | None = None) -> dict[str, str]:
    """The environment of a run that is harmed: see inject/sitecustomize.py. `where` is one of CALLS."""
    current = step + (where in SAVING)  # once a step is logged, progress counts the next one
    settings = {"FAULT_CALL": CALLS[where], "FAULT_STEP": f"ppo:{current}", "FAULT_RANK": str(rank)}
    return {**settings, "FAULT_DO": do, **({"FAULT_PATH": str(path)} if path else {})}


def write_recipe(folder: Path, **changes: Any) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({**RECIPE, **changes}))
    return path


def run(folder: Path, *arguments: str, **environ: str) -> Ended:
    """`genac run` of the folder's recipe in it. Waits, too, for what it may leave behind."""
    mark = f"FAULT_TEST={uuid.uuid4()}"
    note = folder / "done"
    note.unlink(missing_ok=True)
    given = {"PYTHONPATH": f"{INJECT}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1", "FAULT_NOTE": str(note)}
    name, _, value = mark.partition("=")
    command = [sys.executable, "-m", "genac_megatron", "run", "recipe.yaml", *arguments]
    with (folder / "output").open("w+") as output:
        process = subprocess.Popen(
            command, cwd=folder, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
            env={**os.environ, **given, name: value, **environ},
        )  # fmt: skip
        try:
            code = process.wait(LIMIT_S)
        finally:
            process.kill()
            left = outlived(mark, GONE_S)
    return Ended(code, (folder / "output").read_text(), note.exists(), left)


def outlived(mark: str, limit_s: float) -> list[str]:
    """Command lines of processes with `mark` in their environment that are alive after `limit_s` seconds."""
    give_up = time.monotonic() + limit_s
    while (alive := marked(mark)) and time.monotonic() < give_up:
        time.sleep(0.2)
    return alive


def marked(mark: str) -> list[str]:
    """Command lines of living processes with `mark` in their environment."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (folder / "environ").read_bytes().split(b"\0"):
                found.append((folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()[:200])
        except OSError:
            continue
    return found


def from_step(reference: Path, folder: Path, step: int, **changes: Any) -> Path:
    """A run folder as the reference's was after `step` steps and their checkpoint; in `folder`."""
    write_recipe(folder, **changes)
    source, target = reference / "runs" / "run", folder / "runs" / "run"
    target.mkdir(parents=True, exist_ok=True)
    for name in ("recipe.yaml", *LOGS):
        shutil.copy(source / name, target / name)
    for path in (source / "checkpoints").glob("ppo-*"):
        if path.name != "ppo-end" and int(path.name.rsplit("-", 1)[1]) <= step:
            shutil.copytree(path, target / "checkpoints" / path.name)
    return target


def rows(folder: Path, log: str) -> list[dict[str, Any]]:
    """Rows without what time and machine decide, and tokens of evaluations: a resumed run generates
    held-out responses again that the whole one still had."""
    lines = (folder / "runs" / "run" / log).read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not MEASURED.search(k)} for line in lines]


def summary(folder: Path) -> dict[str, Any]:
    found = json.loads((folder / "runs/run/report/summary.json").read_text())
    return {key: value for key, value in found.items() if not MEASURED.search(key)}


def check_same(folder: Path, reference: Path) -> None:
    """Every logged figure, the summary and the last weights are the reference's, to the last bit."""
    for log in LOGS:
        assert rows(folder, log) == rows(reference, log), log
    assert summary(folder) == summary(reference)
    ends = [
        sorted((f / "runs/run/checkpoints/ppo-end/weights").glob("*.distcp")) for f in (folder, reference)
    ]
    assert [path.name for path in ends[0]] == [path.name for path in ends[1]]
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(*ends, strict=True))
