"""`genac evaluate bank build | score | compare | task | gradients | pass-rates`: the grammar. No torch."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from genac_megatron.errors import EXIT_OK, InputError
from genac_megatron.launch import in_world
from genac_megatron.observe.runinfo import RunFolder, run_path
from genac_megatron.recipe.environment_rules import check_benchmarks, need_no_environment
from genac_megatron.recipe.loader import load_recipe
from genac_megatron.stages.endpoints import need_endpoints
from genac_megatron.stages.inputs import need_places

if TYPE_CHECKING:
    from genac_megatron.recipe.schema import Recipe
    from genac_megatron.stages.stopping import StopFlag
    from genac_megatron.training.layout import World

    Job = Callable[[Recipe, World, StopFlag], None]
    InRanks = Callable[[Recipe, list[str], Job, Path], int]

LARGEST_SEED = 2**31


def add_commands(commands: Any) -> None:
    """Add `evaluate` to the command line's subparsers."""
    evaluate = commands.add_parser("evaluate", help="judge critics and actors (docs/evaluation.md)")
    kinds = evaluate.add_subparsers(dest="evaluate", required=True)
    bank = kinds.add_parser("bank", help="states with Monte-Carlo values, to judge critics by")
    steps = bank.add_subparsers(dest="step", required=True)
    _add_build(steps)
    _add_score(steps)
    _add_compare(steps)
    _add_task(kinds)
    _add_gradients(kinds)
    _add_pass_rates(kinds)


def _add_recipe(command: argparse.ArgumentParser, *, optional: bool = False) -> None:
    command.add_argument("recipe", help="a YAML file", nargs="?" if optional else None)
    command.add_argument(
        "overrides", nargs="*", metavar="key.path=value", help="for example task.min_swaps=6"
    )
    command.add_argument(
        "--override", action="append", default=[], metavar="key.path=value", help="the same, between options"
    )


def _add_build(steps: Any) -> None:
    build = steps.add_parser("build", help="build a bank, or go on with one")
    _add_recipe(build)
    build.add_argument("--checkpoint", help="the actor's: a run folder, or one checkpoint of it")
    build.add_argument("--out", required=True, help="the bank's folder")
    build.add_argument("--prompts", type=_positive, help="held-out prompts (128)")
    build.add_argument("--continuations", type=_two_or_more, default=32, help="K, of each state")
    build.add_argument("--samples", type=_positive, default=8, help="responses to every prompt, for p_bar")
    build.add_argument("--limit", type=_positive, help="responses to a prompt at most (64)")
    build.add_argument("--max-new-tokens", type=_positive, help="of a response; else as the last stage's")
    build.add_argument("--states-from", metavar="BANK", help="the same states again, under this actor")
    build.add_argument(
        "--step", type=int, dest="told_step", help="of training, that critics are told; else the actor's"
    )
    build.add_argument(
        "--p-bar-of",
        metavar="BANK",
        help="tell critics the success rate of that bank, of tasks they know",
    )
    build.add_argument("--chunk", type=_positive, default=16, help="prompts of a rank at a time")


def _add_score(steps: Any) -> None:
    score = steps.add_parser("score", help="have a critic value a bank's states")
    score.add_argument("bank", help="the bank's folder")
    _add_recipe(score)
    score.add_argument(
        "--also", action="append", default=[], metavar="BANK", help="another bank, by the critic once loaded"
    )
    score.add_argument("--checkpoint", help="the critic's: a run folder, or one checkpoint of it")
    score.add_argument(
        "--again", action="store_true", help="put these in the place of other scores of that name"
    )
    score.add_argument("--icc", choices=("on", "off", "shuffled"), help="else as the recipe says")
    score.add_argument("--name", help="of the scores: BANK/scores/NAME")


def _add_compare(steps: Any) -> None:
    compare = steps.add_parser("compare", help="one table of several scores")
    compare.add_argument("scores", nargs="+", help="folders that `bank score` has made")
    compare.add_argument("--out", help="a folder for the table and a plot")


