"""Adapters on one rank: what trains, what it takes, what is published; tests/distributed has the layouts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from genac_megatron.errors import InputError
from genac_megatron.models.mapping import random_weights
from genac_megatron.models.registry import shape_of
from genac_megatron.models.sizes import adapter_parameters, hf_names
from genac_megatron.publication.digest import know_base, weights_digest
from genac_megatron.recipe.estimate import Place, describe, memory_of
from genac_megatron.recipe.loader import check, dump_recipe, load_recipe
from genac_megatron.recipe.schema import AdapterConfig, ModelConfig
from genac_megatron.recipe.trains import trains
from genac_megatron.records import Sample
from genac_megatron.training.checkpoint import Checkpoints, load_checkpoint
from genac_megatron.training.layout import init_world
from tests.distributed.cases import make_samples, published, train
from tests.distributed.test_adapter_layouts import ADAPTER, SOME, adapted, adapter_role
from tests.distributed.test_value import train_values


def begun(adapter: Any = None, **training: Any) -> Any:
    init_world()
    role = adapter_role(adapted({"count": 1}, adapter, training=training))
    role.begin_stage(None, 10)
    return role


def test_an_adapter_begins_as_its_base() -> None:
    """B is 0; A is drawn by projection and seed, within +-1 / sqrt(its columns)."""
    from tests.distributed.cases import make_role

    init_world()
    role, base = (make_role("actor", adapted({"count": 1}), 1), make_role("actor", role_alone(), 1))
    assert role.logprobs(make_samples(5, 7)) == base.logprobs(make_samples(5, 7))
    (adapters,) = (model.adapters for model in role.models)
    assert [part.place.key for part in adapters.parts[:4]] == [
        *("0_linear_qkv", "0_linear_proj", "0_linear_fc1", "0_linear_fc2")
    ]
    for part in adapters.parts:
        assert all(not b.any() for b in part.B)
        bound = part.A.size(1) ** -0.5
        assert 0.8 * bound < part.A.abs().max() <= bound
        assert len({tuple(a.flatten().tolist()) for a in part.A.split(4)}) == len(part.B)


def role_alone(**overrides: Any) -> Any:
    from tests.distributed.cases import role_config

    return role_config(layout={"count": 1}, **overrides)


@pytest.mark.parametrize("adapter", [ADAPTER, SOME], ids=["all", "some"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_adapters_alone_have_gradients_masters_and_moments(adapter: Any, dtype: str) -> None:
    role = begun(adapter, dtype=dtype)
    (model,) = role.models
    trains = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trains == {name for name, _ in model.named_parameters() if name.startswith("adapters.")}
    count = sum(parameter.numel() for parameter in model.adapters.parameters())
    assert count == adapter_parameters(role.shape, AdapterConfig(**adapter), 1, role.shape.layers)
    held = sum(p.numel() for part in role.optimizer.param_groups for p in part["params"])
    buffers = sum(buffer.grad_data.numel() for buffer in role._buffers())
    for found in (held, buffers):
        assert count <= found < count + 1024 * len(trains)  # padded
    estimate = memory_of(role.config, role.shape, Place(0, 0, 0, 0), 1)
    moments = 8 if dtype == "fp32" else 12
    assert (estimate.gradients, estimate.optimizer) == (4 * count, moments * count)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    assert estimate.weights == weights


def test_what_is_published_is_merged_from_its_base() -> None:
    """W + alpha / rank B A, projection by projection, by PEFT's names for their parts."""
    role = begun(SOME)
    train(role, 2)
    get = random_weights(role.shape, 3)
    found = published(role)
    wanted = {name: get(name) for name in hf_names(role.shape)}
    (model,) = role.models
    for part in model.adapters.parts:
        for a, b, name in zip(part.A.split(part.rank), part.B, part.place.projections, strict=True):
            wanted[f"{name}.weight"] = wanted[f"{name}.weight"] + 2.0 * b.detach() @ a.detach()
    assert found.keys() == wanted.keys()
    for name, weight in wanted.items():
        torch.testing.assert_close(found[name], weight, atol=1e-6, rtol=0, msg=name)
    base = role.base
    know_base(role)
    assert role.base == base != weights_digest(role)


def test_a_merged_model_gives_the_same_logprobs() -> None:
    """bf16 too: there merged weights have bf16's rounding, which the sum of both products has not."""
    from genac_megatron.publication.publisher import Publisher, RoleSink
    from tests.distributed.cases import make_role

    for dtype, close in (("fp32", 2e-6), ("bf16", 0.1)):
        role = begun(dtype=dtype)
        train(role, 2)
        merged = make_role("merged", role_alone(training={"dtype": dtype}), 1, seed=8)
        Publisher(role, [RoleSink(merged)]).publish(1)
        pairs = zip(role.logprobs(make_samples(5, 7)), merged.logprobs(make_samples(5, 7)), strict=True)
        for mine, theirs in pairs:
            assert mine == pytest.approx(theirs, abs=close)


