"""Actor and critic as adapters on one frozen base, against two whole models.

Measured, on one CPU rank with a pair of small models and with one of SmolLM2-135M: bytes of what each way
holds for training (weights, gradients, optimizer states), bytes that a publication of both roles is at the
least (whole weights, or the adapters of an engine that holds the base), floating-point operations of a
training step of both (torch's counter: the products that were done), and its processor time, in turns, the
median of each. With the serving environment (GENAC_SERVE_PYTHON; `make serve-env` prints it) also what a
publication to real SGLang servers takes, and what these decode (benchmarks/adapters_served.py). Processor
seconds are the measure where others load the machine; `load` says whether they did.

Estimated, for the cluster recipes of 8B, 32B and 70B: GPUs, the state of both roles on the fullest one
(recipe/estimate.py), a publication's bytes, and the operations of a step of training, in which a token costs
6 for each weight that is trained and 4 for a frozen one (studies/cost.py); 2 more of either where layers are
computed again, which is not in the figures. No GPU was asked.
Run: python -m benchmarks.adapters [--turns 5] [--models small SmolLM2-135M] [--estimate]
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.adapters_served import served
from benchmarks.machine import save, table
from benchmarks.published_models import write_place
from genac_megatron.models.build import build_model  # noqa: F401  (megatron's CPU hook before its first import)
from genac_megatron.models.hf_folder import HfFolder
from genac_megatron.models.mapping import load_hf_into, random_weights
from genac_megatron.models.registry import shape_of
from genac_megatron.models.sizes import adapter_parameters, parameters
from genac_megatron.recipe.estimate import BYTES, memory_of, place_of
from genac_megatron.recipe.loader import load_recipe
from genac_megatron.recipe.rules import read_shape
from genac_megatron.recipe.schema import Recipe, RoleConfig
from genac_megatron.recipe.sharing import owner_of
from genac_megatron.records import Sample
from genac_megatron.serving.sglang.server import PYTHON_VARIABLE, Zygote, serving_python
from genac_megatron.training.layout import Layout, init_world
from genac_megatron.training.offload import states_of
from genac_megatron.training.role import Role
from tools.fetch_smollm2 import ensure

RECIPES = Path(__file__).resolve().parents[1] / "recipes" / "cluster"
PAIRS = {  # whole models, adapters on one base
    "8B": ("pipeline-qwen3-8b-2n8g-tp4", "pipeline-qwen3-8b-1n8g-tp4-lora"),
    "32B": ("pipeline-qwen3-32b-5n8g-tp8pp4", "pipeline-qwen3-32b-2n8g-tp8-lora"),
    "70B": ("pipeline-llama-3.1-70b-9n8g-tp8pp4", "pipeline-llama-3.1-70b-4n8g-tp8pp2-lora"),
}
SIZES: dict[str, Any] = {
    "layers": 4, "hidden": 256, "ffn": 768, "heads": 4, "kv_heads": 2, "head_dim": 64, "vocab": 512,
}  # fmt: skip


@dataclass(frozen=True)
class Measured:
    """A model, and how much is done with it."""

    model: Callable[[], dict[str, Any]]  # a recipe's block
    vocab: int
    rank: int
    rows: int  # sequences of a training step
    tokens: int  # of each
    requests: int  # at a time
    new: int  # tokens of each


MODELS = {
    "small": Measured(
        lambda: {"family": "qwen3", "shape": SIZES, "tokenizer": "builtin:tiny"},
        *(SIZES["vocab"], 8, 8, 257, 32, 64),
    ),
    "SmolLM2-135M": Measured(lambda: {"hf": str(ensure())}, 49_152, 32, 4, 129, 8, 32),
}


# --- measured ------------------------------------------------------------------------------------


def pair(what: Measured, rank: int | None) -> list[Role]:
    """Actor and critic, ready to train; rank: of their adapters on one base, None: two whole models."""
    roles: list[Role] = []
    for name in ("actor", "critic"):
        adapter = None if rank is None else {"rank": rank, "alpha": 2 * rank}
        config = RoleConfig.model_validate(
            {
                "model": what.model(),
                "training": {"dtype": "fp32", "tokens_per_microbatch": 1024, "adapter": adapter},
                "engine": {"kind": "sglang", "dtype": "fp32", "enable_lora": rank is not None},
            }
        )
        layout, shape = Layout.from_config(name, config.layout, 1), shape_of(config.model, what.vocab)
        beside = roles[0] if rank is not None and roles else None
        role = Role(name, config, shape, layout, layout.groups(), beside=beside)
        if beside is None:
            hf = config.model.hf
            get = random_weights(shape, 0) if hf is None else HfFolder(hf).get
            load_hf_into(role.models, layout, shape, get)
        role.begin_stage(None, 1000)
        roles.append(role)
    return roles


def held(tensors: Iterable[Tensor]) -> int:
    """Bytes of their storages, each counted once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def state_bytes(roles: list[Role]) -> int:
    """Weights, gradients, masters and moments of both roles."""
    found: list[Tensor] = []
    for role in roles:
        found += [parameter for model in role.models for parameter in model.parameters()]
        buffers = [buffer for chunk in role.chunks for buffer in getattr(chunk, "buffers", [])]
        found += [t for b in buffers for t in (b.grad_data, b.param_data) if t is not None]
        found += list(states_of(role.optimizer))
    return held(found)


