"""Nodes and tasks of a recipe, why one does not fit, the rendered script, and the job's plan."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from genac_megatron.cluster import job, script
from genac_megatron.cluster.placement import (
    duties,
    heaviest,
    misfits,
    placement,
    publication_faults,
    server_count,
)
from genac_megatron.cluster.preflight import missing_gpus
from genac_megatron.errors import InputError
from genac_megatron.observe.lock import _began as began
from genac_megatron.observe.lock import held
from genac_megatron.platform.network import job_ports
from genac_megatron.recipe.loader import load_recipe
from genac_megatron.recipe.resume import lengths
from genac_megatron.recipe.schema import Recipe, TrainingConfig

ROOT = Path(__file__).resolve().parents[2]
RECIPE = """\
name: big
world: {ranks: 16}
cluster: {gpu: h100-80g, cpus_per_rank: 4, time_limit: "01:00:00"}
roles:
  actor: &role
    model:
      family: qwen3
      tokenizer: builtin:tiny
      shape: {layers: 36, hidden: 4096, ffn: 12288, heads: 32, kv_heads: 8, head_dim: 128, vocab: 151936,
              tie_embeddings: false}
    layout: {tp: 8}
    engine: {max_batch_tokens: 8192}
  critic: *role
task: {kind: state_tracking}
stages: [{kind: ppo, steps: 1, rollout: {max_new_tokens: 64}}]
"""
JOB = {"SLURM_JOB_ID": "77", "SLURM_JOB_NUM_NODES": "2"}


def recipe(folder: Path, *overrides: str) -> Recipe:
    path = folder / "big.yaml"
    path.write_text(RECIPE)
    return load_recipe(path, [f"runs={folder}/runs", *overrides])


def test_nodes_and_tasks(tmp_path: Path) -> None:
    place = placement(recipe(tmp_path))
    assert (place.nodes, place.ranks_per_node, place.gpus_per_node) == (2, 8, 8)
    small = ["world.ranks=2", "roles.actor.layout.tp=2", "roles.critic.layout.tp=2"]
    assert placement(recipe(tmp_path, *small)).ranks_per_node == 2
    place = placement(recipe(tmp_path, "cluster.gpu=null"))
    assert (place.ranks, place.gpus_per_node) == (16, 0)
    assert [place.node_of(rank) for rank in (0, 7, 8, 15)] == [0, 0, 1, 1]


def test_a_recipe_that_fits(tmp_path: Path) -> None:
    assert misfits(recipe(tmp_path)) == []


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["world.ranks=40", "cluster.ranks_per_node=16"], "leave one of 3 nodes of 16 partly empty"),
        (["cluster.ranks_per_node=4"], "a tensor-parallel group of 'actor' (ranks 0 to 7) lies on two nodes"),
        (
            ["roles.actor.training.fp8=mxfp8"],
            "'actor' trains with fp8: mxfp8, which a h100-80g does not have",
        ),
        (["cluster.gpu=a100-40g"], "GiB in phase 'train' (actor engine 16.4, critic engine 16.4, "),
        (["cluster.gpu=a100-40g"], "and a a100-40g has 40.0: a larger tp, pp or number of ranks"),
        (["roles.actor.engine.kind=sglang", "roles.actor.engine.engines=9"], "take GPUs up to 8"),
        (["roles.actor.engine.kind=sglang", "roles.actor.engine.mem_fraction=0.1"], "its weights take 15.3"),
        (
            ["roles.actor.engine={kind: sglang, quantization: fp8, mem_fraction: 0.1}"],
            "its weights take 8.8",  # 15.3 in bf16, of which embedding and output layer 2.3
        ),
        (
            ["cluster.gpu=a100-80g", "roles.actor.engine={kind: sglang, quantization: fp8}"],
            "'actor' is served with quantization: fp8, which a a100-80g does not have",
        ),
        (
            ["roles.actor.engine={kind: sglang, engines: 2, nodes: [1, 2]}"],
            "the servers of 'actor' are to start on nodes [1, 2], and the job's are 0 to 1",
        ),
    ],
)
def test_why_a_recipe_does_not_fit(tmp_path: Path, overrides: list[str], said: str) -> None:
    assert any(said in reason for reason in misfits(recipe(tmp_path, *overrides)))


def test_roles_without_gpus_take_turns_and_are_told_where_that_is_too_many(tmp_path: Path) -> None:
    both = [
        "roles.actor.engine={kind: sglang, engines: 2, tp: 2}",
        "roles.critic.engine={kind: sglang, tp: 4}",
    ]
    fits = recipe(tmp_path, *both)
    assert misfits(fits) == []
    assert duties(fits)[0] == (
        "node 0: train actor and critic; 2 server(s) of actor (tp 2, GPUs 0, 1, 2, 3); "
        "1 server(s) of critic (tp 4, GPUs 4, 5, 6, 7)"
    )
    assert missing_gpus(fits, 0, tuple("01234567")) == missing_gpus(fits, 1, ()) == []
    (fault,) = missing_gpus(fits, 0, tuple("0123456"))
    assert "server critic/0 takes GPU 7 of the job" in fault
    (reason,) = misfits(recipe(tmp_path, *both, "roles.actor.engine.engines=3"))
    assert "the servers of 'critic' take GPUs up to 9, a node has 8 ('actor' has servers there too)" in reason
    shared = recipe(
        tmp_path, *both, "roles.actor.engine.gpus=[0,1,2,3]", "roles.critic.engine.gpus=[0,1,2,3]"
    )
    assert duties(shared)[0].count("GPUs 0, 1, 2, 3") == 2, "named, roles may share"


def test_a_role_that_is_not_served_takes_no_gpu(tmp_path: Path) -> None:
    given = [f"roles.{role}.engine={{kind: sglang, tp: 2}}" for role in ("actor", "critic")]
    both = recipe(tmp_path, *given)
    reference = both.roles["actor"].model_copy(update={"training": TrainingConfig(frozen=True)})
    one = both.model_copy(update={"roles": {"reference": reference, "critic": both.roles["critic"]}})
    assert duties(one)[0] == "node 0: train reference and critic; 1 server(s) of critic (tp 2, GPUs 0, 1)"
    assert (server_count(both), server_count(one)) == (2, 1)


FOUR_RANKS = ("world.ranks=4", "roles.actor.layout.tp=2", "roles.critic.layout.tp=2", "cluster.gpu=null")


@pytest.mark.parametrize(
    ("gpus", "more", "refused"),
    [
        ("[0,1]", [], ""),  # all share: CUDA IPC
        ("[4,5]", [], ""),  # none shares: NCCL
        ("[3,5]", [], ""),  # one is on a rank's GPU, but that rank sends nothing
        ("[0,5]", [], "on GPU 0 of node 0 is also a rank that sends, and NCCL takes one process of a GPU; "
                      "CUDA IPC does not reach GPU 5 of node 0"),
        ("[2,4]", ["roles.actor.layout.pp=2"], "on GPU 2 of node 0 is also"),  # the second stage's sender
        ("[2,4]", ["roles.actor.layout.first_rank=2"], "on GPU 2 of node 0 is also"),
        ("[0,5]", ["roles.actor.publication.transport=disk"], ""),
        ("[0,5]", ["roles.actor.publication.transport=tensor"], "no rank is on GPU 5 of node 0"),
        ("[0,1]", ["roles.actor.publication.transport=group"], "on GPU 0 of node 0 is also a rank"),
        ("[2,3]", ["roles.actor.publication.transport=group"], ""),
    ],
)  # fmt: skip
def test_which_way_weights_go_where_some_servers_share_gpus_with_ranks(
    tmp_path: Path, gpus: str, more: list[str], refused: str
) -> None:
    """Decided before anything starts: NCCL would fail at the first publication."""
    engine = {"kind": "sglang", "engines": 2, "gpus": gpus}
    given = [f"roles.actor.engine.{key}={value}" for key, value in engine.items()]
    found = publication_faults(recipe(tmp_path, *FOUR_RANKS, *given, *more))
    assert len(found) == (1 if refused else 0)
    assert refused in "".join(found)


def test_a_gpu_that_is_named_twice_is_refused_with_its_place(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"'actor' names a GPU twice .*\[0, 0\]") as raised:
        recipe(tmp_path, "roles.actor.engine={kind: sglang, engines: 2, gpus: [0, 0]}")
    assert "roles.actor.engine" in raised.value.where


def test_an_unknown_gpu_is_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no GPU called 'h1000'.*(?s:.*)h100-80g"):
        misfits(recipe(tmp_path, "cluster.gpu=h1000"))


def test_servers_take_memory_on_their_gpus_alone(tmp_path: Path) -> None:
    both = [
        f"roles.{role}.engine.{key}"
        for role in ("actor", "critic")
        for key in ("kind=sglang", "engines=2", "mem_fraction=0.3", "max_batch_tokens=1000000")
    ]
    rank, need, parts = heaviest(recipe(tmp_path, *both, "roles.critic.engine.gpus=[4,5]"))
    assert rank == 0
    assert parts["actor server's weights"] + parts["actor server's KV cache"] == pytest.approx(0.3 * 79.6)
    assert "critic server's weights" not in parts
    assert need == pytest.approx(sum(parts.values()))


def test_servers_on_other_nodes_take_memory_there(tmp_path: Path) -> None:
    """Two nodes of eight ranks; the trainer's ranks are on both, servers on the second alone."""
    given = "roles.actor.engine={kind: sglang, engines: 2, tp: 2, nodes: [1], mem_fraction: 0.3, "
    given += "max_batch_tokens: 1000000}"
    rank, _, parts = heaviest(recipe(tmp_path, given))
    assert rank == 8
    assert parts["actor server's weights"] + parts["actor server's KV cache"] == pytest.approx(0.3 * 79.6)
    spread = recipe(tmp_path, "roles.actor.engine={kind: sglang, engines: 16, nodes: [0, 1]}")
    assert misfits(spread) == []
    assert [spread.roles["actor"].engine.node_of(index) for index in (0, 7, 8, 15)] == [0, 0, 1, 1]