@pytest.mark.parametrize("distributed", [True, False])
def test_a_rested_and_a_resumed_adapter_go_on_as_they_would(tmp_path: Path, distributed: bool) -> None:
    role = begun(distributed_optimizer=distributed)
    train(role, 2)
    Checkpoints(tmp_path, 2, False).save("ppo-00002", {"actor": role}, {})
    role.rest()
    role.wake()
    whole, ended = train(role, 2, 2), published(role)
    again = begun(distributed_optimizer=distributed)
    load_checkpoint(tmp_path / "ppo-00002", {"actor": again})
    load_checkpoint(tmp_path / "ppo-00002", {"actor": again}, optimizers=True)
    assert train(again, 2, 2) == whole
    found = published(again)
    assert all(torch.equal(found[name], weight) for name, weight in ended.items())


def test_a_base_may_be_another_roles_of_a_checkpoint(tmp_path: Path) -> None:
    from genac_megatron.training.checkpoint import load_base
    from tests.distributed.cases import make_role

    init_world()
    whole = make_role("actor", role_alone(), 1, seed=9)
    Checkpoints(tmp_path, 2, False).save("sft-00001", {"actor": whole}, {}, optimizers=False)
    critic = make_role("critic", adapted({"count": 1}), 1)
    load_base(tmp_path / "sft-00001", critic, "actor")
    wanted = published(whole)
    assert all(torch.equal(weight, wanted[name]) for name, weight in published(critic).items())


def test_a_scalar_head_trains_beside_adapters(tmp_path: Path) -> None:
    """No base has one: it is in the checkpoint, as PEFT's modules_to_save are."""
    init_world()
    config = adapted({"count": 1})
    model = config.model.model_copy(update={"head": "value"})
    made = [adapter_role(config.model_copy(update={"model": model})) for _ in range(2)]
    for role in made:
        role.begin_stage(None, 10)
    role, again = made
    (bare,) = role.models
    trains = {name.partition(".")[0] for name, p in bare.named_parameters() if p.requires_grad}
    assert trains == {"adapters", "output_layer"}
    losses = [train_values(role, 1)[0][0] for _ in range(6)]  # of one batch
    assert losses[-1] < losses[0]
    Checkpoints(tmp_path, 2, False).save("value-00003", {"actor": role}, {})
    load_checkpoint(tmp_path / "value-00003", {"actor": again})
    load_checkpoint(tmp_path / "value-00003", {"actor": again}, optimizers=True)
    assert train_values(again, 1, 3) == train_values(role, 1, 3)


# --- dropout -------------------------------------------------------------------------------------

DROPPING = {**ADAPTER, "dropout": 0.25}


def test_a_share_of_an_adapters_inputs_is_dropped_anew_in_every_step() -> None:
    """By token, feature and step; the base's log-probs, and those that are only read, drop nothing."""
    from genac_megatron.models.dropout import Dropout, prefixes_of, token_keys

    tokens, positions = torch.randint(0, 67, (400,)), torch.arange(200).repeat(2)
    bounds = torch.tensor([0, 200, 400])
    prefixes, kept = prefixes_of(tokens, positions, bounds, None), []
    for step in (0, 1):
        drop = Dropout(0.25, "0_linear_qkv", 0, (0, 1))
        drop.keys_T = token_keys(prefixes, step)
        kept.append(drop(torch.ones(400, 1, 256))[:, 0])
        assert kept[-1].unique().tolist() == [0.0, pytest.approx(4 / 3)]
        shares = (kept[-1] == 0).float()
        assert shares.mean() == pytest.approx(0.25, abs=0.005)
        assert shares.mean(0).sub(0.25).abs().max() < 0.1  # of every feature
        assert shares.mean(1).sub(0.25).abs().max() < 0.13  # of every token
    assert ((kept[0] == 0) & (kept[1] == 0)).float().mean() == pytest.approx(0.0625, abs=0.005)
    other = Dropout(0.25, "0_linear_fc1", 0, (0, 1))
    other.keys_T = token_keys(prefixes, 0)
    both = (kept[0] == 0) & (other(torch.ones(400, 1, 256))[:, 0] == 0)
    assert both.float().mean() == pytest.approx(0.0625, abs=0.005)


