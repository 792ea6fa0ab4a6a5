"""The estimate of --dry-run against the layout that training uses and models that transformers builds."""

from __future__ import annotations

from pathlib import Path

import pytest

from genac_megatron.models.families.base import Shape
from genac_megatron.models.sizes import parameters, stage_parameters
from genac_megatron.recipe.estimate import (
    Memory,
    activation_bytes,
    describe,
    memory_of,
    place_of,
    served_bytes,
)
from genac_megatron.recipe.loader import load_recipe
from genac_megatron.recipe.rules import read_shape
from genac_megatron.recipe.schema import (
    EngineConfig,
    LayoutConfig,
    ModelConfig,
    ModelShape,
    RoleConfig,
    TrainingConfig,
)

QWEN3_8B = ModelShape(
    layers=36,
    hidden=4096,
    ffn=12_288,
    heads=32,
    kv_heads=8,
    head_dim=128,
    vocab=151_936,
    tie_embeddings=False,
)

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


def model(family: str, sizes: ModelShape) -> Shape:
    return read_shape(ModelConfig(family=family, shape=sizes, tokenizer="builtin:tiny"))


def role(**layout: int) -> RoleConfig:
    model = ModelConfig(family="llama", shape=shape(vocab=500), tokenizer="builtin:tiny")
    return RoleConfig(model=model, layout=LayoutConfig(**layout))


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_parameters_are_those_of_the_model_that_transformers_builds(family: str, tied: bool):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        family, num_hidden_layers=3, hidden_size=32, intermediate_size=48, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, vocab_size=500, tie_word_embeddings=tied,
    )  # fmt: skip
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(config)
    head_dim = theirs.model.layers[0].self_attn.head_dim
    ours = model(family, shape(vocab=500, head_dim=head_dim, tie_embeddings=tied))
    assert parameters(ours) == sum(parameter.numel() for parameter in theirs.parameters())


def test_parameters_of_a_published_size():
    assert round(parameters(model("qwen3", QWEN3_8B)) / 1e9, 2) == 8.19


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


@pytest.mark.parametrize("tied", [True, False])
def test_shards_add_up_to_the_model_and_its_copies(tied: bool):
    sizes = {"layers": 4, "hidden": 64, "ffn": 128, "head_dim": 16, "vocab": 449}
    whole = model("qwen3", shape(**sizes, tie_embeddings=tied))
    total = sum(2 * stage_parameters(whole, 2, 4, stage) for stage in range(4))
    copied_norms = 4 * (2 * 64 + 2 * 16) + 64
    padding = 64 * (1 if tied else 2)  # 450 rows, so that two ranks hold as many
    copied_embedding = 64 * 450 if tied else 0  # the last stage keeps its own copy of a tied one
    assert total == parameters(whole) + copied_norms + padding + copied_embedding


def test_the_distributed_optimizer_divides_its_state_over_data_parallel_ranks():
    config, whole = role(tp=2), read_shape(role().model)
    first = place_of(config.layout, 0, 8)
    assert first is not None
    held = stage_parameters(whole, 2, 1, 0)
    one = memory_of(config, whole, first, 2)
    four = memory_of(config, whole, first, 8)
    assert four.optimizer == one.optimizer / 4
    assert four.weights == one.weights == held * 2
    assert one.optimizer == held * 12
    undivided = config.model_copy(update={"training": TrainingConfig(distributed_optimizer=False)})
    assert memory_of(undivided, whole, first, 8).optimizer == one.optimizer


def test_every_rank_of_the_world_holds_an_engine():
    config, whole = role(tp=2), read_shape(role().model)
    config = config.model_copy(update={"engine": EngineConfig(dtype="fp32", max_batch_tokens=10)})
    outside = memory_of(config, whole, None, 8)
    cache = 10 * 2 * 3 * 2 * 8  # tokens; keys and values; layers; kv_heads; head_dim
    assert outside == Memory(engine=4 * (parameters(whole) + cache))
    for rank in range(8):
        place = place_of(config.layout, rank, 8)
        assert place is not None
        inside = memory_of(config, whole, place, 8)
        assert inside.engine == outside.engine
        assert inside.total > outside.total


