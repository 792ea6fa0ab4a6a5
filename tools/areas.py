"""Run areas of the tests side by side, and tell how far each is: `make test`.

    python tools/areas.py [--jobs 2] [--logs runs/test-logs] AREA ...     begun in this order

Each area is `make test-AREA`, so it can be run alone. Its output goes to LOGS/AREA.log; here stand its
progress, the words of what failed, and a table at the end. Exit code: 0, or 1 where an area failed, or
128 + n where signal n ended it.

Nothing of an area outlives this process, however that ends. Asked to end (SIGINT, SIGTERM, SIGHUP, or its
parent is gone) it interrupts the areas, so that tests stop the servers they started, and after --grace
seconds ends whatever is left; a second Ctrl-C waits no longer. So that this holds after SIGKILL too, a
supervisor runs each area: `areas.py --watch`, which adopts its orphans (Linux), whatever their session, and
ends them all when the area has ended or this process is gone. What an area leaves behind is told by name.
Where orphans cannot be adopted, what left the area's process group is not found. Standard library only.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tools.processes import (  # noqa: E402
    GIVE_UP_S,
    LOOK_S,
    PATIENCE_S,
    adopt_orphans,
    descendants,
    end_all,
    reap,
)

POLL_S = 0.5
CLEAR = "\r\x1b[K"  # of a terminal's line
TOLD_S = {True: 2.0, False: 60.0}  # between two lines of progress: on a terminal, in a log
GRACE_S = 30.0  # from the asking to the ending
ORPHAN_GRACE_S = 5.0  # the same, when nobody waits for it
LINGER_S = 10.0  # for processes that see by themselves that their area has ended

WATCH = "--watch"
SHOWN_LEFT = 20  # processes left behind: with SHOWN_WORDS of each fewer bytes than SHOWN
PERCENT = re.compile(r"\[ *(\d+)%\]")
COUNTED = r"\d+ (?:passed|failed|errors?|skipped|deselected)\b.*? in [\d.]+s.*?"
SUMMARY = re.compile(rf"^=* ?({COUNTED}) ?=*$")
SHOWN = 16_384  # bytes of a log's end that are searched for progress


@dataclass
class Area:
    name: str
    log: Path
    process: subprocess.Popen[bytes]
    began: float = field(default_factory=time.monotonic)
    seconds: float = 0.0
    left: list[str] = field(default_factory=list)  # the processes that outlived it

    @property
    def percent(self) -> str:
        found = PERCENT.findall(_tail(self.log))
        return f"{found[-1]} %" if found else "starting"

    @property
    def outcome(self) -> str:
        """pytest's last line, such as `20 passed in 3.05s`."""
        found = [match[1] for line in _tail(self.log).splitlines() if (match := SUMMARY.match(line.strip()))]
        behind = ", processes left behind" if self.left else ""
        return (found[-1] if found else f"ended with {self.process.returncode}") + behind


class Asked:
    """What asks this process to end: signals, and its parent's end.

    The parent is polled: what the kernel would tell (prctl) is the end of the thread that started us.
    """

    def __init__(self, parent: int) -> None:
        self.parent, self.signals = parent, list[int]()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            # Ignored under nohup, or in a shell's background; SIGTERM is how we ask supervisors.
            if number == signal.SIGTERM or signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, lambda number, _frame: self.signals.append(number))

    def __bool__(self) -> bool:
        return bool(self.signals) or self.orphaned

    @property
    def orphaned(self) -> bool:
        return os.getppid() != self.parent

    @property
    def why(self) -> str:
        return signal.Signals(self.signals[0]).name if self.signals else "its parent has ended"

    @property
    def code(self) -> int:
        return 128 + (self.signals[0] if self.signals else signal.SIGHUP)


def start(name: str, logs: Path, grace_s: float) -> Area:
    log = logs / f"{name}.log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, __file__, WATCH, str(os.getpid()), str(grace_s), name],
            stdout=subprocess.PIPE,  # on it: what was left behind
            stderr=out,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
    return Area(name, log, process)


def run(names: Sequence[str], jobs: int, logs: Path, grace_s: float, asked: Asked) -> list[Area]:
    """Every area once, `jobs` at a time; those that ended, in the order in which they did."""
    logs.mkdir(parents=True, exist_ok=True)
    waiting, running, ended = list(names), list[Area](), list[Area]()
    told = time.monotonic()
    try:
        while (waiting or running) and not asked:
            while waiting and len(running) < jobs:
                running.append(start(waiting.pop(0), logs, grace_s))
                _say(f"{running[-1].name}: begun, {running[-1].log}")
            time.sleep(POLL_S)
            for area in [area for area in running if area.process.poll() is not None]:
                running.remove(area)
                area.seconds = time.monotonic() - area.began
                # All that its supervisor left, which happens where that was killed.
                area.left = _heard(area) + end_all({other.process.pid for other in running})
                ended.append(area)
                _tell_end(area)
            if running and time.monotonic() - told > TOLD_S[sys.stdout.isatty()]:
                told = time.monotonic()
                _progress(running, len(waiting))
        if asked:
            _say_if_heard(
                f"interrupted ({asked.why}): areas may clean up for {grace_s:.0f} s, then all they started is"
                " ended; Ctrl-C again does not wait"
            )
    finally:
        _stop(running, grace_s, asked)
    return ended


def _heard(area: Area) -> list[str]:
    assert area.process.stdout is not None
    with area.process.stdout as told:
        return told.read().decode(errors="replace").splitlines()