def test_trainer_and_engine_nodes_from_the_recipe(tmp_path: Path) -> None:
    """Two nodes for the actor's engines, one for the critic's, two that train; told in the script."""
    apart = [
        "world.ranks=40",
        "roles.actor.layout.first_rank=24", "roles.critic.layout.first_rank=24",
        "roles.actor.engine={kind: sglang, engines: 8, tp: 2, nodes: [0, 1]}",
        "roles.critic.engine={kind: sglang, engines: 8, nodes: [2]}",
    ]  # fmt: skip
    assert duties(recipe(tmp_path, *apart)) == [
        "nodes 0 to 1: 4 server(s) of actor (tp 2, GPUs 0, 1, 2, 3, 4, 5, 6, 7)",
        "node 2: 8 server(s) of critic (tp 1, GPUs 0, 1, 2, 3, 4, 5, 6, 7)",
        "nodes 3 to 4: train actor and critic",
    ]
    assert duties(recipe(tmp_path)) == ["nodes 0 to 1: train actor and critic"]
    given = recipe(tmp_path, *apart)
    text = script.render(given, tmp_path / "big.yaml", apart, {})
    assert "#SBATCH --nodes=5\n" in text
    assert "# nodes 3 to 4: train actor and critic\nset -euo pipefail\n" in text
    assert misfits(given) == []


