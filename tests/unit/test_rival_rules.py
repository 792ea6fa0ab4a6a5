"""Recipes of the algorithms without a generative critic: what goes together, and what is refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from genac_megatron.errors import InputError
from genac_megatron.models.registry import hf_config, shape_from_hf
from genac_megatron.recipe.estimate import describe
from genac_megatron.recipe.loader import load_recipe
from genac_megatron.recipe.rules import read_shape
from genac_megatron.recipe.schema import ModelConfig

BASELINES = Path(__file__).resolve().parents[2] / "recipes" / "baselines"
RECIPE = """\
name: tiny
roles:
  actor:
    model:
      family: qwen3
      tokenizer: builtin:tiny
      shape: &shape {layers: 2, hidden: 64, ffn: 128, heads: 4, kv_heads: 2}
  critic:
    model: {family: qwen3, tokenizer: "builtin:tiny", shape: *shape, head: value}
task: {kind: state_tracking}
stages:
  - {kind: policy, name: policy, algorithm: {kind: vc_ppo}, rollout: {prompts: 16, samples: 1}}
"""
FROZEN = "roles.critic.training.frozen_attention=true"
LOGIT = "roles.critic.model.head=logit"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


def algorithm(words: str) -> str:
    return f"stages.0.algorithm={words}"


@pytest.mark.parametrize("file", sorted(BASELINES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_baselines_recipe_loads_and_is_described(file: Path) -> None:
    assert "rank" in describe(load_recipe(file))


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        [algorithm("{kind: reinforce_pp}")],
        [algorithm("{kind: ppo}")],
        [algorithm("{kind: sao}"), FROZEN],
        [algorithm("{kind: sao, frozen_attention: false}")],
        [algorithm("{kind: pact}"), LOGIT],
        [algorithm("{kind: pact, loss: {band: [0.7, 6]}, value: {lam_actor: 0}}"), LOGIT],
        [algorithm("{kind: vc_ppo, value: {clip: null}}"), LOGIT],
        [algorithm("{kind: sp3o, value: {target: exact, at_cuts: true}}")],
        [algorithm("{kind: vapo, value: {target: monte_carlo, continuations: 4}}")],
        ["stages.0.overlong_filter=true"],
        [algorithm("{kind: grpo}"), "stages.0.rollout.samples=2", "stages.0.overlong_filter=true"],
        [algorithm("{kind: ppo, value: {by_spread: true, minibatches: 4}}"), "stages.0.rollout.samples=2"],
        ["stages.0={kind: value, start_from: actor, value: {target: exact}}"],
    ],
    ids=lambda overrides: " ".join(overrides) or "vc_ppo",
)
def test_what_goes_together_loads(path: Path, overrides: list[str]) -> None:
    """With one response per prompt, where no group is needed."""
    load_recipe(path, overrides)


@pytest.mark.parametrize("kind", ["grpo", "dr_grpo", "dapo", "rloo", "reinforce_pp"])
def test_a_group_of_one_is_refused_with_a_reason_and_ways_out(path: Path, kind: str) -> None:
    words = "{kind: reinforce_pp, baseline: true}" if kind == "reinforce_pp" else f"{{kind: {kind}}}"
    with pytest.raises(InputError) as caught:
        load_recipe(path, [algorithm(words)])
    said = str(caught.value)
    assert f"{kind}{' with baseline' if kind == 'reinforce_pp' else ''} compares the responses" in said
    assert "every advantage would be 0" in said
    for other in ("reinforce_pp without baseline", "vc_ppo", "sao", "pact", "4 or more"):
        assert other in said
    assert caught.value.where.startswith(str(path))


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ([algorithm("{kind: sao}")], "sao has frozen_attention true, and the role 'critic' false"),
        ([algorithm("{kind: sao, frozen_attention: false}"), FROZEN], "false, and the role 'critic' true"),
        ([algorithm("{kind: pact}")], "set roles.critic.model.head: logit"),
        ([LOGIT], "clip 0.5 is of a squared error"),
        (["stages.0={kind: value}", LOGIT], "clip 0.5 is of a squared error"),
        ([algorithm("{kind: pact, value: {lam_critic: 0.9}}"), LOGIT], "importance_limit weights outcomes"),
        ([algorithm("{kind: pact, value: {target: exact}}"), LOGIT], "and the critic is taught exact values"),
        (["task={kind: reasoning_gym, name: chain_sum}", algorithm("{kind: vc_ppo, value: {target: exact}}")],
         "the stage 'policy' is to teach exact values, and the task 'reasoning_gym' has no exact teacher"),
        (["task={kind: reasoning_gym, name: chain_sum}",
          "stages.0={kind: value, name: pre, value: {target: exact}}"], "the stage 'pre' is to teach exact"),
        ([algorithm("{kind: vc_ppo, value: {target: exact, lam_critic: 0.9}}")],
         "lam_critic 0.9 is of targets made of outcomes, and these are exact"),
        ([algorithm("{kind: vc_ppo, value: {target: monte_carlo}}"), "stages.0.overlap=true",
          "roles.actor.engine.kind=sglang"], "while the next batch is generated"),
        ([algorithm("{kind: vc_ppo, value: {by_spread: true}}")], "by_spread compares the returns"),
        ([algorithm("{kind: sao, loss: {band: [1.2, 6]}}"), FROZEN], "below 1 and its second above"),
        ([algorithm("{kind: vc_ppo, value: {target: truth}}")], "one of outcome, exact, monte_carlo"),
        ([algorithm("{kind: grpo, value: {target: exact}}"), "stages.0.rollout.samples=4"], "unknown key"),
        (["stages.0={kind: reinforce}", LOGIT], "needs a language model as its critic"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused(path: Path, overrides: list[str], said: str) -> None:
    with pytest.raises(InputError) as caught:
        load_recipe(path, overrides)
    assert said in str(caught.value)


def test_a_critic_of_log_odds_is_known_by_its_folder() -> None:
    """What it gives is no value: who takes it for one is wrong without a word."""
    shape = {"layers": 2, "hidden": 64, "ffn": 128, "heads": 4, "kv_heads": 2}
    model = {"family": "qwen3", "tokenizer": "builtin:tiny", "shape": shape}
    lm, value, logit = (
        read_shape(ModelConfig.model_validate({**model, "head": head})) for head in ("lm", "value", "logit")
    )
    assert shape_from_hf(hf_config(value)) == value
    assert shape_from_hf(hf_config(logit)) == logit
    assert (value.logit, logit.logit, logit.value, logit.tie) == (False, True, True, False)
    assert value.may_start_from(lm)
    assert logit.may_start_from(lm)
    assert logit.may_start_from(logit)
    assert not logit.may_start_from(value)
    assert not value.may_start_from(logit)
    assert not lm.may_start_from(logit)


def test_a_folder_with_the_other_head_is_refused(tmp_path: Path) -> None:
    import json

    shape = {"layers": 2, "hidden": 64, "ffn": 128, "heads": 4, "kv_heads": 2}
    model = {"family": "qwen3", "tokenizer": "builtin:tiny", "shape": shape, "head": "logit"}
    folder = tmp_path / "critic"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(hf_config(read_shape(ModelConfig.model_validate(model)))))
    given = {"hf": str(folder), "tokenizer": "builtin:tiny"}
    assert read_shape(ModelConfig.model_validate({**given, "head": "logit"})).logit
    for head in ("value", "lm"):
        with pytest.raises(InputError, match="set head: logit"):
            read_shape(ModelConfig.model_validate({**given, "head": head}))
