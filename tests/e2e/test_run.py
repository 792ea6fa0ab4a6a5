"""Whole runs by the command line: every stage, stop and resume, layouts, and what a bad input gives."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from genac_megatron.recipe.loader import load_recipe
from tests.warm import Popen, command, environment, genac

UNEQUAL = ("time", "memory/", "tokens/evaluate")
PPO_ONLY = [{"kind": "ppo", "steps": 1, "rollout": {"prompts": 2, "samples": 2, "max_new_tokens": 8},
             "gate": {"action": "off"}}]  # fmt: skip

RECIPE: dict[str, Any] = {
    "name": "run",
    "seed": 5,
    "world": {"ranks": 2, "threads": 1, "timeout_s": 120},
    "task": {"kind": "state_tracking", "objects": 3, "min_swaps": 1, "max_swaps": 2, "heldout_size": 16},
    "roles": {
        name: {
            "model": {
                "family": "qwen3",
                "tokenizer": "builtin:tiny",
                "shape": {"layers": 2, "hidden": 32, "ffn": 64, "heads": 2, "kv_heads": 2, "init_std": 0.1},
            },
            "layout": {"tp": 2} if name == "actor" else {"pp": 2},
            "training": {"dtype": "fp32", "tokens_per_microbatch": 512},
            "engine": {"dtype": "fp32"},
            "optimizer": {"lr": 1e-3},
        }
        for name in ("actor", "critic")
    },
    "judging": {"template": "brief", "max_new_tokens": 40, "states": {"max_states": 3, "min_segment": 4}},
    "stages": [
        {"kind": "sft", "name": "sft-actor", "role": "actor", "data": "demonstrations", "size": 24,
         "epochs": 1, "batch": 8,
         # Nothing gets better by 100, so after step 2 the learning rate falls.
         "heldout": {"size": 4, "every": 1, "patience": 1, "min_delta": 100, "cooldown": 1}},
        {"kind": "sft", "name": "sft-critic", "role": "critic", "start_from": "actor", "data": "traces",
         "size": 10, "epochs": 1, "batch": 5, "gate": {"action": "off"}},
        {"kind": "reinforce", "steps": 2, "gate": {"action": "off"}},
        {"kind": "ppo", "steps": 4, "minibatches": 2, "eval_every": 2},
    ],
    "evaluation": {"prompts": 4, "samples": 2, "mc_states": 2, "mc_continuations": 2},
    "checkpoint": {"every": 2},
    "observe": {"plots": False},
}  # fmt: skip
for _stage in RECIPE["stages"]:
    _stage["rollout"] = {"prompts": 4, "samples": 2, "max_new_tokens": 16}


def write_recipe(folder: Path, **changes: Any) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({**RECIPE, **changes}))
    return path


def rows(folder: Path, log: str = "metrics.jsonl") -> list[dict[str, Any]]:
    """Rows without what time and machine decide, and the tokens of evaluations: a resumed run generates
    held-out responses again that the whole one still had."""
    kept = []
    for line in (folder / "runs" / "run" / log).read_text().splitlines(keepends=True):
        if not line.endswith("\n"):
            break  # the run is writing it
        row = json.loads(line)
        kept.append(
            {
                k: v
                for k, v in row.items()
                if not k.startswith(UNEQUAL) and not k.endswith(("_s", "_peak_bytes"))
            }
        )
    return kept


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run from beginning to end, actor TP2 and critic PP2 on the same two ranks, as a user starts it."""
    folder = tmp_path_factory.mktemp("whole")
    words = command("run", str(write_recipe(folder)), "observe.plots=true")
    done = subprocess.run(words, cwd=folder, env=environment(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    return folder


def test_a_run_leaves_its_report(whole: Path) -> None:
    run = whole / "runs" / "run"
    summary = json.loads((run / "report" / "summary.json").read_text())
    for key in ("actor/accuracy_sft", "actor/accuracy_ppo", "critic/brier_sft", "critic/brier_reinforce",
                "critic/brier_ppo", "critic/brier_constant", "critic/parse_rate", "parity/logp_p99",
                "publish/actor_version", "publish/critic_version", "time/total_s",
                "memory/peak_gib"):  # fmt: skip
        assert key in summary, key
    assert 0 < summary["memory/peak_rank_gib"] < 0.9 * summary["memory/peak_gib"], "of one of two ranks"
    assert (run / "report" / "index.html").stat().st_size > 10_000
    steps = list(
        dict.fromkeys((row["stage"], row["step"]) for row in rows(whole))
    )  # a stage's end has its last
    traced = sum(stage == "sft-critic" for stage, _ in steps)  # as many as the teacher's traces give
    assert traced >= 1
    wanted = {"sft-actor": 3, "sft-critic": traced, "reinforce": 2, "ppo": 4}
    assert steps == [(stage, step) for stage, last in wanted.items() for step in range(1, last + 1)]


def test_rollouts_are_kept_with_figures_of_every_token(whole: Path) -> None:
    """Of evaluations and of the first step of a stage; joint steps have the advantages of their segments."""
    shown = rows(whole, "rollouts.jsonl")
    assert {(row["stage"], row["of"]) for row in shown} == {
        ("sft-actor", "heldout"), ("sft-critic", "heldout"), ("reinforce", "heldout"), ("ppo", "heldout"),
        ("reinforce", "training"), ("ppo", "training"),
    }  # fmt: skip
    for row in shown:
        tokens = row["tokens"]
        assert tokens["ends"][-1] == len(row["response"])
        assert len(tokens["logprobs"]) == len(tokens["ends"]) == row["length"]
        assert row["messages"][-1]["role"] == "user"
        assert ("advantages" in tokens) == ((row["stage"], row["of"]) == ("ppo", "training"))
        for state in row["states"]:
            shared, rest = state["prompt"]
            asked = row["judge_prompt"][:shared] + rest
            assert row["problem"][:20] in asked
            assert state["cut_text"] == (tokens["ends"][state["cut"] - 1] if state["cut"] else 0)
    joint = next(row for row in shown if "advantages" in row["tokens"])
    cuts = [state["cut"] for state in joint["states"]]
    changes = [
        t for t in range(1, joint["length"]) if len(set(joint["tokens"]["advantages"][t - 1 : t + 1])) > 1
    ]
    assert set(changes) <= set(cuts), "an advantage is of a whole segment"


@pytest.mark.parametrize("role", ["actor", "critic"])
def test_trainer_and_engine_agree_at_every_publication(whole: Path, role: str) -> None:
    """fp32 on both sides, weights through publication from TP2 and PP2; measured below 1e-5.

    A row's parity is that of the weights before the row's own publication, or, after a stage's last step,
    of those that the stage ends with.
    """
    logged = rows(whole)
    published = [i for i, row in enumerate(logged) if f"publish/{role}_version" in row]
    versions = [logged[i][f"publish/{role}_version"] for i in published]
    assert versions == list(range(1, len(versions) + 1))
    for here, following in zip(published, [*published[1:], len(logged)], strict=True):
        seen = [
            row[f"parity/{role}_max"] for row in logged[here : following + 1] if f"parity/{role}_max" in row
        ]
        assert seen, f"version {logged[here][f'publish/{role}_version']} was never compared"
        assert max(seen) < 1e-4
    ends = [row for row in logged if "step" in row and f"parity/{role}_p99" in row]
    assert {row["stage"] for row in ends} >= {"reinforce", "ppo"}


def test_tokens_of_evaluations_are_counted(whole: Path) -> None:
    """By hand: an evaluation's responses and judgements are all generated in it, but for cached ones."""
    summary = json.loads((whole / "runs/run/report/summary.json").read_text())
    for name in ("tokens/evaluate", "tokens/evaluate_prompt"):
        assert summary[name] > 0
    lines = (whole / "runs/run/metrics.jsonl").read_text().splitlines()
    logged = [json.loads(line) for line in lines]
    assert summary["tokens/evaluate"] == sum(row.get("tokens/evaluate", 0.0) for row in logged)
    last = logged[-1]
    assert (last["stage"], last["step"]) == ("ppo", 4)
    # The last evaluation judged 4 prompts x 2 responses of at least 1 token, and continued 2 states twice.
    assert last["tokens/evaluate"] >= 4 * 2 + 4 + 2 * 2
    assert "tokens/evaluate" in logged[0] or "tokens/evaluate" in logged[3], "evaluations of SFT count too"


def test_stopped_by_ctrl_c_and_resumed_it_ends_the_same(whole: Path, tmp_path: Path) -> None:
    """2N = N + resume + N: figures, rollouts and weights are the same to the last bit."""
    recipe = str(write_recipe(tmp_path))
    for stops, (stage, step) in enumerate((("sft-actor", 2), ("sft-critic", 1), ("ppo", 3))):
        resume = ["--resume"] if stops else []
        process = Popen(
            command("run", recipe, *resume), cwd=tmp_path, env=environment(), stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        metrics = tmp_path / "runs" / "run" / "metrics.jsonl"
        give_up = time.monotonic() + 300
        while process.poll() is None and time.monotonic() < give_up:
            if metrics.exists() and any((r["stage"], r["step"]) == (stage, step) for r in rows(tmp_path)):
                process.send_signal(signal.SIGINT)
                break
            time.sleep(0.02)
        text = process.communicate(timeout=300)[0]
        assert process.returncode == 75, text[-4000:]
        assert "--resume" in text
    done = genac("run", recipe, "--resume", cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    assert rows(tmp_path) == rows(whole)
    for log in ("evaluations.jsonl", "rollouts.jsonl"):
        assert rows(tmp_path, log) == rows(whole, log)
    weights = [
        sorted((f / "runs/run/checkpoints/ppo-end/weights").glob("*.distcp")) for f in (tmp_path, whole)
    ]
    assert [p.name for p in weights[0]] == [p.name for p in weights[1]]
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(*weights, strict=True))


def test_a_killed_rank_loses_nothing_and_leaves_nothing_behind(whole: Path, tmp_path: Path) -> None:
    """kill -9 between two checkpoints: the run ends with that said, and resumes to the same figures."""
    recipe = str(write_recipe(tmp_path))
    with (tmp_path / "output").open("w") as output:
        process = Popen(command("run", recipe), cwd=tmp_path, env=environment(), stdout=output, stderr=output)
        metrics = tmp_path / "runs" / "run" / "metrics.jsonl"
        give_up = time.monotonic() + 300
        family: list[psutil.Process] = []
        while process.poll() is None and time.monotonic() < give_up:
            family = psutil.Process(process.pid).children(recursive=True)
            if metrics.exists() and any((r["stage"], r["step"]) == ("ppo", 3) for r in rows(tmp_path)):
                psutil.Process(process.pid).children()[-1].kill()  # its children are the ranks
                break
            time.sleep(0.02)
        assert process.wait(timeout=120) not in (0, 75)
    assert not [p for p in family if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    done = genac("run", recipe, "--resume", cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    assert rows(tmp_path) == rows(whole)


@pytest.mark.parametrize("flag", ["--dry-run", "--resolved"])
def test_a_dry_run_says_what_matters_and_the_next_command_without_torch(tmp_path: Path, flag: str) -> None:
    recipe = write_recipe(tmp_path)
    code = (
        "import sys; from genac_megatron.cli import main; c = main(sys.argv[1:]); "
        "assert 'torch' not in sys.modules; sys.exit(c)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "run", str(recipe), flag, "stages.2.steps=7"],
        cwd=tmp_path, env=environment(), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    if flag == "--resolved":
        (tmp_path / "whole.yaml").write_text(done.stdout)
        assert load_recipe(tmp_path / "whole.yaml") == load_recipe(recipe, ["stages.2.steps=7"])
    else:
        assert "7 steps" in done.stdout
        assert "Memory, estimated" in done.stdout
        assert done.stdout.endswith(f" run {recipe} stages.2.steps=7\n")
        assert f" run {recipe} stages.2.steps=7 --resolved\n" in done.stdout
        assert len(done.stdout.splitlines()) < 40
    assert not (tmp_path / "runs").exists()


def task(block: dict[str, Any]) -> dict[str, Any]:
    return {"task": block, "stages": PPO_ONLY}


@pytest.mark.parametrize(
    ("changes", "arguments", "said"),
    [
        ({"sed": 1}, [], "seed"),
        ({}, ["stages.3.step=3"], "steps"),
        ({"world": {"ranks": 3}}, [], "3"),
        (task({"kind": "jsonl", "path": "none.jsonl", "verifier": "math"}), [], "none.jsonl"),
        (task({"kind": "jsonl", "path": "bad.jsonl", "verifier": "math"}), [], "bad.jsonl:2"),
        (task({"kind": "jsonl", "path": "good.jsonl"}), [], "verifier"),
        (task({"kind": "reasoning_gym", "name": "chain_sums"}), [], "chain_sum"),
        ({"task": {"kind": "jsonl", "path": "good.jsonl", "verifier": "math"}}, [], "teacher"),
        ({}, ["roles.actor.layout.tp=4", "world.ranks=4"], "heads"),
        ({}, ["--resume"], "--resume"),
        (
            {"stages": PPO_ONLY},
            ["roles.actor.model.shape.max_positions=16"],
            "the task have no room",
        ),
    ],
    ids=[
        "unknown-key",
        "unknown-override",
        "ranks",
        "no-file",
        "bad-line",
        "no-verifier",
        "task",
        "no-teacher",
        "heads",
        "no-checkpoint",
        "no-room",
    ],
)
def test_bad_input_is_one_message_and_exit_2(
    tmp_path: Path, changes: dict[str, Any], arguments: list[str], said: str
) -> None:
    good = '{"question": "1+1?", "answer": "2"}\n'
    (tmp_path / "good.jsonl").write_text(good * 3)
    (tmp_path / "bad.jsonl").write_text(good + '{"question": \n' + good)
    done = genac("run", str(write_recipe(tmp_path, **changes)), *arguments, cwd=tmp_path)
    assert done.returncode == 2, done.stdout[-2000:] + done.stderr[-3000:]
    assert said in done.stderr
    assert done.stderr.count("genac: error") == 1, done.stderr
    assert "Traceback" not in done.stderr


def test_a_missing_recipe(tmp_path: Path) -> None:
    done = genac("run", "nothing.yaml", cwd=tmp_path)
    assert done.returncode == 2
    assert "nothing.yaml" in done.stderr


def test_a_second_run_does_not_overwrite_the_first(whole: Path) -> None:
    done = genac("run", str(whole / "recipe.yaml"), cwd=whole)
    assert done.returncode == 2
    assert "--resume" in done.stderr


def test_a_gate_that_is_not_reached_ends_with_3(tmp_path: Path) -> None:
    stages = [
        dict(RECIPE["stages"][0]),
        dict(RECIPE["stages"][1], gate={"action": "stop", "parse_rate": 1.0}),
    ]
    done = genac("run", str(write_recipe(tmp_path, stages=stages)), cwd=tmp_path)
    assert done.returncode == 3, done.stderr
    assert "parse rate" in done.stderr
