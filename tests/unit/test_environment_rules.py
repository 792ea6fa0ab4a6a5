"""What a recipe with an environment may ask for, and what is refused by name."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import yaml

from genac_megatron.errors import InputError
from genac_megatron.evaluation.command import _gradients, score_in_ranks
from genac_megatron.recipe.environment_rules import check_benchmarks, continues, need_no_environment
from genac_megatron.recipe.loader import load_recipe
from genac_megatron.recipe.tasks import VerifiersTask

SHAPE = {"layers": 2, "hidden": 32, "ffn": 64, "heads": 2, "kv_heads": 2}
ROLE = {"model": {"family": "qwen3", "tokenizer": "builtin:tiny", "shape": SHAPE}}
BOTH = {"actor": ROLE, "critic": ROLE}
SCALAR = {"actor": ROLE, "critic": {"model": {**ROLE["model"], "head": "value"}}}
POLICY: dict[str, Any] = {"kind": "policy", "algorithm": {"kind": "grpo"}, "rollout": {"max_new_tokens": 99}}
LOCK = {"kind": "lock"}
THEIRS = {"kind": "textarena", "id": "GuessTheNumber-v0"}
OTHER = {"kind": "state_tracking"}
TEMPLATE = {"kind": "task", "history": "template"}
TOOLS = {"kind": "tools", "tools": ["calculator"]}


def recipe(folder: Path, **changes: Any) -> Path:
    (folder / "own.py").write_text("class Game:\n    pass\n")
    whole = {"name": "r", "roles": {"actor": ROLE}, "task": LOCK, "environment": {"kind": "task"},
             "stages": [POLICY], **changes}  # fmt: skip
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in whole.items() if value is not None}))
    return path


def test_a_game_and_an_environment_of_ones_own_are_read(tmp_path: Path) -> None:
    assert load_recipe(recipe(tmp_path)).environment is not None
    own = {"kind": "python", "python": "./own.py:Game"}
    assert load_recipe(recipe(tmp_path, task=OTHER, environment=own)).environment is not None
    task = {"kind": "verifiers", "id": "simon", "path": "./", "args": {"rounds": 4}}
    theirs = load_recipe(recipe(tmp_path, task=task)).task
    assert isinstance(theirs, VerifiersTask)
    assert theirs.path == str(tmp_path.resolve())


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "none": ({"environment": None}, "no environment plays it"),
    "in-a-mixture": (
        {"task": {"kind": "mixture", "parts": [{"name": "a", "task": LOCK}]}, "environment": None},
        "task",
    ),
    "no-game": ({"task": OTHER}, "'state_tracking' is no environment of its own"),
    "python-unnamed": ({"environment": {"kind": "python"}}, "names what a kind of python"),
    "python-too-much": ({"environment": {"kind": "task", "python": "./own.py:Game"}}, "names what a kind"),
    "python-missing": (
        {"environment": {"kind": "python", "python": "./own.py:Gane"}},
        r"no function 'Gane'(.|\n)*did you mean Game",
    ),
    "turns": ({"environment": {"kind": "task", "turns": 4}}, "a lock has 8 turns"),
    "overlap": ({"stages": [{**POLICY, "overlap": True}]}, "overlap"),
    "history-scalar": (
        {"roles": SCALAR, "environment": TEMPLATE, "stages": [{"kind": "value"}]},
        "a scalar critic, which reads a conversation as one sequence",
    ),
    "history-updates": (
        {"roles": BOTH, "environment": TEMPLATE, "stages": [{"kind": "ppo", "critic_updates": 2}]},
        "a critic that weighs by the moved actor",
    ),
    "history-demonstrations": (
        {"environment": TEMPLATE, "stages": [{"kind": "sft", "role": "actor", "data": "demonstrations"}]},
        "a demonstration, which reads",
    ),
    "final": ({"judging": {"states": {"final": True}}}, "may say how the conversation ended"),
    "turns-without": (
        {"task": OTHER, "environment": None, "judging": {"states": {"cutter": "turns"}}},
        "there is no environment",
    ),
    "ppo-overlong": ({"roles": BOTH, "stages": [{"kind": "ppo", "overlong": {}}]}, "overlong penalty"),
    "tools-none": ({"task": OTHER, "environment": {"kind": "tools"}}, "names what a kind of tools offers"),
    "tools-on-a-game": (
        {"environment": {"kind": "tools", "tools": ["calculator"]}},
        "played in turns, which tools do not answer",
    ),
    "suites": (
        {"evaluation": {"suites": [{"name": "math500"}]}},
        r"evaluation\.suites, whose questions are not played as the task 'lock' is, does not work",
    ),
    "sandbox": (
        {"task": OTHER, "environment": {"kind": "tools", "tools": ["python"], "step_s": 8.0}},
        r"programs may take 5 s .* and an answer 8 s(.|\n)*set environment.step_s to 15",
    ),
    "exact-of-tools": (
        {
            "task": OTHER, "environment": TOOLS, "roles": BOTH,
            "stages": [{"kind": "sft", "role": "critic", "data": "traces"}],
        },
        r"an exact teacher of 'state_tracking', which knows no transcript(.|\n)*or to monte",
    ),
    "exact-target": (
        {
            "task": OTHER, "environment": {"kind": "python", "python": "./own.py:Game"}, "roles": SCALAR,
            "stages": [{"kind": "value", "value": {"target": "exact"}}],
        },
        r"an exact teacher of 'state_tracking'(.|\n)*set it to outcome or monte_carlo",
    ),
    "overlong": (
        {"stages": [{**POLICY, "algorithm": {"kind": "dapo", "overlong": {}}}]},
        "the overlong penalty does not work with an environment yet",
    ),
    "distil": (
        {"roles": SCALAR, "stages": [{"kind": "value", "distil": {"path": "./own.py"}}]},
        "distil does not work with an environment yet",
    ),
    "package-alone": ({"task": THEIRS, "environment": None}, "no environment plays it"),
    "package-and-another": (
        {"task": THEIRS, "environment": {"kind": "python", "python": "./own.py:Game"}},
        r"'textarena' is an environment, and environment\.kind names another",
    ),
    "package-rewards": ({"task": {**THEIRS, "rewards": [1, -1]}}, "the lower one first"),
    "package-suites": (
        {"task": THEIRS, "evaluation": {"suites": [{"name": "math500"}]}},
        "questions are not played as the task 'textarena' is",
    ),
    "package-teacher": (
        {"task": THEIRS, "stages": [{"kind": "sft", "role": "actor", "data": "demonstrations"}]},
        "teacher",
    ),
    "source": (
        {
            "task": OTHER, "environment": None,
            "stages": [
                {"kind": "sft", "role": "actor", "data": "demonstrations",
                 "sources": [{"share": 1.0, "task": LOCK}]},
            ],
        },
        "a source's texts have one",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_there_is_refused_by_name(tmp_path: Path, case: str) -> None:
    changes, why = REFUSED[case]
    with pytest.raises(InputError, match=why):
        load_recipe(recipe(tmp_path, **changes))


CONTINUED: dict[str, dict[str, Any]] = {
    "monte-carlo": {"roles": BOTH, "evaluation": {"mc_states": 4}},
    "no-critic": {"evaluation": {"mc_states": 4}},
    "self": {
        "roles": BOTH,
        "stages": [{"kind": "sft", "role": "critic", "data": "traces", "teacher": {"kind": "self"}}],
    },
    "regression": {"roles": SCALAR, "stages": [{"kind": "value", "value": {"target": "monte_carlo"}}]},
    "suites-with-tools": {
        "task": OTHER, "environment": {"kind": "tools", "tools": ["python"], "step_s": 15.0},
        "evaluation": {"suites": [{"name": "math500"}]},
    },
}  # fmt: skip


@pytest.mark.parametrize("case", CONTINUED)
def test_conversations_are_continued_and_evaluated(tmp_path: Path, case: str) -> None:
    loaded = load_recipe(recipe(tmp_path, **CONTINUED[case]))
    assert loaded.environment is not None
    assert continues(loaded) == (case not in ("no-critic", "suites-with-tools"))


def test_commands_that_know_single_responses_refuse_conversations(tmp_path: Path) -> None:
    loaded = load_recipe(recipe(tmp_path))
    with pytest.raises(InputError, match="genac score does not work with an environment yet"):
        need_no_environment(loaded, "genac score")
    given = argparse.Namespace(recipe=str(tmp_path / "recipe.yaml"), overrides=[], override=[])
    for command, name in ((score_in_ranks, "genac score"), (_gradients, "genac evaluate gradients")):
        with pytest.raises(InputError, match=f"{name} does not work with an environment yet"):
            command(given, [], lambda *_: 0)
    check_benchmarks(loaded, ["heldout"], voting=False)
    with pytest.raises(InputError, match="the questions of math500 are not played as the task 'lock' is"):
        check_benchmarks(loaded, ["heldout", "math500"], voting=False)
    with pytest.raises(InputError, match="task --critic does not work with an environment yet"):
        check_benchmarks(loaded, ["heldout"], voting=True)
    tools = {"task": OTHER, "environment": {"kind": "tools", "tools": ["calculator"]}}
    check_benchmarks(load_recipe(recipe(tmp_path, **tools)), ["math500"], voting=False)
