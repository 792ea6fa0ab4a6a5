"""`genac slurm`: the repository's batch script with the recipe's nodes, tasks and GPUs in it. No torch."""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from genac_megatron.cluster.placement import SUGGESTED, duties, misfits, placement
from genac_megatron.errors import GenacError, InputError
from genac_megatron.recipe.schema import Recipe

HOME = Path(__file__).resolve().parents[2]
SBATCH_LIMIT_S = 60.0


def kind_of(recipe: Recipe) -> str:
    """Which batch script runs the recipe: sft, reinforce, ppo, or pipeline for stages of several kinds."""
    kinds = {stage.kind for stage in recipe.stages}
    return kinds.pop() if len(kinds) == 1 else "pipeline"


def template(kind: str) -> str:
    """The text of slurm/genac_<kind>.sh. Raises InputError where the package is not in its repository."""
    path = HOME / "slurm" / f"genac_{kind}.sh"
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(
            f"cannot be read: {error.strerror}",
            where=str(path),
            way_out="run genac from a clone of the repository: pip installs no batch scripts",
        ) from None


def render(recipe: Recipe, path: Path, overrides: Sequence[str], options: Mapping[str, str]) -> str:
    """The batch script for a recipe that was read from `path` with `overrides`.

    options: further sbatch options by name, such as {"partition": "gpu"}.
    Raises InputError naming every reason why the recipe does not fit the nodes it names.
    """
    if reasons := misfits(recipe):
        raise InputError("\n  ".join(reasons), where=f"recipe {recipe.name} does not fit", way_out=SUGGESTED)
    place = placement(recipe)
    header = {
        "job-name": recipe.name.replace("/", "-"),  # a part of the output's name
        "nodes": str(place.nodes),
        "ntasks-per-node": str(place.ranks_per_node),
        "cpus-per-task": str(place.cpus_per_rank),
        "gpus-per-node": str(place.gpus_per_node) if place.gpus_per_node else None,
        "time": recipe.cluster.time_limit,
        **options,
    }
    text = template(kind_of(recipe))
    for name, value in header.items():
        text = _with_option(text, name, value)
    asked = shlex.join([*(f"--{name}={value}" for name, value in options.items()), *overrides])
    variables = {
        "GENAC_HOME": str(HOME),
        "RECIPE": str(path.resolve()),
        "GENAC_AGAIN": f"genac slurm {shlex.quote(str(path.resolve()))} {asked}".rstrip(),
    }
    settings = "".join(f"export {name}={shlex.quote(value)}\n" for name, value in variables.items())
    notes = "".join(f"# {line}\n" for line in duties(recipe))
    text = text.replace("set -euo pipefail\n", notes + "set -euo pipefail\n" + settings, 1)
    given = "".join(f" {shlex.quote(word)}" for word in overrides)
    return text.replace('genac_job "$@"', f'genac_job{given} "$@"')


def _with_option(text: str, name: str, value: str | None) -> str:
    """The script with one #SBATCH line set; taken out where `value` is None."""
    line = "" if value is None else f"#SBATCH --{name}={_quoted(value)}\n"
    pattern = re.compile(rf"^#SBATCH --{re.escape(name)}=.*\n", re.MULTILINE)
    if pattern.search(text):
        return pattern.sub(lambda _: line, text, count=1)
    first = text.index("#SBATCH")
    return text[:first] + line + text[first:]


def _quoted(value: str) -> str:
    """A value as sbatch reads it in a #SBATCH line: as a shell does double quotes, without expansion.

    Source: _get_argument in Slurm's src/sbatch/opt.c. Raises InputError where no line can hold it.
    """
    if "\n" in value:
        raise InputError(f"{value!r} has a line break", where="genac slurm", way_out="a name in one line")
    if re.fullmatch(r"[\w%+,.:/@=\[\]-]*", value, re.ASCII):
        return value
    escaped = re.sub(r'([\\"#])', r"\\\1", value)
    return f'"{escaped}"'


def submit(text: str) -> str:
    """Hand a script to sbatch; returns the job's id. Raises GenacError where it is refused."""
    try:
        done = subprocess.run(
            ["sbatch", "--parsable"], input=text, capture_output=True, text=True, timeout=SBATCH_LIMIT_S
        )
    except FileNotFoundError:
        raise InputError(
            "sbatch is not on this machine", way_out="run it on a login node, or --dry-run to see the script"
        ) from None
    except subprocess.TimeoutExpired:
        raise GenacError(f"sbatch did not answer in {SBATCH_LIMIT_S:.0f} s", way_out="see sinfo") from None
    if done.returncode:
        raise GenacError(
            f"sbatch refused the job: {done.stderr.strip()}",
            where="sbatch",
            way_out="sinfo shows partitions and limits; further sbatch options go behind the recipe, as in "
            "genac slurm RECIPE --partition=NAME --account=NAME",
        )
    return done.stdout.strip().split(";")[0]
