"""The loop around a stage's steps: resume, logging, evaluation, checkpoints, stopping."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from genac_megatron.critic.icc import IccState
from genac_megatron.errors import InputError, LeftBand, StopRequested
from genac_megatron.observe.bands import Watch, is_step
from genac_megatron.observe.runinfo import METRICS, read_jsonl
from genac_megatron.recipe.resume import before_judging, check_steps, fingerprint, lengths
from genac_megatron.recipe.schema import SftStage, StageConfig
from genac_megatron.stages.runtime import Run
from genac_megatron.training.agreement import from_first
from genac_megatron.training.checkpoint import Checkpoints, load_checkpoint


class Loop:
    """One stage's steps, from where the run stands."""

    def __init__(self, run: Run, stage: StageConfig, checkpoints: Checkpoints, resumed: Path | None) -> None:
        self.run, self.stage, self.checkpoints = run, stage, checkpoints
        self._resumed = resumed  # the checkpoint that this stage goes on from, inside the stage
        self._total = 0
        self.step = 0  # the one that is under way, or the last
        self._mark: dict[str, Any] = {}  # of what judging the stage changes, as of its last step
        self._asked = False  # to stop, at a step where it could not
        self._watch = Watch(stage.expect)
        self._went_back = False  # from what is trained, which is kept elsewhere, to earlier weights
        # Writes, on each rank, what a checkpoint inside the stage holds besides (stages/ahead.py)
        self.beside: Callable[[Path], None] | None = None

    @property
    def fresh(self) -> bool:
        """Whether the stage begins at its beginning."""
        return self.run.at.step == 0

    @property
    def resumed(self) -> Path | None:
        """The checkpoint that the stage goes on from, inside it."""
        return None if self.fresh else self._resumed

    @property
    def total(self) -> int:
        """The stage's last step."""
        return self._total

    def restore_optimizers(self) -> None:
        """After `begin_stage`: load what the checkpoint holds."""
        if self._resumed is not None and not self.fresh:
            load_checkpoint(self._resumed, self.run.roles, optimizers=True)

    def steps(self, total: int) -> Iterator[int]:
        """The steps left, counted from 1, as many as `end_at` last said."""
        check_steps(self.stage, self.run.at.step, total, f"stage {self.stage.name}")
        self._total = total
        for row in self._rows_before():
            self._watch.look(row)
        first = self.run.at.step + 1
        self.run.progress.stage(self.stage.name, total, first - 1)
        self.step = first - 1
        while self.step < self._total:
            self.step += 1
            with self.run.profiler.step(self.stage.name, self.step, self.step - first + 1):
                yield self.step
        self._mark = {
            "explained_variance": self.run.at.explained_variance,
            "measured": dict(self.run.at.measured),
            "rows": self.run.gather([dict(self.run.log.counts) if self.run.log is not None else None])[0],
        }

    def end_at(self, step: int) -> None:
        """The stage's last step is this one."""
        if step != self._total:
            self._total = step
            self.run.progress.last_step(step)

    def done(
        self, step: int, figures: dict[str, float], evaluate: Callable[[], dict[str, float]] | None
    ) -> None:
        """Log a step; evaluate, save and stop where due."""
        run = self.run
        self.checkpoints.poll()
        if evaluate is not None:
            figures = {**figures, **evaluate()}
        run.at.step = step
        row = run.log_step(self.stage.name, self.stage.kind, step, figures)
        if (left := self._look_at_bands({**row, "step": step})) is not None:
            self.save()
            self.checkpoints.wait()
            raise left
        self._save_and_stop(step)

    def _rows_before(self) -> list[dict[str, Any]]:
        """The stage's steps of earlier attempts, where bands look at them. The same on all. Collective."""
        if self.fresh or not self.stage.expect:
            return []

        def read() -> list[dict[str, Any]]:
            rows, _ = read_jsonl(self.run.folder.path / METRICS)  # cut to what the checkpoint knows of
            return [row for row in rows if row.get("stage") == self.stage.name and is_step(row)]

        return from_first(read)

    def _look_at_bands(self, row: dict[str, Any]) -> LeftBand | None:
        """Say of each band once that the stage has left it; the end that one asks for. The same on all."""
        end = None
        for left in self._watch.look(row):
            self.run.progress.note(f"[{self.stage.name}] warning: {left.text}")
            if self.stage.expect[left.place].action == "stop":
                where = f"stages.{self.stage.name}.expect.{left.place}"
                end = LeftBand(
                    f"the stage has left its band: {left.text}",
                    where=where,
                    way_out="what is trained is saved; change something, and --resume goes on from here, as "
                    f"it is with {where}.action=warn",
                )
        return end

    def _save_and_stop(self, step: int) -> None:
        """Save where it is due. A stop that was asked for comes once engines have the newest weights: a
        checkpoint holds no others, and the resumed run goes on with the engines of the one that stopped.

        What is saved at once, where that is later, is for the case that there is no time for it.
        """
        stop = self.run.stop_requested()
        trailing = _trailing(self.run) if stop else {}
        if self.saves_at(step) or (stop and not (trailing and self._asked)):
            self.save()
        if not stop:
            return
        after = f"step {step} of {self._total} of stage {self.stage.name}"
        if not trailing:
            self._stop(after)
        if not self._asked:
            self._asked = True
            names = " and ".join(trailing)
            self.run.progress.note(f"asked to stop after {after}: goes on until {names} is published")

    def saves_at(self, step: int) -> bool:
        """Whether a checkpoint is due after this step, the stage's last apart."""
        every = self.run.recipe.checkpoint.every
        return bool(every) and step % every == 0 and step < self._total

    def whole(self, step: int) -> bool:
        """Whether engines must have the newest weights after this step, whatever the recipe's cadence.

        Evaluations, checkpoints and the next stage go by what is published.
        """
        every = getattr(self.stage, "eval_every", 0)
        return step == self._total or self.saves_at(step) or (every > 0 and step % every == 0)

    def _stop(self, after: str) -> None:
        self.checkpoints.wait()
        raise StopRequested(
            f"stopped as asked after {after}; everything is saved",
            way_out="the same command with --resume goes on from here",
        )

    def save(self) -> None:
        """A checkpoint inside the stage."""
        self._write(f"{self.stage.name}-{self.run.at.step:05d}", self.run.at.step)

    def save_judged(self) -> None:
        """The same after the stage's last step, once it is judged: a resume judges it again."""
        step = self.run.at.step
        self._write(f"{self.stage.name}-{step:05d}", step, judged=self.run.at.stage)

    def keep_judged(self, kept: Checkpoints) -> None:
        """The same in a folder of its own: a role is about to go back to earlier weights."""
        step = self.run.at.step
        self._write(f"{self.stage.name}-{step:05d}", step, judged=self.run.at.stage, to=kept)
        self._went_back = True

    def end(self, index: int) -> None:
        """The stage is over: a checkpoint from which the next one begins. The run's last one keeps what more
        steps of it need, unless that is kept elsewhere.
        """
        run = self.run
        last = index + 1 == len(run.recipe.stages)
        self.checkpoints.wait()  # a save under way holds what roles let go
        goes_on = last and not self._went_back
        if not goes_on:  # optimizers are of no use to the next stage, nor to other weights
            self._end_roles()
        run.at.stage, run.at.step = index + 1, 0
        run.log_step(self.stage.name, self.stage.kind, self._total, {}, step_done=False)
        self._write(f"{self.stage.name}-end", self._total, inside=index if goes_on else None)
        if goes_on:
            self._end_roles()
        if run.stop_requested() and index + 1 < len(run.recipe.stages):
            self._stop(f"stage {self.stage.name}")

    def _end_roles(self) -> None:
        for role in self.run.roles.values():
            role.end_stage()

    def _write(
        self,
        name: str,
        steps: int,
        *,
        judged: int | None = None,
        inside: int | None = None,
        to: Checkpoints | None = None,
    ) -> None:
        """judged: the stage's index, where a resume judges it again. inside: the same, where it may go on."""
        with self.run.phase("checkpoint"):
            state = run_state(self.run, self.stage.name, steps)
            if judged is not None:
                state |= before_judging(state, self._mark, judged, steps)
            if inside is not None:
                state["inside"] = before_judging(state, self._mark, inside, steps)
            if self._went_back:
                state["went_back"] = True
            (to or self.checkpoints).save(name, self.run.roles, state, beside=self.beside)


