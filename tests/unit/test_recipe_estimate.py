"""The estimate of --dry-run against the layout that training uses and models that transformers builds."""

from __future__ import annotations

from pathlib import Path

import pytest

from genac_megatron.recipe.estimate import activation_bytes, describe, memory_of, parameters_on, place_of
from genac_megatron.recipe.loader import load_recipe
from genac_megatron.recipe.schema import LayoutConfig, ModelConfig, ModelShape, RoleConfig, TrainingConfig
from genac_megatron.recipe.shapes import Sizes, read_sizes

QWEN3_8B = Sizes("qwen3", 36, 4096, 12288, 32, 8, 128, 151_936, False)

RECIPE = """\
name: tiny
world: {ranks: 4}
roles:
  actor:
    model: &model
      family: llama
      tokenizer: builtin:tiny
      shape: {layers: 4, hidden: 64, ffn: 128, heads: 4, kv_heads: 2}
    layout: {count: 2, tp: 2}
  critic:
    model: *model
    layout: {first_rank: 1, count: 2, pp: 2}
task: {kind: state_tracking}
judging: {max_new_tokens: 10, states: {max_states: 4}}
stages:
  - kind: ppo
    steps: 3
    train_states: 2
    rollout: {prompts: 5, samples: 4, max_new_tokens: 100}
"""


def shape(**changes: object) -> ModelShape:
    return ModelShape(**({"layers": 3, "hidden": 32, "ffn": 48, "heads": 4, "kv_heads": 2} | changes))


def role(**layout: int) -> RoleConfig:
    model = ModelConfig(family="llama", shape=shape(vocab=100), tokenizer="builtin:tiny")
    return RoleConfig(model=model, layout=LayoutConfig(**layout))


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_parameters_are_those_of_the_model_that_transformers_builds(family: str, tied: bool):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        family, num_hidden_layers=3, hidden_size=32, intermediate_size=48, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, vocab_size=100, tie_word_embeddings=tied,
    )  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    head_dim = model.model.layers[0].self_attn.head_dim
    sizes = read_sizes(
        ModelConfig(
            family=family,
            shape=shape(vocab=100, head_dim=head_dim, tie_embeddings=tied),
            tokenizer="builtin:tiny",
        )
    )
    assert sizes.parameters == sum(parameter.numel() for parameter in model.parameters())


def test_parameters_of_a_published_size():
    assert round(QWEN3_8B.parameters / 1e9, 2) == 8.19


@pytest.mark.parametrize(
    "layout",
    [
        LayoutConfig(first_rank=3, count=16, tp=2, pp=2, cp=2),
        LayoutConfig(tp=4, pp=2),
        LayoutConfig(count=6, pp=3),
    ],
)
def test_places_are_those_of_the_layout_that_training_uses(layout: LayoutConfig):
    from genac_megatron.training.layout import Layout

    world = 24
    real = Layout.from_config("actor", layout, world)
    for rank in range(world):
        place = place_of(layout, rank, world)
        assert (place is not None) == real.contains(rank)
        if place is not None:
            assert place._asdict() == real.coords(rank)._asdict()
            assert place.leads == (rank in real.leaders)


@pytest.mark.parametrize("tied", [True, False])
def test_shards_add_up_to_the_model_and_its_copies(tied: bool):
    sizes = Sizes("qwen3", 4, 64, 128, 4, 2, 16, 320, tied)
    layout = LayoutConfig(tp=2, pp=4)
    total = sum(layout.tp * parameters_on(sizes, layout, pp) for pp in range(layout.pp))
    copied_norms = sizes.layers * sizes.layer_replicated + sizes.hidden
    copied_embedding = sizes.embedding if tied else 0  # the last stage keeps its own copy of a tied one
    assert total == sizes.parameters + copied_norms + copied_embedding


def test_the_distributed_optimizer_divides_its_state_over_data_parallel_ranks():
    config, sizes = role(tp=2), read_sizes(role().model)
    first = place_of(config.layout, 0, 8)
    assert first is not None
    one = memory_of(config, sizes, first, 2)
    four = memory_of(config, sizes, first, 8)
    assert four.optimizer == one.optimizer / 4
    assert four.weights == one.weights == parameters_on(sizes, config.layout, 0) * 2
    assert one.optimizer == parameters_on(sizes, config.layout, 0) * 12
    whole = config.model_copy(update={"training": TrainingConfig(distributed_optimizer=False)})
    assert memory_of(whole, sizes, first, 8).optimizer == one.optimizer


def test_only_leaders_hold_an_engine():
    config, sizes = role(tp=2, pp=2), read_sizes(role().model)
    held = [
        memory_of(config, sizes, place, 8).engine
        for place in (place_of(config.layout, r, 8) for r in range(8))
        if place
    ]
    assert [bool(engine) for engine in held] == [True, False, True, False, False, False, False, False]


def test_activations_fall_with_recomputation_and_along_the_pipeline():
    config, sizes = role(pp=3), read_sizes(role().model)
    full = config.model_copy(update={"training": TrainingConfig(recompute="full", logprob_chunk=1)})
    plain = config.model_copy(update={"training": TrainingConfig(logprob_chunk=1)})
    assert activation_bytes(full, sizes, 0) < activation_bytes(plain, sizes, 0)
    assert (
        activation_bytes(plain, sizes, 0)
        > activation_bytes(plain, sizes, 1)
        > activation_bytes(plain, sizes, 2)
    )


def test_a_recipe_is_described(tmp_path: Path):
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    text = describe(load_recipe(path))
    assert "actor      tp 1 cp 0 dp 0 pp 0" in text
    assert "critic     tp 0 cp 0 dp 0 pp 1" in text
    assert "idle" in text  # rank 3 has no role
    # 5 * 4 responses; 5 prompt states and 20 * 3 later ones; at most 20 * 2 of them trained
    assert "2 k actor tokens (20 responses) and 650 critic tokens (65 states)" in text
    assert "trains 400 critic tokens and 2 k actor tokens" in text


def test_a_large_world_is_described_by_its_first_and_heaviest_ranks(tmp_path: Path):
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    text = describe(load_recipe(path, ["world.ranks=512"]))
    assert "496 more ranks" in text
    assert len(text.splitlines()) < 100
