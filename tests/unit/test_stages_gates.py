"""Gates: what passes, what stops, what only warns; a figure that is missing never passes."""

from __future__ import annotations

import logging
import re
from typing import Any

import pytest
from pydantic import TypeAdapter

from genac_megatron.errors import EXIT_GATE, GateFailed
from genac_megatron.recipe.schema import (
    CriticGate,
    OptimizerConfig,
    Recipe,
    ReinforceStage,
    SftGate,
    SftStage,
    StageConfig,
)
from genac_megatron.stages.gates import check_critic_gate, check_sft_gate

NAN = float("nan")
GOOD = {
    "eval/critic_brier": 0.20,
    "eval/critic_brier_constant": 0.25,
    "eval/critic_auc": 0.66,
    "eval/critic_ranking_prompt": 0.51,
}


def reinforce(**gate: Any) -> ReinforceStage:
    return ReinforceStage.model_validate({"kind": "reinforce", "name": "pretrain", "gate": gate})


def sft(**gate: Any) -> SftStage:
    return SftStage.model_validate({"kind": "sft", "role": "critic", "data": "traces", "gate": gate})


def message(stage: Any, figures: dict[str, float]) -> str:
    """What a person reads where the gate stops the run."""
    check = check_sft_gate if stage.kind == "sft" else check_critic_gate
    with pytest.raises(GateFailed) as caught:
        check(stage, figures)
    return str(caught.value)


def keys_in(text: str) -> list[str]:
    """Recipe keys that a message names, as an override would write them."""
    return re.findall(r"(?:stages|roles|evaluation|judging)\.[\w.-]*\w", text)


def recipe_with(stage: Any) -> dict[str, Any]:
    role = {"model": {"family": "qwen3", "tokenizer": "builtin:tiny", "shape": {
        "layers": 1, "hidden": 8, "ffn": 8, "heads": 1, "kv_heads": 1}}}  # fmt: skip
    return {"name": "x", "roles": {"actor": role, "critic": role}, "stages": [stage.model_dump(mode="json")],
            "task": {"kind": "state_tracking"}}  # fmt: skip


def test_a_good_critic_passes() -> None:
    check_critic_gate(reinforce(), GOOD)
    check_sft_gate(sft(), {"eval/critic_parse_rate": 0.98})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"eval/critic_brier": 0.25}, "Brier 0.2500 is not below the constant predictor's 0.2500"),
        ({"eval/critic_brier": NAN}, "Brier nan"),
        ({"eval/critic_brier_constant": NAN}, "constant predictor's nan"),
        ({"eval/critic_auc": 0.65}, "AUC 0.650 is not above 0.65"),
        ({"eval/critic_auc": NAN}, "AUC nan"),
        ({"eval/critic_ranking_prompt": 0.5}, "within a prompt 0.500 is not above 0.5"),
        ({"eval/critic_ranking_prompt": NAN}, "within a prompt nan"),
    ],
)
def test_each_figure_can_stop(change: dict[str, float], words: str) -> None:
    with pytest.raises(GateFailed) as caught:
        check_critic_gate(reinforce(), GOOD | change)
    assert words in str(caught.value)
    assert "gate of stage pretrain" in str(caught.value)
    assert "stages.pretrain.gate.action" in str(caught.value), "the way out"
    assert str(caught.value).count("means:") == str(caught.value).count("helps:") == 1, "only what failed"
    assert caught.value.exit_code == EXIT_GATE == 3


def test_what_a_figure_means_what_helps_and_how_to_go_on() -> None:
    told = message(reinforce(), GOOD | {"eval/critic_auc": 0.512})
    assert told.splitlines()[:2] == [
        "gate of stage pretrain: not reached",
        "  AUC 0.512 is not above 0.65",
    ]
    assert "the right one higher in 51.2 % of cases; a coin does in 50 %" in told
    assert "helps: more steps (stages.pretrain.steps)" in told
    after = [line.strip() for line in told.split("way out:")[1].splitlines()]
    assert "--resume" in after[0]
    assert after[1::2] == [
        "stages.pretrain.steps=100",
        "stages.pretrain.gate.auc=0.51",
        "stages.pretrain.gate.action=warn",
    ]
    assert after[2].startswith("trains 50 steps more (a learning rate that has fallen is higher again)")