def run_state(run: Run, stage: str, steps: int) -> dict[str, Any]:
    """The run's small state as plain data; its logs end at step `steps` of `stage`."""
    run.at.serials = {name: role.serial for name, role in run.roles.items()}
    at = dataclasses.asdict(run.at)
    at["icc"] = run.icc.state_dict() if run.icc is not None else None
    log = run.gather([run.log.state_dict() if run.log is not None else None])[0]
    return {
        "at": at,
        "position": [stage, steps],
        "log": log,
        "recipe": fingerprint(run.recipe),
        "lengths": lengths(run.recipe),
        "prompts": run.task.digest,
    }


def restore_state(run: Run, state: dict[str, Any]) -> None:
    """Take over `run_state`. Raises InputError where the task gives other prompts now."""
    if state.get("prompts", run.task.digest) != run.task.digest:
        raise InputError(
            "the task gives other prompts than when the checkpoint was made",
            where="task",
            way_out="restore the files (function, data, pass rates) that it was made with, or begin a "
            "new run (name=...)",
        )
    run.at.load(state["at"])
    for name, serial in run.at.serials.items():
        run.roles[name].serial = serial
    if run.at.icc is not None:
        run.icc = IccState(0.0)
        run.icc.load_state_dict(run.at.icc)


def _trailing(run: Run) -> dict[str, int]:
    """Roles whose engines generate, inside a stage, with weights of before: by how many updates."""
    if run.at.step == 0 or isinstance(run.recipe.stages[run.at.stage], SftStage):  # it publishes at its end
        return {}
    behind = {name: run.serving.behind(name) for name in run.roles}
    return {name: updates for name, updates in behind.items() if updates}


def restore_engines(run: Run) -> None:
    """After a resume: give engines the weights that they had.

    Where the run was ended between publications these are gone. Engines then have the newest, under a version
    of their own, and the run says that it is not what it would have been.
    """
    trailing = _trailing(run)
    for name in run.roles:
        if name in trailing:
            run.progress.note(
                f"warning: the run ended between publications of {name}: its engines go on with weights of "
                f"{trailing[name]} updates later than they had"
            )
        run.publish(name, advance=name in trailing)
