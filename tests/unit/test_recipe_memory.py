"""Who holds a GPU's memory when: the model that dry runs, preflight and servers' starts go by."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from genac_megatron.cluster.placement import fit_faults, misfits, server_shares, tenants
from genac_megatron.errors import InputError
from genac_megatron.recipe import memory
from genac_megatron.recipe.estimate import memory_of, place_of, served_bytes
from genac_megatron.recipe.loader import load_recipe
from genac_megatron.recipe.memory import (
    FILLED,
    PREFILL,
    SERVED_IN,
    SERVER_GIB,
    Phase,
    kv_pool,
)
from genac_megatron.recipe.rules import read_shape
from genac_megatron.recipe.schema import Recipe
from genac_megatron.recipe.share import CONTEXT_GIB, GIB, Share

RECIPE = """\
name: eight
world: {ranks: 16}
cluster: {gpu: h100-80g}
roles:
  actor:
    model: &model
      family: qwen3
      tokenizer: builtin:tiny
      shape: {layers: 36, hidden: 4096, ffn: 12288, heads: 32, kv_heads: 8, head_dim: 128, vocab: 151936,
              tie_embeddings: false}
    layout: {tp: 4}
    training: {recompute: full}
    engine: {kind: sglang, engines: 4, gpus: [0, 1, 2, 3]}
  critic:
    model: *model
    layout: {tp: 4}
    training: {recompute: full}
    engine: {kind: sglang, engines: 4, gpus: [4, 5, 6, 7]}