def published_bytes(role: Role) -> int:
    """The least that engines need of a new version, which hold what does not change."""
    adapter = role.config.training.adapter
    count = (
        parameters(role.shape)
        if adapter is None
        else adapter_parameters(role.shape, adapter, 1, role.shape.layers)
    )
    return count * BYTES[role.config.training.dtype]


def step_loss(logp_T: Tensor, entropy_T: Tensor | None, fields: Any) -> Any:
    """The mean negative log-prob."""
    return -(logp_T * fields["weights"]).sum(), {}


def step(roles: list[Role], what: Measured) -> None:
    each = what.tokens - 1
    rows = [[(7 * row + 3 * t) % what.vocab for t in range(what.tokens)] for row in range(what.rows)]
    batch = [Sample(row, 1, {"weights": [1 / (each * len(rows))] * each}) for row in rows]
    for role in roles:
        role.train_step(batch, step_loss)


def measured(name: str, turns: int, zygote: Zygote | None, folder: Path) -> list[list[dict[str, Any]]]:
    """A row for each way; and, with a zygote of servers, one for each way to ask them."""
    what = MODELS[name]
    ways = {"two whole models": pair(what, None), f"adapters of rank {what.rank}": pair(what, what.rank)}
    rows: dict[str, dict[str, Any]] = {}
    for way, roles in ways.items():
        with FlopCounterMode(display=False) as counter:
            step(roles, what)  # the first also makes the optimizer's states
        rows[way] = {
            "model": name,
            "pair": way,
            "state MB": round(state_bytes(roles) / 1e6, 2),
            "publication MB": round(sum(map(published_bytes, roles)) / 1e6, 3),
            "step GFLOPs": round(counter.get_total_flops() / 1e9, 2),
        }
    times: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(turns):
        for way, roles in ways.items():
            began = time.process_time()
            step(roles, what)
            times[way].append(time.process_time() - began)
    for way, found in times.items():
        rows[way]["step CPU s"] = round(statistics.median(found), 3)
    if zygote is None:
        return [list(rows.values()), []]
    work = {"requests": what.requests, "new": what.new, "turns": turns}
    figures, asked = served(ways, zygote, folder, **work)
    return [
        [rows[way] | figures[way] for way in rows],
        [{"model": name, **row} for row in asked],
    ]


# --- estimated -----------------------------------------------------------------------------------


def estimated(size: str, whole: bool) -> dict[str, Any]:
    """A cluster recipe's figures."""
    recipe = load_recipe(RECIPES / f"{PAIRS[size][0 if whole else 1]}.yaml")
    shape, actor = read_shape(recipe.roles["actor"].model), recipe.roles["actor"].training
    count = parameters(shape)
    own = 0 if actor.adapter is None else adapter_parameters(shape, actor.adapter, 1, shape.layers)
    each = 6 * count if whole else 4 * count + 6 * own
    published = (count if whole else own) * BYTES[actor.dtype] * len(recipe.roles)
    return {
        "size": size,
        "pair": "two whole models" if whole else f"adapters of rank {actor.adapter.rank}",  # type: ignore[union-attr]
        "GPUs": recipe.world.ranks,
        "state GB per GPU": round(fullest(recipe) / 1e9, 2),
        "state GB": round(sum(states(recipe)) / 1e9, 1),
        "publication GB": round(published / 1e9, 3),
        "GFLOPs per token": round(each / 1e9, 1),
    }


def states(recipe: Recipe) -> list[float]:
    """Bytes of both roles' weights, gradients and optimizer states, by rank."""
    world, found = recipe.world.ranks, []
    for rank in range(world):
        total = 0.0
        for name, role in recipe.roles.items():
            shared = owner_of(recipe, name) is not None
            place = place_of(role.layout, rank, world)
            memory = memory_of(role, read_shape(role.model), place, world, shared=shared)
            total += memory.weights + memory.gradients + memory.optimizer
        found.append(total)
    return found


def fullest(recipe: Recipe) -> float:
    return max(states(recipe))


def all_measured(names: list[str], turns: int) -> list[list[dict[str, Any]]]:
    """The tables of all models: ways to train, and, where there is an environment for it, to ask servers."""
    init_world()
    tables: list[list[dict[str, Any]]] = [[], []]
    with tempfile.TemporaryDirectory(prefix="genac-") as folder:
        there = PYTHON_VARIABLE in os.environ
        zygote = Zygote(serving_python(), Path(folder) / "zygote.log") if there else None
        try:
            for name in names:
                place = Path(folder) / name
                place.mkdir()
                for rows, more in zip(tables, measured(name, turns, zygote, place), strict=True):
                    rows += more
        finally:
            if zygote is not None:
                zygote.close()
    return tables


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--turns", type=int, default=5, help="timed steps, and requests, of each way")
    parser.add_argument("--estimate", action="store_true", help="the estimate alone")
    options = parser.parse_args()
    load = round(os.getloadavg()[0], 1)  # what else the machine was doing
    rows, asked = ([], []) if options.estimate else all_measured(options.models, options.turns)
    with tempfile.TemporaryDirectory() as folder:
        write_place(Path(folder))
        here = Path.cwd()
        os.chdir(folder)
        try:
            larger = [estimated(size, whole) for size in PAIRS for whole in (True, False)]
        finally:
            os.chdir(here)
    for found in (rows, asked, larger):
        if found:
            print(table(found))
    if rows:
        settings = {**vars(options), "load": load, "sizes": SIZES, "larger": larger}
        save("adapters", settings, [*rows, *asked])


if __name__ == "__main__":
    main()
