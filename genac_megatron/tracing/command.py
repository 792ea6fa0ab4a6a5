"""`genac traces ask | filter`: their grammar. No torch."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from genac_megatron.errors import EXIT_OK
from genac_megatron.launch import in_world
from genac_megatron.observe.runinfo import RunFolder, run_path
from genac_megatron.recipe.loader import load_recipe
from genac_megatron.stages.endpoints import need_endpoints
from genac_megatron.stages.inputs import need_places
from genac_megatron.tracing.asked_stage import traces_stage

if TYPE_CHECKING:
    from genac_megatron.recipe.schema import Recipe
    from genac_megatron.stages.stopping import StopFlag
    from genac_megatron.training.layout import World

    Job = Callable[[Recipe, World, StopFlag], None]
    InRanks = Callable[[Recipe, list[str], Job, Path], int]


def add_command(commands: Any) -> None:
    """Add `traces` to the command line's subparsers."""
    traces = commands.add_parser("traces", help="a critic's SFT data from a teacher (docs/traces.md)")
    steps = traces.add_subparsers(dest="traces", required=True)
    ask = steps.add_parser("ask", help="draw states, value them, ask the teacher; goes on where it was")
    ask.add_argument("recipe", help="a YAML file")
    ask.add_argument("overrides", nargs="*", metavar="key.path=value", help="for example stages.0.size=500")
    ask.add_argument("--override", action="append", default=[], metavar="key.path=value", help="the same")
    ask.add_argument("--out", required=True, help="a folder for states, values, answers and traces.jsonl")
    ask.add_argument("--stage", help="the SFT stage that says what is asked; else the first on traces")
    ask.add_argument("--checkpoint", help="the actor's: a run folder, or one checkpoint of it")
    ask.add_argument("--critic", metavar="RUN", help="the critic's, where it teaches itself")
    _add_gate(ask)
    again = steps.add_parser("filter", help="what is learnt of what was asked, by other settings")
    again.add_argument("folders", nargs="+", metavar="FOLDER", help="that `traces ask` has made")
    again.add_argument("--out", required=True, help="a file of traces")
    again.add_argument("--size", type=int, help="traces; else as many as are even")
    again.add_argument("--tolerance-floor", type=float, default=0.05, help="(0.05)")
    again.add_argument(
        "--tolerance-errors", type=float, default=2.0, help="standard errors of the Monte-Carlo value (2)"
    )
    again.add_argument(
        "--most", type=float, default=2.0, help="even shares that a fifth of the values may have (2)"
    )
    again.add_argument("--seed", type=int, default=0, help="of the order")
    _add_gate(again)


def _add_gate(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--gate",
        choices=("stop", "warn", "off"),
        default="stop",
        help="where the teacher's Brier score is no better than a constant's, or its ranking than a coin's",
    )


def run_command(options: argparse.Namespace, given: list[str], in_ranks: InRanks) -> int:
    """Run `genac traces ...`; the exit code. `in_ranks` does a job on every rank, in a folder."""
    if options.traces == "filter":
        from genac_megatron.tracing.filter import FilterOptions, run_filter

        wanted = FilterOptions(
            Path(options.out),
            options.size,
            options.tolerance_floor,
            options.tolerance_errors,
            options.most,
            options.seed,
            options.gate,
        )
        print(run_filter([Path(folder) for folder in options.folders], wanted))
        return EXIT_OK
    recipe = load_recipe(options.recipe, [*options.overrides, *options.override])
    traces_stage(recipe, options.stage)  # before ranks start
    need_places(options.out, options.checkpoint, options.critic)
    folder = RunFolder(run_path(recipe)).beside("traces", given)
    if not in_world() and not Path(options.out).exists():  # else it goes on, and may have all answers
        need_endpoints(recipe, teachers=True)

    def job(recipe: Recipe, world: World, stop: StopFlag) -> None:
        from genac_megatron.tracing.collect import AskOptions, ask_teacher

        asked = AskOptions(
            Path(options.out), options.stage, options.checkpoint, options.critic, gate=options.gate
        )
        ask_teacher(recipe, world, stop, asked, folder)

    return in_ranks(recipe, given, job, folder)
