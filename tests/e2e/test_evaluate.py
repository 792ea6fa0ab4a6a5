"""`genac evaluate` by the command line, on two ranks: banks, critics on them, benchmarks."""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from genac_megatron.evaluation.bank import read_bank
from tests.e2e.test_run import RECIPE
from tests.warm import Popen, command, environment, genac

pytestmark = pytest.mark.timeout(900)  # the first test trains; every test starts several commands
PROMPTS = ("--prompts", "8", "--continuations", "8", "--chunk", "1", "--limit", "64")


def able_recipe() -> dict[str, Any]:
    """The tiny run's recipe with two SFT stages, after which the actor is right now and then."""
    recipe: dict[str, Any] = json.loads(json.dumps(RECIPE))
    for role in recipe["roles"].values():
        role["model"]["shape"] |= {"hidden": 64, "ffn": 128, "rope_theta": 100.0, "init_std": 0.08}
        role["layout"] = {}
        role["training"]["tokens_per_microbatch"] = 4096
    recipe["stages"] = recipe["stages"][:2]
    optimizer = {"lr": 4e-3, "schedule": "cosine", "warmup_steps": 10, "beta2": 0.98}
    for stage, size in zip(recipe["stages"], (1600, 160), strict=True):
        stage |= {"size": size, "epochs": 1, "batch": 16, "optimizer": optimizer, "heldout": None}
        stage["rollout"]["max_new_tokens"] = 40
    recipe["checkpoint"] = {"every": 0}  # each costs more than a step
    return recipe


def recipe_file(folder: Path) -> Path:
    """That recipe, evaluated without Monte Carlo."""
    recipe = able_recipe()
    recipe["evaluation"]["mc_states"] = 0
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe, a run of it, and a bank of its actor."""
    folder = tmp_path_factory.mktemp("trained")
    done = genac("run", str(recipe_file(folder)), "world.ranks=1", cwd=folder)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    done = genac(*build("bank"), cwd=folder)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    return folder


def build(out: str, *more: str) -> list[str]:
    given = ["--checkpoint", "runs/run", "--out", out, *PROMPTS, *more]
    return ["evaluate", "bank", "build", "recipe.yaml", *given]


def test_a_bank_holds_right_and_wrong_responses_and_fresh_continuations(trained: Path) -> None:
    bank = read_bank(trained / "bank")
    assert len(bank.prompts) == 8
    judged = [prompt for prompt in bank.prompts if prompt.skipped is None]
    assert judged, "the actor is right now and then"
    for prompt in judged:
        assert [response.outcome for response in prompt.responses] == [1.0, 0.0]
        assert prompt.states[0].response is None
        assert all(len(state.draws) == 8 for state in prompt.states)
        for which, response in enumerate(prompt.responses):
            cuts = [state.state.cut for state in prompt.states if state.response == which]
            assert cuts == sorted(set(cuts))
            assert all(0 < cut < len(response.completion.ids) for cut in cuts)
    for prompt in bank.prompts:
        if prompt.skipped == "wrong":
            assert len(prompt.outcomes) == 64
            assert not any(prompt.outcomes)
    first = [sum(prompt.outcomes[:8]) / 8 for prompt in bank.prompts]
    assert bank.manifest["p_bar"] == pytest.approx(sum(first) / 8)


def test_a_build_that_was_killed_goes_on_to_the_same_bank(trained: Path) -> None:
    process = Popen(
        command(*build("killed")), cwd=trained, env=environment(), start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    until = time.monotonic() + 200
    while not any(path.stat().st_size for path in trained.glob("killed/parts/*.jsonl")):
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < until
        time.sleep(0.01)
    ranks = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    for pid in (*ranks, process.pid):
        os.kill(pid, signal.SIGKILL)
    process.wait()
    assert not (trained / "killed" / "manifest.json").exists()
    done = genac(
        "evaluate", "bank", "score", "killed", "recipe.yaml", "--checkpoint", "runs/run", cwd=trained
    )
    assert done.returncode == 2, done.stdout + done.stderr
    assert "killed: it is unfinished" in done.stderr
    done = genac(*build("killed"), cwd=trained)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "going on after" in done.stdout
    for name in ("bank.jsonl", "manifest.json"):
        assert (trained / "killed" / name).read_bytes() == (trained / "bank" / name).read_bytes()
    done = genac(*build("killed", "--override", "task.min_swaps=2"), cwd=trained)
    assert done.returncode == 2
    assert "another task" in done.stderr


def test_a_harder_bank_is_scored_beside_the_first_and_told_the_same_rate(trained: Path) -> None:
    """What ICC tells is how strong the actor is on the critic's tasks, not how hard these are."""
    done = genac(*build("harder", "--override", "task.min_swaps=3", "--override", "task.max_swaps=3",
                        "--p-bar-of", "bank"), cwd=trained)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    first, harder = read_bank(trained / "bank"), read_bank(trained / "harder")
    assert harder.manifest["p_bar"] == first.manifest["p_bar"] != harder.manifest["success_rate"]
    done = genac("evaluate", "bank", "score", "bank", "recipe.yaml", "--checkpoint", "runs/run",
                 "--name", "both", "--also", "harder", cwd=trained)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    for bank in (first, harder):
        report = json.loads((bank.folder / "scores" / "both" / "scores.json").read_text())
        assert report["bank"] == bank.manifest["sha256"]
        assert report["states"] == len(bank.states)
        assert report["p_bar"] == first.manifest["p_bar"]
    done = genac("evaluate", "bank", "score", "bank", "recipe.yaml", "--checkpoint", "runs/run",
                 "--name", "neither", "--also", "nowhere", cwd=trained)  # fmt: skip
    assert done.returncode == 2, done.stdout + done.stderr
    assert "nowhere" in done.stderr
    assert not (trained / "bank" / "scores" / "neither").exists()