def test_activations_fall_with_recomputation_and_along_the_pipeline():
    config, whole = role(pp=3), read_shape(role().model)
    full = config.model_copy(update={"training": TrainingConfig(recompute="full", logprob_chunk=1)})
    plain = config.model_copy(update={"training": TrainingConfig(logprob_chunk=1)})
    assert activation_bytes(full, whole, 0) < activation_bytes(plain, whole, 0)
    assert (
        activation_bytes(plain, whole, 0)
        > activation_bytes(plain, whole, 1)
        > activation_bytes(plain, whole, 2)
    )


def test_a_recipe_is_described(tmp_path: Path):
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    text = describe(load_recipe(path))
    assert "actor      tp 1 cp 0 dp 0 pp 0" in text
    assert "critic     tp 0 cp 0 dp 0 pp 1" in text
    idle = text.split("  rank 3: ")[1].splitlines()[:3]  # rank 3 trains no role and generates with both
    assert [line.split(", engine ")[0].split() for line in idle[1:]] == [
        ["actor", "not", "trained", "here"],
        ["critic", "not", "trained", "here"],
    ]
    # 5 * 4 responses; 5 prompt states and 20 * 3 later ones; at most 20 * 2 of them trained
    assert "2 k actor tokens (20 responses) and 650 critic tokens (65 states)" in text
    assert "trains 400 critic tokens and 2 k actor tokens" in text


def test_a_large_world_is_described_by_its_first_and_heaviest_ranks(tmp_path: Path):
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    text = describe(load_recipe(path, ["world.ranks=512"]))
    assert "496 more ranks" in text
    assert len(text.splitlines()) < 100


# --- FP8 ----------------------------------------------------------------------------------------------

FP8_SHAPE = shape(layers=4, hidden=128, ffn=256, head_dim=32, vocab=500)
LAYER = 128 * 128 + 2 * 128 * 64 + 128 * 128 + 3 * 128 * 256  # queries, keys and values, output, feed-forward


def fp8_role(layout: dict[str, int] | None = None, **training: object) -> RoleConfig:
    model = ModelConfig(family="llama", shape=FP8_SHAPE, tokenizer="builtin:tiny")
    made = TrainingConfig.model_validate({"specs": "te"} | training)
    return RoleConfig(model=model, layout=LayoutConfig(**(layout or {})), training=made)


def weights(config: RoleConfig, rank: int = 0, world: int = 1) -> float:
    place = place_of(config.layout, rank, world)
    return memory_of(config, read_shape(config.model), place, world).weights


@pytest.mark.parametrize(
    ("fp8", "scales"), [("tensorwise", 0.0), ("delayed", 0.0), ("blockwise", 4 / 128**2), ("mxfp8", 1 / 32)]
)
def test_fp8_copies_of_the_weights_are_counted(fp8: str, scales: float):
    """Two copies of one byte a weight of a layer's matrices, beside the weights or in their place."""
    plain = weights(fp8_role())
    assert weights(fp8_role(fp8=fp8)) == pytest.approx(plain + 4 * LAYER * 2 * (1 + scales))
    frozen = weights(fp8_role(fp8=fp8, frozen=True))
    assert frozen == pytest.approx(plain + 4 * LAYER * (1 + scales)), "no backward pass"
    kept = weights(fp8_role(fp8=fp8, fp8_param=True))
    assert kept == pytest.approx(plain - 4 * LAYER * 2 + 4 * LAYER * 2 * (1 + scales))


