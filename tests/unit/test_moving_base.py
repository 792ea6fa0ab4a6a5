"""An adapter that is merged into its base as it trains: what stays, what begins anew, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from genac_megatron.cli import main
from genac_megatron.errors import InputError
from genac_megatron.observe.manifest import read_manifest
from genac_megatron.publication.digest import know_base, moved_by
from genac_megatron.recipe.estimate import describe
from genac_megatron.recipe.loader import check, dump_recipe, load_recipe
from genac_megatron.recipe.trains import trains
from genac_megatron.tasks.tokenizer import tokenizer_size
from genac_megatron.training.adapted import saved_parameters
from genac_megatron.training.checkpoint import Checkpoints, load_checkpoint
from genac_megatron.training.layout import init_world
from genac_megatron.training.merging import merge
from genac_megatron.training.role import Role
from tests.distributed.cases import make_role, make_samples, published, train
from tests.distributed.test_adapter_layouts import ADAPTER, SOME, adapted, adapter_role, base_of
from tests.distributed.test_value import train_values
from tests.unit.test_adapters import RECIPE, SHARED

MOVES = {**ADAPTER, "merge_every": 2}
VOCAB = 67


def pair(adapter: Any = None, vocab: int = VOCAB, **training: Any) -> dict[str, Role]:
    """An actor whose base moves and a critic on it, ready to train."""
    init_world()
    shape = {"vocab": vocab}
    actor = adapter_role(adapted({"count": 1}, adapter or MOVES, training=training, shape=shape))
    config = adapted({"count": 1}, {"rank": 2}, training=training, shape=shape)
    layout = replace(actor.layout, name="critic")
    critic = Role("critic", config, actor.shape, layout, layout.groups(), beside=actor)
    critic.base = actor.base
    roles = {"actor": actor, "critic": critic}
    for role in roles.values():
        role.begin_stage(None, 10)
    return roles


def merged(role: Role) -> float:
    return merge(role, moved_by(role))


def moments(role: Role) -> list[torch.Tensor]:
    parts = role.optimizer.chained_optimizers
    return [
        state[name]
        for part in parts
        for state in part.optimizer.state.values()
        for name in ("exp_avg", "exp_avg_sq")
    ]


def masters(role: Role) -> dict[str, torch.Tensor]:
    """Of each parameter that trains, flat; one rank has all of it."""
    found = {}
    for name, parameter in role.models[0].named_parameters():
        if parameter.requires_grad:
            found[name] = parameter.main_param.detach().float().flatten().clone()
    return found


@pytest.mark.parametrize("distributed", [True, False])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_merge_moves_the_base_and_not_what_the_role_says(dtype: str, distributed: bool) -> None:
    """Engines that have merged weights have the new base, bit for bit; the adapter begins anew."""
    roles = pair(dtype=dtype, distributed_optimizer=distributed)
    actor, critic = roles["actor"], roles["critic"]
    for role in roles.values():
        train(role, 2)
    (adapters,) = (model.adapters for model in actor.models)
    before = [role.logprobs(make_samples(5, 7)) for role in roles.values()]
    sent, first = published(actor), [part.A.detach().clone() for part in adapters.parts]
    serials, steps = critic.serial, actor.scheduler.num_steps
    lost = merged(actor)
    assert lost < 1e-5 if dtype == "fp32" else 1e-4 < lost < 0.5
    after = [role.logprobs(make_samples(5, 7)) for role in roles.values()]
    close = 5e-6 if dtype == "fp32" else 0.1
    for mine, theirs in zip(after[0], before[0], strict=True):
        assert mine == pytest.approx(theirs, abs=close)
    flat = ([value for sample in found[1] for value in sample] for found in (before, after))
    assert max(abs(a - b) for a, b in zip(*flat, strict=True)) > 0.01
    base = base_of(actor)
    assert all(torch.equal(base[name], weight) for name, weight in sent.items())
    assert all(not b.any() for part in adapters.parts for b in part.B)
    assert all(not torch.equal(part.A, a) for part, a in zip(adapters.parts, first, strict=True))
    assert moments(actor)
    assert not any(moment.any() for moment in moments(actor))
    assert any(moment.any() for moment in moments(critic))
    assert (critic.serial, actor.scheduler.num_steps) == (serials + 1, steps)
    train(actor, 1)  # the masters are the new adapter's: the old one's would be back after a step
    bound = 1.2 * adapters.parts[0].A.size(1) ** -0.5
    assert max(float(part.A.abs().max()) for part in adapters.parts) < bound
    assert 0 < max(float(b.abs().max()) for part in adapters.parts for b in part.B) < 0.02


def test_another_a_at_every_merge(tmp_path: Path) -> None:
    roles = pair(SOME)
    drawn = []
    for _ in range(3):
        drawn.append([part.A.detach().clone() for part in roles["actor"].models[0].adapters.parts])
        train(roles["actor"], 1)
        merged(roles["actor"])
    assert all(not torch.equal(a, b) for a, b in zip(drawn[1], drawn[2], strict=True))
    assert roles["actor"].memory.merges == roles["critic"].memory.merges == 3
    kept = roles["actor"].memory.moved
    Checkpoints(tmp_path, 2, False).save("x", roles, {})
    said = read_manifest(tmp_path / "x")["adapters"]
    assert {said[name]["moved"] for name in roles} == {kept} != {roles["actor"].base}


def test_a_scalar_head_goes_on_beside_a_base_that_moves(tmp_path: Path) -> None:
    """It is no adapter: its weights and moments stay, and a checkpoint has it with the base."""
    init_world()
    config = adapted({"count": 1}, MOVES)
    model = config.model.model_copy(update={"head": "value"})
    role, again = (adapter_role(config.model_copy(update={"model": model})) for _ in range(2))
    for one in (role, again):
        one.begin_stage(None, 10)
    train_values(role, 2)
    before = role.values(make_samples(5, 7))
    head = role.models[0].output_layer.weight.detach().clone()
    merged(role)
    for mine, theirs in zip(role.values(make_samples(5, 7)), before, strict=True):
        assert mine == pytest.approx(theirs, abs=5e-6)
    assert torch.equal(role.models[0].output_layer.weight, head)
    (bare,) = role.models
    own = [name for name, p in bare.named_parameters() if p.requires_grad and "adapters." not in name]
    assert sum(bool(moment.any()) for moment in moments(role)) == 2 * len(own) > 0  # the head's alone
    Checkpoints(tmp_path, 2, False).save("value-00002", {"actor": role}, {})
    load_checkpoint(tmp_path / "value-00002", {"actor": again})
    load_checkpoint(tmp_path / "value-00002", {"actor": again}, optimizers=True)
    assert train_values(again, 1, 3) == train_values(role, 1, 3)


@pytest.mark.parametrize("distributed", [True, False])
def test_a_scalar_heads_master_keeps_what_its_weights_cannot_say(distributed: bool) -> None:
    """bf16 rounds small updates away, which masters add up; the adapter's begin at its weights."""
    init_world()
    training = {"dtype": "bf16", "distributed_optimizer": distributed}
    config = adapted({"count": 1}, MOVES, training=training)
    role = adapter_role(
        config.model_copy(update={"model": config.model.model_copy(update={"head": "value"})})
    )
    role.begin_stage(None, 10)
    train_values(role, 2)
    (bare,) = role.models
    before = masters(role)
    merged(role)
    after = masters(role)
    own = {n for n, p in bare.named_parameters() if p.requires_grad and "adapters." not in n}
    weights = dict(bare.named_parameters())
    assert all(torch.equal(after[name], before[name]) for name in own)
    assert any(not torch.equal(after[name], weights[name].float().flatten()) for name in own)
    assert all(torch.equal(after[n], weights[n].float().flatten()) for n in after.keys() - own)


