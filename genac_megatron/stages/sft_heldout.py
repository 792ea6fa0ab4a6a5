"""Held-out samples of an SFT stage: when it has learnt enough, and which weights were the best.

A small critic learns some operations all at once, at a step that seed and processor decide; so a stage may
go on until samples that it is not trained on are right, and only then let the learning rate fall.
"""

from __future__ import annotations

import math
import random
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

from genac_megatron.errors import InputError, on_all_ranks
from genac_megatron.observe.report_gates import reached
from genac_megatron.recipe.schema import SftHeldout, SftStage
from genac_megatron.records import Sample
from genac_megatron.stages.loop import Loop, run_state
from genac_megatron.training.agreement import from_first
from genac_megatron.training.checkpoint import Checkpoints, load_checkpoint

if TYPE_CHECKING:
    from genac_megatron.stages.runtime import Run

LARGEST_SHARE = 0.5  # of the samples that may be held out


@dataclass
class Seen:
    """What looks at held-out samples have shown so far: plain data, kept in checkpoints."""

    best: float | None = None  # of the chosen metric
    best_step: int = 0
    latest: float | None = None
    mark: float | None = None  # the figure that patience counts from: a better one by min_delta is the next
    waited: int = 0  # looks since then
    cooling: int | None = None  # the step after which the learning rate falls
    total: int = 0  # steps of all epochs, when it began to
    size: int | None = None  # heldout.size and heldout.metric, which a resume may not change
    metric: str | None = None
    looks: int = 0
    settled: int | None = None  # the last step, once the role has the weights that the stage ends with


def hold_out(samples: Sequence[Sample], heldout: SftHeldout, where: str, seed: int) -> list[list[Sample]]:
    """[samples to train on, samples held out], each in its given order.

    Samples of one problem (its text, and the states of all responses to it) stay together, so that nothing
    is held out whose problem is trained on: generated tasks repeat short ones under other ids, and a stage's
    sources share them. Raises InputError where more than half would be held out.
    """
    sources: dict[str, list[int]] = {}
    for index, sample in enumerate(samples):
        sources.setdefault(sample.problem or sample.source or f"sample {index}", []).append(index)
    names = random.Random(seed).sample(sorted(sources), len(sources))
    out: set[int] = set()
    for name in names:
        if len(out) >= heldout.size:
            break
        out.update(sources[name])
    if len(out) < heldout.size or len(out) > LARGEST_SHARE * len(samples):
        error = InputError(
            f"{heldout.size} samples cannot be held out: there are {len(samples)}, of {len(sources)} "
            "different prompts, and at most half of them may be",
            where=f"{where}, heldout.size",
            way_out="lower heldout.size, or give the stage more samples",
        )
        raise on_all_ranks(error)
    return [[s for i, s in enumerate(samples) if (i in out) is held] for held in (False, True)]


def heldout_figures(logprobs: Sequence[Sequence[float]], samples: Sequence[Sample] = ()) -> dict[str, float]:
    """From each sample's log-probs: `loss`, nats a token; `exact_match`, the mean chance that a completion
    sampled at temperature 1 is the held-out one word for word.

    samples: theirs; tokens that carry no loss are left out, as if they were given.
    """
    if any("weights" in sample.fields for sample in samples):
        logprobs = [_learnt(*both) for both in zip(samples, logprobs, strict=True)]
    tokens = sum(map(len, logprobs))
    chances = [math.exp(sum(values)) for values in logprobs]
    return {
        "loss": -sum(map(sum, logprobs)) / max(tokens, 1),
        "exact_match": sum(chances) / max(len(chances), 1),
    }


def _learnt(sample: Sample, logprobs: Sequence[float]) -> list[float]:
    weights = sample.fields.get("weights", [1.0] * sample.trained)
    return [value for weight, value in zip(weights, logprobs, strict=True) if weight]


def figures_by_part(logprobs: Sequence[Sequence[float]], samples: Sequence[Sample]) -> dict[str, float]:
    """`heldout_figures` of all samples and, with several sources, of each one's under <figure>_<source>."""
    figures = heldout_figures(logprobs, samples)
    for part in sorted({sample.part for sample in samples if sample.part}):
        mine = [n for n, sample in enumerate(samples) if sample.part == part]
        found = heldout_figures([logprobs[n] for n in mine], [samples[n] for n in mine])
        figures |= {f"{name}_{part}": value for name, value in found.items()}
    return figures


