"""`genac evaluate task`: avg@k and pass@k on named benchmarks, by a recipe's actor or any chat server.

OUT/BENCHMARK/
    samples.jsonl    per sample: index, sample, outcome, finish, tokens, text
    results.json     figures with intervals over problems
    manifest.json    what made it
OUT/results.md       all of them
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from genac_megatron import __version__
from genac_megatron.errors import InputError, PeerLost, StopRequested
from genac_megatron.evaluation import metrics
from genac_megatron.evaluation.intervals import Resampled, plain
from genac_megatron.evaluation.parts import Parts, Row
from genac_megatron.evaluation.tables import table, with_interval
from genac_megatron.observe.runinfo import write_json_atomic, write_text_atomic
from genac_megatron.records import Prompt
from genac_megatron.serving.chat import ChatEndpoint
from genac_megatron.stages.seeds import seed_for
from genac_megatron.tasks.base import Task
from genac_megatron.tasks.benchmarks import GymSuite, find_benchmark, make_benchmark

if TYPE_CHECKING:
    from genac_megatron.recipe.schema import Recipe
    from genac_megatron.stages.runtime import Run
    from genac_megatron.stages.stopping import StopFlag
    from genac_megatron.training.layout import World

RESULTS, SAMPLES = "results.json", "samples.jsonl"
KEPT_TOGETHER = 16  # answers of a server that are written at a time, and lost where we are killed
Item = tuple[int, int]  # (problem, sample)


@dataclass(frozen=True)
class TrialOptions:
    """Which benchmarks, and how the model is sampled. None: the benchmark's or the recipe's own."""

    names: list[str]
    out: Path
    paths: dict[str, str] = field(default_factory=dict)  # benchmark -> local file or folder
    samples: int | None = None
    problems: int | None = None  # the first so many
    max_new_tokens: int | None = None
    temperature: float | None = None
    seed: int = 0
    checkpoint: str | None = None
    chunk: int = 256  # requests of a rank at a time, and lost where it is killed
    draws: int = 2000  # bootstrap


@dataclass(frozen=True)
class ServerOptions:
    """A model behind an OpenAI-compatible endpoint."""

    url: str
    model: str
    api_key_env: str | None = None
    concurrency: int = 32
    timeout_s: float = 1800.0
    attempts: int = 4


class Trial:
    """One benchmark's work: which samples are missing, and what the whole says."""

    def __init__(self, options: TrialOptions, name: str, task: Task, model: Row, sampling: Row) -> None:
        self.options, self.name, self.task = options, name, task
        self.parts = Parts(options.out / name, SAMPLES, ("index", "sample"))
        count = task.heldout_size if options.problems is None else min(options.problems, task.heldout_size)
        self.prompts = [task.prompt("heldout", index) for index in range(count)]
        self.samples = options.samples or find_benchmark(name).samples
        self.plan = {
            "kind": "benchmark",
            "benchmark": name,
            "problems": len(self.prompts),
            "texts": _digest(self.prompts),
            "samples": self.samples,
            "sampling": sampling,
            "seed": options.seed,
            "model": model,
        }

    def begin(self) -> list[Item]:
        """What is missing."""
        known = self.parts.begin(self.plan)
        items = [(index, sample) for index in range(len(self.prompts)) for sample in range(self.samples)]
        return [item for item in items if item not in known]

    def seed_of(self, item: Item) -> tuple[object, ...]:
        return (self.options.seed, "benchmark", self.name, *item)

    def finish(self) -> None:
        """All samples are there: write figures and manifest."""
        rows = [row for _, row in sorted(self.parts.begin(self.plan).items())]
        report = self.figures(rows)
        write_json_atomic(self.parts.folder / RESULTS, report)
        if not self.parts.complete:
            self.parts.finish(rows, {"plan": self.plan, "version": __version__})

    def figures(self, rows: Sequence[Row]) -> Row:
        """avg@k, pass@j for j = 1, 2, 4 .. k, and how responses ended, with intervals over problems."""
        outcomes: dict[str, list[float]] = {}
        for row in rows:
            outcomes.setdefault(str(row["index"]), []).append(float(row["outcome"]))
        sample = Resampled(list(outcomes), self.options.draws)
        k = self.samples
        figures = {f"avg@{k}": sample.mean([np.mean(found) for found in outcomes.values()])}
        for j in sorted({2**n for n in range(k.bit_length())} | {k}):
            figures[f"pass@{j}"] = sample.mean(metrics.pass_shares(outcomes, j))
        each = Resampled([row["index"] for row in rows], self.options.draws)
        figures["truncated"] = each.mean([float(row["finish"] == "length") for row in rows])
        figures["tokens"] = each.mean([float(row["tokens"]) for row in rows])
        return {
            "benchmark": self.name,
            "title": find_benchmark(self.name).title,
            "problems": len(outcomes),
            "samples": k,
            "model": self.plan["model"],
            "sampling": self.plan["sampling"],
            "figures": {name: plain(estimate) for name, estimate in figures.items()},
            "parts": self._by_part(outcomes),
        }

    def _by_part(self, outcomes: dict[str, list[float]]) -> dict[str, float]:
        """The mean outcome of each task of a suite."""
        if not isinstance(self.task, GymSuite) or len(self.task.names) < 2:
            return {}
        found: dict[str, list[float]] = {}
        for index, samples in outcomes.items():
            found.setdefault(self.task.part(int(index)), []).append(float(np.mean(samples)))
        return {name: float(np.mean(means)) for name, means in found.items()}


