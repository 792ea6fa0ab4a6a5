"""Progress on a clock of its own: times, expected times, and what is printed where."""

from __future__ import annotations

import io
import subprocess
import sys
import time

import pytest
from rich.console import Console

from genac_megatron.cluster.heartbeat import describe
from genac_megatron.observe import progress as progress_module
from genac_megatron.observe.progress import Progress, format_duration, shown_figures
from genac_megatron.observe.timer import PhaseTimer


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def text_progress(clock: Clock, enabled: bool = True) -> tuple[Progress, io.StringIO]:
    out = io.StringIO()
    console = Console(file=out, force_terminal=False, width=200)
    timer = PhaseTimer(clock)
    return Progress(enabled, stages=["sft", "ppo"], timer=timer, console=console, clock=clock), out


def test_phases_inside_phases_are_counted_once() -> None:
    clock = Clock()
    timer = PhaseTimer(clock)
    with timer.phase("train"):
        clock.now += 2
        with timer.phase("publish"):
            clock.now += 3
        clock.now += 1
    with timer.phase("train"):
        clock.now += 4
    clock.now += 5
    timer.add("judge", 1.5)
    wanted = {"time/train_s": 7.0, "time/publish_s": 3.0, "time/judge_s": 1.5, "time/total_s": 15.0}
    assert timer.take() == wanted
    clock.now += 1
    assert timer.take() == {"time/total_s": 1.0}


def test_a_phase_that_raises_is_timed() -> None:
    clock = Clock()
    timer = PhaseTimer(clock)

    def fails() -> None:
        with timer.phase("train"):
            clock.now += 2
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert timer.take()["time/train_s"] == 2.0


def test_a_line_per_step_with_the_time_left() -> None:
    clock = Clock()
    progress, out = text_progress(clock)
    with progress:
        progress.stage("ppo", 12, done=10)
        clock.now += 60
        progress.step(11, {"rollout/outcome_mean": 0.51234, "time/train_s": 9.0})
        progress.note("published actor 3")
        progress.step(12, {})
    lines = out.getvalue().splitlines()
    assert lines[0] == "stage 2/2 ppo: 12 steps, going on after 10"
    assert lines[1] == "[ppo 11/12] rollout/outcome_mean 0.5123 · 60 s/step · eta 1m00s"
    assert lines[2] == "published actor 3"
    assert lines[3].startswith("[ppo 12/12]")
    assert lines[3].endswith("eta 0s")


def test_many_steps_are_a_line_a_minute_and_the_stages_ends() -> None:
    clock = Clock()
    progress, out = text_progress(clock)
    with progress:
        progress.stage("sft", 1000)
        for step in range(1, 1001):
            clock.now += 0.5
            progress.step(step, {"actor/loss": 1.0, "unique/actor_train": 9.0})
    lines = out.getvalue().splitlines()
    steps = [int(line.split()[1].split("/")[0]) for line in lines[1:]]
    assert steps == [1, *range(121, 1000, 120), 1000]
    assert max(map(len, lines)) < 60, "figures that tell a person nothing are left out"


def test_a_step_that_takes_long_says_each_minute_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the thread itself, with a shorter minute."""
    monkeypatch.setattr(progress_module, "QUIET_S", 0.02)
    progress, out = text_progress(Clock())
    progress._clock = time.monotonic
    with progress:
        progress.stage("ppo", 3)
        with progress.phase("evaluate"):
            deadline = time.monotonic() + 20
            while "evaluate for" not in out.getvalue() and time.monotonic() < deadline:
                time.sleep(0.01)
    assert "[ppo 0/3] evaluate for 0s" in out.getvalue()
    said = out.getvalue()
    time.sleep(0.1)
    assert out.getvalue() == said, "it ends with the run"


def test_what_precedes_a_stages_steps_is_told_as_that_stages() -> None:
    clock = Clock()
    progress, _ = text_progress(clock)
    progress.stage("sft", 1000)
    progress.step(1000, {"actor/loss": 1.0})
    progress.prepare("ppo")
    with progress.phase("data"):
        clock.now += 66
        assert progress._where() == "[ppo] data for 1m06s"
        wide = Console(file=io.StringIO(), width=200, record=True)
        wide.print(progress._render())
        shown = wide.export_text()
        for wanted in ("2/2 stages", "  ppo", "before its steps: 1m06s"):
            assert wanted in shown
        for old in ("sft", "1000", "actor/loss"):
            assert old not in shown
        seen = progress.snapshot()
        assert seen["stage"] == "ppo"
        assert "steps" not in seen
        assert seen["eta_s"] is None
        assert describe(seen) == "stage ppo, phase data"
    progress.stage("ppo", 12, done=10)
    assert progress._where().startswith("[ppo 10/12]")


def test_figures_take_one_line_however_narrow_the_terminal() -> None:
    clock = Clock()
    progress = Progress(stages=["sft"], console=Console(file=io.StringIO(), force_terminal=True), clock=clock)
    progress.stage("sft", 3)
    progress.step(1, {f"actor/figure{i}": 1.0 for i in range(6)})
    narrow = Console(file=io.StringIO(), width=40, record=True)
    narrow.print(progress._render())
    assert len(narrow.export_text().splitlines()) == 3


def loggers_of(script: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)


def test_warnings_of_all_loggers_speak_with_one_voice() -> None:
    """In a process of its own, with handlers as transformers and a careless library add them."""
    done = loggers_of("""