def test_a_constant_learning_rate_is_not_warned_of() -> None:
    stage = reinforce().model_copy(update={"optimizer": OptimizerConfig(lr=1e-4)})
    told = message(stage, GOOD | {"eval/critic_ranking_prompt": 0.4})
    assert "has fallen" not in told
    assert "stages.pretrain.rollout.samples" in told
    cosine = stage.model_copy(update={"optimizer": OptimizerConfig(lr=1e-4, schedule="cosine")})
    assert "has fallen" in message(cosine, GOOD | {"eval/critic_ranking_prompt": 0.4})


def test_a_brier_score_of_judgements_without_scores_says_so() -> None:
    told = message(reinforce(), GOOD | {"eval/critic_brier": 0.3, "eval/critic_parse_rate": 0.8})
    assert "20 % of its judgements have no score" in told
    assert "a longer SFT of the critic" in told
    read = message(reinforce(), GOOD | {"eval/critic_brier": 0.3, "eval/critic_parse_rate": 1.0})
    assert "have no score" not in read


def test_no_bound_is_offered_where_there_is_no_figure() -> None:
    told = message(reinforce(), GOOD | {"eval/critic_auc": NAN})
    assert "held-out responses all ended alike" in told
    assert "stages.pretrain.gate.auc=" not in told
    assert "stages.pretrain.gate.action=warn" in told


@pytest.mark.parametrize("kind", ["sft", "reinforce", "value"])
def test_the_keys_it_names_are_keys_of_the_recipe(kind: str) -> None:
    of_sft = {"role": "critic", "data": "traces", "heldout": {"target": 0.1, "patience": 2}}
    more = of_sft if kind == "sft" else {}
    stage = TypeAdapter(StageConfig).validate_python({"kind": kind, "name": "one", **more}).model_copy(
        update={"gate": SftGate() if kind == "sft" else CriticGate()}
    )  # fmt: skip
    bad = {f"eval/critic_{name}": 0.4 for name in ("auc", "ranking_prompt", "parse_rate", "brier")}
    told = message(stage, bad | {"eval/critic_brier_constant": 0.25, "heldout/loss": 0.5})
    resolved = Recipe.model_validate(recipe_with(stage)).model_dump()
    resolved["stages"] = {"one": resolved["stages"][0]}
    named = keys_in(told)
    assert len(named) > 5
    for key in named:
        block: Any = resolved
        for part in key.split("."):
            assert part in block, key
            block = block[part]


def test_the_bounds_it_offers_let_the_same_figures_pass() -> None:
    figures = GOOD | {"eval/critic_brier": 0.3, "eval/critic_auc": 0.6, "eval/critic_ranking_prompt": 0.45}
    told = message(reinforce(), figures)
    line = next(line for line in told.splitlines() if "gate.auc=" in line)
    gate = dict(part.split(".gate.")[1].split("=") for part in line.split())
    assert sorted(gate) == ["auc", "brier_below_constant", "ranking"]
    check_critic_gate(reinforce(**gate), figures)
    told = message(sft(), {"eval/critic_parse_rate": 0.9})
    bound = re.search(r"stages\.sft\.gate\.parse_rate=(\S+)", told)
    assert bound
    check_sft_gate(sft(parse_rate=bound[1]), {"eval/critic_parse_rate": 0.9})


@pytest.mark.parametrize(
    ("metric", "target", "figure", "words"),
    [("exact_match", 0.7, 0.42, "0.420 is below 0.7"), ("loss", 0.1, 0.31, "0.310 is above 0.1")],
)
def test_a_held_out_target_of_any_role(metric: str, target: float, figure: float, words: str) -> None:
    def stage(target: float | str) -> SftStage:
        heldout = {"metric": metric, "target": target, "cooldown": 5}
        return SftStage.model_validate(
            {"kind": "sft", "role": "actor", "data": "demonstrations", "heldout": heldout}
        )

    told = message(stage(target), {f"heldout/{metric}": figure})
    assert f"held-out {metric} {words}" in told
    assert "stages.sft.epochs=4" in told
    check_sft_gate(stage(target), {f"heldout/{metric}": target})
    bound = re.search(r"stages\.sft\.heldout\.target=(\S+)", told)
    assert bound
    check_sft_gate(stage(bound[1]), {f"heldout/{metric}": figure})
    told = message(stage(target), {f"heldout/{metric}": NAN})
    assert f"held-out {metric} nan is " in told
    assert "heldout.target=" not in told  # no bound would do