def test_checkpoints_hold_the_base_and_resume_byte_for_byte(tmp_path: Path) -> None:
    """Both roles, the critic alone on a base of its own, and the actor where no base is to move any more."""
    roles = pair()
    Checkpoints(tmp_path, 9, False).save("ppo-00000", roles, {})
    for role in roles.values():
        train(role, 2)
    merged(roles["actor"])
    for role in roles.values():
        train(role, 1, 2)
    Checkpoints(tmp_path, 9, False).save("ppo-00003", roles, {})
    said = [role.logprobs(make_samples(5, 7)) for role in roles.values()]
    ended = [train(role, 2, 3) for role in roles.values()], [published(role) for role in roles.values()]

    again = pair()
    load_checkpoint(tmp_path / "ppo-00003", again)
    load_checkpoint(tmp_path / "ppo-00003", again, optimizers=True)
    assert [role.logprobs(make_samples(5, 7)) for role in again.values()] == said
    assert [train(role, 2, 3) for role in again.values()] == ended[0]
    for mine, theirs in zip([published(role) for role in again.values()], ended[1], strict=True):
        assert all(torch.equal(mine[name], weight) for name, weight in theirs.items())
    assert again["critic"].memory.merges == 1

    alone = make_role("critic", adapted({"count": 1}, {"rank": 2}), 1)
    know_base(alone)
    load_checkpoint(tmp_path / "ppo-00003", {"critic": alone})
    assert alone.logprobs(make_samples(5, 7)) == said[1]
    still = adapter_role(adapted({"count": 1}, ADAPTER))
    load_checkpoint(tmp_path / "ppo-00003", {"actor": still})
    assert still.logprobs(make_samples(5, 7)) == said[0]
    assert still.keeps_base  # nothing else would have what it stands beside
    whole = saved_parameters(adapter_role(adapted({"count": 1}, ADAPTER)))
    assert saved_parameters(still) > 2 * whole

    load_checkpoint(tmp_path / "ppo-00000", again)  # back to where it had not moved
    assert again["actor"].memory.moved == ""
    load_checkpoint(tmp_path / "ppo-00003", {"actor": again["actor"]})
    with pytest.raises(InputError, match="beside a base that has moved 0 times, and this one has moved 1"):
        load_checkpoint(tmp_path / "ppo-00000", {"critic": again["critic"]})


