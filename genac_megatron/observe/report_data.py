"""What a report is made of: a run folder's logs, read once, and the summary of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter, ValidationError

from genac_megatron import metrics as figures
from genac_megatron.errors import InputError
from genac_megatron.observe.bands import Left, all_outside, is_step
from genac_megatron.observe.history import attempts, history, meaning
from genac_megatron.observe.report_gates import Figures, JudgedStage, Missed, missed
from genac_megatron.observe.runinfo import EVALUATIONS, METRICS, ROLLOUTS, RunFolder
from genac_megatron.recipe.algorithms import WithScalarCritic
from genac_megatron.recipe.schema import PolicyStage, PpoStage, SftStage, StageConfig
from genac_megatron.recipe.stages import entry_action

KINDS = ("sft", "reinforce", "value", "policy", "ppo")  # of stages
ACTOR_KINDS = ("policy", "ppo")  # that train the actor by RL
ROLES = ("actor", "critic")
CRITIC_FIGURES = (
    "brier", "brier_constant", "mse", "mse_constant", "auc", "ece", "explained_variance", "spearman",
    "ranking_between", "ranking_prompt", "ranking_response", "parse_rate", "score_entropy",
)  # fmt: skip
Row = dict[str, Any]


def number(value: Any) -> float:
    """A finite float, or NaN for whatever is none."""
    if not isinstance(value, (int, float)):
        return math.nan
    return float(value) if math.isfinite(value) else math.nan


def groups(value: Any) -> dict[str, list[float]]:
    """An evaluation's `outcomes` of the actor: samples by prompt, what is no number left out."""
    if not isinstance(value, Mapping):
        return {}
    kept = {str(k): [number(x) for x in v if not math.isnan(number(x))] for k, v in value.items()}
    return {k: v for k, v in kept.items() if v}


@dataclass(frozen=True)
class StageSpan:
    """A stage's rows, first+1 .. last, and where it lies on the axis of all steps: from begin to end."""

    name: str
    kind: str
    first: int
    last: int
    begin: int
    end: int


