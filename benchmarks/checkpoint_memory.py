"""Host memory and bytes written and read of a checkpoint, at dp 1 to 8: the form of before and ours.

gathered: Megatron's `fully_reshardable` as this project used it until 11/2026: every rank holds all states of
the optimizer while it saves, one rank writes them, and each reads all of them. by share: what
`Checkpoints.save` and `load_checkpoint` do. Peaks are the most resident memory that a rank had above what it
had before (its writers' own, which are forked and share it, are not counted), divided by the parameters;
read: the stored pieces that torch's reader was asked for. Run: python -m benchmarks.checkpoint_memory
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import multiprocessing
import os
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from benchmarks.machine import save, table
from genac_megatron.platform.megatron import install

FORMS = ("gathered", "by share")
SHAPE = {"layers": 4, "hidden": 384, "ffn": 1024, "heads": 6, "kv_heads": 2, "head_dim": 64, "vocab": 8192}
LIMIT_S = 1200.0
Figures = dict[str, float]
T = TypeVar("T")


def peak_reset() -> None:
    """Have the kernel count this process's peak from now on."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what was freed and kept would hide what is needed
    Path("/proc/self/clear_refs").write_text("5")


def memory(field: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":")) << 10


def make_role(ranks: int) -> Any:
    """A role over all ranks, data parallel, after a step: it has Adam's states."""
    from genac_megatron.algorithms.losses import make_sft_loss
    from genac_megatron.models.mapping import load_hf_into, random_weights
    from genac_megatron.models.registry import shape_of
    from genac_megatron.recipe.schema import RoleConfig
    from genac_megatron.records import Sample
    from genac_megatron.training.layout import Layout
    from genac_megatron.training.role import Role

    model = {"family": "qwen3", "shape": SHAPE, "tokenizer": "builtin:tiny"}
    config = RoleConfig.model_validate({"model": model, "training": {"dtype": "bf16"}})
    layout = Layout.from_config("actor", config.layout, ranks)
    shape = shape_of(config.model, SHAPE["vocab"])
    role = Role("actor", config, shape, layout, layout.groups())
    load_hf_into(role.models, layout, shape, random_weights(shape, 1))
    role.begin_stage(None, 10)
    samples = [Sample(list(range(9)), 1, fields={"weights": [1 / 16 / ranks] * 8}) for _ in range(2 * ranks)]
    role.train_step(samples, make_sft_loss())
    return role


def save_gathered(role: Any, folder: Path) -> None:
    from megatron.core import dist_checkpointing

    from genac_megatron.platform.megatron import keep_write_errors, own_results_queue, save_options
    from genac_megatron.training.sharding import ROLES, role_state

    own_results_queue()
    keep_write_errors()
    folder.mkdir(parents=True, exist_ok=True)
    state = {ROLES: {role.name: role_state(role, optimizer=True)}}
    dist_checkpointing.save(state, str(folder), **save_options())


def load_gathered(role: Any, folder: Path) -> None:
    """Weights, then the optimizer with the weights once more, as a resume did."""
    from megatron.core import dist_checkpointing

    from genac_megatron.training.sharding import OPTIMIZER, ROLES, role_state

    for optimizer in (False, True):
        request = {ROLES: {role.name: role_state(role, optimizer=optimizer, loading=True)}}
        loaded = dist_checkpointing.load(request, str(folder))[ROLES][role.name]
        if optimizer:
            role.optimizer.load_state_dict(loaded[OPTIMIZER])


def save_by_share(role: Any, folder: Path) -> None:
    from genac_megatron.training.checkpoint import Checkpoints

    Checkpoints(folder.parent, 9, asynchronous=False).save(folder.name, {role.name: role}, {})


def load_by_share(role: Any, folder: Path) -> None:
    from genac_megatron.training.checkpoint import load_checkpoint

    for optimizers in (False, True):
        load_checkpoint(folder, {role.name: role}, optimizers=optimizers)


