"""`genac evaluate task`: avg@k and pass@k on named benchmarks, by a recipe's actor or any chat server.

OUT/BENCHMARK/
    samples.jsonl    per sample: index, sample, outcome, finish, tokens, text; of a conversation, whose text
                     is the last turn, turns, how it ended and all of it, too
    results.json     figures with intervals over problems
    manifest.json    what made it
OUT/results.md       the table of all that are finished in the folder, whichever call made them
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from genac_megatron import __version__, metrics
from genac_megatron.errors import InputError
from genac_megatron.escaping import transcript
from genac_megatron.evaluation.intervals import Resampled, plain
from genac_megatron.evaluation.parts import MANIFEST, PARTS, Parts, Row
from genac_megatron.evaluation.tables import table, with_interval
from genac_megatron.evaluation.trial_paths import paths_of as paths_of
from genac_megatron.evaluation.votes import vote_table, votes_of
from genac_megatron.observe.runinfo import write_json_atomic, write_text_atomic
from genac_megatron.recipe.data import HELDOUT
from genac_megatron.records import Prompt, Rollout
from genac_megatron.tasks.base import Task
from genac_megatron.tasks.benchmarks import GymSuite, find_benchmark, make_benchmark

if TYPE_CHECKING:
    from genac_megatron.recipe.schema import Recipe
    from genac_megatron.stages.runtime import Run
    from genac_megatron.stages.stopping import StopFlag
    from genac_megatron.training.layout import World

RESULTS, SAMPLES, SUMMARY = "results.json", "samples.jsonl", "results.md"
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
    critic: str | None = None  # a run whose critic votes: of the recipe's role
    p_bar: float | None = None  # that it is told; None: as its own run told it
    chunk: int = 256  # requests of a rank at a time, and lost where it is killed
    draws: int = 2000  # bootstrap


class Trial:
    """One benchmark's work: which samples are missing, and what the whole says.

    `model` says what the model is, so that no other's samples are mixed in, `more` what answers its turns and
    how it is graded, where that is the recipe's matter; `made_from` where it was found, for people.
    """

    def __init__(
        self,
        options: TrialOptions,
        name: str,
        task: Task,
        model: Row,
        sampling: Row,
        made_from: Row,
        more: Row | None = None,
    ) -> None:
        self.options, self.name, self.task, self.made_from = options, name, task, made_from
        self.sampling = sampling
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
            **(more or {}),
        }

    @property
    def items(self) -> list[Item]:
        """All that is planned, in order."""
        return [(index, sample) for index in range(len(self.prompts)) for sample in range(self.samples)]

    def begin(self) -> list[Item]:
        """What is missing. Raises InputError where the folder holds other work or is damaged."""
        with _sound(self.parts):
            known = self.parts.begin(self.plan)
        return [item for item in self.items if item not in known]

    def seed_of(self, item: Item) -> tuple[object, ...]:
        return (self.options.seed, "benchmark", self.name, *item)

    def finish(self) -> None:
        """All samples are there: write figures and manifest. Raises InputError where they are not."""
        with _sound(self.parts):
            rows = self.parts.whole(self.plan, self.items)
            bad = [item for item, row in zip(self.items, rows, strict=True) if not _is_sample(row)]
            if bad:
                raise ValueError(f"(problem, sample) {bad[0]} lacks an outcome, tokens or finish")
        if self.parts.complete:
            self.made_from = self.parts.read()[0].get("made_from", self.made_from)
        write_json_atomic(self.parts.folder / RESULTS, self.figures(rows))
        if not self.parts.complete:
            made = {"plan": self.plan, "made_from": self.made_from, "version": __version__}
            self.parts.finish(rows, made)

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
        if all("turns" in row for row in rows):
            figures["turns"] = each.mean([float(row["turns"]) for row in rows])
            figures["failed"] = each.mean([float(row["ended"] == "failed") for row in rows])
        return {
            "benchmark": self.name,
            "title": find_benchmark(self.name).title,
            "problems": len(outcomes),
            "samples": k,
            "model": self.plan["model"],
            "made_from": self.made_from,
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


@contextmanager
def _sound(parts: Parts) -> Iterator[None]:
    """Kept samples are read inside: whatever does not fit is an InputError."""
    try:
        yield
    except (LookupError, TypeError, ValueError) as error:
        raise InputError(
            f"its kept samples are damaged ({type(error).__name__}: {error})",
            where=str(parts.folder),
            way_out=f"restore them, or take the damaged lines out of {PARTS}/: the command makes them again",
        ) from error


def _is_sample(row: Row) -> bool:
    numbers = all(_number(row.get(key)) for key in ("outcome", "tokens"))
    return numbers and 0.0 <= row["outcome"] <= 1.0 and isinstance(row.get("finish"), str)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


# --- a recipe's actor ----------------------------------------------------------------------------


def try_actor(recipe: Recipe, world: World, stop: StopFlag, options: TrialOptions, folder: Path) -> None:
    """Every benchmark by the recipe's actor and its engine, shared over the ranks. Collective.

    Raises InputError where a benchmark's data is missing, StopRequested where it was asked to stop.
    """
    from genac_megatron.evaluation.score import ScoreOptions, needs_critic, told_by
    from genac_megatron.evaluation.session import (
        answered_by,
        as_sampled,
        graded_by,
        identity,
        made_from,
        trial_config,
        with_roles,
    )
    from genac_megatron.recipe.tasks import BenchmarkTask
    from genac_megatron.stages.session import session

    roles, told = {"actor": options.checkpoint}, None
    if options.critic is not None:
        needs_critic(recipe)
        told = told_by(recipe, ScoreOptions(options.out, options.out, options.critic, options.p_bar))
        roles["critic"] = options.critic
    recipe = with_roles(recipe, roles)
    own = HELDOUT if HELDOUT in options.names else options.names[0]  # the run's task
    if own != HELDOUT:
        first = BenchmarkTask(kind="benchmark", name=own, path=options.paths.get(own))
        recipe = recipe.model_copy(update={"task": first})
    with session(recipe, world, stop, "benchmarks", folder) as run:
        run.publish(*roles)
        votes: dict[str, Row] = {}
        model, source = identity(run, "actor"), made_from(recipe, "actor")
        for name in options.names:
            tags = recipe.roles["actor"].model.reasoning_tags
            made = partial(make_benchmark, name, options.paths.get(name), run.tokenizers["actor"], tags)
            task = run.task if name == own else run.together(made)
            config = trial_config(recipe, name, options.max_new_tokens, options.temperature)
            more = answered_by(recipe) | graded_by(recipe, own=name == HELDOUT)
            sampling = as_sampled(recipe, config)
            trial = run.together(partial(Trial, options, name, task, model, sampling, source, more))
            _on_engines(run, trial, config)
            if told is not None:
                votes[name] = votes_of(run, trial, told)
        if world.rank == 0:
            print(write_summary(options.out), flush=True)
            if votes:
                print(vote_table(votes), flush=True)


def _on_engines(run: Run, trial: Trial, config: Any) -> None:
    from genac_megatron.evaluation.session import stop_if_asked
    from genac_megatron.stages.rollouts import Generator
    from genac_megatron.training.agreement import from_first

    seed = (trial.options.seed, "benchmark", trial.name)
    generator = Generator.of_actor(run, config, seed, trial.task, environment=run.environment)

    def sample(items: Sequence[Item]) -> list[Row]:
        return asyncio.run(sampled(items))

    async def sampled(items: Sequence[Item]) -> list[Row]:
        made = (generator.group(trial.prompts[index], range(n, n + 1)) for index, n in items)
        groups = await asyncio.gather(*made)
        found = [group.rollouts[0] for group in groups]
        return [
            sample_row(item, one.outcome, one.completion.finish, one.completion.written, one.text)
            | conversation_row(one)
            for item, one in zip(items, found, strict=True)
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


def sample_row(item: Item, outcome: float, finish: str, tokens: int, text: str) -> Row:
    """A sample as it is kept."""
    index, sample = item
    return {
        "index": index,
        "sample": sample,
        "outcome": outcome,
        "finish": finish,
        "tokens": tokens,
        "text": text,
    }


def conversation_row(rollout: Rollout) -> Row:
    """What a sample's row says more where it is of a conversation; its `text` is the last turn."""
    episode = rollout.episode
    if episode is None:
        return {}
    said = transcript((turn.who, turn.text) for turn in episode.turns)
    return {"turns": episode.taken, "ended": episode.ended, "conversation": said}


