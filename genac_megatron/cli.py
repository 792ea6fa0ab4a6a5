"""The command line. Imports no torch before a run needs it."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from genac_megatron import __version__
from genac_megatron.cluster import command as cluster
from genac_megatron.conversion import options as conversion
from genac_megatron.errors import (
    EXIT_INPUT,
    EXIT_OK,
    EXIT_REQUEUE,
    GenacError,
    InputError,
    PeerLost,
    StopRequested,
)
from genac_megatron.evaluation import command as evaluation
from genac_megatron.launch import LAUNCHER, Launcher, adopt_slurm, check_world, in_world, rank_command
from genac_megatron.observe.ending import Ending
from genac_megatron.observe.lock import run_lock
from genac_megatron.observe.origin import TYPED, Origin, again, typed
from genac_megatron.observe.runinfo import RunFolder, run_path
from genac_megatron.observe.voice import one_voice
from genac_megatron.recipe.document import files
from genac_megatron.recipe.loader import dump_recipe, load_recipe
from genac_megatron.stages.endpoints import unset_keys
from genac_megatron.stages.inputs import need_inputs
from genac_megatron.studies import command as studies
from genac_megatron.tracing import command as tracing
from genac_megatron.watch import command as watching

if TYPE_CHECKING:
    from genac_megatron.recipe.schema import Recipe
    from genac_megatron.stages.stopping import StopFlag
    from genac_megatron.training.layout import World

    Job = Callable[[Recipe, World, StopFlag], None]

EPILOG = """exit codes: 0 done; 1 the file system or the training failed; 2 the recipe or an input is wrong;
3 a gate failed; 4 an engine or peer was lost beyond its budget; 75 stopped on purpose with a checkpoint"""


def parser() -> argparse.ArgumentParser:
    """The command line's grammar."""
    root = argparse.ArgumentParser(
        prog="genac", description="LLM reinforcement learning with a generative critic.", epilog=EPILOG
    )
    root.add_argument("--version", action="version", version=f"genac-megatron {__version__}")
    commands = root.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="run a recipe", epilog=EPILOG)
    run.add_argument("recipe", help="a YAML file")
    run.add_argument("overrides", nargs="*", metavar="key.path=value", help="for example stages.2.steps=5")
    run.add_argument("--dry-run", action="store_true", help="look at all it needs, and print an estimate")
    run.add_argument("--resolved", action="store_true", help="print every key of the recipe, and run nothing")
    run.add_argument("--resume", action="store_true", help="go on from the newest complete checkpoint")
    run.add_argument("--profile", action="store_true", help="trace a step of each stage (observe.profile)")
    parity = commands.add_parser("parity", help="compare a role's trainer and engine", epilog=EPILOG)
    parity.add_argument("role", help="actor or critic")
    parity.add_argument("recipe", help="a YAML file")
    parity.add_argument("overrides", nargs="*", metavar="key.path=value", help="roles.actor.model.hf=...")
    parity.add_argument("--prompts", type=int, default=32, help="held-out prompts to sample")
    parity.add_argument("--max-new-tokens", type=int, default=128, help="of each")
    report = commands.add_parser("report", help="write the report of a run folder")
    report.add_argument("run", help="a run folder")
    watching.add_commands(commands)
    commands.add_parser("doctor", help="check this machine's packages")
    evaluation.add_commands(commands)
    evaluation.add_score(commands)
    tracing.add_command(commands)
    studies.add_command(commands)
    cluster.add_commands(commands)
    conversion.add_convert(commands)
    conversion.add_inspect(commands)
    return root


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `genac`; returns the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = _parsed(given)
    endings: list[Ending] = []  # of the run, once it is about to begin
    code = _done(options, given, endings)
    for ending in endings:
        ending.tell(code)
    return code


def _done(options: argparse.Namespace, given: list[str], endings: list[Ending]) -> int:
    """Do what a command asks for; its exit code, all that went wrong told."""
    try:
        match options.command:
            case "run":
                return _run(options, given, endings)
            case "parity":
                return _parity(options, given)
            case "evaluate":
                return evaluation.run_command(options, given, _in_ranks)
            case "score":
                return _score(options, given)
            case "traces":
                return tracing.run_command(options, given, _in_ranks)
            case "convert":
                return conversion.run_convert(options)
            case "inspect":
                return conversion.run_inspect(options)
            case "report":
                return _report(Path(options.run))
            case "study":
                return studies.run_command(options)
            case command if command in watching.COMMANDS:
                return watching.run_command(options)
            case command if command in cluster.COMMANDS:
                return cluster.run_command(options)
            case _:
                return _doctor()
    except KeyboardInterrupt:
        print("genac: interrupted before anything was begun", file=sys.stderr, flush=True)
        return 130
    except GenacError as error:
        _tell(error)
        return error.exit_code
    except Exception:
        if _rank_name() is None:
            raise
        # One write, so that ranks do not talk into each other's lines.
        text = f"genac: unexpected error on {_rank_name()}:\n{traceback.format_exc()}"
        print(text, end="", file=sys.stderr, flush=True)
        return 1


