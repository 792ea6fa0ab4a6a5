"""The real specs of all servers that a recipe starts on GPUs of a made-up node. No GPU is here."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from genac_megatron.cluster.placement import placement
from genac_megatron.recipe.schema import Recipe
from genac_megatron.recipe.servers import node_servers, plan_gpus, served_adapters, started_engines
from genac_megatron.serving.sglang.cores import Topology, deal_cores
from genac_megatron.serving.sglang.fleet import Fleet
from genac_megatron.serving.sglang.server import ServerSpec

FOLDER = Path(__file__).resolve().parents[1] / "recipes"
RECIPES = sorted(FOLDER.glob("cluster/*-*.yaml")) + sorted(FOLDER.glob("*/qwen3-4b-*.yaml"))
# Two sockets of 32 cores, GPUs 0 to 3 near the first one; the job has the cores from 8 on.
HELD = range(8, 64)
NODE = Topology(
    tuple((core,) for core in HELD), {c: c // 32 for c in HELD}, {gpu: gpu // 4 for gpu in range(8)}
)
MASK = "GPU-{:08x}"  # as a job may be given them, in any order


def specs_of(recipe: Recipe, folder: Path) -> Iterator[tuple[int, ServerSpec]]:
    """The node and the spec of every server that a run of the recipe starts on GPUs."""
    engines = started_engines(recipe)
    plan = plan_gpus(engines)
    for node in range(placement(recipe).nodes):
        cores = deal_cores(node_servers(engines, node, gpu=True), NODE)
        for role, engine in engines.items():
            more = {"node": node, "places": plan[role], "cores": cores}
            more["adapters"] = served_adapters(recipe, role)
            fleet = Fleet(role, engine, {"model_type": "llama"}, folder / "m", folder, "cuda", **more)
            for index in fleet._here():
                yield node, fleet._spec(index, 20_000 + index)