def test_dropout_is_of_training_alone() -> None:
    dropping, plain = begun(DROPPING), begun()
    assert dropping.logprobs(make_samples(5, 7)) == plain.logprobs(make_samples(5, 7))
    assert train(dropping, 1) != train(plain, 1)


def test_a_beginning_that_samples_share_is_dropped_alike_once_and_apart() -> None:
    """So trees change no result; and another step drops others."""
    from genac_megatron.algorithms.losses import make_sft_loss

    first = list(range(30, 54))
    samples = [Sample([*first, *range(n, n + 6)], 24, {"weights": [1 / 36] * 6}) for n in range(6)]
    figures = []
    for share in (True, False):
        role = begun(DROPPING, share_prefixes=share)
        results = [role.train_step(samples, make_sft_loss()) for _ in range(2)]
        figures.append([(r.stats["loss"], r.stats["grad_norm"], r.stats["computed_tokens"]) for r in results])
    trees, flat = figures
    for (loss, norm, tokens), (loss_ref, norm_ref, all_tokens) in zip(trees, flat, strict=True):
        assert loss == pytest.approx(loss_ref, abs=2e-6)
        assert norm == pytest.approx(norm_ref, rel=1e-5)
        assert tokens < all_tokens


# --- PEFT's folders ------------------------------------------------------------------------------


def peft_folder(folder: Path, role: Any, spell: Any = lambda name: name, **config: Any) -> dict[str, Any]:
    """What a role has trained as PEFT would save it, under names as `spell` has them; the tensors."""
    from safetensors.torch import save_file

    folder.mkdir()
    tensors: dict[str, torch.Tensor] = {}
    for part in (part for model in role.models for part in model.adapters.parts):
        for a, b, name in zip(part.A.split(part.rank), part.B, part.place.projections, strict=True):
            tensors[spell(f"base_model.model.{name}.lora_A.weight")] = a.detach().clone()
            tensors[spell(f"base_model.model.{name}.lora_B.weight")] = b.detach().clone()
    save_file(tensors, folder / "adapter_model.safetensors")
    adapter = role.config.training.adapter
    plain = {
        "peft_type": "LORA",
        "r": adapter.rank,
        "lora_alpha": adapter.alpha,
        "target_modules": "all-linear",
    }
    (folder / "adapter_config.json").write_text(json.dumps({**plain, **config}))
    return tensors


@pytest.mark.parametrize(
    "spell",
    [
        lambda name: name,
        lambda name: name.replace(".weight", ".default.weight"),
        lambda name: name.removeprefix("base_model.model."),
        lambda name: name.replace("base_model.model.model.", "base_model.model."),
    ],
    ids=["peft", "state", "bare", "headless"],
)
def test_an_adapter_begins_with_a_peft_folder(tmp_path: Path, spell: Any) -> None:
    from genac_megatron.training.loading import load_peft

    trained = begun(SOME)
    train(trained, 2)
    peft_folder(tmp_path / "peft", trained, spell)
    role = begun(SOME)
    load_peft(tmp_path / "peft", role)
    found, wanted = published(role), published(trained)
    assert all(torch.equal(found[name], weight) for name, weight in wanted.items())
    assert role.serial == 1


def test_a_recipe_begins_with_a_peft_folder_of_its_adapter(recipe: Path, tmp_path: Path) -> None:
    """Of the same rank, alpha and projections, which the message says."""
    folder = tmp_path / "peft"
    role = begun(SOME)
    given = [
        f"roles.actor.model.peft={folder}",
        "roles.actor.model.shape={layers: 4, hidden: 32, ffn: 64, heads: 4, kv_heads: 2, head_dim: 8}",
    ]
    words = "roles.actor.training.adapter={rank: 4, alpha: 8, targets: [v_proj, o_proj, up_proj]}"
    tensors = peft_folder(folder, role)
    load_recipe(recipe, [*given, words])
    rs = "roles.actor.training.adapter={rank: 4, alpha: 16, targets: [v_proj, o_proj, up_proj]}"
    (folder / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8, "use_rslora": True})
    )
    load_recipe(recipe, [*given, rs])
    assert "base_model.model.model.layers.3.mlp.up_proj.lora_A.weight" in tensors
    for overrides, told in (
        (given, "set adapter: {rank: 4, alpha: 16, targets: [v_proj, o_proj, up_proj]}"),
        ([given[0], rs], "expected (4, 64)"),
        ([*given, rs, "roles.actor.model.checkpoint=runs/x"], "a checkpoint and a PEFT folder"),
        ([*given, "roles.actor.training.adapter=null"], "names an adapter's folder"),
        ([given[1], rs, "roles.actor.model.peft=nowhere"], "nowhere"),
    ):
        with pytest.raises(InputError) as raised:
            load_recipe(recipe, overrides)
        assert told in str(raised.value)