def test_what_comes_out_is_merged_with_the_base_that_moved(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors.torch import load_file

    roles = pair(vocab=tokenizer_size("builtin:tiny"))
    for role in roles.values():
        train(role, 1)
    merged(roles["actor"])
    train(roles["actor"], 1, 1)
    Checkpoints(tmp_path / "checkpoints", 2, False).save("ppo-00002", roles, {})
    source = ["convert", "to-hf", str(tmp_path)]
    for name, role in roles.items():
        options = ["--role", name, "--merge", "--assets", "builtin:tiny", "--quiet"]
        assert main([*source, str(tmp_path / name), *options]) == 0
        found, wanted = load_file(tmp_path / name / "model.safetensors"), published(role, 1 << 17)
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[key], weight) for key, weight in wanted.items())
    for options, words in (
        ([], "a PEFT folder would be beside no model of yours"),
        (["--merge", str(tmp_path)], "give --merge without a folder"),
    ):
        assert main([*source, str(tmp_path / "x"), "--assets", "builtin:tiny", "--quiet", *options]) == 2
        assert words in capsys.readouterr().err
    path = tmp_path / "checkpoints" / "ppo-00002" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["adapters"]["actor"] |= {"base_in": None, "merges": 0}
    path.write_text(json.dumps(manifest))
    assert main([*source, str(tmp_path / "x"), "--merge", "--quiet"]) == 2
    assert "name that model's folder: --merge BASE" in capsys.readouterr().err


# --- recipes -------------------------------------------------------------------------------------

EVERY = "roles.actor.training.adapter.merge_every=5"
KL = "stages.3.actor_loss={kl_coef: 0.1}"


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


def test_a_recipe_says_what_moves(recipe: Path) -> None:
    found = load_recipe(recipe, [*SHARED, EVERY])
    check(found)
    told = trains(yaml.safe_load(dump_recipe(found)))
    assert told["actor"].endswith("merged into its model every 5 steps")
    assert told["critic"].endswith("on the model of 'actor', held once, which moves every 5 steps")
    assert all(text in describe(found) for text in told.values())
    model = json.dumps(yaml.safe_load(RECIPE)["roles"]["actor"]["model"])
    frozen = f"roles.reference={{model: {model}, training: {{frozen: true}}}}"
    check(load_recipe(recipe, [*SHARED, EVERY, KL, frozen]))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ["roles.critic.training.adapter={rank: 4, merge_every: 5}"],
            ("base of 'actor', which alone may move it", "roles.actor.training.adapter.merge_every"),
        ),
        ([EVERY, KL], ("moves every 5 steps", "add a role 'reference'")),
        (
            [EVERY, "stages.2.actors=[{name: early, checkpoint: runs/x}, {name: actor}]"],
            ("plays actors of other checkpoints", "take checkpoints out of stages."),
        ),
        (["roles.actor.training.adapter.merge_every=0"], ("at least 1", "merge_every")),
    ],
    ids=["sharer", "kl", "actors", "zero"],
)
def test_what_cannot_move(recipe: Path, overrides: list[str], words: Any) -> None:
    with pytest.raises(InputError) as raised:
        check(load_recipe(recipe, [*SHARED, *overrides]))
    assert all(word in str(raised.value) for word in words), str(raised.value)


def test_servers_of_two_roles_have_one_base_that_moves(recipe: Path) -> None:
    lora = ["roles.actor.engine={kind: sglang, enable_lora: true}", "roles.critic.engine={share: actor}"]
    check(load_recipe(recipe, [*SHARED, *lora, EVERY]))
    with pytest.raises(InputError, match=r"'critic' is on the same servers with a base of its own"):
        check(load_recipe(recipe, [*lora, EVERY, "roles.critic.model.share=null"]))
    critic = "roles.critic.training.adapter.merge_every=5"
    with pytest.raises(InputError, match=r"'actor' is on the same servers with a base of its own"):
        check(load_recipe(recipe, [*lora, critic, "roles.critic.model.share=null"]))


def test_a_base_in_fp8_does_not_move(recipe: Path) -> None:
    fp8 = ["roles.actor.training.fp8=blockwise", "roles.actor.training.fp8_param=true"]
    with pytest.raises(InputError, match="kept in FP8, whose rounding it does not survive"):
        load_recipe(recipe, [*fp8, EVERY])