def _rank_name() -> str | None:
    """This process among the ranks of a world, or None where it is none or the only one."""
    if os.environ.get("WORLD_SIZE", "1") == "1" or not in_world():
        return None
    return f"rank {os.environ.get('RANK', '0')}"


def _tell(error: GenacError) -> None:
    """Show an error once: one that all ranks have by rank 0, any other by the rank that has it."""
    if error.told:
        return
    kind = "error" if error.exit_code != EXIT_REQUEUE else "stopped"
    rank = _rank_name()
    if not error.agreed and rank is not None:
        kind = f"{kind}: {rank}"
    elif rank not in (None, "rank 0"):
        return
    print(f"genac: {kind}: {error}", file=sys.stderr, flush=True)


def _parsed(given: list[str]) -> argparse.Namespace:
    """The command line. Options may stand before, between and behind a recipe's overrides."""
    grammar = parser()
    options, left = grammar.parse_known_args(given)
    if "--" in left:
        left.remove("--")
    if left and (not hasattr(options, "overrides") or any(word.startswith("-") for word in left)):
        grammar.error(f"unrecognized arguments: {' '.join(left)}")
    if left:  # argparse ends a list of words at the first option behind it
        options.overrides = [*options.overrides, *left]
    return options


def _run(options: argparse.Namespace, given: list[str], endings: list[Ending]) -> int:
    profile = ["observe.profile.on=true"] if options.profile else []
    recipe = load_recipe(options.recipe, [*profile, *options.overrides])
    planning = options.dry_run or options.resolved
    first = LAUNCHER not in os.environ and _rank_name() in (None, "rank 0")  # of all that run this command
    need_inputs(recipe, resume=options.resume, planning=planning, ask=first and not planning)
    if planning:
        print(dump_recipe(recipe) if options.resolved else _plan(recipe, options, given), end="")
        return EXIT_OK
    if not in_world():  # at once, before ranks have imported torch; their first one takes the folder
        run_lock(run_path(recipe)).refuse()
    if first:  # else the launcher has the last word
        os.environ[TYPED] = typed()  # ranks are not begun as this process was
        endings.append(Ending(run_path(recipe), plots=recipe.observe.plots))
    origin = Origin(given, options.recipe, options.overrides, files(Path(options.recipe)))
    return _in_ranks(recipe, given, _run_job(options, origin), run_path(recipe))


def _plan(recipe: Recipe, options: argparse.Namespace, given: list[str]) -> str:
    """What a dry run has to say. Raises InputError at what a run would refuse."""
    from genac_megatron.cluster.placement import describe_memory
    from genac_megatron.models.hf_headers import check_weights
    from genac_megatron.recipe.estimate import describe
    from genac_megatron.stages.look import look_at_data

    for role in recipe.roles.values():
        adapter = role.training.adapter is not None
        check_weights(role.model, resuming=options.resume, planning=True, adapter=adapter)
    memory = [f"{describe_memory(recipe)}\n"] if recipe.cluster.gpu is not None else []
    data = [*look_at_data(recipe), *unset_keys(recipe)]
    words = [word for word in given if not word.startswith("--d")]  # argparse reads --dry too
    next_ones = [
        "Nothing was run.",
        f"  every key:  {again(words, options.recipe, '--resolved')}",
        f"  to run it:  {again(words, options.recipe)}",
    ]
    return "\n".join([describe(recipe), *memory, *data, *([""] if data else []), *next_ones, ""])


def _run_job(options: argparse.Namespace, origin: Origin) -> Job:
    def job(recipe: Recipe, world: World, stop: StopFlag) -> None:
        from genac_megatron.stages.pipeline import run_recipe

        run_recipe(recipe, world, stop, resume=options.resume, origin=origin)

    return job