def _add_task(kinds: Any) -> None:
    task = kinds.add_parser("task", help="avg@k and pass@k on named benchmarks")
    task.add_argument(
        "benchmarks",
        help="for example aime24,math500; maths: the six of it; rg:chain_sum; heldout: the recipe's own",
    )
    _add_recipe(task, optional=True)
    task.add_argument("--checkpoint", help="the actor's: a run folder, or one checkpoint of it")
    task.add_argument("--url", help="an OpenAI-compatible server instead of a recipe: its base, .../v1")
    task.add_argument("--model", help="its model")
    task.add_argument("--api-key-env", help="the environment variable that holds its key")
    task.add_argument("--concurrency", type=_positive, help="requests at a time, else 32")
    task.add_argument("--timeout", type=float, help="seconds for one request, else 1800")
    task.add_argument("--out", required=True, help="a folder for samples and results")
    task.add_argument(
        "--path", action="append", default=[], metavar="[NAME=]FILE", help="read its questions there"
    )
    task.add_argument("--samples", type=_positive, help="k; else the benchmark's own")
    task.add_argument("--problems", type=_positive, help="the first so many")
    task.add_argument("--max-new-tokens", type=_positive, help="of a response")
    task.add_argument("--temperature", type=float, help="else the recipe's evaluation.temperature, or 1")
    task.add_argument("--critic", metavar="RUN", help="whose critic values samples: best@k, weighted@k")
    task.add_argument("--p-bar", type=float, help="the success rate that it is told; else as its run told it")
    task.add_argument("--seed", type=_seed, default=0, help="of the samples")


def _add_gradients(kinds: Any) -> None:
    audit = kinds.add_parser("gradients", help="how good estimators of an actor's policy gradient are")
    _add_recipe(audit)
    audit.add_argument("--checkpoint", help="the actor's: a run folder, or one checkpoint of it")
    audit.add_argument("--critic", metavar="RUN", help="whose critic is a generative one; else the recipe's")
    audit.add_argument("--scalar", metavar="RUN", help="whose critic is a scalar one, for the role `scalar`")
    audit.add_argument("--out", required=True, help="a folder for what is kept, and for figures")
    audit.add_argument("--reference", type=_positive, default=8192, help="rollouts of the reference gradient")
    audit.add_argument("--chunks", type=_positive, default=16, help="that the reference is cut into")
    audit.add_argument("--batches", type=_positive, default=200, help="whose gradients are looked at")
    audit.add_argument("--prompts", type=_positive, default=8, help="of a batch")
    audit.add_argument("--samples", type=_positive, default=2, help="responses to each of them")
    audit.add_argument("--estimators", help="for example rloo,genac-0,exact-0; else all that can be made")
    audit.add_argument("--max-new-tokens", type=_positive, help="of a response; else as the last stage's")


def _add_pass_rates(kinds: Any) -> None:
    rates = kinds.add_parser("pass-rates", help="how often an actor solves each training question")
    _add_recipe(rates)
    rates.add_argument("--checkpoint", help="the actor's: a run folder, or one checkpoint of it")
    rates.add_argument("--out", required=True, help="a folder, for task.filter.pass_rates")
    rates.add_argument("--samples", type=_positive, default=8, help="responses to each question")
    rates.add_argument("--prompts", type=_positive, help="the first so many questions")
    rates.add_argument("--max-new-tokens", type=_positive, help="of a response; else as the last stage's")
    rates.add_argument("--temperature", type=float, help="else the last stage's, which trains by them")


def add_score(commands: Any) -> None:
    """Add `score` to the command line's subparsers."""
    command = commands.add_parser("score", help="a critic's values of any transcripts (docs/evaluation.md)")
    command.add_argument("source", help="JSONL: problem and response, or messages")
    _add_recipe(command)
    command.add_argument("--out", required=True, help="JSONL: the same rows with value")
    command.add_argument("--checkpoint", help="the critic's: a run folder, or one checkpoint of it")
    command.add_argument("--p-bar", type=float, help="the actor's success rate, where rows do not say")
    command.add_argument("--step", type=int, help="its step of training, likewise")
    command.add_argument("--limit", type=_positive, default=4096, help="tokens of a response, likewise")
    command.add_argument("--judgements", type=_positive, default=1, help="of a state: their mean counts")
    command.add_argument("--lines", action="store_true", help="values of prefixes too, at line ends")
    command.add_argument("--url", help="a server that has the critic: its base, .../v1")
    command.add_argument("--model", help="its model")
    command.add_argument("--api-key-env", help="the environment variable that holds its key")