def test_only_fp8_weights_change_with_fp8():
    """fp32 masters and moments are what they were; layers kept in BF16 have no FP8 copies."""
    one = fp8_role(fp8="tensorwise", fp8_param=True)
    two = fp8_role()
    sizes = read_shape(one.model)
    for part in ("gradients", "optimizer", "activations", "engine"):
        place = place_of(one.layout, 0, 1)
        assert getattr(memory_of(one, sizes, place, 1), part) == getattr(
            memory_of(two, sizes, place, 1), part
        )
    some = weights(fp8_role(fp8="tensorwise", bf16_first_layers=1, bf16_last_layers=2))
    assert some == weights(two) + LAYER * 2


def test_fp8_weights_of_a_rank_are_those_of_its_layers_and_cuts():
    layout = {"tp": 2, "pp": 2}
    plain = [weights(fp8_role(layout), rank, 4) for rank in range(4)]
    fp8 = [weights(fp8_role(layout, fp8="tensorwise", bf16_first_layers=1), rank, 4) for rank in range(4)]
    assert [a - b for a, b in zip(fp8, plain, strict=True)] == [LAYER, LAYER, 2 * LAYER, 2 * LAYER]


def test_an_experts_model_counts_those_that_a_rank_holds():
    sizes = shape(
        layers=2, hidden=128, ffn=256, head_dim=32, vocab=500, experts=4, experts_per_token=2, expert_ffn=64,
        norm_topk=True,
    )  # fmt: skip
    model = ModelConfig(family="qwen3_moe", shape=sizes, tokenizer="builtin:tiny")
    attention, expert = 128 * 128 * 2 + 2 * 128 * 64, 3 * 128 * 64
    for ep, each in ((1, 4), (2, 2)):
        made = [
            RoleConfig(
                model=model,
                layout=LayoutConfig(ep=ep),
                training=TrainingConfig.model_validate({"fp8": fp8, "specs": "te"}),
            )
            for fp8 in ("off", "tensorwise")
        ]
        plain, fp8 = (weights(config, 0, 2) for config in made)
        assert fp8 - plain == 2 * 2 * (attention + each * expert)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_served_weights_are_what_a_publication_sends(dtype: str):
    from genac_megatron.publication.plan import make_plan
    from genac_megatron.training.layout import Layout

    width = {"bf16": 2, "fp32": 4}[dtype]
    for quantization in ("off", "fp8"):
        config = fp8_role().model_copy(
            update={"engine": EngineConfig(kind="sglang", dtype=dtype, quantization=quantization)}
        )
        sizes = read_shape(config.model)
        plan = make_plan(sizes, Layout("actor", 0, 1), width, fp8=quantization == "fp8")
        assert served_bytes(config, sizes) == sum(bucket.nbytes(width) for bucket in plan)


def test_the_dry_run_says_what_servers_hold(tmp_path: Path):
    path = tmp_path / "recipe.yaml"
    larger = RECIPE.replace("hidden: 64, ffn: 128", "hidden: 512, ffn: 1024")
    path.write_text(larger.replace("family: llama", "family: qwen3"))
    engine = "roles.actor.engine={kind: sglang, engines: 2, quantization: %s}"
    said = [describe(load_recipe(path, [engine % word])) for word in ("off", "fp8")]
    plain, fp8 = (next(line for line in text.splitlines() if "SGLang servers" in line) for text in said)
    assert "2 SGLang servers of 1 rank, quantization off" in plain
    assert plain.endswith("at most 64 requests of 65,536 tokens at a time"), "of a CPU's server"
    for given, limits in (
        ([], "requests as its memory holds"),
        (["roles.actor.engine.max_batch=7"], "at most 7 requests at a time"),
        (["roles.actor.engine.max_batch_tokens=4096"], "at most 4,096 tokens at a time"),
    ):
        text = describe(load_recipe(path, [engine % "off", "cluster.gpu=h100-80g", *given]))
        assert next(line for line in text.splitlines() if "SGLang servers" in line).endswith(limits)
    megabytes = [float(line.split("weights ")[1].split(" MiB")[0]) for line in (plain, fp8)]
    assert megabytes[1] < 0.52 * megabytes[0]
