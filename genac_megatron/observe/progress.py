"""What a person watches: pipeline, stage and phase with the time they still need.

On a terminal a live block of three lines; elsewhere a line a minute, and one at a stage's first and last
step. Other ranks than the one with the display use `Progress(False)`: silent, but their phases are timed too.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from genac_megatron.observe.profile import mark
from genac_megatron.observe.timer import PhaseTimer

# what a line shows first, where a step has it; the rest of its room goes to what else there is
SHOWN = (
    "rollout/outcome_mean",
    "critic/brier",
    "judge/brier",
    "judge/parse_rate",
    "actor/loss",
    "critic/loss",
    "actor/entropy",
    "actor/grad_norm",
    "critic/grad_norm",
    "parity/actor_p99",
)
_ROOM = 6  # figures on a line
_WINDOW = 10  # steps that a step's expected duration is the mean of
_SILENT_GROUPS = ("time", "tokens", "memory", "publish", "unique")
QUIET_S = 60.0  # without a terminal: between lines that only say how far it is


def format_duration(seconds: float) -> str:
    """45s, 4m10s, 1h05m, 2d03h."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"


def shown_figures(metrics: Mapping[str, float], room: int = _ROOM) -> list[tuple[str, str]]:
    """The few figures of a step that fit on a line, as (name, text)."""
    names = [key for key in SHOWN if key in metrics]
    rest = (key for key in metrics if key not in SHOWN and key.split("/")[0] not in _SILENT_GROUPS)
    names += list(rest)[: max(0, room - len(names))]
    return [(name, f"{float(metrics[name]):.4g}") for name in names[:room]]


class _Stage:
    """A stage's steps (total 0: not known yet) and how long one takes."""

    def __init__(self, name: str, total: int, done: int, now: float) -> None:
        self.name, self.total, self.done = name, total, done
        self.began = self.last = now
        self.first = done + 1  # of its steps in this run
        self._recent: deque[float] = deque(maxlen=_WINDOW)

    def advance(self, step: int, now: float) -> None:
        steps = step - self.done
        if steps > 0:
            self._recent.append((now - self.last) / steps)
        self.done, self.last = step, now

    @property
    def told(self) -> str:
        """Its name, and how far it is."""
        return f"{self.name} {self.done}/{self.total}" if self.total else self.name

    @property
    def seconds_per_step(self) -> float | None:
        return sum(self._recent) / len(self._recent) if self._recent else None

    def eta(self, now: float) -> float | None:
        """Seconds to the stage's end; None before a first step has been timed."""
        each = self.seconds_per_step
        if each is None:
            return None
        left = max(0, self.total - self.done)
        return max(0.0, each * left - min(now - self.last, each)) if left else 0.0


_current: Progress | None = None  # the run's, while it is open


def current() -> Progress | None:
    """This process's progress, for who watches it from another thread."""
    return _current