task: {kind: state_tracking}
stages: [{kind: ppo, steps: 1, rollout: {max_new_tokens: 2048}}]
"""
H100 = 79.6 * GIB
MANY = "engine.max_batch_tokens=100000000"  # no limit
BOTH = ("actor", "critic")


def both(*settings: str) -> list[str]:
    return [f"roles.{role}.{setting}" for role in BOTH for setting in settings]


def recipe(folder: Path, *overrides: str) -> Recipe:
    path = folder / "eight.yaml"
    path.write_text(RECIPE)
    return load_recipe(path, [f"runs={folder}/runs", *overrides])


def lines(given: Recipe, total: float = H100) -> list[memory.Timeline]:
    return memory.timelines(given, tenants(given), total)


def test_who_shares_a_gpu(tmp_path: Path) -> None:
    kinds = tenants(recipe(tmp_path))
    assert [(kind.rank, kind.servers, len(kind.gpus)) for kind in kinds] == [
        (0, ("actor",), 4),
        (4, ("critic",), 4),
        (8, (), 8),
    ]
    assert memory.colocated(kinds)
    apart = recipe(tmp_path, "world.ranks=24", *both("layout.first_rank=8"))
    assert not memory.colocated(tenants(apart))
    both_there = recipe(tmp_path, "roles.critic.engine.gpus=[2,3,4,5]")
    assert [kind.servers for kind in tenants(both_there)] == [
        ("actor",),
        ("actor", "critic"),
        ("critic",),
        (),
    ]


def test_phases_by_hand(tmp_path: Path) -> None:
    """8.19 B parameters at TP 4 over 16 ranks; a server holds 15.3 GiB of weights."""
    given = recipe(tmp_path, *both("engine.max_batch_tokens=16384"))
    role = given.roles["actor"]
    shape = read_shape(role.model)
    own = memory_of(role, shape, place_of(role.layout, 0, 16), 16)
    first, phases = lines(given)[0], lines(given)[0].phases
    assert phases[Phase.START] == {
        "rank's libraries": 6 * GIB,
        "actor server's weights": served_bytes(role, shape),
        "actor server's KV cache": 16_384 * 2 * 36 * 1024 * 2,
        "actor server's libraries": phases[Phase.START]["actor server's libraries"],
    }
    layer = 4 * 4096 + 2 * (4096 + 1024) + 3 * 12_288
    # A cache of 16,384 tokens: 256 requests at the least, and the smallest table of SGLang's.
    logits, table = 3 * 4 * 256 * 151_936, 4 * 2049 * shape.max_positions
    wanted = SERVER_GIB * GIB + PREFILL * layer * 2 + logits + table
    assert phases[Phase.START]["actor server's libraries"] == wanted
    trained = 2 * (own.weights + own.gradients + own.optimizer)  # two roles alike
    for phase in (Phase.GENERATE, Phase.RESTART):
        assert first.used(phase) == pytest.approx(first.used(Phase.START) + trained)
    assert first.used(Phase.TRAIN) == pytest.approx(first.used(Phase.GENERATE) + own.activations)
    # Two buckets as large as the embedding, and its shards where they are joined.
    assert first.used(Phase.PUBLISH) == pytest.approx(first.used(Phase.GENERATE) + 3 * 151_936 * 4096 * 2)
    assert first.peak == Phase.PUBLISH


def test_servers_get_what_the_others_leave(tmp_path: Path) -> None:
    """Up to 98 % of the GPU in the fullest phase, in equal parts where two share it."""
    given = recipe(tmp_path, *both(MANY))
    first = lines(given)[0]
    assert first.used(first.peak) == pytest.approx(FILLED * H100)
    given = recipe(tmp_path, *both(MANY, "engine.gpus=[0,1,2,3]"),
                   "cluster.gpu=b200-180g")  # fmt: skip
    first = lines(given, 178.4 * GIB)[0]
    assert first.used(first.peak) == pytest.approx(FILLED * 178.4 * GIB)
    shares = server_shares(given)
    assert shares["actor"].cache == pytest.approx(shares["critic"].cache)
    fixed = recipe(
        tmp_path, "roles.actor.engine.mem_fraction=0.25", *both("engine.max_batch_tokens=10000000")
    )
    assert server_shares(fixed)["actor"].static == pytest.approx(0.25 * H100)
    assert server_shares(fixed)["critic"].static > 0.3 * H100


def test_giving_back_makes_room_for_the_cache(tmp_path: Path) -> None:
    """Roles that rest while servers generate, servers that rest while roles train."""
    most = both(MANY)
    caches = []
    for more in ([], both("training.offload=true"), both("training.offload=true", "engine.release=kv_cache"),
                 both("training.offload=true", "engine.release=all")):  # fmt: skip
        given = recipe(tmp_path, *most, *more)
        assert misfits(given) == []
        caches.append(server_shares(given)["actor"].cache / GIB)
    assert caches[0] == caches[1], "the cache is there in training too"
    assert caches[2] > caches[0] + 30
    assert caches[3] == caches[2]
    asleep = lines(given)[0]
    assert "actor server's weights" not in asleep.phases[Phase.TRAIN]
    assert "actor server's KV cache" not in asleep.phases[Phase.PUBLISH]
    assert "actor server's weights" in asleep.phases[Phase.PUBLISH]
    assert all("actor weights" not in asleep.phases[phase] for phase in SERVED_IN)
    assert all(asleep.used(phase) <= H100 * (1 + 1e-9) for phase in Phase)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (  # the whole model's optimizer on four ranks
            ["world.ranks=8", "roles.actor.engine.mem_fraction=0.3", *both(MANY)],
            ["phase 'publish'", "actor optimizer 11.4", "roles.actor.engine.release: kv_cache or all"],
        ),
        (
            ["world.ranks=4", *both("engine.engines=1", "engine.gpus=[0]", "layout.tp=2")],
            ["GPU 0 of node 0 (rank 0)", "actor optimizer", "a larger tp, pp or number of ranks"],
        ),
        (
            ["roles.actor.engine.mem_fraction=0.6", *both(MANY)],
            ["GiB in phase 'publish'", "a h100-80g has 79.6", "a smaller roles.actor.engine.mem_fraction"],
        ),
        (
            ["roles.actor.engine.mem_fraction=0.19"],
            ["a server of 'actor' has 15.1 GiB per GPU", "its weights take 15.3",
             "raise roles.actor.engine.tp or mem_fraction"],
        ),
        (  # weights fit, and not a single response
            ["roles.critic.engine.mem_fraction=0.193"],
            ["a server of 'critic'", "one response of 3,072 tokens 0.4"],
        ),
        (
            both("training.recompute=off", "training.tokens_per_microbatch=65536"),
            ["in phase 'train'", "recompute: full, or a smaller tokens_per_microbatch"],
        ),
        (
            ["cluster.gpu=a100-40g"],
            ["a server of 'actor'", "or make room on GPU", "roles.actor.training.offload: true"],
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_by_phase_party_and_keys(
    tmp_path: Path, overrides: list[str], said: list[str]
) -> None:
    found = "\n".join(fit_faults(recipe(tmp_path, *overrides)))
    for text in said:
        assert text in found


# --- SGLang's fraction -----------------------------------------------------------------------------------


def started(share: Share, held: float, total: float = H100, between: float = 0.0) -> float:
    """SGLang's KV cache in GiB, by its own formula, where `held` bytes are held when a server starts and
    others take `between` more before its cache is made. Its context takes CONTEXT_GIB of `runtime`.
    """
    free = total - held
    fraction = share.fraction(free)
    at_start = free - CONTEXT_GIB * GIB
    return kv_pool(at_start, at_start - share.weights - between, fraction) / GIB


def test_a_constant_fraction_made_servers_race_for_memory() -> None:
    """What was: mem_fraction 0.3 of what is free at the bootstrap, for 15.3 GiB of weights."""
    for held, between, pool in ((0.0, 0.0, 8.5), (0.0, 22.9, -14.4), (23.0, 0.0, 1.6)):
        free = 79.3 - held  # GiB
        assert kv_pool(free, free - 15.3 - between, 0.3) == pytest.approx(pool, abs=0.3)


def test_the_fraction_gives_the_share_at_any_start(tmp_path: Path) -> None:
    share = server_shares(recipe(tmp_path))["actor"]
    planned = share.cache / GIB
    for held in (0.0, 6.0, 20.0, 40.0):
        pool = started(share, held * GIB)
        assert pool == pytest.approx(planned, abs=0.01), held


def test_less_is_taken_where_less_is_free_and_told_where_it_holds_nothing(tmp_path: Path) -> None:
    share = server_shares(recipe(tmp_path))["actor"]
    tight = share.static + share.runtime - 2 * GIB
    assert share.fraction(tight) * (tight - CONTEXT_GIB * GIB) == pytest.approx(
        share.static - 2 * GIB, rel=1e-3
    )
    with pytest.raises(InputError, match=r"15\.3 GiB for weights.*17\.0 GiB of its GPU are free") as raised:
        share.fraction(17 * GIB)
    assert raised.value.where == "roles.actor.engine"
    assert "nvidia-smi" in raised.value.way_out


def test_no_torch_is_needed(tmp_path: Path) -> None:
    code = (
        "import sys; import genac_megatron.recipe.memory, genac_megatron.cluster.placement; "
        "sys.exit('torch' in sys.modules)"
    )
    environ: dict[str, Any] = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run([sys.executable, "-c", code], env=environ, cwd=tmp_path).returncode == 0
