"""Rules of joint training: each broken once; and its entry gate."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from genac_megatron.errors import EXIT_GATE, GateFailed, InputError
from genac_megatron.observe.report_data import FailedGate, RunData, failed_gates
from genac_megatron.recipe.estimate import describe
from genac_megatron.recipe.loader import dump_recipe, load_recipe
from genac_megatron.recipe.schema import PpoStage, Recipe, StageConfig
from genac_megatron.recipe.stages import entry_action
from genac_megatron.stages.gates import check_entry_gate
from tests.unit.test_recipe_rules import RECIPE

NAN = float("nan")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["stages.ppo.advantage.blend={}", "stages.ppo.rollout.samples=1"], "blend mixes"),
        (["stages.ppo.advantage.blend={of: heldout}", "evaluation.samples=1"], "evaluation.samples is 1"),
        (["stages.ppo.advantage.blend={of: heldout}", "evaluation.samples=3", "stages.ppo.rollout.samples=5"],
         "means of 3 held-out responses"),
        (["stages.ppo.advantage={lam: 0.5, lam_schedule: {steps: 9}}"], "both say what lambda is"),
        (["stages.ppo.advantage={readiness: {}, lam: 0}"], "each problem's lambda, and lam that"),
        (["stages.ppo.advantage={readiness: {}, lam_schedule: {steps: 3}}"], "and lam_schedule that"),
        (["stages.ppo.advantage={readiness: {}, lam_gate: null}"], "and lam_gate that"),
        (["stages.ppo.advantage.lam_gate={figure: mse, threshold: 0.1}"], "lam_gate's mse needs evaluation"),
        (["stages.ppo.advantage.lam_gate={figure: mse, threshold: 0.04, of: batch}"], "a batch has no Monte"),
        (["stages.ppo.gate.pearson=0.9"], "an entry gate by Monte-Carlo values needs"),
        (["stages.ppo.gate.mse=0.04"], "needs evaluation.mc_states, which is 0"),
        (["stages.ppo.train_critic=false", "stages.ppo.critic_updates=2"], "does not train it"),
        (["stages.ppo.importance_limit=3"], "and critic_updates is 1"),
        (["stages.ppo.advantage.blend={weight: 0.5, momentum: 0.5}"], "and blend.weight is 0.5"),
        (["stages.ppo.advantage.blend={weight: 0.5, of: heldout}"], "blend.of is of a weight"),
        (["stages.ppo.advantage.lam_gate={figure: explained_variance_prompt, threshold: 0, of: batch}",
          "stages.ppo.rollout.samples=1"], "lambda would be 1 for good"),
        (["stages.ppo.advantage.lam_gate={figure: explained_variance_prompt, threshold: 0}",
          "evaluation.samples=1"], "and evaluation.samples is 1: lambda would be 1 for good"),
        (["judging.teacher=exact", "judging.budget=99", "stages=[{kind: ppo, train_critic: false}]"],
         "judging.teacher writes none"),
        (["judging.states.final=true", "stages=[{kind: ppo, train_critic: false}]"],
         "no stage of this recipe trains one"),
        (["stages.ppo.advantage={whiten: false, normalise: centre}"], "whiten: false and normalise: centre"),
        (["judging.certain=left_out", "stages.ppo.rollout.samples=2"], "these are always alike"),
        (["judging.certain=left_out", "stages.ppo.rollout.samples=1"], "these are none"),
        (["judging.certain=left_out", "stages.ppo.advantage={readiness: {}}"], "would never be ready"),
        (["judging.certain=left_out", "stages.ppo.advantage={blend: {of: heldout}}",
          "stages.ppo.rollout.samples=4", "evaluation.samples=4"], "none is left out"),
        (["judging.certain=left_out", "stages=[{kind: reinforce}]"], "and this recipe has none"),
        (["judging.certain=left_out", "judging.teacher=exact", "stages=[{kind: ppo, train_critic: false}]"],
         "for the critic's tokens; judging.teacher"),
        (["stages.ppo.advantage.normalise=white"], "one of whiten, centre, scale, none"),
        (["judging.teacher=exact"], "'traces' (sft) trains a critic"),
        (["judging.teacher=exact", "stages=[{kind: ppo}]"], "'ppo' (ppo) trains a critic"),
        (["judging.teacher=exact", "stages=[{kind: reinforce}]"], "'reinforce' (reinforce) trains a critic"),
        (
            ["judging.teacher=exact", "roles.critic.model.head=value", "stages=[{kind: value}]"],
            "the critic is a scalar one",
        ),
        (
            ["judging.teacher=exact", "roles.critic.model.head=logit",
             "stages=[{kind: ppo, train_critic: false}]"],
            "the critic is a scalar one",
        ),
        (
            ["judging.teacher=exact", "task={kind: reasoning_gym, name: chain_sum}",
             "stages=[{kind: ppo, train_critic: false}]"],
            "the task 'reasoning_gym' has none",
        ),
    ],
)  # fmt: skip
def test_each_rule(path: Path, overrides: list[str], words: str) -> None:
    with pytest.raises(InputError, match=re.escape(words)) as raised:
        load_recipe(path, overrides)
    assert "way out" in str(raised.value) or "normalise" in words or "none'" in words


@pytest.mark.parametrize(
    "overrides",
    [
        ["stages.ppo.advantage={lam: 0}"],
        ["stages.ppo.advantage={lam_schedule: {shape: cosine, steps: 40}}"],
        ["stages.ppo.advantage={readiness: {}}", "stages.ppo.rollout.samples=1"],
        ["stages.ppo.advantage={lam_gate: {figure: mse, threshold: 0.04}}", "evaluation.mc_states=8"],
        ["stages.ppo.advantage={blend: {weight: 0.5}}", "evaluation.samples=1"],
        ["stages.ppo.advantage={whiten: false}"],
        ["judging.certain=left_out", "judging.states.final=true", "stages.ppo.rollout.samples=3",
         "stages.ppo.advantage={blend: {}}"],
        ["stages.ppo.critic_updates=2", "stages.ppo.overlong_filter=true", "judging.states.final=true"],
        ["stages.ppo.gate={parse_rate: 1, mse: 0.04, pearson: 0.9, spearman: 0.9}", "evaluation.mc_states=8"],
        ["judging.teacher=exact", "stages=[{kind: ppo, train_critic: false, rollout: {samples: 1}}]"],
    ],
)  # fmt: skip
def test_what_loads_is_read_back_to_the_same(path: Path, overrides: list[str], tmp_path: Path) -> None:
    recipe = load_recipe(path, overrides)
    again = tmp_path / "again.yaml"
    again.write_text(dump_recipe(recipe))
    assert load_recipe(again) == recipe


def test_a_teacher_needs_no_critic(path: Path) -> None:
    plain = RECIPE.replace("  critic: *role\n", "").split("stages:")[0]
    path.write_text(plain + "judging: {teacher: exact}\nstages: [{kind: ppo, train_critic: false}]\n")
    recipe = load_recipe(path)
    assert "critic" not in recipe.roles
    assert "and 0 critic tokens" in describe(recipe)
    path.write_text(plain + "stages: [{kind: ppo, train_critic: false}]\n")
    with pytest.raises(InputError, match="needs a role 'critic'"):
        load_recipe(path)


# --- the entry gate ------------------------------------------------------------------------------

GOOD = {
    "eval/critic_parse_rate": 0.5, "eval/critic_brier": 0.2, "eval/critic_brier_constant": 0.25,
    "eval/critic_auc": 0.8, "eval/critic_ranking_prompt": 0.7, "eval/critic_mse": 0.03,
    "eval/critic_mse_pearson": 0.92, "eval/critic_mse_spearman": 0.9,
}  # fmt: skip
STRICT = {
    "parse_rate": 0.5, "brier_below_constant": True, "auc": 0.65, "ranking": 0.5, "mse": 0.04,
    "pearson": 0.9, "spearman": 0.87,
}  # fmt: skip


def recipe_of(gate: dict[str, Any], before: list[dict[str, Any]] | None = None) -> tuple[Recipe, PpoStage]:
    role = {"model": {"family": "qwen3", "tokenizer": "builtin:tiny", "shape": {
        "layers": 1, "hidden": 8, "ffn": 8, "heads": 1, "kv_heads": 1}}}  # fmt: skip
    stages = [*(before or []), {"kind": "ppo", "name": "joint", "gate": gate}]
    recipe = Recipe.model_validate(
        {"name": "x", "roles": {"actor": role, "critic": role}, "stages": stages,
         "task": {"kind": "state_tracking"}}
    )  # fmt: skip
    stage = recipe.stages[-1]
    assert isinstance(stage, PpoStage)
    return recipe, stage


def test_a_critic_that_writes_scores_enters_and_one_that_writes_none_does_not() -> None:
    """Bug 9 of the review: 500 steps went by with p_bar as every value, and the exit code was 0."""
    check_entry_gate(*recipe_of({}), {"eval/critic_parse_rate": 0.01})
    for figures in ({"eval/critic_parse_rate": 0.0}, {}, {"eval/critic_parse_rate": NAN}):
        with pytest.raises(GateFailed) as caught:
            check_entry_gate(*recipe_of({}), figures)
        told = str(caught.value)
        assert caught.value.exit_code == EXIT_GATE
        for words in (
            "gate of stage joint",
            "none of the critic's judgements can be read",
            "means:",
            "helps:",
            "roles.critic.model.checkpoint=",
            "stages.joint.gate.action=warn",
        ):
            assert words in told


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"parse_rate": 0.4}, "parse rate 0.400 is below 0.5"),
        ({"brier": 0.25}, "Brier 0.2500 is not below the constant predictor's 0.2500"),
        ({"auc": 0.65}, "AUC 0.650 is not above 0.65"),
        ({"ranking_prompt": NAN}, "within a prompt nan is not above 0.5"),
        ({"mse": 0.041}, "MSE 0.0410 is above 0.04"),
        ({"mse": NAN}, "MSE nan is above 0.04"),
        ({"mse_pearson": 0.899}, "Pearson's correlation 0.899 is below 0.9"),
        ({"mse_spearman": 0.5}, "Spearman's correlation 0.500 is below 0.87"),
    ],
)
def test_each_figure_that_is_asked_for(change: dict[str, float], words: str) -> None:
    figures = GOOD | {f"eval/critic_{key}": value for key, value in change.items()}
    check_entry_gate(*recipe_of(STRICT), GOOD)
    check_entry_gate(*recipe_of({}), figures)
    with pytest.raises(GateFailed) as caught:
        check_entry_gate(*recipe_of(STRICT), figures)
    told = str(caught.value)
    assert words in told
    assert told.count("means:") == 1, "only what failed"
    # The bound that it offers lets the same figures pass.
    bound = re.search(r"stages\.joint\.gate\.(\w+)=(\S+)\n", told)
    assert bound
    if any(value == value for value in change.values()):
        check_entry_gate(*recipe_of(STRICT | {bound[1]: bound[2]}), figures)
    else:
        assert bound[1] == "action"


@pytest.mark.parametrize(
    ("before", "gate", "wanted"),
    [
        ([], {}, "stop"),
        ([{"kind": "reinforce", "gate": {"action": "off"}}], {}, "off"),
        ([{"kind": "sft", "role": "critic", "data": "traces", "gate": {"action": "warn"}}], {}, "warn"),
        ([{"kind": "sft", "role": "actor", "data": "demonstrations", "gate": {"action": "off"}}], {}, "stop"),
        ([{"kind": "sft", "role": "critic", "data": "traces", "gate": {"action": "off"}},
          {"kind": "reinforce"}], {}, "stop"),
        ([{"kind": "reinforce", "gate": {"action": "off"}}], {"action": "stop"}, "stop"),
        ([], {"action": "warn"}, "warn"),
    ],
)  # fmt: skip
def test_who_lets_an_unready_critic_through_means_it(
    before: list[dict[str, Any]], gate: dict[str, Any], wanted: str, caplog: pytest.LogCaptureFixture
) -> None:
    recipe, stage = recipe_of(gate, before)
    assert entry_action(recipe.stages, stage) == wanted
    figures = {"eval/critic_parse_rate": 0.0}
    if wanted == "stop":
        with pytest.raises(GateFailed):
            check_entry_gate(recipe, stage, figures)
        return
    with caplog.at_level(logging.WARNING):
        check_entry_gate(recipe, stage, figures)
    assert bool(caplog.records) == (wanted == "warn")


def test_the_keys_that_the_gate_names_are_keys_of_the_recipe() -> None:
    bad = dict.fromkeys(GOOD, 0.3) | {"eval/critic_brier_constant": 0.25}
    recipe, stage = recipe_of(STRICT)
    with pytest.raises(GateFailed) as caught:
        check_entry_gate(recipe, stage, bad)
    resolved: Any = recipe.model_dump()
    resolved["stages"] = {"joint": resolved["stages"][-1]}
    named = re.findall(r"(?:stages|roles|evaluation|judging)\.[\w.-]*\w", str(caught.value))
    assert len(named) > 5
    for key in named:
        block = resolved
        for part in key.split("."):
            assert part in block, key
            block = block[part]
    assert TypeAdapter(StageConfig).validate_python(resolved["stages"]["joint"]) == stage


def test_the_report_says_where_the_entry_gate_stopped_a_run() -> None:
    recipe, _ = recipe_of({})
    start = {"stage": "joint", "kind": "ppo", "name": "start", "step": 0, "critic": {"parse_rate": 0.0}}
    judged = {"stage": "joint", "kind": "ppo", "step": 0}  # what the judging took

    def failed(*metrics: dict[str, Any]) -> FailedGate:
        run = RunData(Path("run"), recipe.model_dump(mode="json"), list(metrics), [start], [], {})
        (found,) = failed_gates(run)
        return found

    assert failed(judged).stopped
    assert "none of the critic's judgements" in failed(judged).missed[0].what
    assert not failed(judged, {**judged, "step": 1}).stopped, "it was told to go on"
