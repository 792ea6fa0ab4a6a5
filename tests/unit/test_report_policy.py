"""Reports of rivals' runs: stages of kind policy and value, with a scalar critic and without one."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from fabricated_run import RECIPE, critic_block, write_lines

from genac_megatron.observe.report_data import read_run, summarise, what_is_missing
from genac_megatron.observe.report_page import chosen_rollouts, missing_card, page
from genac_megatron.observe.report_plots import draw_all

GRPO = {"kind": "policy", "name": "rival", "steps": 4, "algorithm": {"kind": "grpo"}}
VC_PPO = {"kind": "policy", "name": "rival", "steps": 4, "algorithm": {"kind": "vc_ppo"}}
VALUE = {"kind": "value", "name": "warm-up", "steps": 2}
CRITICS_PLOTS = {"critic_error", "reliability", "scores", "ranking"}


def evaluation(
    stage: dict[str, Any], name: str, step: int, right: int, critic: bool = False
) -> dict[str, Any]:
    """Of 40 held-out prompts so many are solved."""
    outcomes = {f"heldout/{i}": [float(i < right)] for i in range(40)}
    return {
        "stage": stage["name"], "kind": stage["kind"], "name": name, "step": step,
        "actor": {"accuracy": right / 40, "outcomes": outcomes, "truncated": 0.0},
        "critic": critic_block(np.random.default_rng(step), 0.45, 0.8, 1.0) if critic else None,
    }  # fmt: skip


def made(folder: Path, stages: list[dict[str, Any]], evaluations: list[dict[str, Any]]) -> Path:
    """A run of these stages to their ends, with a right and a wrong rollout of each."""
    folder.mkdir()
    roles = RECIPE["roles"] if any(e["critic"] for e in evaluations) else {"actor": RECIPE["roles"]["actor"]}  # type: ignore[index]
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE | {"roles": roles, "stages": stages}))
    steps = [(s, step) for s in stages for step in range(1, s["steps"] + 1)]
    rows = [
        {"stage": s["name"], "kind": s["kind"], "step": step, "rollout/outcome_mean": 0.4, "actor/loss": 0.1}
        for s, step in steps
    ]
    write_lines(folder / "metrics.jsonl", rows)
    write_lines(folder / "evaluations.jsonl", evaluations)
    shown = [
        {"stage": s["name"], "step": 2, "prompt": "train/1", "response": "A=red", "outcome": x, "states": []}
        for s in stages
        for x in (0.0, 1.0)
    ]
    write_lines(folder / "rollouts.jsonl", shown)
    return folder


def grpo(folder: Path) -> Path:
    return made(folder, [GRPO], [evaluation(GRPO, "start", 0, 12), evaluation(GRPO, "end", 4, 28)])


def vc_ppo(folder: Path) -> Path:
    evaluations = [
        evaluation(VALUE, "end", 2, 12, critic=True),
        evaluation(VC_PPO, "start", 0, 12, critic=True),
        evaluation(VC_PPO, "end", 4, 28, critic=True),
    ]
    return made(folder, [VALUE, VC_PPO], evaluations)


@pytest.mark.parametrize("run", [grpo, vc_ppo])
def test_the_actors_gain_is_from_its_start_to_its_end(run: Any, tmp_path: Path) -> None:
    data = read_run(run(tmp_path / "run"))
    summary = summarise(data)
    assert (summary["actor/accuracy_sft"], summary["actor/accuracy_policy"]) == (0.3, 0.7)
    assert summary["actor/accuracy_gain"] == pytest.approx(0.4)
    assert 0.2 < summary["actor/accuracy_gain_low"] < 0.4 < summary["actor/accuracy_gain_high"] < 0.6
    assert summary["actor/accuracy_policy_step"] == 4
    assert math.isnan(summary["actor/accuracy_ppo"]), "no joint step was taken"
    shown = page(data, summary, [], [], [])
    assert "<b class=good>70.0 %</b>" in shown
    assert "after policy, from 30.0 %; gain +40.0 points (95 %: " in shown
    assert "before its RL" not in shown


def test_rollouts_of_every_kind_of_stage_are_shown(tmp_path: Path) -> None:
    data = read_run(vc_ppo(tmp_path / "run"))
    chosen = [(row["stage"], row["outcome"]) for row in chosen_rollouts(data)]
    assert chosen == [("rival", 1.0), ("rival", 0.0), ("warm-up", 1.0), ("warm-up", 0.0)]


def test_a_scalar_critics_figures_and_plots_are_there(tmp_path: Path) -> None:
    data = read_run(vc_ppo(tmp_path / "run"))
    summary = summarise(data)
    value, _, end = (row["critic"] for row in data.evaluations)
    assert (summary["critic/brier_value"], summary["critic/brier_policy"]) == (value["brier"], end["brier"])
    assert summary["critic/brier_constant"] == value["brier_constant"], "of the frozen actor's states"
    shown = page(data, summary, [], [], [])
    assert "Critic Brier after value" in shown
    assert "Critic Brier after policy" in shown
    plots, absent = draw_all(data)
    assert {plot.id for plot in plots} >= CRITICS_PLOTS
    assert "Critic" not in missing_card([], absent), "what it gives the actor is a generative critic's"
    assert what_is_missing(data) == []


def test_a_head_that_had_no_stage_of_its_own_has_no_figures_after_one(tmp_path: Path) -> None:
    ends = [evaluation(VC_PPO, "start", 0, 12, critic=True), evaluation(VC_PPO, "end", 4, 28, critic=True)]
    summary = summarise(read_run(made(tmp_path / "run", [VC_PPO], ends)))
    assert summary["critic/brier_policy"] == ends[1]["critic"]["brier"]
    assert not any(key.endswith("_value") for key in summary)


def test_what_a_run_without_a_critic_has_not_is_not_missing(tmp_path: Path) -> None:
    data = read_run(grpo(tmp_path / "run"))
    assert what_is_missing(data) == []
    _, absent = draw_all(data)
    assert "Critic" not in missing_card([], absent)


def test_an_evaluation_that_a_rival_lacks_is_missing(tmp_path: Path) -> None:
    run = vc_ppo(tmp_path / "run")
    write_lines(run / "evaluations.jsonl", [evaluation(VC_PPO, "start", 0, 12)])
    assert what_is_missing(read_run(run)) == [
        "no evaluation of the critic after value",
        "no evaluation of the critic after policy",
        "no evaluation of the actor after a policy step",
    ]