def test_the_rendered_script(tmp_path: Path) -> None:
    given = ["seed=3", "name=it's"]
    text = script.render(
        recipe(tmp_path), tmp_path / "big.yaml", given, {"partition": "gpu", "time": "02:00:00"}
    )
    for line in ("--job-name=big", "--nodes=2", "--ntasks-per-node=8", "--cpus-per-task=4",
                 "--gpus-per-node=8", "--time=02:00:00", "--partition=gpu", "--signal=B:USR1@300",
                 "--requeue", "--open-mode=append"):  # fmt: skip
        assert text.count(f"#SBATCH {line}\n") == 1, line
    assert f"export GENAC_HOME={ROOT}\n" in text
    assert f"export RECIPE={tmp_path}/big.yaml\n" in text
    assert """genac_job seed=3 'name=it'"'"'s' "$@"\n""" in text
    assert text.startswith("#!/usr/bin/env bash\n#SBATCH")
    assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0
    on_cpus = script.render(recipe(tmp_path, "cluster.gpu=null"), tmp_path / "big.yaml", [], {})
    assert "gpus-per-node" not in on_cpus


def test_a_recipe_that_does_not_fit_is_not_rendered(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not fit"):
        script.render(recipe(tmp_path, "cluster.gpu=a100-40g"), tmp_path / "big.yaml", [], {})


def test_the_script_is_that_of_the_stages() -> None:
    assert script.kind_of(load_recipe(ROOT / "recipes/quickstart.yaml")) == "pipeline"
    for kind in ("sft", "reinforce", "ppo", "pipeline"):
        assert "genac_job" in script.template(kind)


def test_the_jobs_plan(tmp_path: Path) -> None:
    given = recipe(tmp_path, "roles.actor.engine.kind=sglang")
    found = job.plan(given, JOB | {"GENAC_PEER": "127.0.0.1", "SLURM_RESTART_COUNT": "2"})
    assert found["GENAC_LOGS"] == str(tmp_path / "runs/big/logs/77-r2")
    assert (tmp_path / "runs/big/logs/latest").resolve() == Path(found["GENAC_LOGS"])
    assert (found["GENAC_RESUME"], found["GENAC_FINISHED"], found["GENAC_RANKS"]) == ("", "", "16")
    assert found["MASTER_PORT"] != found["GENAC_PREFLIGHT_PORT"]
    assert "roles.actor.engine.port=" in found["GENAC_ADDED"], "of the job's window"
    assert "host" not in found["GENAC_ADDED"], "each node has an address of its own"
    assert "critic" not in found["GENAC_ADDED"]
    each = "{kind: sglang, engines: 16, nodes: [0, 1], gpus: [0, 1, 2, 3, 4, 5, 6, 7], mem_fraction: 0.2}"
    many = [f"roles.{role}.engine={each}" for role in ("actor", "critic")]
    window = job_ports(77, servers=32)
    first = {"actor": window[8], "critic": window[24]}
    added = job.plan(recipe(tmp_path, *many), JOB)["GENAC_ADDED"].split()
    assert added == [f"roles.{role}.engine.port={port}" for role, port in first.items()]
    assert first["critic"] + 16 <= window.stop, "the last server's port is the job's own"
    shell = job.as_shell({"A": "it's"}) + 'printf %s "$A"'
    assert subprocess.run(["bash", "-c", shell], capture_output=True, text=True).stdout == "it's"


@pytest.mark.parametrize(("stage", "finished"), [(0, ""), (1, "1")])
def test_a_run_that_was_begun_is_resumed(tmp_path: Path, stage: int, finished: str) -> None:
    for serial, name in ((1, "ppo-00001"), (2, "ppo-00002"), (3, ".part-ppo-00003")):
        folder = tmp_path / "runs/big/checkpoints" / name
        folder.mkdir(parents=True)
        state = {"at": {"stage": stage}, "position": ["ppo", serial], "lengths": lengths(recipe(tmp_path))}
        manifest = {"format": 1, "serial": serial, "roles": {}, "trained": [], "state": state}
        (folder / "manifest.json").write_text(json.dumps(manifest))
    (tmp_path / "runs/big/checkpoints/ppo-00009").mkdir()
    (tmp_path / "runs/big/checkpoints/ppo-00009/manifest.json").write_text("{")
    found = job.plan(recipe(tmp_path), JOB)
    assert (found["GENAC_RESUME"], found["GENAC_POSITION"]) == ("--resume", "ppo 2")
    assert found["GENAC_FINISHED"] == finished


def test_a_finished_run_with_more_steps_is_not_finished(tmp_path: Path) -> None:
    folder = tmp_path / "runs/big/checkpoints/ppo-end"
    folder.mkdir(parents=True)
    made_with = lengths(recipe(tmp_path))
    state = {"at": {"stage": 1}, "position": ["ppo", 9], "lengths": made_with, "inside": {}}
    manifest = {"format": 1, "serial": 1, "roles": {}, "trained": ["actor"], "state": state}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert job.plan(recipe(tmp_path), JOB)["GENAC_FINISHED"] == "1"
    more = recipe(tmp_path, f"stages.ppo.steps={made_with['ppo'] + 1}")
    found = job.plan(more, JOB)
    assert (found["GENAC_RESUME"], found["GENAC_FINISHED"]) == ("--resume", "")


def test_a_run_that_lives_elsewhere_is_not_begun(tmp_path: Path) -> None:
    with held(tmp_path / "runs/big", "the run"):
        (path,) = (tmp_path / "runs/big/.lock").glob("*.json")
        holder = json.loads(path.read_text())
        path.write_text(json.dumps({**holder, "pid": os.getppid(), "began": began(os.getppid())}))
        with pytest.raises(InputError, match="the run is under way"):
            job.plan(recipe(tmp_path), JOB)


@pytest.mark.parametrize("environ", [{"SLURM_JOB_NUM_NODES": "1"}, {"SLURM_GPUS_ON_NODE": "4"}])
def test_nodes_that_are_not_the_recipes(tmp_path: Path, environ: dict[str, str]) -> None:
    with pytest.raises(InputError, match="sbatch --nodes=2 --ntasks-per-node=8 --cpus-per-task=4 --gpus-per"):
        job.plan(recipe(tmp_path), JOB | environ)


def test_attempts_that_come_no_further_end_the_job(tmp_path: Path) -> None:
    given = recipe(tmp_path)
    for restarts in ("0", "1"):
        job.plan(given, JOB | {"SLURM_RESTART_COUNT": restarts})
    with pytest.raises(InputError, match="2 attempts in a row came no further than the beginning"):
        job.plan(given, JOB | {"SLURM_RESTART_COUNT": "2"})
    (tmp_path / "runs/big/logs/77-r1/from").write_text("ppo 5")
    job.plan(given, JOB | {"SLURM_RESTART_COUNT": "2"})