def use(form: str) -> None:
    """Have Megatron's optimizers save and load in this form."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    from genac_megatron.platform import optimizer_shards

    optimizer_shards.install()
    methods = optimizer_shards.REPLACED if form == "gathered" else optimizer_shards.OWN
    for name, method in methods.items():
        setattr(DistributedOptimizer, name, method)


def count_reads() -> list[int]:
    """From now on, the bytes of each stored piece that this rank reads."""
    from torch.distributed.checkpoint.filesystem import FileSystemReader

    sizes: list[int] = []
    real = FileSystemReader.read_data

    def read(self: Any, plan: Any, planner: Any) -> Any:
        sizes.extend(self.storage_data[item.storage_index].length for item in plan.items)
        return real(self, plan, planner)

    FileSystemReader.read_data = read  # type: ignore[method-assign]
    return sizes


def rank_figures(rank: int, ranks: int, folder: Path) -> list[Figures]:
    """Of both forms: peaks while saving and loading, bytes written and read by this rank."""
    import torch.distributed as dist

    from genac_megatron.training.layout import init_world, seed_everything

    init_world(LIMIT_S)
    seed_everything(0)
    role, reads, found = make_role(ranks), count_reads(), []
    for form in FORMS:
        use(form)
        stored = folder / form.replace(" ", "-") / "ppo-00001"
        weights = stored if form == "gathered" else stored / "weights"
        peaks = []
        for act in (save_gathered, load_gathered) if form == "gathered" else (save_by_share, load_by_share):
            dist.barrier()
            del reads[:]
            peak_reset()
            before = memory("VmRSS")
            act(role, stored)
            peaks.append(memory("VmHWM") - before)
        written = sum(file.stat().st_size for file in weights.glob(f"__{rank}_*.distcp"))
        found.append(
            {"save": peaks[0], "load": peaks[1], "written": float(written), "read": float(sum(reads))}
        )
        dist.barrier()
    return found


def work(act: Callable[..., Any], rank: int, ranks: int, port: int, folder: str, pipe: Any) -> None:
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo",
    }  # fmt: skip
    pipe.send(act(rank, ranks, Path(folder)))
    os._exit(0)  # groups of a world that is over are not taken down one by one


def on_ranks(act: Callable[[int, int, Path], T], ranks: int) -> list[T]:
    """act(rank, ranks, a folder) on so many real ranks at once, over gloo; of each, what it returns."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["genac_megatron.training.role", "genac_megatron.models.build"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory(prefix="checkpoint-memory-") as folder:
        pipes = []
        for rank in range(ranks):
            ours, theirs = context.Pipe()
            args = (act, rank, ranks, port, folder, theirs)
            context.Process(target=work, args=args, daemon=False).start()
            theirs.close()
            pipes.append(ours)
        for rank, pipe in enumerate(pipes):
            if not pipe.poll(LIMIT_S):
                raise SystemExit(f"rank {rank} of {ranks} gave nothing in {LIMIT_S:g} s")
        return [pipe.recv() for pipe in pipes]


def rows_of(ranks: int, parameters: int, figures: list[list[Figures]]) -> list[dict[str, Any]]:
    rows = []
    for index, form in enumerate(FORMS):
        mine = [rank[index] for rank in figures]
        total = sum(rank["written"] for rank in mine)
        rows.append(
            {
                "dp": ranks,
                "form": form,
                "save_peak_bytes_per_parameter": round(max(rank["save"] for rank in mine) / parameters, 1),
                "load_peak_bytes_per_parameter": round(max(rank["load"] for rank in mine) / parameters, 1),
                "written_mb": round(total / 1e6, 1),
                "largest_writer": round(max(rank["written"] for rank in mine) / total, 3),
                "read_mb": round(sum(rank["read"] for rank in mine) / 1e6, 1),
                "read_times": round(sum(rank["read"] for rank in mine) / total, 2),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dp", type=int, nargs="+", default=[1, 2, 4, 8])
    options = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    install()
    from genac_megatron.models.registry import shape_of
    from genac_megatron.models.sizes import parameters
    from genac_megatron.recipe.schema import ModelConfig

    model = {"family": "qwen3", "shape": SHAPE, "tokenizer": "builtin:tiny"}
    count = parameters(shape_of(ModelConfig.model_validate(model), SHAPE["vocab"]))
    rows = [row for dp in options.dp for row in rows_of(dp, count, on_ranks(rank_figures, dp))]
    print(table(rows))
    print(save("checkpoint_memory", {"parameters": count, "shape": SHAPE, "dtype": "bf16"}, rows))


if __name__ == "__main__":
    main()
