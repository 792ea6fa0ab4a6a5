"""Where a run stands, by its own files: stages, phases, and how long all of it still takes. No torch."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np
from pydantic import ValidationError

from genac_megatron.cluster.heartbeat import read_beats, silent
from genac_megatron.cluster.status import attempt, stall
from genac_megatron.errors import InputError
from genac_megatron.observe.history import meaning
from genac_megatron.observe.report_data import Row, RunData, number, typed_stage
from genac_megatron.recipe.estimate import step_tokens
from genac_megatron.recipe.schema import JudgingConfig, SftStage

STARTS_S = 300.0  # that a run may take to its first heartbeat
RECENT = 20  # steps that a pace is the mean of


@dataclass
class StageAt:
    """A stage of the recipe, and how far it is. total: None where nobody knows yet."""

    name: str
    kind: str
    done: int
    total: int | None
    state: str = "next"  # done, now, next
    pace: float | None = None  # seconds a step
    guessed: bool = False  # the pace is another stage's, by tokens

    @property
    def left(self) -> float | None:
        """Seconds that its steps still take; None where that is not known."""
        if self.state == "done":
            return 0.0
        if self.total is None or self.pace is None:
            return None
        return max(0, self.total - self.done) * self.pace


@dataclass
class Standing:
    """A run now. Durations in seconds; None: not known."""

    state: str  # running, starting, ended, failed, silent, stalled or none
    told: str  # the same in a few words
    stages: list[StageAt] = field(default_factory=list)
    phases: list[tuple[str, float | None, float | None]] = field(
        default_factory=list
    )  # name, so far, usually
    stage_left: float | None = None
    run_left: float | None = None  # of all that is known
    unknown: list[str] = field(default_factory=list)  # stages whose time is in no figure
    guessed: list[str] = field(default_factory=list)  # ... and in it by another stage's pace
    begun: float | None = None  # seconds since 1970
    heard: float | None = None  # of it last
    ranks: int = 0
    note: str = ""  # a stall's words

    @property
    def now(self) -> StageAt | None:
        """The stage that is under way, or was last."""
        return next((stage for stage in self.stages if stage.state == "now"), None)


def standing(run: RunData, now: float | None = None) -> Standing:
    """By the run's logs, history and heartbeats."""
    moment = time.time() if now is None else now
    start, end = run.attempts[-1] if run.attempts else ({}, None)
    began = number(start.get("time")) if start else float("nan")
    beats, folder = _beats(run.path)
    if began == began and beats and number(beats[0].get("time")) < began - 1:
        beats = []  # of an attempt before
    found = _state(run, end, beats, began, moment)
    found.begun = began if began == began else None
    found.heard = _heard(run, beats)
    found.ranks = len(beats)
    beat = beats[0] if beats and found.state in ("running", "stalled") else {}
    found.stages = _stages(run, beat, finished=end is not None and int(end.get("code", 1)) == 0)
    if beat:
        found.phases = _phases(beat, moment)
        if found.state == "stalled" and folder is not None:
            found.note = stall(folder) or ""
    if found.state in ("running", "starting", "stalled"):
        _time_left(found, beat, moment)
    return found


def _beats(path: Path) -> tuple[list[Row], Path | None]:
    try:
        folder = attempt(path)
        return [beat for beat in read_beats(folder) if isinstance(beat, dict)], folder
    except (InputError, OSError, ValueError, KeyError, TypeError):
        return [], None


def _heard(run: RunData, beats: Sequence[Row]) -> float | None:
    times = [number(beat.get("time")) for beat in beats]
    times += [number(row.get("time")) for row in run.metrics[-1:]]
    times += [number(row.get("time")) for pair in run.attempts[-1:] for row in pair if row is not None]
    known = [t for t in times if t == t]
    return max(known) if known else None


def _state(run: RunData, end: Row | None, beats: Sequence[Row], began: float, now: float) -> Standing:
    if end is not None:
        code = int(number(end.get("code")))
        return Standing("ended" if code in (0, 75) else "failed", meaning(code))
    if beats and str(beats[0].get("state")) == "running" and not silent(beats[0], now):
        ill = [beat for beat in beats if beat.get("stalled") or silent(beat, now)]
        told = f"no progress on {len(ill)} of {len(beats)} ranks" if ill else "running"
        return Standing("stalled" if ill else "running", told)
    if not beats and now - began < STARTS_S:
        return Standing("starting", "starting")
    if beats and str(beats[0].get("state")) != "running":
        return Standing("failed", str(beats[0].get("state")))
    if run.attempts or beats:
        return Standing("silent", "no word of its end, and none of it any more: killed, or its node is gone")
    return Standing("none", "no word of a start" if run.metrics else "not begun")


