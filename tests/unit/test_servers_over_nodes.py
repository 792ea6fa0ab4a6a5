"""Servers that span nodes: how they are dealt, what is refused, and what SGLang and the cluster are told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.published_models import QWEN3
from genac_megatron.cluster import script
from genac_megatron.cluster.placement import duties, misfits, publication_faults
from genac_megatron.errors import InputError
from genac_megatron.recipe.loader import load_recipe
from genac_megatron.recipe.schema import EngineConfig, Recipe
from genac_megatron.recipe.servers import node_servers, plan_gpus, too_few
from genac_megatron.serving.sglang.server import ServerSpec

ROOT = Path(__file__).resolve().parents[2]
LARGE = ROOT / "recipes" / "large" / "ppo-qwen3-235b-a22b-36n8g-tp4pp8ep16.yaml"
CONFIG = {
    **QWEN3, "model_type": "qwen3_moe", "hidden_size": 4096, "num_hidden_layers": 94,
    "num_attention_heads": 64, "num_key_value_heads": 4, "intermediate_size": 12_288, "num_experts": 128,
    "num_experts_per_tok": 8, "moe_intermediate_size": 1536, "norm_topk_prob": True,
    "tie_word_embeddings": False,
}  # fmt: skip


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    model = tmp_path / "models" / "Qwen3-235B-A22B"
    model.mkdir(parents=True)
    (model / "config.json").write_text(json.dumps(CONFIG))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def large(*overrides: str) -> Recipe:
    return load_recipe(LARGE, list(overrides))


def test_ranks_of_a_server_take_the_same_gpus_of_each_of_its_nodes() -> None:
    actor = EngineConfig(kind="sglang", engines=2, tp=16, nnodes=2, nodes=[0, 1, 2, 3])
    assert [actor.nodes_of(n) for n in range(2)] == [[0, 1], [2, 3]]
    assert [actor.node_of(n) for n in range(2)] == [0, 2]
    engines = {"actor": actor, "critic": EngineConfig(kind="sglang", tp=2, nodes=[3])}
    assert plan_gpus(engines) == {"actor": [list(range(8))] * 2, "critic": [[8, 9]]}
    assert list(node_servers(engines, 1, gpu=True)) == ["actor/0"]
    assert list(node_servers(engines, 3, gpu=True)) == ["actor/1", "critic/0"]
    assert "the servers of 'critic' take GPUs up to 9" in too_few(engines, 8)[0]
    four = EngineConfig(kind="sglang", engines=2, tp=4, nnodes=2, nodes=[0, 1], gpus=[4, 5, 6, 7])
    assert plan_gpus({"actor": four}) == {"actor": [[4, 5], [6, 7]]}


def test_a_server_over_two_nodes_says_what_each_part_does() -> None:
    spec = ServerSpec("actor/0", Path("m"), 30_000, tp=16, nnodes=2, node_rank=1, meeting="10.0.0.1:4000")
    told = " ".join(spec.arguments())
    assert "--tp 16 " in told
    assert "--nnodes 2 --node-rank 1 --dist-init-addr 10.0.0.1:4000" in told
    assert "--nnodes" not in ServerSpec("actor/0", Path("m"), 30_000, tp=16).arguments()


def test_the_large_recipe_fits_and_its_script_says_who_serves(place: Path) -> None:
    recipe = large()
    assert misfits(recipe) == []
    gpus = ", GPUs 0, 1, 2, 3, 4, 5, 6, 7)"
    assert duties(recipe) == [
        f"nodes 0 to 1: a part of 1 server(s) of actor (tp 16{gpus}",
        f"nodes 2 to 3: a part of 1 server(s) of critic (tp 16{gpus}",
        "nodes 4 to 35: train actor and critic",
    ]
    text = script.render(recipe, LARGE, [], {})
    assert "#SBATCH --nodes=36" in text
    assert "# nodes 0 to 1: a part of 1 server(s) of actor" in text


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("roles.actor.engine.tp=15", "do not divide tp 15"),
        ("roles.actor.engine.nodes=[0]", "nodes names [0]"),
        ("roles.actor.engine.nodes=[0, 1, 4]", "over nodes [0, 1, 4], 2 nodes each"),
        ("roles.actor.publication.transport=tensor", "memory is shared on one"),
        ("roles.actor.engine.gpus=[0, 1]", "names 2 GPUs, its 1 servers of a node take 8"),
        ("roles.actor.engine.urls=['http://a:1']", "somebody else runs it"),
    ],
)
def test_what_cannot_be_is_refused_where_it_stands(place: Path, override: str, said: str) -> None:
    with pytest.raises(InputError) as raised:
        large(override)
    assert said in str(raised.value)
    assert raised.value.where
    assert raised.value.way_out


def test_a_server_that_shares_gpus_with_a_sender_is_told(place: Path) -> None:
    """CUDA IPC stays on a node, and NCCL takes one process of a GPU."""
    recipe = large("roles.actor.engine.nodes=[4, 5]", "roles.actor.publication.transport=auto")
    assert "weights of 'actor' do not reach all its servers" in publication_faults(recipe)[0]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("engine.nnodes", "2"),
        ("engine.engines", "4"),
        ("engine.mem_fraction", "0.5"),
        ("engine.urls", "['http://127.0.0.1:30000']"),
        ("publication.bucket_mib", "64"),
        ("publication.mode", "in_flight"),
    ],
)
def test_what_servers_alone_read_is_refused_beside_an_embedded_engine(key: str, value: str) -> None:
    with pytest.raises(InputError) as caught:
        load_recipe(ROOT / "recipes" / "quickstart.yaml", [f"roles.actor.{key}={value}"])
    assert f"'actor' sets {key}, which is of SGLang's servers, and its engine is embedded" in str(
        caught.value
    )
    assert "kind: sglang" in str(caught.value.way_out)


def test_an_embedded_engine_may_have_what_servers_read_at_its_usual_value() -> None:
    for key in "engine.engines=1", "engine.nodes=[0]", "publication.transport=auto", "publication.every=2":
        load_recipe(ROOT / "recipes" / "quickstart.yaml", [f"roles.actor.{key}"])


@pytest.mark.parametrize(
    ("key", "value", "more"),
    [
        ("engine.args", "['--mem-fraction-static', '0.5']", ["roles.actor.engine.urls=['http://host:1']"]),
        ("engine.mem_fraction", "0.5", ["roles.actor.engine.urls=['http://host:1']"]),
        ("engine.api_key_env", "KEY", []),
        ("publication.pause", "in_place", []),
        ("publication.folder", "shared", []),
        ("publication.address", "10.0.0.1", ["roles.actor.publication.transport=disk"]),
    ],
)
def test_what_no_server_would_be_told_is_refused(key: str, value: str, more: list[str]) -> None:
    recipe = ROOT / "recipes" / "quickstart-sglang.yaml"
    with pytest.raises(InputError, match=f"'actor' sets {key}, (and|which)"):
        load_recipe(recipe, [*more, f"roles.actor.{key}={value}"])
