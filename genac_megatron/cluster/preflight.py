"""`genac preflight` under srun: every rank takes part, the first of each node looks at its node.

Reports are files on the shared file system, so that a node that hangs or cannot start is named by what it
left out (verdict.py). Nothing here decides; every wait has a limit.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from genac_megatron.cluster.heartbeat import node_name, write
from genac_megatron.cluster.placement import server_count
from genac_megatron.errors import EXIT_OK, InputError
from genac_megatron.launch import adopt_slurm
from genac_megatron.platform.network import ENGINES, interface_towards, is_free, job_ports
from genac_megatron.recipe.data import BenchmarkSource
from genac_megatron.recipe.schema import Recipe
from genac_megatron.recipe.servers import started_engines
from genac_megatron.recipe.source_rules import source_tasks
from genac_megatron.recipe.tasks import DatasetTask, QuestionsBlock, single_tasks
from genac_megatron.serving.sglang.gpus import refusals, visible_gpus
from genac_megatron.serving.sglang.server import serving_python
from genac_megatron.tasks.benchmarks import find_benchmark

JOIN_S = 60.0  # for all ranks to meet, and for each collective
SEE_S = 30.0  # for all nodes to see each other's canaries
TOOL_S = 20.0
ROUNDS = 5
ELEMENTS_GPU, ELEMENTS_CPU = 64 << 20, 1 << 20  # of the all-reduce, fp32
QUERY = (
    "index", "name", "driver_version", "memory.total", "memory.used", "ecc.errors.uncorrected.volatile.total",
    "uuid",
)  # fmt: skip
CANARY = "canary"
Report = dict[str, Any]


def preflight(recipe: Recipe, folder: Path) -> int:
    """This rank's part; leaves node-<name>.json (first of a node) and rank-<n>.json in `folder`."""
    os.environ.update(adopt_slurm())
    rank, local = int(os.environ.get("RANK", "0")), int(os.environ.get("LOCAL_RANK", "0"))
    began = time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    node = node_name()
    (folder / f"{CANARY}-{rank:05d}").write_text(node, encoding="utf-8")
    if local == 0:
        write(folder / f"node-{node}.json", {"node": node, "rank": rank, **look(recipe)})
    report: Report = {"rank": rank, "node": node, "state": "before the all-reduce"}
    path = folder / f"rank-{rank:05d}.json"
    write(path, report)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        report |= _guarded(communicate)
    report["unseen"] = _unseen(folder, int(os.environ.get("WORLD_SIZE", "1"))) if local == 0 else []
    report |= {"state": "done", "seconds": time.monotonic() - began}
    write(path, report)
    print(f"preflight rank {rank} on {node}: {report.get('error') or 'done'}", flush=True)
    return EXIT_OK