def test_critics_are_scored_and_compared_on_one_bank(trained: Path) -> None:
    critic = ("recipe.yaml", "--checkpoint", "runs/run")
    scalar = ("recipe.yaml", "roles.critic.model.head=value", "--name", "scalar")
    runs = [(*critic, "--icc", "on"), (*critic, "--icc", "shuffled"), scalar]
    for given in runs:
        done = genac("evaluate", "bank", "score", "bank", *given, cwd=trained)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "MSE to Monte-Carlo values" in done.stdout
    names = ("run-icc-on", "run-icc-shuffled", "scalar")
    folders = [trained / "bank" / "scores" / name for name in names]
    bank = read_bank(trained / "bank").states
    noise = statistics.fmean(statistics.variance(state.draws) / len(state.draws) for state in bank)
    assert noise > 0.0
    for folder in folders:
        report = json.loads((folder / "scores.json").read_text())
        rows = [json.loads(line) for line in (folder / "states.jsonl").read_text().splitlines()]
        assert len(rows) == report["states"] == len(bank)
        error = statistics.fmean((row["used"] - row["monte_carlo"]) ** 2 for row in rows)
        assert report["figures"]["mse"]["value"] == pytest.approx(error - noise), "the noise is taken off"
        assert all(0.0 <= row["used"] <= 1.0 for row in rows)
        assert (folder / "reliability.png").stat().st_size > 5000
    assert json.loads((folders[2] / "scores.json").read_text())["critic"]["kind"] == "scalar"
    words = [[row["text"] for row in map(json.loads, (f / "states.jsonl").read_text().splitlines())]
             for f in folders[:2]]  # fmt: skip
    assert words[0] != words[1], "another p_bar was shown"
    done = genac("evaluate", "bank", "compare", *map(str, folders), "--out", "table", cwd=trained)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "less the first's" in done.stdout
    assert all(name in done.stdout for name in names)
    assert (trained / "table" / "compare.png").stat().st_size > 5000


def test_the_same_states_under_another_actor(trained: Path) -> None:
    """Another actor, here one of other random weights, continues the states of the first one."""
    again = ("evaluate", "bank", "build", "recipe.yaml", "roles.actor.model.init_seed=9", "--out", "later",
             "--states-from", "bank", "--continuations", "4")  # fmt: skip
    done = genac(*again, cwd=trained)
    assert done.returncode == 0, done.stdout + done.stderr
    first, later = read_bank(trained / "bank"), read_bank(trained / "later")
    for before, after in zip(first.prompts, later.prompts, strict=True):
        assert after.responses == before.responses
        assert [state.state for state in after.states] == [state.state for state in before.states]
        assert all(len(state.draws) == 4 for state in after.states)
    assert later.manifest["plan"]["states_from"] == first.manifest["sha256"]
    assert later.manifest["plan"]["actor"]["weights"] != first.manifest["plan"]["actor"]["weights"]
    values = [[state.value for state in bank.states] for bank in (first, later)]
    assert sum(values[1]) < sum(values[0]), "random weights end no row of swaps"


def test_benchmarks_by_a_recipes_actor(trained: Path) -> None:
    (trained / "aime.jsonl").write_text(
        "".join(json.dumps({"problem": f"What is {n} + {n}?", "answer": str(2 * n)}) + "\n" for n in range(3))
    )
    given = (
        *("evaluate", "task", "aime24,rg:gcd", "recipe.yaml", "--checkpoint", "runs/run", "--out", "tried"),
        *("--path", "aime24=aime.jsonl", "--samples", "2", "--problems", "3", "--max-new-tokens", "8"),
        "stages.1.rollout.truncated_outcome=zero",  # of training: benchmarks verify what was cut off
    )
    done = genac(*given, cwd=trained)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "AIME 2024" in done.stdout
    assert "reasoning-gym: gcd" in done.stdout
    kept = {}
    for name in ("aime24", "rg:gcd"):
        folder = trained / "tried" / name
        rows = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
        assert [(row["index"], row["sample"]) for row in rows] == [(i, s) for i in range(3) for s in (0, 1)]
        assert all(1 <= row["tokens"] <= 8 for row in rows)
        report = json.loads((folder / "results.json").read_text())
        assert report["sampling"]["truncated_outcome"] == "verify"
        figures = report["figures"]
        assert figures["avg@2"]["value"] == sum(row["outcome"] for row in rows) / 6
        kept[name] = (folder / "samples.jsonl").read_bytes()
        # As after a kill: some rows are kept in parts, the rest is to be made again.
        lines = (folder / "samples.jsonl").read_text().splitlines(keepends=True)
        (folder / "parts").mkdir()
        (folder / "parts" / "00000-000.jsonl").write_text("".join(lines[1:4]))
        for gone in ("samples.jsonl", "manifest.json"):
            (folder / gone).unlink()
    done = genac(*given, cwd=trained)
    assert done.returncode == 0, done.stdout + done.stderr
    for name, before in kept.items():
        assert (trained / "tried" / name / "samples.jsonl").read_bytes() == before