def test_a_curriculum_is_not_told_to_train_longer() -> None:
    """More epochs are refused where a source has a phase (recipe/source_rules.py)."""
    phased = [{"share": 0.5, "phase": [0.0, 0.5]}, {"share": 0.5}]
    heldout = {"metric": "loss", "target": 0.1, "patience": 2}
    block = {"kind": "sft", "role": "critic", "data": "traces", "epochs": 1, "heldout": heldout,
             "gate": {"brier_below_constant": True}}  # fmt: skip
    figures = {"eval/critic_parse_rate": 0.9, "heldout/loss": 0.3}
    told = message(SftStage.model_validate({**block, "sources": phased}), figures)
    assert "epochs" not in told
    assert "stages.sft.gate.action=warn" in told
    assert "another learning rate (roles.critic.optimizer.lr)" in told
    told = message(SftStage.model_validate({**block, "sources": [{"share": 1}]}), figures)
    assert "stages.sft.epochs=2" in told
    assert "more passes over the traces (stages.sft.epochs) with a longer heldout.patience" in told


def test_missing_figures_fail_every_gate() -> None:
    """Evaluations drop what is NaN; that must not open a gate."""
    with pytest.raises(GateFailed) as caught:
        check_critic_gate(reinforce(), {})
    assert [word in str(caught.value) for word in ("Brier nan", "AUC nan", "prompt nan")] == [True] * 3
    with pytest.raises(GateFailed, match=r"parse rate nan is below 0\.98"):
        check_sft_gate(sft(), {})


def test_the_critics_parse_rate() -> None:
    with pytest.raises(GateFailed, match=r"parse rate 0\.979 is below 0\.98"):
        check_sft_gate(sft(), {"eval/critic_parse_rate": 0.979})
    check_sft_gate(sft(parse_rate=0.5), {"eval/critic_parse_rate": 0.5})


def test_warn_says_so_and_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        check_critic_gate(reinforce(action="warn"), {})
        check_sft_gate(sft(action="warn"), {"eval/critic_parse_rate": 0.1})
    assert len(caplog.records) == 2
    assert "stage pretrain: gate not reached: Brier nan" in caplog.text
    assert "parse rate 0.100" in caplog.text


def test_off_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        check_critic_gate(reinforce(action="off"), {})
        check_sft_gate(sft(action="off"), {})
    assert not caplog.records


def test_fallback_says_whether_it_is_reached_and_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert not check_critic_gate(reinforce(action="fallback"), {})
        assert check_critic_gate(reinforce(action="fallback"), GOOD)
    assert "stage pretrain: gate not reached: Brier nan" in caplog.text
    assert check_critic_gate(reinforce(), GOOD)


def test_a_critic_that_taught_itself_must_beat_a_constant() -> None:
    """One that says 9 or 10 of every state of a strong actor parses, and passed."""
    flat = {"eval/critic_parse_rate": 1.0, "eval/critic_brier": 0.07, "eval/critic_brier_constant": 0.056}
    check_sft_gate(sft(), flat)

    def taught(**more: Any) -> SftStage:
        block = {"kind": "sft", "role": "critic", "data": "traces", **more}
        return SftStage.model_validate(block)

    own = taught(teacher={"kind": "self"})
    told = message(own, flat)
    assert "Brier 0.0700 is not below the constant predictor's 0.0560" in told
    assert "stages.sft.gate.brier_below_constant=false" in told
    assert "stages.sft.teacher.judgements" in told
    check_sft_gate(own, flat | {"eval/critic_brier": 0.05})
    check_sft_gate(taught(teacher={"kind": "self"}, gate={"brier_below_constant": False}), flat)
    message(taught(gate={"brier_below_constant": True}), flat)
    message(taught(sources=[{"share": 0.5}, {"share": 0.5, "teacher": {"kind": "self"}}]), flat)
    check_sft_gate(taught(teacher={"kind": "self"}, sources=[{"share": 1, "teacher": {}}]), flat)


def test_the_brier_gate_can_be_left_out() -> None:
    check_critic_gate(reinforce(brier_below_constant=False), GOOD | {"eval/critic_brier": 0.9})