# --- what came out -------------------------------------------------------------------------------


HEAD = ["benchmark", "problems", "k", "avg@k [95 %]", "pass@1", "pass@k", "truncated", "tokens"]


def write_summary(out: Path) -> str:
    """The tables of all benchmarks that are finished in `out`, one for each model and way of sampling.

    Also in OUT/results.md. Raises InputError where a results file is damaged.
    """
    alike: dict[str, list[Row]] = {}
    for folder in sorted(path.parent for path in out.glob(f"*/{RESULTS}")):
        if (folder / MANIFEST).exists():
            report = _report(folder / RESULTS)
            alike.setdefault(json.dumps([report["model"], report["sampling"]]), []).append(report)
    text = "\n".join(_table(reports) for reports in alike.values())
    write_text_atomic(out / SUMMARY, text)
    return text


def _table(reports: Sequence[Row]) -> str:
    """One model's table, under where it was found and how it was sampled."""
    rows: list[list[str]] = []
    for report in reports:
        figures, k = report["figures"], report["samples"]
        shown = (f"avg@{k}", "pass@1", f"pass@{k}", "truncated")
        rows.append(
            [
                report["title"],
                str(report["problems"]),
                str(k),
                *(with_interval(figures[name]) for name in shown),
                f"{figures['tokens']['value']:.0f}",
            ]
        )
        parts = report["parts"].items()
        rows += [[f"  {part}", "", "", f"{mean:.3f}", *[""] * 4] for part, mean in parts]
    sources = [report.get("made_from", report["model"]) | report["sampling"] for report in reports]
    told = dict.fromkeys(", ".join(f"{key} {value}" for key, value in source.items()) for source in sources)
    heading = "\n".join(told)
    return f"{heading}\n\n{table(HEAD, rows)}\n"


def _report(path: Path) -> Row:
    """A benchmark's results file."""
    try:
        report: Row = json.loads(path.read_text(encoding="utf-8"))
        _table([report])
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(
            "not a results file of `genac evaluate task`",
            where=str(path),
            way_out="give that benchmark's command again, which writes it anew, or remove its folder",
        ) from error
    return report


def _digest(prompts: Sequence[Prompt]) -> str:
    """Of what is asked and how it is graded, and of the ids, where prompts have been rendered here: a chat
    template may print the date."""
    digest = hashlib.sha256()
    for prompt in prompts:
        text = f"{prompt.messages}{prompt.reference}{prompt.ids or ''}"
        digest.update(text.encode("utf-8", "surrogatepass"))
    return digest.hexdigest()