def _phases(beat: Row, now: float) -> list[tuple[str, float | None, float | None]]:
    """Open phases, outermost first; the innermost with its time so far and what it took last."""
    names = [str(name) for name in beat.get("phases") or []]
    if not names:
        return []
    age = max(0.0, now - number(beat.get("time")))
    spent, usual = number(beat.get("phase_s")) + age, number(beat.get("usual_s"))
    last = (names[-1], spent if spent == spent else None, usual if usual == usual else None)
    return [*((name, None, None) for name in names[:-1]), last]


# --- stages --------------------------------------------------------------------------------------


def _stages(run: RunData, beat: Row, *, finished: bool) -> list[StageAt]:
    done: dict[str, int] = {}
    for row in run.metrics:
        step = number(row.get("step"))
        if step == step:
            name = str(row.get("stage"))
            done[name] = max(done.get(name, 0), int(step))
    here = str(beat["stage"]) if beat.get("stage") else next(reversed(done), None)
    planned = run.recipe_stages()
    names = [str(stage["name"]) for stage in planned]
    planned += [{"name": name, "kind": ""} for name in done if name not in names]  # of a recipe that is gone
    found = [_stage(stage, done.get(str(stage["name"]), 0)) for stage in planned]
    at = next((i for i, stage in enumerate(found) if stage.name == here), None)
    for index, stage in enumerate(found):
        if at is not None and (index < at or finished):
            stage.state, stage.total = "done", stage.done
        elif index == at:
            stage.state = "now"
            steps = number(beat.get("steps"))
            if steps == steps:
                stage.total, stage.done = int(steps), max(stage.done, int(number(beat.get("step"))))
    _give_paces(run, found, planned)
    return found


def _stage(plain: Row, done: int) -> StageAt:
    steps = number(plain.get("steps"))
    if steps != steps and (typed := typed_stage(plain)) is not None and isinstance(typed, SftStage):
        made = typed.made
        steps = float(typed.epochs * -(-made // typed.batch)) if made and typed.data != "jsonl" else steps
    total = int(steps) if steps == steps else None
    return StageAt(str(plain["name"]), str(plain.get("kind")), done, total)


def paces(run: RunData) -> dict[str, float]:
    """By stage, seconds between its last steps, what lies between attempts left out."""
    starts = [number(start.get("time")) for start, _ in run.attempts]
    found: dict[str, float] = {}
    for span in run.spans:
        rows = [row for row in run.metrics[span.first : span.last] if number(row.get("step")) > 0]
        between = []
        for one, other in pairwise(rows):
            begin, end = number(one.get("time")), number(other.get("time"))
            steps = number(other.get("step")) - number(one.get("step"))
            if steps > 0 and end >= begin and not any(begin < start <= end for start in starts):
                between.append((end - begin) / steps)
        if between:
            found[span.name] = float(np.mean(between[-RECENT:]))
    return found


def _give_paces(run: RunData, stages: Sequence[StageAt], planned: Sequence[Row]) -> None:
    """Each stage's own pace; of one that has none yet, that of the latest one that rolls out, by tokens."""
    known = paces(run)
    tokens = {stage.name: _tokens(run, plain) for stage, plain in zip(stages, planned, strict=True)}
    measured = [s.name for s in stages if s.name in known and tokens[s.name]]
    for stage in stages:
        stage.pace = known.get(stage.name)
        mine = tokens[stage.name]
        if stage.pace is None and mine and measured:
            other = measured[-1]
            stage.pace, stage.guessed = known[other] * mine / tokens[other], True


def _tokens(run: RunData, plain: Row) -> float:
    """What a step of a stage generates and trains at most; 0 of one that does not roll out, or is unknown."""
    typed = typed_stage(plain)
    if typed is None or isinstance(typed, SftStage):
        return 0.0
    try:
        judging = JudgingConfig.model_validate(run.recipe.get("judging") or {})
    except ValidationError:
        return 0.0
    return step_tokens(judging, typed).total


def _time_left(found: Standing, beat: Row, now: float) -> None:
    """Of the present stage and of the whole run."""
    here = found.now
    eta = number(beat.get("eta_s")) - max(0.0, now - number(beat.get("time"))) if beat else float("nan")
    total, any_known = 0.0, False
    for stage in found.stages:
        left = max(0.0, eta) if stage is here and eta == eta else stage.left
        if stage is here:
            found.stage_left = left
        if left is None:
            found.unknown.append(stage.name)
            continue
        if stage.state != "done":
            any_known = True
        if stage.guessed and stage.state == "next":
            found.guessed.append(stage.name)
        total += left
    found.run_left = total if any_known else None
