"""Adapters on servers: which names are loaded and let go, and rules of recipes. No server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from genac_megatron.errors import InputError
from genac_megatron.models.registry import shape_of
from genac_megatron.recipe.estimate import describe, slot_bytes
from genac_megatron.recipe.loader import dump_recipe, load_recipe
from genac_megatron.recipe.rules import read_shape
from genac_megatron.recipe.schema import AdapterConfig, EngineConfig
from genac_megatron.recipe.servers import served_adapters, started_engines
from genac_megatron.recipe.sharing import only
from genac_megatron.serving.sglang.adapters import Changes, changes, lora_arguments, refusal, version_of
from genac_megatron.serving.sglang.client import ServerClient
from genac_megatron.serving.sglang.engine import SglangEngine
from genac_megatron.serving.sglang.fleet import Fleet

OURS = [f"actor@{version}" for version in range(1, 9)]


@pytest.mark.parametrize(
    ("found", "in_use", "wanted"),
    [
        ([], [], ([], True, [])),
        (["actor@6"], [6], ([], True, [])),
        (["actor@5", "actor@6"], [6], ([], True, ["actor@5"])),
        (["actor@5", "actor@6"], [5, 6], ([], True, [])),  # it still runs
        (["actor@3", "actor@5", "actor@6"], [3], ([], True, ["actor@5"])),
        (["actor@6", "actor@7"], [], ([], False, [])),  # a publication that failed elsewhere begins again
        (["critic@2", "critic@3", "other", "actor@x"], [], ([], True, [])),  # nobody of this role
        (["actor@9"], [], ([], True, ["actor@9"])),  # an earlier run's, on a server that somebody else runs
    ],
)
def test_what_a_server_loads_and_lets_go(found: list[str], in_use: list[int], wanted: Any) -> None:
    drop, load, unload = wanted
    assert changes("actor", 7, found, OURS, set(in_use)) == Changes(tuple(drop), load, tuple(unload))


def test_a_name_that_somebody_else_loaded_is_not_trusted() -> None:
    found = changes("actor", 7, ["actor@6", "actor@7"], ["actor@6"], {6})
    assert found == Changes(("actor@7",), True, ())
    assert changes("actor", 7, ["actor@6"], [], set()).unload == ("actor@6",)


def test_names() -> None:
    assert version_of("actor", "actor@12") == 12
    assert [
        version_of("actor", name) for name in ("actor", "actor@", "actor@1.5", "critic@1", "x/actor@1")
    ] == [None] * 5


def test_what_servers_are_started_with() -> None:
    assert lora_arguments([], gpu=False) == ()
    two = [AdapterConfig(rank=8, targets=["v_proj", "q_proj"]), AdapterConfig(rank=32, targets=["o_proj"])]
    line = " ".join(lora_arguments(two, gpu=True))
    assert line == (
        "--enable-lora --max-lora-rank 32 --max-loras-per-batch 5 --lora-strict-loading "
        "--lora-target-modules o_proj q_proj v_proj"
    )
    assert "--lora-backend torch_native" in " ".join(lora_arguments(two, gpu=False))


def test_a_width_that_a_cpu_server_pads_is_refused(tmp_path: Path) -> None:
    attention, all_of_it = [AdapterConfig(targets=["q_proj"])], [AdapterConfig()]
    assert refusal(all_of_it, 40, 1, gpu=False).startswith(
        "on a CPU SGLang pads the ffn 40 to a multiple of 32"
    )
    assert refusal(all_of_it, 96, 2, gpu=False)
    assert not any(
        [refusal(all_of_it, 40, 1, gpu=True), refusal(attention, 40, 1, gpu=False),
         refusal(all_of_it, 96, 1, gpu=False), refusal([], 40, 1, gpu=False)]
    )  # fmt: skip
    config = EngineConfig(kind="sglang", enable_lora=True)
    with pytest.raises(InputError, match=r"roles\.actor\.engine\.enable_lora"):
        Fleet("actor", config, {"intermediate_size": 40}, tmp_path, tmp_path, "cpu", adapters=all_of_it)


def test_an_attempt_keeps_the_version_that_it_began_with(recipe: Path) -> None:
    """No server: only which names requests would have, and which versions are said to be in use."""
    role = load_recipe(recipe).roles["actor"]
    client = ServerClient("http://127.0.0.1:9")
    engine = SglangEngine([client], role.engine, shape_of(role.model, 40), adapter="actor")
    engine.version = 3
    seen: list[Any] = []

    async def attempt(route: Any, weights: Any) -> None:
        engine.version = 4
        seen.append((weights, engine.in_use()))

    import asyncio

    asyncio.run(engine._attempts(attempt, "", "here"))
    asyncio.run(engine._attempts(attempt, "", "here"))
    assert seen == [((3, "actor@3"), {3}), ((4, "actor@4"), {4})]
    assert engine.in_use() == set()


# --- rules ---------------------------------------------------------------------------------------

RECIPE = """\
name: tiny
world: {ranks: 2, timeout_s: 3600}
roles:
  actor:
    model: &model
      family: qwen3
      tokenizer: builtin:tiny
      shape: {layers: 4, hidden: 64, ffn: 128, heads: 4, kv_heads: 2}
    training: {adapter: {rank: 8, targets: [q_proj, v_proj]}}
    engine: {kind: sglang, enable_lora: true, max_in_flight: 7}
  critic:
    model: *model
    training: {adapter: {rank: 16}}
    engine: {share: actor}