class Watch:
    """Looks at the held-out samples while a stage trains, and decides when it ends. Collective."""

    def __init__(self, run: Run, stage: SftStage, held: Sequence[Sample], total: int) -> None:
        assert stage.heldout is not None
        self.run, self.stage, self.heldout, self.held, self.total = run, stage, stage.heldout, held, total
        self._read = [replace(sample, fields={}) for sample in held]  # their log-probs alone are asked for
        self.seen = Seen(**(run.at.heldout or {}))
        self.seen.size, self.seen.metric = self.heldout.size, self.heldout.metric
        if self.seen.cooling is not None and self.seen.total != total:
            self.seen.cooling, self.seen.waited = None, 0  # resumed with other epochs: it is not over yet
        folder = run.folder.path / "heldout"
        self._best = Checkpoints(folder, keep=1, asynchronous=False, limit_s=run.recipe.world.timeout_s)
        run.together(lambda: self._remove_unfinished() if run.world.rank == 0 else None)
        optimizer = stage.optimizer or run.roles[stage.role].config.optimizer
        self.warmup = optimizer.warmup_steps
        if self.warmup + self.heldout.cooldown > total:
            error = InputError(
                f"{self.warmup} steps of warm-up and {self.heldout.cooldown} of cooldown are more than the "
                f"{total} steps of all epochs",
                where=f"stage {stage.name}, heldout.cooldown",
                way_out="shorten one of them, or give the stage more epochs or samples",
            )
            raise on_all_ranks(error)

    def _remove_unfinished(self) -> None:
        for path in self._best.survey().unfinished:  # of an attempt that is over
            shutil.rmtree(path, ignore_errors=True)

    @property
    def last(self) -> int:
        """The stage's last step, as far as is known."""
        if self.seen.cooling is None:
            return self.total
        return min(self.total, self.seen.cooling + self.heldout.cooldown)

    def begin(self) -> None:
        """After the role's `begin_stage`: where the stage is resumed, its schedule is what it was."""
        if self.seen.cooling is not None and self.heldout.cooldown:
            self.run.roles[self.stage.role].cool_down(self.seen.cooling, self.heldout.cooldown)

    def look(self, step: int, loop: Loop) -> dict[str, float]:
        """After a step: the figures where a look is due; the schedule changes where it has to."""
        figures: dict[str, float] = {}
        role = self.run.roles[self.stage.role]
        if step % self.heldout.every == 0 or step == self.last:
            with self.run.phase("heldout"):
                figures = figures_by_part(role.logprobs(self._read), self.held)
            self.run.count_sequences("evaluate", self.held)
            self._judge(step, figures[self.heldout.metric], loop)
        if self.seen.cooling is None and step >= self.total - self.heldout.cooldown:
            self._cool(step, "its epochs are over")
        loop.end_at(self.last)
        self.run.at.heldout = asdict(self.seen)
        return {f"{self.stage.role}/heldout_{name}": value for name, value in figures.items()}

    def _judge(self, step: int, figure: float, loop: Loop) -> None:
        seen, heldout = self.seen, self.heldout
        seen.latest, seen.looks = figure, seen.looks + 1
        if not math.isfinite(figure):
            return  # the next step tells
        if seen.best is None or self._better(figure, seen.best):
            seen.best, seen.best_step = figure, step
            if heldout.keep == "best":
                self._save(step, loop)
        if seen.mark is None or self._better(figure, seen.mark, heldout.min_delta):
            seen.mark, seen.waited = figure, 0
        else:
            seen.waited += 1
        if seen.cooling is not None or step < self.warmup:
            return
        if reached(self.heldout, figure):
            self._cool(step, f"held-out {heldout.metric} {figure:.3f} reached {heldout.target:g}")
        elif heldout.patience is not None and seen.waited >= heldout.patience:
            self._cool(step, f"held-out {heldout.metric} did not get better in {seen.waited} looks")

    def _better(self, figure: float, than: float, by: float = 0.0) -> bool:
        return figure < than - by if self.heldout.metric == "loss" else figure > than + by

    def _cool(self, step: int, why: str) -> None:
        self.seen.cooling, self.seen.total = step, self.total
        if self.heldout.cooldown and step < self.total:
            self.run.roles[self.stage.role].cool_down(step, self.heldout.cooldown)
        self.run.progress.note(f"[{self.stage.name}] step {step}: {why}; the last step is {self.last}")

    def _save(self, step: int, loop: Loop) -> None:
        """The role's weights, without its optimizer: they are kept until better ones are found."""
        with self.run.phase("checkpoint"):
            loop.checkpoints.wait()  # one save at a time
            state = run_state(self.run, self.stage.name, step)
            roles = {self.stage.role: self.run.roles[self.stage.role]}
            self._best.save(self._name(step), roles, state, optimizers=False)

    def _name(self, step: int) -> str:
        return f"{self.stage.name}-{step:05d}"

    def settle(self, step: int) -> dict[str, float]:
        """After the last step: the role has the best weights again, where the recipe wants them. The figure
        of the weights it ends with, by its metric's name.
        """
        seen, metric = self.seen, self.heldout.metric
        if seen.best is None:
            if not seen.looks:
                return {}
            self.run.progress.note(f"[{self.stage.name}] warning: held-out {metric} was never finite")
            return {f"heldout/{metric}": math.nan}  # which reaches no target
        figure = math.nan if seen.latest is None else seen.latest  # a manifest has null for NaN
        found = f"held-out {metric} {seen.best:.4f}, the best, at step {seen.best_step} of {step}"
        text = f"[{self.stage.name}] {found}"
        if self.heldout.keep == "best" and seen.settled == step:
            figure = seen.best  # resumed: they are what it was resumed with
        elif self.heldout.keep == "best" and seen.best_step != step:
            path = self._best.folder / self._name(seen.best_step)
            if from_first(lambda: path in self._best.survey().whole):
                load_checkpoint(path, {self.stage.role: self.run.roles[self.stage.role]})
                text, figure = f"{text}, whose weights are kept", seen.best
            else:
                text += f"; its weights are gone or damaged ({path}), the last step's are kept"
        self.run.progress.note(text)
        seen.settled = step
        self.run.at.heldout = asdict(seen)
        return {f"heldout/{metric}": figure}