class Progress:
    """Shows a run's progress: `with Progress(rank == 0, stages=names) as progress: ...`.

    `timer` collects the phases' seconds; `progress.timer.take()` gives them for a step's row.
    """

    def __init__(
        self,
        enabled: bool = True,
        *,
        name: str = "",
        stages: Sequence[str] = (),
        timer: PhaseTimer | None = None,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.timer = timer or PhaseTimer()
        self.notes: list[str] = []  # all of them, in order
        self._enabled = enabled
        self._name, self._stages = name, list(stages)
        self._console = console or Console()
        self._clock = clock
        self._began = clock()
        self._stage: _Stage | None = None
        self._phases: list[tuple[str, float]] = []  # open phases: name, begin
        self._usual: dict[tuple[str, str], float] = {}  # seconds of a (stage, phase) last time
        self._figures: list[tuple[str, str]] = []
        self._live: Live | None = None
        self._ticks = 0  # phases begun or ended, and steps
        self._said = clock()  # the last line
        self._over = threading.Event()

    def __enter__(self) -> Progress:
        global _current
        _current = self
        if self._enabled and self._console.is_terminal:
            self._live = Live(
                get_renderable=self._render, console=self._console, refresh_per_second=4, transient=False
            )
            self._live.start()
        elif self._enabled:
            threading.Thread(target=self._tell_each_minute, name="progress", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _current
        _current = None
        self._over.set()
        if self._live is not None:
            self._live.stop()
            self._live = None

    @property
    def has_bars(self) -> bool:
        """Whether it draws on a terminal, through which nothing else may write."""
        return self._live is not None

    def snapshot(self) -> dict[str, Any]:
        """Where this rank is, as plain data; safe to call from another thread. Durations in seconds."""
        now, stage, phases = self._clock(), self._stage, list(self._phases)
        seen: dict[str, Any] = {"ticks": self._ticks, "phases": [name for name, _ in phases]}
        if phases:
            name, begin = phases[-1]
            seen["phase_s"] = now - begin
            seen["usual_s"] = self._usual.get((stage.name if stage else "", name))
        if stage is not None:
            seen["stage"] = stage.name
            if stage.total:
                seen |= {"step": stage.done, "steps": stage.total}
            seen |= {"stages": list(self._stages), "step_s": stage.seconds_per_step, "eta_s": stage.eta(now)}
        return seen

    # --- what a run calls ------------------------------------------------------------------------

    def prepare(self, name: str) -> None:
        """A stage begins with what precedes its steps, which `stage` tells: data, a look at the held-out."""
        self._stage = _Stage(name, 0, 0, self._clock())
        self._figures = []
        if name not in self._stages:
            self._stages.append(name)

    def stage(self, name: str, total_steps: int, done: int = 0) -> None:
        """A stage of `total_steps` begins, or goes on after its first `done` steps."""
        self.prepare(name)
        self._stage = _Stage(name, total_steps, done, self._clock())
        self._line(f"{self._place()}: {total_steps} steps" + (f", going on after {done}" if done else ""))

    def last_step(self, total_steps: int) -> None:
        """The current stage ends after another number of steps than it was begun with."""
        self._current().total = total_steps

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Step `step` (counted from 1) of the current stage is done."""
        stage = self._current()
        now = self._clock()
        self._ticks += 1
        stage.advance(step, now)
        self._figures = shown_figures(metrics)
        eta = stage.eta(now)
        parts = [f"{name} {text}" for name, text in self._figures]
        if stage.seconds_per_step is not None:
            parts.append(f"{stage.seconds_per_step:.3g} s/step")
        if eta is not None:
            parts.append(f"eta {format_duration(eta)}")
        text = f"[{stage.name} {step}/{stage.total}] " + " · ".join(parts)
        if step in (stage.first, stage.total) or now - self._said >= QUIET_S:
            self._line(text)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Show and time a phase; its seconds go to the timer as `time/<name>_s`. Phases nest."""
        with self.shown(name), self.timer.phase(name):
            yield

    @contextmanager
    def shown(self, name: str) -> Iterator[None]:
        """Show a phase whose seconds the work itself counts."""
        key = (self._stage.name if self._stage else "", name)
        begin = self._clock()
        self._phases.append((name, begin))
        self._ticks += 1
        try:
            with mark(name):
                yield
        finally:
            self._ticks += 1
            self._phases.pop()
            self._usual[key] = self._clock() - begin

    def note(self, text: str) -> None:
        """A line that stays."""
        self.notes.append(text)
        if self._enabled:
            self._said = self._clock()
            self._console.print(Text(text), soft_wrap=True)

    def _tell_each_minute(self) -> None:
        """Where no step ends for long: how long its phase has taken so far."""
        while not self._over.wait(QUIET_S / 4):
            if self._clock() - self._said >= QUIET_S:
                self._line(self._where())

    def _where(self) -> str:
        now, stage, phases = self._clock(), self._stage, list(self._phases)
        at = self._name or "starting"
        if stage is not None:
            at = stage.told
        parts = [f"{name} for {format_duration(now - begin)}" for name, begin in phases]
        return f"[{at}] " + (" · ".join(parts) or f"{format_duration(now - self._began)} so far")

    # --- how it looks ----------------------------------------------------------------------------

    def _current(self) -> _Stage:
        if self._stage is None:
            raise RuntimeError("a step before its stage")
        return self._stage

    def _place(self) -> str:
        stage = self._current()
        return f"stage {self._stages.index(stage.name) + 1}/{len(self._stages)} {stage.name}"

    def _line(self, text: str) -> None:
        if self._enabled and self._live is None:
            self._said = self._clock()
            self._console.print(Text(text), soft_wrap=True)

    def _render(self) -> RenderableType:
        now = self._clock()
        grid = Table.grid(padding=(0, 1))
        for width in (24, 26, None):
            grid.add_column(width=width, no_wrap=True)
        stage = self._stage
        if stage is None:
            return Text(f"{self._name} starting, {format_duration(now - self._began)}")
        index = self._stages.index(stage.name)
        share = min(1.0, stage.done / stage.total) if stage.total else 0.0
        grid.add_row(
            Text(f"{self._name} {index + 1}/{len(self._stages)} stages".strip(), style="bold"),
            ProgressBar(total=len(self._stages), completed=index + share, width=26),
            Text(f"{format_duration(now - self._began)} so far", style="dim"),
        )
        grid.add_row(
            Text(f"  {stage.told}"),
            ProgressBar(total=max(1, stage.total), completed=stage.done, width=26),
            Text(self._pace(stage, now), style="cyan"),
        )
        for depth, (name, begin) in enumerate(list(self._phases)):
            grid.add_row(*self._phase_row(stage.name, name, now - begin, depth))
        lines: list[RenderableType] = [grid]
        if self._figures:
            figures = "  " + " · ".join(f"{n} {t}" for n, t in self._figures)
            lines.append(Text(figures, style="dim", no_wrap=True, overflow="ellipsis"))
        return Group(*lines)

    def _pace(self, stage: _Stage, now: float) -> str:
        each, eta = stage.seconds_per_step, stage.eta(now)
        if not stage.total:
            return f"before its steps: {format_duration(now - stage.began)}"
        if each is None or eta is None:
            return f"first step: {format_duration(now - stage.last)}"
        return f"eta {format_duration(eta)}, {each:.3g} s/step"

    def _phase_row(self, stage: str, name: str, spent: float, depth: int) -> tuple[RenderableType, ...]:
        label = Text("  " * (depth + 2) + name, style="green")
        usual = self._usual.get((stage, name))
        if usual is None:
            return label, ProgressBar(total=None, width=26, pulse=True), Text(f"{spent:.1f} s")
        bar = ProgressBar(total=max(usual, 1e-9), completed=min(spent, usual), width=26)
        left = f"eta {format_duration(usual - spent)}" if spent < usual else "longer than last time"
        return label, bar, Text(f"{spent:.1f} s, {left}")