import io, logging
logging.basicConfig()
library = logging.getLogger("transformers")
library.addHandler(logging.StreamHandler()); library.propagate = False
from rich.console import Console
from genac_megatron.observe import progress as progress_module
from genac_megatron.observe.progress import Progress
from genac_megatron.observe.voice import one_voice
one_voice(); one_voice()
for _ in range(2):
    logging.getLogger("transformers.x").warning("an old %s", "key")
    logging.getLogger("genac_megatron.stages").warning("a gate")
logging.getLogger("megatron.core").warning("no Apex")
out = io.StringIO()
with Progress(console=Console(file=out, force_terminal=True, width=60)):
    logging.getLogger("genac_megatron.stages").warning("genac: warning: above the bars")
print(out.getvalue().count("genac: warning: above the bars"))
""")
    assert done.stderr.splitlines() == [
        "genac: warning of transformers: an old key", "genac: warning: a gate", "genac: warning: a gate"
    ]  # fmt: skip
    assert done.stdout == "1\n"


def test_the_cause_of_a_warning_is_shown_with_it() -> None:
    """An error says "see the cause above"."""
    done = loggers_of("""
import logging
from genac_megatron.observe.voice import one_voice
one_voice()
try:
    open("/nowhere/x")
except OSError:
    logging.getLogger("genac_megatron.training").error("rank 0 failed", exc_info=True)
""")
    first, *traceback = done.stderr.splitlines()
    assert (first, traceback[0]) == ("genac: warning: rank 0 failed", "Traceback (most recent call last):")
    assert traceback[-1].startswith("FileNotFoundError: ")


def test_steps_done_before_a_resume_do_not_make_the_estimate_rosy() -> None:
    clock = Clock()
    progress, out = text_progress(clock)
    with progress:
        progress.stage("sft", 1000, done=998)
        clock.now += 100
        progress.step(999, {})
    assert "100 s/step · eta 1m40s" in out.getvalue()


def test_other_ranks_are_silent_and_timed() -> None:
    clock = Clock()
    progress, out = text_progress(clock, enabled=False)
    with progress:
        progress.stage("sft", 2)
        with progress.phase("train"):
            clock.now += 2
        progress.step(1, {"a/b": 1.0})
        progress.note("hello")
    assert out.getvalue() == ""
    assert progress.timer.take()["time/train_s"] == 2.0


def test_a_terminal_shows_pipeline_stage_and_phase() -> None:
    clock = Clock()
    console = Console(file=io.StringIO(), force_terminal=True, width=120, record=True)
    progress = Progress(
        True, name="run", stages=["sft", "ppo"], timer=PhaseTimer(clock), console=console, clock=clock
    )
    progress.stage("sft", 10)
    for step in (1, 2):
        with progress.phase("judge"):
            clock.now += 8
        clock.now += 2
        progress.step(step, {"critic/loss": 0.25})
    with progress.phase("judge"):
        clock.now += 3
        shown = Console(file=io.StringIO(), width=120, record=True)
        shown.print(progress._render())
        text = shown.export_text()
    assert "run 1/2 stages" in text
    assert "23s so far" in text
    assert "sft 2/10" in text
    assert "eta 1m17s, 10 s/step" in text
    assert "judge" in text
    assert "3.0 s, eta 5s" in text
    assert "critic/loss 0.25" in text


def test_the_live_block_ends_and_leaves_its_last_state(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")  # rich moves no cursor of a dumb one
    out = io.StringIO()
    with Progress(
        True, stages=["sft"], console=Console(file=out, force_terminal=True, width=100)
    ) as progress:
        progress.stage("sft", 3)
        with progress.phase("train"):
            pass
        progress.step(1, {"critic/loss": 0.5})
    assert "sft 1/3" in out.getvalue()
    assert out.getvalue().rstrip().endswith("\x1b[?25h")  # the cursor is back


def test_a_step_needs_a_stage() -> None:
    with pytest.raises(RuntimeError, match="before its stage"):
        Progress(False).step(1, {})


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0s"), (59.6, "1m00s"), (3599.4, "59m59s"), (3700, "1h01m"), (90000, "1d01h"), (-3, "0s")],
)
def test_durations(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_the_figures_shown_are_the_telling_ones() -> None:
    metrics = {"time/train_s": 1.0, "x/y": 2.0, "critic/loss": 3.0, "rollout/outcome_mean": 0.5}
    assert [name for name, _ in shown_figures(metrics, room=2)] == ["rollout/outcome_mean", "critic/loss"]
    assert [name for name, _ in shown_figures(metrics)] == ["rollout/outcome_mean", "critic/loss", "x/y"]