task: {kind: state_tracking}
stages:
  - {kind: reinforce}
  - {kind: ppo}
"""


WIDE = [
    f"roles.{role}.model.shape.{key}=128" for role in ("actor", "critic") for key in ("hidden", "head_dim")
]


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


def test_two_roles_on_one_fleet(recipe: Path, tmp_path: Path) -> None:
    """The second role's engine is the first one's; a resolved recipe is read back to the same."""
    found = load_recipe(recipe)
    actor, critic = found.roles["actor"].engine, found.roles["critic"].engine
    assert (critic.share, critic.kind, critic.max_in_flight) == ("actor", "sglang", 7)
    assert list(started_engines(found)) == ["actor"]
    assert [adapter.rank for adapter in served_adapters(found, "actor")] == [8, 16]
    assert actor.model_copy(update={"share": "actor"}) == critic
    told = describe(found)
    assert "servers hold the base and load adapters of 2 roles beside it" in told
    assert "served by the servers of 'actor', which load its adapters" in told
    shape = read_shape(found.roles["actor"].model)
    assert (shape.q_size, shape.kv_size) == (64, 32)
    each = 2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 128)  # q, o; k, v; gate, up, down: the critic's targets
    held = slot_bytes(served_adapters(found, "actor"), shape, actor)
    assert held == 5 * 16 * 4 * each * 2  # slots, the larger rank, layers, bf16
    again = tmp_path / "resolved.yaml"
    again.write_text(dump_recipe(found))
    assert load_recipe(again) == found
    alone = only(found, {"critic": found.roles["critic"]})  # as in an evaluation of it
    assert list(started_engines(alone)) == ["critic"]
    assert [adapter.rank for adapter in served_adapters(alone, "critic")] == [16]
    assert only(found, found.roles) == found


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["roles.critic.training.adapter=null"], "'critic' has enable_lora, and is trained whole"),
        (["roles.actor.engine.kind=embedded"], "its engine is embedded, which is given the merged weights"),
        (["roles.actor.engine.quantization=fp8", *WIDE], "which is not built beside quantization: fp8"),
        (["roles.actor.engine.release=all"], "given the base once"),
        (["roles.critic.engine.share=judge"], "which is no other role"),
        (["roles.critic.engine.share=critic"], "which is no other role"),
        (["roles.actor.engine.enable_lora=false"], "which hold whole weights"),
        (["roles.critic.engine.max_in_flight=8", "roles.critic.engine.tp=2"], "of them: tp, max_in_flight"),
        (["roles.critic.model.init_seed=3"], "beside another base: model.init_seed"),
        (["roles.critic.training.dtype=fp32"], "its base is in fp32, theirs in bf16"),
    ],
)  # fmt: skip
def test_what_servers_cannot_do_with_adapters(recipe: Path, overrides: list[str], words: str) -> None:
    with pytest.raises(InputError) as raised:
        load_recipe(recipe, overrides)
    assert words in str(raised.value)
    assert "way out: " in str(raised.value)
    assert "recipe.yaml" in str(raised.value) or "roles." in str(raised.value)