@pytest.mark.parametrize(
    ("config", "spell", "words"),
    [
        ({"use_dora": True}, None, "use_dora is True"),
        ({"modules_to_save": ["lm_head"]}, None, "modules_to_save is ['lm_head']"),
        ({"rank_pattern": {"q_proj": 8}}, None, "rank_pattern"),
        ({"peft_type": "IA3"}, None, "peft_type is 'IA3'"),
        ({}, ".lora_A.weight .lora_magnitude_vector.weight", "is no projection's lora_A or lora_B"),
        ({}, "layers.3. layers.9.", "model.layers.3.self_attn.v_proj.lora_A is missing"),
    ],
    ids=["dora", "saved", "pattern", "kind", "tensor", "layer"],
)
def test_a_peft_folder_of_another_kind_is_refused_by_name(
    tmp_path: Path, config: Any, spell: str | None, words: str
) -> None:
    from genac_megatron.models.peft_folder import PeftHeaders

    role = begun(SOME)
    change = (lambda name: name) if spell is None else (lambda name: name.replace(*spell.split()))
    peft_folder(tmp_path / "peft", role, change, **config)
    with pytest.raises(InputError) as raised:
        PeftHeaders(tmp_path / "peft").check(role.shape)
    assert words in str(raised.value)


# --- rules ---------------------------------------------------------------------------------------

RECIPE = """\
name: tiny
roles:
  actor: &role
    model:
      family: qwen3
      tokenizer: builtin:tiny
      shape: {layers: 4, hidden: 64, ffn: 128, heads: 4, kv_heads: 2}
    training: {adapter: {rank: 8}}
  critic: *role
task: {kind: state_tracking}
stages:
  - {kind: sft, name: demos, role: actor, data: demonstrations}
  - {kind: sft, name: traces, role: critic, data: traces}
  - {kind: reinforce}
  - {kind: ppo}
"""
EXPERTS = (
    "{layers: 2, hidden: 64, ffn: 128, heads: 4, kv_heads: 2, "
    "experts: 4, experts_per_token: 2, norm_topk: true"
)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


def test_a_recipe_of_two_adapters(recipe: Path) -> None:
    found = load_recipe(recipe)
    check(found)
    adapter = found.roles["critic"].training.adapter
    assert adapter is not None
    assert (adapter.rank, adapter.alpha, adapter.scale, len(adapter.targets)) == (8, 32.0, 4.0, 7)
    assert "adapters of rank 8 on 7 projections: 32.8 k parameters train (" in describe(found)
    check(load_recipe(recipe, ["roles.critic.model.base=runs/before", "roles.actor.training.adapter=null"]))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ["roles.actor.model.family=qwen3_moe", f"roles.actor.model.shape={EXPERTS}, expert_ffn: 32}}"],
            ("a mixture of 4 experts", "take adapter out"),
        ),
        (["roles.critic.model.base_role=actor"], ("no base in which it is one", "take base_role out")),
        (["roles.critic.training.frozen=true"], ("is frozen and has an adapter", "training.frozen")),
        (["roles.critic.training.frozen_attention=true"], ("the whole model is frozen", "frozen_attention")),
        (["roles.actor.training.adapter.targets=[q_proj, q_proj]"], ("names q_proj twice", "targets")),
        (["roles.actor.training.adapter.dropout=1.0"], ("less than 1", "dropout")),
        (["stages.1.start_from=actor"], ("'critic' is an adapter", "roles.critic.model (hf or base)")),
        (
            ["roles.actor.training.adapter=null", "roles.actor.model.base=runs/x"],
            ("names a base, which is an adapter's", "call it checkpoint"),
        ),
        (["roles.actor.training.adapter.targets=[]"], ("at least 1 entry", "targets")),
        (["roles.actor.training.adapter.targets=[lm_head]"], ("q_proj", "targets")),
        (["roles.actor.training.adapter.rank=0"], ("at least 1", "rank")),
        (["roles.actor.training.adapter.alpha=0"], ("more than 0", "alpha")),
    ],
    ids=[
        "experts",
        "base role",
        "frozen",
        "attention",
        "twice",
        "dropout",
        "from",
        "base",
        "none",
        "head",
        "rank",
        "alpha",
    ],
)
def test_what_an_adapter_cannot_go_beside(recipe: Path, overrides: list[str], words: Any) -> None:
    with pytest.raises(InputError) as raised:
        check(load_recipe(recipe, overrides))
    assert all(word in str(raised.value) for word in words), str(raised.value)