def _parity(options: argparse.Namespace, given: list[str]) -> int:
    recipe = load_recipe(options.recipe, options.overrides)
    if options.role not in recipe.roles:
        known = f"one of: {', '.join(recipe.roles)}"
        raise InputError(f"the recipe has no role '{options.role}'", where="roles", way_out=known)
    folder = RunFolder(run_path(recipe)).beside("parity", given)

    def job(recipe: Recipe, world: World, stop: StopFlag) -> None:
        from genac_megatron.stages.parity_check import check_parity

        asked = {"prompts": options.prompts, "max_new_tokens": options.max_new_tokens}
        check_parity(recipe, world, stop, role=options.role, folder=folder, **asked)

    return _in_ranks(recipe, given, job, folder)


def _in_ranks(recipe: Recipe, given: list[str], job: Job, folder: Path) -> int:
    """Do a job on every rank: those that this process starts, or the world that it belongs to.

    folder: for their heartbeats.
    """
    from genac_megatron.platform.network import rank_environment
    from genac_megatron.recipe.megatron_rules import queue_environment

    queues = queue_environment(recipe, os.environ)
    if not in_world():
        return Launcher(rank_command(given), recipe.world.ranks, recipe.world.threads).run()
    os.environ.update(adopt_slurm())
    check_world(recipe.world.ranks)
    os.environ.update(rank_environment(os.environ) | queues)
    return _rank(recipe, job, folder)


def need_files(recipe: Recipe, files: int) -> None:
    """Raise InputError where this process may open fewer files than a rank has connections."""
    from genac_megatron.recipe.estimate import open_files

    needed = open_files(recipe)
    if files < needed:
        raise InputError(
            f"one of {recipe.world.ranks} ranks has up to {needed} files open, and this process may have "
            f"{files}",
            where="world.ranks",
            way_out="raise the hard limit of open files (ulimit -Hn) on every node: LimitNOFILE of slurmd, "
            "or /etc/security/limits.conf",
        )


def _rank(recipe: Recipe, job: Job, folder: Path) -> int:
    """This process's part of a job."""
    from genac_megatron import platform
    from genac_megatron.launch import follow_launcher
    from genac_megatron.platform.megatron import install

    with platform.uncollected():
        import torch

    follow_launcher()
    need_files(recipe, platform.raise_open_files())
    torch.set_num_threads(recipe.world.threads)
    install()  # before anything imports megatron.core
    one_voice()
    from genac_megatron.stages.stopping import StopFlag

    return _joined(recipe, job, StopFlag().install(), folder)


@contextmanager
def _lost_peers() -> Iterator[None]:
    """What a collective says where another rank has ended, as PeerLost."""
    from genac_megatron.training.agreement import lost_peer

    try:
        yield
    except RuntimeError as error:
        if not lost_peer(error):
            raise
        raise PeerLost(
            f"a peer was lost or did not answer: {str(error).splitlines()[0]}",
            way_out="look at the first rank that ended; --resume goes on from the newest checkpoint",
        ) from error


def _joined(recipe: Recipe, job: Job, stop: StopFlag, folder: Path) -> int:
    import torch.distributed as dist

    from genac_megatron.cluster.heartbeat import heartbeat
    from genac_megatron.platform import uncollected

    with uncollected():
        from genac_megatron.training.layout import close_world, init_world

    with heartbeat(folder), _lost_peers():  # the last beat tells its exit code
        world = init_world(recipe.world.timeout_s, recipe.seed)
        try:
            with uncollected():
                import genac_megatron.stages.runtime  # noqa: F401  what every job needs
            one_voice()
            job(recipe, world, stop)
        except StopRequested:
            dist.barrier()  # srun ends the others once one has left
            raise
        close_world()
    return EXIT_OK


def _score(options: argparse.Namespace, given: list[str]) -> int:
    if in_world():
        return evaluation.score_in_ranks(options, given, _in_ranks)
    from genac_megatron.library import score

    score(
        options.source,
        options.recipe,
        [*options.overrides, *options.override],
        out=options.out,
        checkpoint=options.checkpoint,
        p_bar=options.p_bar,
        step=options.step,
        limit=options.limit,
        judgements=options.judgements,
        lines=options.lines,
        url=options.url,
        model=options.model,
        api_key_env=options.api_key_env,
    )
    return EXIT_OK


def _report(folder: Path) -> int:
    from genac_megatron.library import open_run

    if not (folder / "metrics.jsonl").exists():
        raise InputError("no metrics.jsonl there", where=str(folder), way_out="give the folder of a run")
    print(open_run(folder).report())
    return EXIT_OK


def _doctor() -> int:
    from genac_megatron.platform.doctor import doctor

    text, ok = doctor()
    print(text)
    return EXIT_OK if ok else EXIT_INPUT