def score_in_ranks(options: argparse.Namespace, given: list[str], in_ranks: InRanks) -> int:
    """A rank's part of `genac score`, which library.score starts."""
    recipe = _recipe(options)
    need_no_environment(recipe, "genac score")
    folder = RunFolder(run_path(recipe)).beside("score", given)

    def job(recipe: Recipe, world: World, stop: StopFlag) -> None:
        from genac_megatron.evaluation.score import score
        from genac_megatron.evaluation.transcripts import ScoreOptions

        wanted = ScoreOptions(
            Path(options.source),
            Path(options.out),
            options.checkpoint,
            options.p_bar,
            options.step,
            options.limit,
            options.judgements,
            options.lines,
        )
        score(recipe, world, stop, wanted, folder)

    return in_ranks(recipe, given, job, folder)


def run_command(options: argparse.Namespace, given: list[str], in_ranks: InRanks) -> int:
    """Run `genac evaluate ...`; the exit code. `in_ranks` does a job on every rank, in a folder."""
    if options.evaluate == "task":
        return _task(options, given, in_ranks)
    if options.evaluate == "gradients":
        return _gradients(options, given, in_ranks)
    if options.evaluate == "pass-rates":
        return _pass_rates(options, given, in_ranks)
    if options.step == "compare":
        return _compare(options)
    recipe = _recipe(options)
    _need_folders(options)
    folder = RunFolder(run_path(recipe)).beside(f"bank-{options.step}", given)
    if options.step == "build" and not in_world():
        need_endpoints(recipe, teachers=False)
    job = _build_job(options, folder) if options.step == "build" else _score_job(options, folder)
    return in_ranks(recipe, given, job, folder)


def _need_folders(options: argparse.Namespace) -> None:
    """Raise InputError, before ranks start, where a bank or a checkpoint that is named is not there."""
    need_places(getattr(options, "out", ""), options.checkpoint)
    for bank in (options.bank, *options.also) if options.step == "score" else ():
        if not Path(bank).is_dir():
            raise InputError("no bank is there", where=bank, way_out="genac evaluate bank build makes one")


def _recipe(options: argparse.Namespace) -> Recipe:
    return load_recipe(options.recipe, [*options.overrides, *options.override])


def _build_job(options: argparse.Namespace, folder: Path) -> Job:
    def job(recipe: Recipe, world: World, stop: StopFlag) -> None:
        from genac_megatron.evaluation.build import BuildOptions, build_bank

        wanted = BuildOptions(
            out=Path(options.out),
            checkpoint=options.checkpoint,
            prompts=options.prompts,
            continuations=options.continuations,
            samples=options.samples,
            limit=options.limit,
            max_new_tokens=options.max_new_tokens,
            states_from=_path(options.states_from),
            p_bar_of=_path(options.p_bar_of),
            step=options.told_step,
            chunk=options.chunk,
        )
        build_bank(recipe, world, stop, wanted, folder)

    return job


def _score_job(options: argparse.Namespace, folder: Path) -> Job:
    def job(recipe: Recipe, world: World, stop: StopFlag) -> None:
        from genac_megatron.evaluation.scoring import ScoreOptions, score_bank

        banks = tuple(Path(bank) for bank in (options.bank, *options.also))
        wanted = ScoreOptions(banks, options.checkpoint, options.icc, options.name, again=options.again)
        score_bank(recipe, world, stop, wanted, folder)

    return job


def _gradients(options: argparse.Namespace, given: list[str], in_ranks: InRanks) -> int:
    recipe = _recipe(options)
    need_no_environment(recipe, "genac evaluate gradients")
    folder = RunFolder(run_path(recipe)).beside("gradients", given)
    need_places(options.out, options.checkpoint, options.critic, options.scalar)
    if not in_world():
        need_endpoints(recipe, teachers=False)

    def job(recipe: Recipe, world: World, stop: StopFlag) -> None:
        from genac_megatron.evaluation.gradients import GradientOptions, audit_gradients

        wanted = GradientOptions(
            out=Path(options.out),
            checkpoint=options.checkpoint,
            critic=options.critic,
            scalar=options.scalar,
            reference=options.reference,
            chunks=options.chunks,
            batches=options.batches,
            prompts=options.prompts,
            samples=options.samples,
            estimators=tuple(options.estimators.split(",")) if options.estimators else (),
            max_new_tokens=options.max_new_tokens,
        )
        audit_gradients(recipe, world, stop, wanted, folder)

    return in_ranks(recipe, given, job, folder)


