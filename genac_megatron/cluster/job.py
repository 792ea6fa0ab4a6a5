"""What a batch script must know before it starts ranks, worked out on the job's first node. No torch."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from genac_megatron.cluster.placement import SUGGESTED, Placement, misfits, placement, server_count
from genac_megatron.errors import GenacError, InputError
from genac_megatron.observe.lock import run_lock
from genac_megatron.observe.manifest import read_manifest, survey
from genac_megatron.observe.runinfo import RunFolder
from genac_megatron.platform.network import (
    ENGINES,
    PREFLIGHT,
    RUN,
    bracketed,
    fabric_address,
    free_ports,
    job_ports,
)
from genac_megatron.recipe.resume import finished
from genac_megatron.recipe.schema import Recipe

LATEST = "latest"
FROM = "from"  # in an attempt's folder: the position that it began at
IDLE_ATTEMPTS = 2  # without a step in so many of a job's attempts, another would do no better


def attempt_name(environ: Mapping[str, str]) -> str:
    """The attempt's folder under logs/: job id and how often Slurm has restarted it."""
    return f"{environ['SLURM_JOB_ID']}-r{environ.get('SLURM_RESTART_COUNT', '0')}"


def newest_manifest(checkpoints: Path) -> dict[str, Any] | None:
    """The manifest of the newest whole checkpoint; None where there is none."""
    newest = survey(checkpoints).newest  # the run itself says what is wrong with others
    return None if newest is None else read_manifest(newest)


def check_allocation(recipe: Recipe, environ: Mapping[str, str]) -> Placement:
    """The recipe's placement. Raises InputError where it does not fit, or the job's nodes are not its."""
    place = placement(recipe)
    if reasons := misfits(recipe):
        raise InputError("\n  ".join(reasons), where=f"recipe {recipe.name}", way_out=SUGGESTED)
    nodes = int(environ.get("SLURM_JOB_NUM_NODES", "1"))
    gpus = environ.get("SLURM_GPUS_ON_NODE")
    has = f"{nodes} node(s)" + (f" of {gpus} GPU(s)" if gpus else "")
    if nodes != place.nodes or (gpus is not None and int(gpus) < place.gpus_per_node):
        raise InputError(
            f"the recipe needs {place.nodes} node(s) of {place.ranks_per_node} rank(s) and "
            f"{place.gpus_per_node} GPU(s); the job has {has}",
            where=f"recipe {recipe.name}",
            way_out=f"sbatch {sbatch_options(place)} ..., or genac slurm RECIPE, which works it out",
        )
    return place


def sbatch_options(place: Placement) -> str:
    """The options of sbatch that give a placement its nodes."""
    options = f"--nodes={place.nodes} --ntasks-per-node={place.ranks_per_node}"
    options += f" --cpus-per-task={place.cpus_per_rank}"
    return options + (f" --gpus-per-node={place.gpus_per_node}" if place.gpus_per_node else "")


def plan(recipe: Recipe, environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Makes the attempt's log folder and returns the variables that the batch script takes over.

    Raises InputError where the recipe does not fit the allocation, GenacError where no port is free.
    """
    place = check_allocation(recipe, environ)
    folder = RunFolder(Path(recipe.runs).absolute() / recipe.name)
    run_lock(folder.path).refuse()
    manifest = newest_manifest(folder.checkpoints)
    done = manifest is not None and finished(recipe, manifest["state"], str(folder.checkpoints))
    named = environ.get("GENAC_FABRIC", "").replace(",", " ").split()
    address = fabric_address(named, environ.get("GENAC_PEER", ""))
    number, servers = int(environ["SLURM_JOB_ID"]), server_count(recipe)
    ports = free_ports(number, 2, servers=servers)
    check_progress(folder, environ, position(manifest))
    logs = begin_attempt(folder, attempt_name(environ))
    (logs / FROM).write_text(position(manifest), encoding="utf-8")
    return {
        "GENAC_RUN": str(folder.path),
        "GENAC_LOGS": str(logs),
        "GENAC_NODES": str(place.nodes),
        "GENAC_RANKS": str(place.ranks),
        "GENAC_RANKS_PER_NODE": str(place.ranks_per_node),
        "GENAC_RESUME": "--resume" if manifest is not None else "",
        "GENAC_POSITION": position(manifest),
        "GENAC_FINISHED": "1" if done else "",
        "MASTER_ADDR": address,
        "MASTER_PORT": str(ports[RUN]),
        "GENAC_PREFLIGHT_PORT": str(ports[PREFLIGHT]),
        "GENAC_MEETS_AT": f"{bracketed(address)}:{ports[RUN]}",
        "GENAC_ADDED": " ".join(added_overrides(recipe, job_ports(number, servers=servers))),
    }


def added_overrides(recipe: Recipe, ports: range) -> list[str]:
    """What only the job knows of a recipe's servers: its ports. (Their address is each node's own.)"""
    found, port = [], ports[ENGINES]
    for name, role in recipe.roles.items():
        if not role.starts_servers:
            continue
        if role.engine.port is None:
            found.append(f"roles.{name}.engine.port={port}")
        port += role.engine.engines
    return found


def position(manifest: Mapping[str, Any] | None) -> str:
    """Where a checkpoint stands, as "stage step"; "" where there is none."""
    if manifest is None:
        return ""
    stage, step = manifest["state"]["position"]
    return f"{stage} {step}"


def check_progress(folder: RunFolder, environ: Mapping[str, str], now: str) -> None:
    """Raises InputError where the job's last attempts all began where this one would."""
    restarts, job = int(environ.get("SLURM_RESTART_COUNT", "0")), environ["SLURM_JOB_ID"]
    if restarts < IDLE_ATTEMPTS:
        return
    files = [folder.logs / f"{job}-r{count}" / FROM for count in range(restarts - IDLE_ATTEMPTS, restarts)]
    if all(file.exists() and file.read_text(encoding="utf-8") == now for file in files):
        raise InputError(
            f"{IDLE_ATTEMPTS} attempts in a row came no further than {now or 'the beginning'}",
            where=f"job {job}",
            way_out="give the job more time, or save more often (checkpoint.every)",
        )


def begin_attempt(folder: RunFolder, attempt: str) -> Path:
    """Make logs/<attempt>/ and let `latest` point to it. Raises GenacError where it cannot be written."""
    logs = folder.logs / attempt
    try:
        logs.mkdir(parents=True, exist_ok=True)
        link = folder.logs / f".{LATEST}.{attempt}"
        link.unlink(missing_ok=True)
        link.symlink_to(attempt)
        link.replace(folder.logs / LATEST)
    except OSError as error:
        raise GenacError(
            f"cannot be written: {error.strerror or error}",
            where=str(logs),
            way_out="let `runs:` name a folder on the file system that all nodes share",
        ) from error
    return logs


def as_shell(variables: Mapping[str, str]) -> str:
    """Assignments that a shell may evaluate."""
    return "".join(f"export {name}={shlex.quote(value)}\n" for name, value in variables.items())