# --- a recipe's actor ----------------------------------------------------------------------------


def try_actor(recipe: Recipe, world: World, stop: StopFlag, options: TrialOptions) -> None:
    """Every benchmark by the recipe's actor and its engine, shared over the ranks. Collective.

    Raises InputError where a benchmark's data is missing, StopRequested where it was asked to stop.
    """
    from genac_megatron.evaluation.session import identity, made_from, rollout_config, session, with_role
    from genac_megatron.recipe.tasks import BenchmarkTask

    recipe = with_role(recipe, "actor", options.checkpoint)
    first = BenchmarkTask(kind="benchmark", name=options.names[0], path=options.paths.get(options.names[0]))
    recipe = recipe.model_copy(update={"task": first})
    config = rollout_config(recipe, options.max_new_tokens)
    if options.temperature is not None:
        config = config.model_copy(update={"temperature": options.temperature})
    sampling = {"max_new_tokens": config.max_new_tokens, "temperature": config.temperature}
    with session(recipe, world, stop, "benchmarks") as run:
        run.publish("actor")
        model = identity(run, "actor")
        for name in options.names:
            made = partial(make_benchmark, name, options.paths.get(name), run.tokenizers["actor"])
            task = run.task if name == options.names[0] else run.together(made)
            trial = run.together(partial(Trial, options, name, task, model, sampling))
            _on_engines(run, trial, config)
        if world.rank == 0:
            print(write_summary(options, made_from(recipe, "actor")), flush=True)


def _on_engines(run: Run, trial: Trial, config: Any) -> None:
    from genac_megatron.evaluation.session import stop_if_asked
    from genac_megatron.stages.rollouts import Generator
    from genac_megatron.training.agreement import from_first

    generator = Generator(
        engine=run.engines["actor"],
        tokenizer=run.tokenizers["actor"],
        task=trial.task,
        config=config,
        stop_ids=run.stop_ids("actor"),
        seed=(trial.options.seed, "benchmark", trial.name),
        positions=run.actor.shape.max_positions,
    )

    def sample(items: Sequence[Item]) -> list[Row]:
        return asyncio.run(sampled(items))

    async def sampled(items: Sequence[Item]) -> list[Row]:
        made = (generator.group(trial.prompts[index], range(n, n + 1)) for index, n in items)
        groups = await asyncio.gather(*made)
        found = [group.rollouts[0] for group in groups]
        return [
            _row(item, rollout.outcome, rollout.completion.finish, len(rollout.completion.ids), rollout.text)
            for item, rollout in zip(items, found, strict=True)
        ]

    left = from_first(trial.begin)
    total = len(trial.prompts) * trial.samples
    run.progress.stage(trial.name, total, total - len(left))
    size = trial.options.chunk * run.world.size
    for at in range(0, len(left), size):
        mine = run.share(left[at : at + size])
        with run.phase("sample"):
            rows = run.generating(partial(sample, mine))
        run.together(partial(trial.parts.append, rows, run.world.rank))
        done = total - len(left) + min(at + size, len(left))
        run.progress.step(done, {})
        stop_if_asked(run, f"{done} of {total} samples of {trial.name}")
    run.together(lambda: trial.finish() if run.world.rank == 0 else None)


# --- any chat server -----------------------------------------------------------------------------