def _pass_rates(options: argparse.Namespace, given: list[str], in_ranks: InRanks) -> int:
    recipe = _recipe(options)
    folder = RunFolder(run_path(recipe)).beside("pass-rates", given)
    need_places(options.out, options.checkpoint)

    def job(recipe: Recipe, world: World, stop: StopFlag) -> None:
        from genac_megatron.evaluation.pass_rates import RateOptions, measure

        wanted = RateOptions(
            out=Path(options.out),
            checkpoint=options.checkpoint,
            samples=options.samples,
            prompts=options.prompts,
            max_new_tokens=options.max_new_tokens,
            temperature=options.temperature,
        )
        measure(recipe, world, stop, wanted, folder)

    return in_ranks(recipe, given, job, folder)


def _compare(options: argparse.Namespace) -> int:
    from genac_megatron.evaluation.compare import compare

    print(compare([Path(folder) for folder in options.scores], _path(options.out)))
    return EXIT_OK


def _task(options: argparse.Namespace, given: list[str], in_ranks: InRanks) -> int:
    from genac_megatron.evaluation.trial import TrialOptions, paths_of, try_actor
    from genac_megatron.evaluation.trial_server import ServerOptions, try_server
    from genac_megatron.tasks.benchmarks import benchmark_names

    names = benchmark_names(options.benchmarks)
    wanted = TrialOptions(
        names=names,
        out=Path(options.out),
        paths=paths_of(options.path, names),
        samples=options.samples,
        problems=options.problems,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        seed=options.seed,
        checkpoint=options.checkpoint,
        critic=options.critic,
        p_bar=options.p_bar,
    )
    _check_task(options)
    need_places(options.out, options.checkpoint, options.critic)
    for name, path in wanted.paths.items():
        if not Path(path).expanduser().exists():
            what = f"there is no file or folder {path} of {name}"
            raise InputError(what, where="--path", way_out="write --path BENCHMARK=FILE")
    if options.url is not None:
        limits = {"concurrency": options.concurrency, "timeout_s": options.timeout}
        more = {key: value for key, value in limits.items() if value is not None}
        server = ServerOptions(options.url, options.model or "", options.api_key_env, **more)
        print(try_server(server, wanted))
        return EXIT_OK

    recipe = _recipe(options)
    check_benchmarks(recipe, names, voting=options.critic is not None)
    folder = RunFolder(run_path(recipe)).beside("task", given)

    def job(recipe: Recipe, world: World, stop: StopFlag) -> None:
        try_actor(recipe, world, stop, wanted, folder)

    return in_ranks(recipe, given, job, folder)


def _check_task(options: argparse.Namespace) -> None:
    """Raise InputError where neither or both of recipe and server are given, or an option of the other."""
    if (options.url is None) == (options.recipe is None):
        raise InputError(
            "give a recipe, or --url and --model: one of the two",
            where="genac evaluate task",
            way_out="genac evaluate task math500 RECIPE --checkpoint RUN --out FOLDER, or "
            "genac evaluate task math500 --url http://host:port/v1 --model NAME --out FOLDER",
        )
    if options.url is not None:
        kind, other = (
            "a server (--url)",
            {"--checkpoint": options.checkpoint, "--override": options.override, "--critic": options.critic},
        )
        way_out = "leave it out; a server's model is named by --model"
    else:
        kind = "a recipe"
        other = {
            "--model": options.model,
            "--api-key-env": options.api_key_env,
            "--concurrency": options.concurrency,
            "--timeout": options.timeout,
        }
        way_out = "leave it out, or give --url instead of the recipe"
    if options.p_bar is not None and options.critic is None:
        raise InputError(
            "a critic is told it, and none is asked",
            where="--p-bar",
            way_out="give --critic too, or leave it out",
        )
    for name, value in other.items():
        if value not in (None, []):
            raise InputError(f"{kind} takes no {name}", where="genac evaluate task", way_out=way_out)


def _path(text: str | None) -> Path | None:
    return None if text is None else Path(text)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return number


def _two_or_more(text: str) -> int:
    number = int(text)
    if number < 2:
        raise argparse.ArgumentTypeError(f"{text} is not at least 2: the spread of one outcome is not known")
    return number


def _seed(text: str) -> int:
    number = int(text)
    if not 0 <= number < LARGEST_SEED:
        raise argparse.ArgumentTypeError(f"{text} is not from 0 to {LARGEST_SEED - 1}")
    return number