SHARED = [
    "roles.critic.model={share: actor}",
    "roles.critic.training={adapter: {rank: 4}}",
    "stages.1.rollout.max_new_tokens=64",
]


def test_a_recipe_of_two_roles_on_one_base(recipe: Path, tmp_path: Path) -> None:
    """The critic has the actor's model and layout; the report says who trains what; memory counts it once."""
    found = load_recipe(recipe, [*SHARED, "world.ranks=4", "roles.actor.layout={tp: 2, count: 2}"])
    actor, critic = found.roles["actor"], found.roles["critic"]
    assert critic.model.model_copy(update={"share": None}) == actor.model
    assert (critic.layout, critic.training.adapter.rank) == (actor.layout, 4)  # type: ignore[union-attr]
    again = tmp_path / "resolved.yaml"
    again.write_text(dump_recipe(found))
    assert load_recipe(again) == found
    shape = shape_of(actor.model, 67)
    adapters = 2 * adapter_parameters(shape, critic.training.adapter, 2, shape.layers)  # type: ignore[arg-type]
    assert memory_of(critic, shape, Place(0, 0, 0, 0), 4, shared=True).weights == adapters
    text = describe(found)
    assert "16.4 k parameters train" in text
    assert "on the frozen model of 'actor', held once" in text


def test_status_and_report_say_what_trains(recipe: Path, tmp_path: Path) -> None:
    """Also where the model's folder is not here, and of a recipe that has roles of another version."""
    plain = yaml.safe_load(dump_recipe(load_recipe(recipe, SHARED)))
    plain["roles"]["old"] = {"model": {"unknown": 1}}
    plain["roles"]["teacher"] = {"model": {"hf": str(tmp_path / "nowhere")}}
    shared = "adapters of rank 4 on 7 projections: 16.4 k parameters train (9.6 % of its 171 k), "
    assert trains(plain) == {
        "actor": "adapters of rank 8 on 7 projections: 32.8 k parameters train (19 % of its 171 k), "
        "its model is frozen",
        "critic": shared + "on the frozen model of 'actor', held once",
        "teacher": "all of its parameters train",
    }


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["roles.critic.model.share=judge"], ("the base of 'judge'", "name another role: actor")),
        (["roles.critic.model.share=critic"], ("the base of 'critic'", "name another role: actor")),
        (["roles.critic.training.adapter=null"], ("'critic' trains it whole", "model of its own")),
        (["roles.actor.training.adapter=null"], ("'actor' trains it whole", "model of its own")),
        (["roles.critic.model.init_seed=3"], ("another model.init_seed: 3 (0)", "take init_seed out")),
        (["roles.critic.layout={tp: 2}", "world.ranks=2"], ("layout.tp: 2 (1)", "roles.critic.layout.tp: 1")),
        (["roles.critic.layout={count: 1}", "world.ranks=2"], ("on 1 ranks (2)", "the same ranks")),
        (["roles.critic.training.dtype=fp32"], ("training.dtype: fp32 (bf16)", "dtype: bf16")),
        (["roles.critic.training.offload=true"], ("training.offload: True (False)", "offload: False")),
        (
            ["roles.judge={model: {share: critic}, training: {adapter: {}}}"],
            ("which stands on that of 'actor' itself", "share: actor"),
        ),
    ],
    ids=["unknown", "itself", "whole", "owner", "model", "tp", "count", "dtype", "offload", "chain"],
)
def test_a_base_is_shared_by_roles_that_agree(recipe: Path, overrides: list[str], words: Any) -> None:
    with pytest.raises(InputError) as raised:
        load_recipe(recipe, [*SHARED, *overrides])
    assert all(word in str(raised.value) for word in words), str(raised.value)


def test_a_kl_term_needs_no_reference_beside_an_adapter(recipe: Path) -> None:
    load_recipe(recipe, [*SHARED, "stages.3.actor_loss={kl_coef: 0.1}"])
    with pytest.raises(InputError, match="needs a role 'reference'"):
        load_recipe(recipe, ["roles.actor.training.adapter=null", "stages.3.actor_loss={kl_coef: 0.1}"])


def test_experts_are_refused_where_a_model_is_built_too() -> None:
    from genac_megatron.models.adapters import attach

    model = ModelConfig.model_validate(
        {
            "family": "qwen3_moe",
            "tokenizer": "builtin:tiny",
            "shape": yaml.safe_load(EXPERTS + ", expert_ffn: 32}"),
        }
    )
    with pytest.raises(InputError, match="a mixture of experts"):
        attach(None, range(2), shape_of(model, 67), AdapterConfig(), 0)