def _tell_end(area: Area) -> None:
    _say(f"{area.name}: {area.outcome}")
    _tell_left(area, _say)
    if area.process.returncode:
        print(area.log.read_text(errors="replace"), flush=True)


def _tell_left(area: Area, say: Callable[[str], None]) -> None:
    for words in area.left:
        say(f"{area.name}: left behind, now ended: {words}")


def _progress(running: Sequence[Area], waiting: int) -> None:
    now = time.monotonic()
    words = [f"{area.name} {area.percent}, {(now - area.began) / 60:.0f} min" for area in running]
    line = " · ".join(words) + (f" · {waiting} more" if waiting else "")
    if sys.stdout.isatty():
        print(CLEAR + line, end="", flush=True)
    else:
        _say(line)


def _say(text: str) -> None:
    print(f"{CLEAR if sys.stdout.isatty() else ''}[tests] {text}", flush=True)


def _say_if_heard(text: str) -> None:
    """Whoever read us may be gone, as a terminal: that must not keep us from ending areas."""
    try:
        _say(text)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def _tail(path: Path) -> str:
    with path.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - SHOWN))
        return file.read().decode(errors="replace")


def _stop(running: Sequence[Area], grace_s: float, asked: Asked) -> None:
    """End areas that still run: asked first, so that they clean up."""
    requests = 0
    until = time.monotonic() + grace_s + PATIENCE_S + GIVE_UP_S
    while any(area.process.poll() is None for area in running) and time.monotonic() < until:
        wanted = 2 if asked.signals.count(signal.SIGINT) > 1 else 1
        if requests < wanted:
            requests += 1
            for area in running:
                area.process.terminate()
        time.sleep(LOOK_S)
    for area in running:
        if area.process.poll() is None:  # stuck: what it looked after becomes ours
            area.process.kill()
        area.process.wait()
        area.left = _heard(area)
        _tell_left(area, _say_if_heard)
    for words in end_all():
        _say_if_heard(f"left behind, now ended: {words}")


# --- a supervisor: one area, and all that descends from it ------------------------------------------


def watch(parent: int, grace_s: float, name: str) -> int:
    """Run an area and end with all that it started, some seconds after `parent` has gone at the latest."""
    asked = Asked(parent)
    adopt_orphans()
    make = subprocess.Popen(
        [os.environ.get("MAKE", "make"), "--no-print-directory", f"test-{name}"],
        stdout=sys.stderr,
        stderr=sys.stderr,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        # Started in a shell's background we ignore SIGINT, and so would all that we start.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        while make.poll() is None and not asked:
            reap({make.pid})
            time.sleep(LOOK_S)
        until = time.monotonic() + min(LINGER_S, grace_s)
        while not asked and descendants() and time.monotonic() < until:
            time.sleep(POLL_S)
        if asked:
            _interrupt(make, grace_s, asked)
    finally:
        _tell_areas(end_all(leader=make))
    if asked:
        return asked.code
    return make.returncode if make.returncode >= 0 else 128 - make.returncode


def _tell_areas(left: Sequence[str]) -> None:
    """In the log, and to areas.py, which may be gone."""
    shown = [*left[:SHOWN_LEFT], *([f"{len(left) - SHOWN_LEFT} more"] if len(left) > SHOWN_LEFT else [])]
    for out, before in ((2, "left behind, now ended: "), (1, "")):
        with contextlib.suppress(OSError):
            os.write(out, "".join(f"{before}{words}\n" for words in shown).encode())


def _interrupt(make: subprocess.Popen[bytes], grace_s: float, asked: Asked) -> None:
    """As by Ctrl-C, so that tests clean up. Once all whom it reached have ended, nobody does."""
    began = time.monotonic()
    with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS: of a group that has ended
        os.killpg(make.pid, signal.SIGINT)
        while len(asked.signals) < 2:
            if time.monotonic() - began > (min(grace_s, ORPHAN_GRACE_S) if asked.orphaned else grace_s):
                return
            time.sleep(LOOK_S)
            make.poll()
            reap({make.pid})
            os.killpg(make.pid, 0)


# --- the command --------------------------------------------------------------------------------------


def table(ended: Sequence[Area], names: Sequence[str]) -> str:
    rows = [(area.name, f"{area.seconds / 60:.1f} min", area.outcome) for area in ended]
    rows.sort(key=lambda row: names.index(row[0]))
    width = max(len(row[0]) for row in rows)
    return "\n".join(f"  {name:<{width}}  {took:>9}  {outcome}" for name, took, outcome in rows)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("areas", nargs="+")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--logs", type=Path, default=Path("runs/test-logs"))
    parser.add_argument("--grace", type=float, default=GRACE_S, help="seconds from the asking to the ending")
    options = parser.parse_args(arguments)

    asked = Asked(os.getppid())
    adopt_orphans()  # those of a supervisor that is killed
    began = time.monotonic()
    ended = run(options.areas, options.jobs, options.logs, options.grace, asked)
    if asked:
        return asked.code
    failed = [area.name for area in ended if area.process.returncode]
    print(table(ended, options.areas), flush=True)
    minutes = (time.monotonic() - began) / 60
    _say(f"{minutes:.1f} min, " + (f"failed: {', '.join(sorted(failed))}" if failed else "all passed"))
    return 1 if failed else 0


if __name__ == "__main__":
    if sys.argv[1:2] == [WATCH]:
        sys.exit(watch(int(sys.argv[2]), float(sys.argv[3]), sys.argv[4]))
    sys.exit(main())
