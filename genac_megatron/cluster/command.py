"""`genac slurm | preflight | status`: their grammar, and what each calls. Imports no torch by itself."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from genac_megatron.errors import EXIT_OK

COMMANDS = ("slurm", "preflight", "status")
SBATCH = ("partition", "account", "qos", "constraint", "reservation", "time")


def add_commands(commands: Any) -> None:
    """Add the cluster's commands to the command line's subparsers."""
    slurm = commands.add_parser("slurm", help="render and submit the batch script of a recipe")
    _add_recipe(slurm)
    slurm.add_argument("--dry-run", action="store_true", help="print the script, submit nothing")
    slurm.add_argument("--job", action="store_true", help=argparse.SUPPRESS)  # for slurm/common.sh
    for name in SBATCH:
        slurm.add_argument(f"--{name}", help=f"sbatch's --{name}")
    check = commands.add_parser("preflight", help="check the nodes of a job (under srun)")
    _add_recipe(check)
    check.add_argument("--folder", required=True, help="a folder on the shared file system, for reports")
    check.add_argument("--verdict", action="store_true", help="judge the reports that are there")
    status = commands.add_parser("status", help="where a run stands, from any node")
    status.add_argument("run", help="a run folder")
    status.add_argument(
        "--follow", action="store_true", help="a line for every step and stall, until it ends"
    )
    # For slurm/common.sh, at a job's end: its code, what submits the same again, whether Slurm does
    status.add_argument("--ended", type=int, help=argparse.SUPPRESS)
    status.add_argument("--again", default="", help=argparse.SUPPRESS)
    status.add_argument("--requeued", action="store_true", help=argparse.SUPPRESS)
    status.add_argument("--until", type=float, default=0.0, help="the job's end, in seconds since the epoch")


def _add_recipe(command: argparse.ArgumentParser) -> None:
    command.add_argument("recipe", help="a YAML file")
    command.add_argument("overrides", nargs="*", metavar="key.path=value")


def run_command(options: argparse.Namespace) -> int:
    """Run one of COMMANDS; returns the exit code."""
    match options.command:
        case "slurm":
            return _slurm(options)
        case "preflight":
            return _preflight(options)
        case _:
            return _status(options)


def _slurm(options: argparse.Namespace) -> int:
    from genac_megatron.cluster import job, placement, script
    from genac_megatron.recipe.loader import load_recipe

    recipe = load_recipe(options.recipe, options.overrides)
    if options.job:
        print(job.as_shell(job.plan(recipe)), end="")
        return EXIT_OK
    given = {name: getattr(options, name) for name in SBATCH if getattr(options, name) is not None}
    text = script.render(recipe, Path(options.recipe), options.overrides, given)
    if options.dry_run:
        print(text, end="")
        return EXIT_OK
    print(f"job {script.submit(text)}: {recipe.name}, {placement.describe(recipe)}")
    return EXIT_OK


def _preflight(options: argparse.Namespace) -> int:
    from genac_megatron.recipe.loader import load_recipe

    if options.verdict:
        from genac_megatron.cluster.verdict import judge_folder

        return judge_folder(load_recipe(options.recipe, options.overrides), Path(options.folder))
    from genac_megatron.cluster.preflight import preflight

    return preflight(load_recipe(options.recipe, options.overrides), Path(options.folder))


def _status(options: argparse.Namespace) -> int:
    from genac_megatron.cluster.status import follow, status

    if options.ended is not None:
        from genac_megatron.cluster.ending import job_words

        print(job_words(Path(options.run), options.ended, options.again, requeued=options.requeued))
        return EXIT_OK
    if options.follow:
        return follow(Path(options.run), options.until)
    text, code = status(Path(options.run))
    print(text)
    return code
