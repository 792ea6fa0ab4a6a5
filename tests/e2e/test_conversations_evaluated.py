"""Commands that evaluate, over an environment: benchmarks, banks, pass rates, traces. The actor guesses.

Its game is worth now 0 and now 1, so that one that was never trained has both.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from genac_megatron.evaluation.bank import read_bank
from genac_megatron.records import ACTOR
from tests.e2e.test_conversation_runs import ACTOR as ROLE
from tests.e2e.test_conversation_runs import ROLLOUT, SFT
from tests.e2e.test_run import RECIPE
from tests.warm import genac

GAME = """
class Odd:  # won by an odd number of characters in three turns
    def reset(self, prompt, seed):
        self.count = self.sum = 0
    def step(self, turn):
        self.count += 1
        self.sum += len(turn)
        shown = f"{self.count} of 3, {self.sum} so far"
        return {"observation": shown, "done": self.count == 3, "outcome": self.sum % 2}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("evaluated")
    (made / "odd.py").write_text(GAME)
    whole = {
        **RECIPE,
        "roles": {"actor": {**ROLE, "layout": {}}, "critic": {**RECIPE["roles"]["critic"], "layout": {}}},
        "environment": {"kind": "python", "python": "./odd.py:Odd", "turns": 4, "turn_tokens": 3},
        "judging": {
            "template": "brief", "max_new_tokens": 8, "states": {"cutter": "turns", "min_segment": 1},
        },
        "stages": [
            {**SFT, "data": "traces", "role": "critic", "size": 6, "gate": {"action": "off"},
             "teacher": {"kind": "self", "continuations": 2, "rounds": 1}},
            {"kind": "ppo", "steps": 1, "rollout": ROLLOUT, "eval_every": 0, "gate": {"action": "off"}},
        ],
        "world": {**RECIPE["world"], "ranks": 1},
        "evaluation": {"prompts": 4, "samples": 2},
    }  # fmt: skip
    (made / "recipe.yaml").write_text(yaml.safe_dump(whole))
    return made


def done(folder: Path, *words: str) -> str:
    result = genac(*words, cwd=folder)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-5000:]
    return result.stdout


def test_a_recipes_own_prompts_are_asked_in_its_environment(folder: Path) -> None:
    words = [
        "evaluate",
        "task",
        "heldout",
        "recipe.yaml",
        "--out",
        "tried",
        "--samples",
        "2",
        "--problems",
        "4",
    ]
    assert "the recipe's held-out prompts" in done(folder, *words)
    rows = [json.loads(line) for line in (folder / "tried/heldout/samples.jsonl").read_text().splitlines()]
    assert len(rows) == 8
    for row in rows:
        assert row["ended"] == "done"
        assert row["turns"] == 3
        assert row["conversation"].count("<actor>\n") == 3
        assert row["conversation"].count("<user>\n") == 3
        counted = int(re.findall(r"3 of 3, (\d+) so far", row["conversation"])[0])
        assert row["outcome"] == counted % 2
    figures = json.loads((folder / "tried/heldout/results.json").read_text())["figures"]
    assert figures["turns"]["value"] == 3.0
    assert figures["failed"]["value"] == 0.0
    done(folder, *words)  # all is there already
    other = genac(*words, "task.slip_rate=0.5", cwd=folder)
    assert other.returncode == 2
    assert "work with another task" in other.stderr


def test_a_bank_of_conversations_is_built_and_scored(folder: Path) -> None:
    given = ["--prompts", "3", "--continuations", "4", "--samples", "4", "--chunk", "3", "--limit", "16"]
    done(folder, "evaluate", "bank", "build", "recipe.yaml", "--out", "bank", *given)
    bank = read_bank(folder / "bank")
    assert bank.manifest["plan"]["environment"]["turns"] == 4
    states = [state for prompt in bank.prompts for state in prompt.states]
    assert any(0.0 < state.value < 1.0 for state in states)
    for state in states:
        episode = state.state.rollout.episode
        assert episode is not None
        if state.response is not None:
            assert state.state.cut in {t.begin for t in episode.turns if t.who == ACTOR}
    shown = done(folder, "evaluate", "bank", "score", "bank", "recipe.yaml")
    assert "MSE to Monte-Carlo values" in shown


def test_traces_are_asked_about_states_between_turns(folder: Path) -> None:
    # a lock, whose exact teacher says what it knows
    played = ["task={kind: lock, min_length: 1, max_length: 2, turns: 4, heldout_size: 16}",
              "environment={kind: task, turns: 4, turn_tokens: 3}"]  # fmt: skip
    wide = "stages.0.teacher.tolerance_floor=1.0"  # an actor that was never trained plays as nobody does
    exact = "stages.0.teacher.kind=exact"
    done(folder, "traces", "ask", "recipe.yaml", *played, exact, wide, "--out", "asked", "--gate", "off")
    rows = [json.loads(line) for line in (folder / "asked/traces.jsonl").read_text().splitlines()]
    assert rows
    for row in rows:
        assert set(row) & {"ids", "episode", "whole"} == set()
        assert re.match(r"step \d of \d left \d\nrow ", row["text"])
    assert any("<user>\nstep " in row["partial"] for row in rows)
    trained: dict[str, Any] = {"kind": "file", "path": "asked/traces.jsonl"}
    words = [
        *played,
        f"stages.0.teacher={json.dumps(trained)}",
        f"stages.0.size={len(rows)}",
        "name=learnt",
        "judging.max_new_tokens=40",
    ]
    done(folder, "run", "recipe.yaml", *words, "evaluation.mc_states=4", "evaluation.mc_continuations=2")
    evaluated = [
        json.loads(line) for line in (folder / "runs/learnt/evaluations.jsonl").read_text().splitlines()
    ]
    last = [row["critic"] for row in evaluated if row["kind"] == "ppo" and row["critic"]]
    assert last
    assert {"exact_mse", "exact_mse_constant", "exact_mse/turn_1"} <= set(last[-1])
    assert any("mse" in row for row in last)


def test_pass_rates_are_of_conversations(folder: Path) -> None:
    shown = done(
        folder, "evaluate", "pass-rates", "recipe.yaml", "--out", "rates", "--prompts", "3", "--samples", "4"
    )
    assert "3 questions, 4 samples each" in shown