@dataclass
class RunData:
    """A run folder's contents, partial ones included."""

    path: Path
    recipe: Row
    metrics: list[Row]
    evaluations: list[Row]
    rollouts: list[Row]
    unreadable: dict[str, int]  # log: lines that are no JSON object
    attempts: list[tuple[Row, Row | None]] = field(default_factory=list)  # starts and their ends
    data: list[str] = field(default_factory=list)  # what was told of the data when the run began

    @cached_property
    def spans(self) -> list[StageSpan]:
        """Stages in order of their first row, those with evaluations alone included."""
        found: dict[str, list[int]] = {}
        kinds: dict[str, str] = {}
        for i, row in enumerate(self.metrics):
            name = str(row.get("stage"))
            found.setdefault(name, [i, i])[1] = i + 1
            kinds.setdefault(name, str(row.get("kind")))
        spans, end = [], 0
        for name, (first, last) in found.items():
            begin, end = end, end + len(_steps(self.metrics[first:last]))
            spans.append(StageSpan(name, kinds[name], first, last, begin, end))
        for row in self.evaluations:
            name = str(row.get("stage"))
            if name not in found:
                found[name] = [len(self.metrics)] * 2
                rows = len(self.metrics)
                spans.append(StageSpan(name, str(row.get("kind")), rows, rows, end, end))
        return spans

    @cached_property
    def places(self) -> list[int]:
        """Where each row of metrics lies on the axis of all steps: how many are done by then. What a stage
        spends before its first step, or after its last, is no step.
        """
        at = [0] * len(self.metrics)
        for span in self.spans:
            seen: dict[Any, None] = {}
            for i in range(span.first, span.last):
                seen |= _steps(self.metrics[i : i + 1])
                at[i] = span.begin + len(seen)
        return at

    def steps(self, span: StageSpan) -> int:
        """How many steps of a stage are logged."""
        return span.end - span.begin

    def position(self, row: Row) -> float:
        """Where an evaluation lies on the axis of all steps: steps done before it."""
        if row.get("stage") not in self._done:
            return float(self.places[-1] if self.places else 0)
        steps, done = self._done[row["stage"]]
        step = number(row.get("step"))
        return float(done[0 if math.isnan(step) else np.searchsorted(steps, step, side="right")])

    @cached_property
    def _done(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """By stage its rows' steps in order, and where the axis is before them and by each."""
        found = {}
        for span in self.spans:
            steps = np.array([number(row.get("step")) for row in self.metrics[span.first : span.last]])
            order = np.argsort(steps, kind="stable")[: int(np.isfinite(steps).sum())]  # NaN is last
            places = np.array(self.places[span.first : span.last], dtype=int)[order]
            found[span.name] = steps[order], np.maximum.accumulate([span.begin, *places])
        return found

    def series(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """(axis position, value) of the rows that have a finite figure under this name."""
        points = [(self.places[i], number(row.get(key))) for i, row in enumerate(self.metrics)]
        kept = [p for p in points if not math.isnan(p[1])]
        return np.array([p[0] for p in kept], dtype=float), np.array([p[1] for p in kept], dtype=float)

    def keys(self, prefix: str, suffix: str = "") -> list[str]:
        """Names of figures logged anywhere, in order of first sight."""
        seen: dict[str, None] = {}
        for row in self.metrics:
            for key in row:
                if key.startswith(prefix) and key.endswith(suffix):
                    seen.setdefault(key)
        return list(seen)

    def judged(self, kind: str | None = None) -> list[Row]:
        """Evaluations with a critic's figures, of one kind of stage or of all."""
        return [
            e for e in self.evaluations if isinstance(e.get("critic"), dict) and kind in (None, e.get("kind"))
        ]

    def acted(self) -> list[Row]:
        """Evaluations with the actor's held-out accuracy."""
        return [e for e in self.evaluations if isinstance(e.get("actor"), dict)]

    def recipe_stages(self) -> list[Row]:
        """The recipe's stages, each with its name."""
        stages = self.recipe.get("stages")
        known = [s for s in stages if isinstance(s, dict)] if isinstance(stages, list) else []
        return [{**s, "name": s.get("name", s.get("kind"))} for s in known]

    @cached_property
    def judged_kinds(self) -> list[str]:
        """Kinds of the recipe's stages that have a critic."""
        found = set()
        for plain in self.recipe_stages():
            stage = typed_stage(plain)
            alone = isinstance(stage, SftStage) and stage.role != "critic"
            alone |= isinstance(stage, PolicyStage) and not isinstance(stage.algorithm, WithScalarCritic)
            found |= set() if alone else {plain.get("kind")}
        return [kind for kind in KINDS if kind in found]

    @cached_property
    def at_stage_end(self) -> dict[str, Row]:
        """By kind, the critic's evaluation that stands for the stage's end: the last one after a step.

        SFT and REINFORCE without one: that which the next stage starts with (no step of it done, so it sees
        the same critic and the same frozen actor).
        """
        ends: dict[str, Row] = {}
        for kind in KINDS:
            own = [e for e in self.judged(kind) if not is_start(e)]
            after = {"sft": "reinforce", "reinforce": "ppo"}.get(kind)
            next_start = [e for e in self.judged(after) if is_start(e)] if after else []
            if own or next_start:
                ends[kind] = own[-1] if own else next_start[0]
        return ends

    @cached_property
    def actor_before(self) -> Row | None:
        """The actor's last evaluation before the first step of its RL."""
        before = list(takewhile(lambda row: not is_moved(row), self.acted()))
        return before[-1] if before else None

    @cached_property
    def actor_after(self) -> Row | None:
        """The actor's last evaluation after a step of its RL."""
        after = [e for e in self.acted() if is_moved(e)]
        return after[-1] if after else None


def _steps(rows: Iterable[Row]) -> dict[Any, None]:
    """The steps that rows are of, each once, in order."""
    return {row.get("step"): None for row in rows if row.get("step") != 0}


def is_start(row: Row) -> bool:
    """Whether an evaluation was made before its stage's first step."""
    return row.get("name") == "start" or (number(row.get("step")) == 0 and row.get("name") != "end")


def is_moved(row: Row) -> bool:
    """Whether an evaluation was made after a step of the actor's RL."""
    return row.get("kind") in ACTOR_KINDS and not is_start(row)


def read_run(path: str | Path) -> RunData:
    """Read a run folder. Raises InputError where it is no folder, or holds nothing to report."""
    folder = RunFolder(path)
    if not folder.path.is_dir():
        raise InputError("no such run folder", where=str(path), way_out="genac report runs/<name>")
    rows: dict[str, list[Row]] = {}
    unreadable: dict[str, int] = {}
    for log in (METRICS, EVALUATIONS, ROLLOUTS):
        rows[log], bad = folder.rows(log)
        if bad:
            unreadable[log] = bad
    recipe = folder.resolved_recipe()
    if not recipe and not any(rows.values()):
        raise InputError(
            f"neither recipe.yaml nor {METRICS} is in it",
            where=str(path),
            way_out="name the folder of a run: genac report runs/<name>",
        )
    evaluations = latest_evaluations(rows[EVALUATIONS])
    begun = attempts(history(folder))
    logs = rows[METRICS], evaluations, rows[ROLLOUTS]
    return RunData(folder.path, recipe, *logs, unreadable, begun, folder.told_of_data())


def latest_evaluations(rows: Sequence[Row]) -> list[Row]:
    """Each evaluation once: a resumed stage may make one again, and the later one counts."""
    unique = {(e.get("stage"), e.get("name"), e.get("step")): e for e in rows}
    last = set(map(id, unique.values()))
    return [e for e in rows if id(e) in last]


# --- the summary ---------------------------------------------------------------------------------


def summarise(run: RunData) -> dict[str, Any]:
    """The flat object of summary.json. A figure that the run does not give is null, not left out,
    where its name is one that scripts rely on; totals are sums over all stages' rows."""
    summary: dict[str, Any] = {
        "run/name": run.recipe.get("name", run.path.name),
        "run/steps": sum(map(run.steps, run.spans)),
    }
    summary.update(_origin(run))
    summary.update(_actor(run))
    summary.update(_critic(run))
    summary.update(_training(run))
    summary.update(_costs(run))
    failed = failed_gates(run)
    summary["gate/failed"] = "; ".join(f"{gate.stage.name}: {m.what}" for gate in failed for m in gate.missed)
    back = [gate.stage.name for gate in failed if gate.stage.gate.action == "fallback"]
    summary["gate/fallback"] = "; ".join(back)
    summary["gate/stopped"] = next((gate.stage.name for gate in failed if gate.stopped), None)
    summary["run/unexpected"] = "; ".join(f"{name}: {left.what}" for name, left in left_bands(run))
    missing = what_is_missing(run)
    summary["report/complete"] = not missing
    summary["report/missing"] = "; ".join(missing)
    return summary


def _origin(run: RunData) -> Row:
    """What the last attempt came from, and how it ended."""
    start, end = run.attempts[-1] if run.attempts else ({}, None)
    code = None if end is None else int(end["code"])
    return {
        **{f"run/{key}": start.get(key) for key in ("version", "commit", "dirty", "command", "host")},
        "run/attempts": len(run.attempts),
        "run/exit_code": code,
        "run/ended": None if code is None else meaning(code),
    }


def accuracy_interval(row: Row) -> tuple[float, float]:
    """95 % interval of an evaluation's accuracy, prompts resampled; NaN where outcomes are not kept."""
    outcomes = groups((row.get("actor") or {}).get("outcomes"))
    flat = [(p, x) for p, samples in outcomes.items() for x in samples]
    return figures.bootstrap_mean([x for _, x in flat], [p for p, _ in flat])


def brier_interval(row: Row) -> tuple[float, float]:
    """95 % interval of an evaluation's Brier score, prompts resampled; NaN where errors are not kept."""
    critic = row.get("critic") or {}
    errors = zip(critic.get("errors") or [], critic.get("prompts") or [], strict=False)
    kept = [(number(e), p) for e, p in errors if not math.isnan(number(e))]
    return figures.bootstrap_mean([e for e, _ in kept], [p for _, p in kept])


def _actor(run: RunData) -> Row:
    result: Row = {"actor/accuracy_sft": math.nan, "actor/accuracy_ppo": math.nan}
    after = run.actor_after
    kind = str(after["kind"]) if after else "ppo"
    for name, row in (("sft", run.actor_before), (kind, after)):
        if row is None:
            continue
        result[f"actor/accuracy_{name}"] = number(row["actor"].get("accuracy"))
        low, high = accuracy_interval(row)
        result |= {f"actor/accuracy_{name}_low": low, f"actor/accuracy_{name}_high": high}
        outcomes = groups(row["actor"].get("outcomes"))
        if outcomes and (k := min(map(len, outcomes.values()))) > 1:
            result[f"actor/pass_at_{k}_{name}"] = figures.pass_at_k(outcomes, k)
        result[f"actor/truncated_{name}"] = number(row["actor"].get("truncated"))
    if run.actor_before and after:
        result["actor/accuracy_gain"] = result[f"actor/accuracy_{kind}"] - result["actor/accuracy_sft"]
        one, other = (groups(row["actor"].get("outcomes")) for row in (run.actor_before, after))
        shared = [p for p in one if p in other]
        gains = [float(np.mean(other[p]) - np.mean(one[p])) for p in shared]
        low, high = figures.bootstrap_mean(gains, shared)
        result |= {"actor/accuracy_gain_low": low, "actor/accuracy_gain_high": high}
        result[f"actor/accuracy_{kind}_step"] = number(after.get("step"))
    return result


def _critic(run: RunData) -> Row:
    promised = ("constant", "sft", "reinforce", "ppo", "constant_ppo")
    result: Row = {f"critic/brier_{name}": math.nan for name in promised}
    for kind, row in run.at_stage_end.items():
        for name in CRITIC_FIGURES:
            if name in row["critic"]:
                result[f"critic/{name}_{kind}"] = number(row["critic"][name])
        low, high = brier_interval(row)
        result |= {f"critic/brier_{kind}_low": low, f"critic/brier_{kind}_high": high}
    ends = (run.at_stage_end.get(kind) for kind in ("reinforce", "value", "sft"))
    if frozen := next((end for end in ends if end), None):
        result["critic/brier_constant"] = number(frozen["critic"].get("brier_constant"))
    judged = run.judged()
    result["critic/parse_rate"] = number(judged[-1]["critic"].get("parse_rate")) if judged else math.nan
    return result


def _training(run: RunData) -> Row:
    result: Row = {"parity/logp_p99": math.nan}
    for statistic in ("p99", "max", "mean", "k3"):
        worst = {role: run.series(f"parity/{role}_{statistic}")[1] for role in ROLES}
        result |= {f"parity/{role}_{statistic}": float(v.max()) for role, v in worst.items() if v.size}
        values = [float(v.max()) for v in worst.values() if v.size]
        if values:
            result[f"parity/logp_{statistic}" if statistic != "k3" else "parity/k3"] = max(values)
    for role in ROLES:
        versions = run.series(f"publish/{role}_version")[1]
        result[f"publish/{role}_version"] = int(versions[-1]) if versions.size else None
    for key in run.keys("publish/"):
        logged = run.series(key)[1]
        if not key.endswith("_version") and logged.size:
            result |= {key: float(logged.sum()), f"{key}_mean": float(logged.mean())}
    result["metrics/nonfinite"] = sum(len(row.get("nonfinite") or ()) for row in run.metrics)
    return result


def phase_totals(rows: Iterable[Row], prefix: str, suffix: str = "") -> dict[str, float]:
    """Sum by phase of the figures `<prefix><phase><suffix>`; a step's total is no phase."""
    totals: dict[str, float] = {}
    for row in rows:
        for key, value in row.items():
            if key.startswith(prefix) and key.endswith(suffix) and not math.isnan(number(value)):
                phase = key[len(prefix) : len(key) - len(suffix)]
                if phase != "total":
                    totals[phase] = totals.get(phase, 0.0) + number(value)
    return totals


def _costs(run: RunData) -> Row:
    seconds = phase_totals(run.metrics, "time/", "_s")
    steps = float(np.sum(run.series("time/total_s")[1]))
    total = steps if steps > 0 else sum(seconds.values())
    result: Row = {f"time/{phase}_s": value for phase, value in seconds.items()}
    result["time/total_s"] = total if run.metrics else math.nan
    times = run.series("time")[1]
    result["time/wall_s"] = float(times[-1] - times[0]) if times.size > 1 else math.nan
    if total > 0:
        result |= {f"share/time_{phase}": value / total for phase, value in seconds.items()}
        result["share/time_other"] = max(0.0, 1.0 - sum(seconds.values()) / total)
    tokens = phase_totals(run.metrics, "tokens/")
    result |= {f"tokens/{phase}": value for phase, value in tokens.items()}
    result["tokens/total"] = sum(tokens.values())
    for name in ("peak_gib", "peak_rank_gib", "rss_gib"):
        values = run.series(f"memory/{name}")[1]
        if values.size:
            result[f"memory/{name}"] = float(values.max())
    result.setdefault("memory/peak_gib", result.get("memory/rss_gib", math.nan))
    return result


@dataclass(frozen=True)
class FailedGate:
    """A stage that ended below its gate."""

    stage: JudgedStage
    missed: list[Missed]
    stopped: bool  # and the run with it


def failed_gates(run: RunData) -> list[FailedGate]:
    """Gates that the recipe asks for and the figures at their stages' ends do not reach, in order."""
    begun = {span.name for span in run.spans}
    plain = run.recipe_stages()
    failed = []
    for index, row in enumerate(plain):
        stage, figures = typed_stage(row), _end_figures(run, row)
        if stage is None or isinstance(stage, PolicyStage):
            continue
        later = any(str(other["name"]) in begun for other in plain[index + 1 :])
        if isinstance(stage, PpoStage):  # its gate is at its beginning
            action: str = entry_action(
                [one for one in map(typed_stage, plain[: index + 1]) if one is not None], stage
            )
            later |= any(r.get("stage") == stage.name and number(r.get("step")) > 0 for r in run.metrics)
        else:
            action = stage.gate.action
        if action != "off" and figures is not None and (found := missed(stage, figures)):
            failed.append(FailedGate(stage, found, action == "stop" and not later))
    return failed


def left_bands(run: RunData) -> list[tuple[str, Left]]:
    """(stage, band that it has left) of the recipe's `expect`, as its rows have it."""
    found = []
    for plain in run.recipe_stages():
        stage = typed_stage(plain)
        if stage is None or not stage.expect:
            continue
        rows = [row for row in run.metrics if row.get("stage") == stage.name and is_step(row)]
        found += [(stage.name, left) for left in all_outside(stage.expect, rows)]
    return found


@cache
def _stage_type() -> TypeAdapter[StageConfig]:
    return TypeAdapter(StageConfig)  # a tenth of a second


def typed_stage(stage: Row) -> StageConfig | None:
    """A stage of the run's recipe; None where this version knows other keys."""
    try:
        return _stage_type().validate_python(stage)
    except ValidationError:
        return None


def _end_figures(run: RunData, stage: Row) -> Figures | None:
    """What a stage's gate judges; None where the stage is not at its end, or has gone on since.

    A ppo stage's is judged at its beginning.
    """
    name, entry = stage["name"], stage.get("kind") == "ppo"
    judged_at = "start" if entry else "end"
    ends = [e for e in run.evaluations if e.get("stage") == name and e.get("name") == judged_at]
    rows = [row for row in run.metrics if row.get("stage") == name]
    if not ends or (not entry and any(number(r.get("step")) > number(ends[-1].get("step")) for r in rows)):
        return None
    critic = ends[-1].get("critic")
    judged = critic if isinstance(critic, Mapping) else {}
    figures = {f"eval/critic_{key}": number(value) for key, value in judged.items()}
    heldout = stage.get("heldout") or {}
    metric = heldout.get("metric", "loss")
    seen = [number(row.get(f"{stage.get('role')}/heldout_{metric}")) for row in rows]
    if looks := [figure for figure in seen if not math.isnan(figure)]:
        best = min(looks) if metric == "loss" else max(looks)
        figures[f"heldout/{metric}"] = best if heldout.get("keep", "best") == "best" else looks[-1]
    return figures


def what_is_missing(run: RunData) -> list[str]:
    """What a whole run of this recipe would have and this folder has not, in words."""
    missing = []
    if not run.recipe:
        missing.append("recipe.yaml")
    for log, rows in ((METRICS, run.metrics), (EVALUATIONS, run.evaluations), (ROLLOUTS, run.rollouts)):
        if not rows:
            missing.append(f"{log} has no rows")
        if log in run.unreadable:
            missing.append(f"{run.unreadable[log]} unreadable line(s) of {log}")
    steps = {s.name: number(run.metrics[s.last - 1].get("step")) for s in run.spans if s.last > s.first}
    for stage in run.recipe_stages():
        name, wanted = str(stage["name"]), number(stage.get("steps"))
        if name not in steps:
            missing.append(f"stage {name} has not begun")
        elif not math.isnan(wanted) and steps[name] < wanted:
            missing.append(f"stage {name} is at step {steps[name]:.0f} of {wanted:.0f}")
    judged = {"sft", *run.at_stage_end}
    missing += [f"no evaluation of the critic after {k}" for k in run.judged_kinds if k not in judged]
    trained = [kind for kind in ACTOR_KINDS if any(s.get("kind") == kind for s in run.recipe_stages())]
    if trained and run.actor_after is None:
        missing.append(f"no evaluation of the actor after a {trained[0]} step")
    return missing