def _guarded(act: Callable[[], Report]) -> Report:
    try:
        return act()
    except Exception as error:  # whatever it is, it belongs in the report
        return {"error": f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no message'])[0]}"}


def look(recipe: Recipe) -> Report:
    """What this node shows: GPUs, versions, disk, ports, model and data."""
    ports = job_ports(int(os.environ.get("SLURM_JOB_ID", "0")), servers=server_count(recipe))
    node = int(os.environ.get("SLURM_NODEID", "0"))
    return {
        "host": socket.gethostname(),
        "interface": interface_towards(os.environ.get("MASTER_ADDR", "")),
        "gpus": gpus(),
        "versions": _guarded(versions),
        "free_gib": {name: _free_gib(path) for name, path in _folders(recipe).items()},
        "busy_ports": [port for port in ports[ENGINES:] if not is_free(port)],
        "missing": [*missing_inputs(recipe, node), *missing_gpus(recipe, node, visible_gpus(os.environ))],
    }


def gpus() -> list[dict[str, str]] | str | None:
    """nvidia-smi's rows; None where there is no nvidia-smi, text where it fails."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TOOL_S)
    except subprocess.TimeoutExpired:
        return f"nvidia-smi did not answer in {TOOL_S:.0f} s"
    if done.returncode:
        return f"nvidia-smi: {(done.stdout + done.stderr).strip().splitlines()[-1:]}"
    rows = [row.split(",") for row in done.stdout.splitlines() if row.strip()]
    found = [dict(zip(QUERY, (cell.strip() for cell in row), strict=False)) for row in rows]
    return with_job(found, visible_gpus(os.environ))


def with_job(rows: list[dict[str, str]], visible: Sequence[str] | None) -> list[dict[str, str]]:
    """nvidia-smi's rows, `job: no` in those that are another job's: it shows all where no cgroup hides them.

    visible: as CUDA_VISIBLE_DEVICES names the job's, by number or UUID, which may be cut short; None: all.
    What else runs on the GPU of a MIG instance is not this job's affair.
    """

    def ours(row: dict[str, str]) -> bool:
        uuid = row.get("uuid", "")
        return any(
            name == row["index"] or (len(name) > 4 and uuid.startswith(name)) for name in visible or ()
        )

    return [row if visible is None or ours(row) else row | {"job": "no"} for row in rows]


def versions() -> Report:
    """The version matrix: it must be the same on every node."""
    import importlib.metadata as metadata

    from genac_megatron import __version__
    from genac_megatron.platform.doctor import EXTRA, PARTS

    found = {"genac": __version__, "python": ".".join(map(str, sys.version_info[:3]))}
    for name in (*(part.name for part in PARTS), *EXTRA):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    import torch

    if torch.cuda.is_available():
        found["cuda"] = torch.version.cuda or ""
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    return found


def _folders(recipe: Recipe) -> dict[str, Path]:
    runs = Path(recipe.runs).absolute()
    while not runs.exists():
        runs = runs.parent
    return {"runs": runs, "tmp": Path(os.environ.get("TMPDIR", "/tmp")), "shm": Path("/dev/shm")}


def _free_gib(path: Path) -> float | None:
    with contextlib.suppress(OSError):
        return shutil.disk_usage(path).free / 2**30
    return None


def missing_inputs(recipe: Recipe, node: int = 0) -> list[str]:
    """What of the recipe's models and data node number `node` cannot read, and SGLang where it is to serve.

    The recipe's own files are checked on loading; here are the weights, and data sets that would have to be
    fetched.
    """
    found = []
    for name, role in recipe.roles.items():
        if role.starts_servers and node in role.engine.nodes:
            try:
                serving_python(role.engine.python)
            except InputError as error:
                found.append(f"{name}: {error.what}: {error.way_out}")
        if role.model.hf is not None:
            folder = Path(role.model.hf).expanduser()
            weights = list(folder.glob("*.safetensors"))
            if not weights:
                found.append(f"{name}: no safetensors in {folder}")
            found += [f"{name}: {file} cannot be read" for file in weights if not os.access(file, os.R_OK)]
        if role.model.checkpoint is not None and not Path(role.model.checkpoint).expanduser().is_dir():
            found.append(f"{name}: no checkpoint {role.model.checkpoint}")
    for name in _data_sets(recipe):
        if not _has_dataset(name):
            found.append(f"data set {name} is neither a folder nor in the Hugging Face cache (HF_HOME)")
    return found


def _data_sets(recipe: Recipe) -> list[str]:
    """Every data set, file or folder that the recipe's tasks, suites and decontamination read, once each."""
    suites = [*recipe.evaluation.suites, *recipe.evaluation.test]
    own = [suite.task for suite in suites if suite.task is not None]
    tasks = [*single_tasks(recipe.task), *source_tasks(recipe), *own]
    benchmarks: list[BenchmarkSource] = [suite for suite in suites if suite.task is None]
    for task in tasks:
        if isinstance(task, QuestionsBlock) and task.decontaminate is not None:
            benchmarks += task.decontaminate.against
    names = [task.source for task in tasks if isinstance(task, DatasetTask)]
    names += [one.path or find_benchmark(one.name).dataset for one in benchmarks]
    return [name for name in dict.fromkeys(names) if name]


def missing_gpus(recipe: Recipe, node: int, visible: tuple[str, ...] | None) -> list[str]:
    """Servers whose GPUs are not among those that this process sees; visible: as `visible_gpus` says."""
    if recipe.cluster.gpu is None:
        return []
    return [f"{error.what}: {error.way_out}" for error in refusals(started_engines(recipe), node, visible)]


def _has_dataset(name: str) -> bool:
    if Path(name).expanduser().exists():
        return True
    home = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    kept = Path(os.environ.get("HF_DATASETS_CACHE", home / "datasets")) / name.replace("/", "___")
    hub = Path(os.environ.get("HF_HUB_CACHE", home / "hub")) / f"datasets--{name.replace('/', '--')}"
    return kept.is_dir() or hub.is_dir()


def communicate(environ: Mapping[str, str] = os.environ) -> Report:
    """Meet, compare clocks, time an all-reduce. bus_gbs: 10^9 bytes/s, bus bandwidth as in NCCL's tests."""
    import torch
    import torch.distributed as dist

    from genac_megatron import platform

    device = platform.device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=JOIN_S))
    world = dist.get_world_size()
    clocks: list[Any] = [None] * world
    dist.barrier()
    dist.all_gather_object(clocks, time.time())
    data = torch.ones(ELEMENTS_GPU if device.type == "cuda" else ELEMENTS_CPU, device=device)
    dist.all_reduce(data)  # the first one builds the connections
    right = bool((data == world).all())
    _settle(device)
    began = time.perf_counter()
    for _ in range(ROUNDS):
        dist.all_reduce(data)
    _settle(device)
    seconds = (time.perf_counter() - began) / ROUNDS
    size = data.numel() * data.element_size()
    dist.destroy_process_group()
    return {
        "clocks": clocks if environ.get("RANK", "0") == "0" else [],
        "right": right,
        "bus_gbs": 2 * (world - 1) / world * size / seconds / 1e9,
        "all_reduce_mib": size / 2**20,
    }


def _settle(device: Any) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _unseen(folder: Path, world: int) -> list[int]:
    """Ranks whose canary this node does not see on the shared file system, after at most SEE_S seconds."""
    give_up = time.monotonic() + SEE_S
    while True:
        names: set[str] = set()
        with contextlib.suppress(OSError):
            names = set(os.listdir(folder))
        unseen = [rank for rank in range(world) if f"{CANARY}-{rank:05d}" not in names]
        if not unseen or time.monotonic() > give_up:
            return unseen
        time.sleep(0.5)