def try_server(server: ServerOptions, options: TrialOptions) -> str:
    """Every benchmark by a model behind an endpoint, from this process; the table.

    Raises InputError where the endpoint refuses, PeerLost where requests failed for good; what was
    answered is kept, and the same call goes on.
    """
    if not server.model:
        raise InputError(f"which model of {server.url}?", where="--url", way_out="name it by --model")
    endpoint = ChatEndpoint(
        server.url,
        server.model,
        api_key_env=server.api_key_env,
        timeout_s=server.timeout_s,
        concurrency=server.concurrency,
        attempts=server.attempts,
        who="server",
        where="server",
    )
    limit = options.max_new_tokens or 4096
    temperature = 1.0 if options.temperature is None else options.temperature
    sampling = {"max_new_tokens": limit, "temperature": temperature}
    model = {"url": server.url.rstrip("/"), "model": server.model}
    try:
        for name in options.names:
            task = make_benchmark(name, options.paths.get(name), None)
            _ask(endpoint, Trial(options, name, task, model, sampling), limit, temperature)
    except KeyboardInterrupt:
        raise StopRequested("stopped as asked", way_out="the same command goes on from here") from None
    finally:
        endpoint.close()
    return write_summary(options, model)


def _ask(endpoint: ChatEndpoint, trial: Trial, limit: int, temperature: float) -> None:
    left = trial.begin()

    def one(item: Item) -> tuple[Item, Any]:
        seed = seed_for(*trial.seed_of(item)) % 2**31
        messages = trial.prompts[item[0]].messages
        return item, endpoint.ask(messages, limit, temperature, seed=seed)

    answered: list[tuple[Item, Any]] = []
    failed = 0
    with ThreadPoolExecutor(endpoint.concurrency, thread_name_prefix="ask") as pool:
        futures = [pool.submit(one, item) for item in left]
        try:
            for number, future in enumerate(as_completed(futures), 1):
                item, answer = future.result()
                failed += answer is None
                if answer is not None:
                    answered.append((item, answer))
                if len(answered) >= KEPT_TOGETHER or number == len(futures):
                    _keep(trial, answered)
                    answered = []
        except BaseException:
            for future in futures:
                future.cancel()
            _keep(trial, answered)
            raise
    if failed:
        raise PeerLost(
            f"{failed} of {len(left)} requests failed, each {endpoint.attempts} times; the others are kept",
            where=endpoint.url,
            way_out="see that the server is up, lower --concurrency, and give the same command again",
        )
    trial.finish()


def _keep(trial: Trial, answered: Sequence[tuple[Item, Any]]) -> None:
    pairs = [(trial.prompts[item[0]], answer.text or "") for item, answer in answered]
    outcomes = trial.task.verify_many(pairs)
    trial.parts.append(
        [
            _row(item, outcome, answer.finish, answer.tokens, answer.text or "")
            for (item, answer), outcome in zip(answered, outcomes, strict=True)
        ],
        0,
    )


def _row(item: Item, outcome: float, finish: str, tokens: int, text: str) -> Row:
    index, sample = item
    return {
        "index": index,
        "sample": sample,
        "outcome": outcome,
        "finish": finish,
        "tokens": tokens,
        "text": text,
    }


# --- what came out -------------------------------------------------------------------------------


def write_summary(options: TrialOptions, model: Row) -> str:
    """The table of all benchmarks, also in OUT/results.md."""
    rows = []
    for name in options.names:
        report = json.loads((options.out / name / RESULTS).read_text(encoding="utf-8"))
        figures, k = report["figures"], report["samples"]
        rows.append(
            [
                report["title"],
                str(report["problems"]),
                str(k),
                with_interval(figures[f"avg@{k}"]),
                with_interval(figures["pass@1"]),
                with_interval(figures[f"pass@{k}"]),
                with_interval(figures["truncated"]),
                f"{figures['tokens']['value']:.0f}",
            ]
        )
        rows += [
            [f"  {part}", "", "", f"{mean:.3f}", "", "", "", ""] for part, mean in report["parts"].items()
        ]
    head = ["benchmark", "problems", "k", "avg@k [95 %]", "pass@1", "pass@k", "truncated", "tokens"]
    who = ", ".join(f"{key} {value}" for key, value in model.items())
    text = f"{who}\n\n{table(head, rows)}\n"
    write_text_atomic(options.out / "results.md", text)
    return text


def _digest(prompts: Sequence[Prompt]) -> str:
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(f"{prompt.messages}{prompt.reference}".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def paths_of(given: Sequence[str], names: Sequence[str]) -> dict[str, str]:
    """NAME=PATH pairs; a bare PATH where there is one benchmark. Raises InputError."""
    found = {}
    for text in given:
        name, equals, path = text.partition("=")
        if not equals and len(names) == 1:
            name, path = names[0], text
        if name not in names:
            raise InputError(
                f"--path {text} is for none of {', '.join(names)}", way_out="write --path BENCHMARK=FILE"
            )
        found[name] = path
    return found
