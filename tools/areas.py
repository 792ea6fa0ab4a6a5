"""Run areas of the tests side by side, and tell how far each is: `make test`.

    python tools/areas.py [--jobs 2] [--logs runs/test-logs] AREA ...     begun in this order

Each area is `make test-AREA`, so it can be run alone. Its output goes to LOGS/AREA.log; here stand its
progress, the words of what failed, and a table at the end. Exit code: 0, or 1 where an area failed.
Asked to end (SIGINT, SIGTERM) it passes that on, so that tests stop the servers they started. Standard
library only.
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
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

POLL_S = 0.5
CLEAR = "\r\x1b[K"  # of a terminal's line
TOLD_S = {True: 2.0, False: 60.0}  # between two lines of progress: on a terminal, in a log
GRACE_S = 30.0  # from the asking to the killing
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

    @property
    def percent(self) -> str:
        found = PERCENT.findall(_tail(self.log))
        return f"{found[-1]} %" if found else "starting"

    @property
    def outcome(self) -> str:
        """pytest's last line, such as `20 passed in 3.05s`."""
        found = [match[1] for line in _tail(self.log).splitlines() if (match := SUMMARY.match(line.strip()))]
        return found[-1] if found else f"ended with {self.process.returncode}"


def start(name: str, logs: Path) -> Area:
    log = logs / f"{name}.log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            [os.environ.get("MAKE", "make"), "--no-print-directory", f"test-{name}"],
            stdout=out,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            # Started in a shell's background we ignore SIGINT, and so would all that we start.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
    return Area(name, log, process)


def run(names: Sequence[str], jobs: int, logs: Path) -> list[Area]:
    """Every area once, `jobs` at a time; those that ended, in the order in which they did."""
    logs.mkdir(parents=True, exist_ok=True)
    waiting, running, ended = list(names), list[Area](), list[Area]()
    told = time.monotonic()
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                running.append(start(waiting.pop(0), logs))
                _say(f"{running[-1].name}: begun, {running[-1].log}")
            time.sleep(POLL_S)
            for area in [area for area in running if area.process.poll() is not None]:
                running.remove(area)
                area.seconds = time.monotonic() - area.began
                ended.append(area)
                _tell_end(area)
            if running and time.monotonic() - told > TOLD_S[sys.stdout.isatty()]:
                told = time.monotonic()
                _progress(running, len(waiting))
    finally:
        _stop(running)
    return ended


def _tell_end(area: Area) -> None:
    _say(f"{area.name}: {area.outcome}")
    if area.process.returncode:
        print(area.log.read_text(errors="replace"), flush=True)


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


def _tail(path: Path) -> str:
    with path.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - SHOWN))
        return file.read().decode(errors="replace")


def _stop(running: Sequence[Area]) -> None:
    """End areas that still run: asked first, so that they clean up."""
    for area in running:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(area.process.pid, signal.SIGINT)
    until = time.monotonic() + GRACE_S
    for area in running:
        try:
            area.process.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(area.process.pid, signal.SIGKILL)


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
    options = parser.parse_args(arguments)

    def asked(number: int, _frame: object) -> None:
        raise KeyboardInterrupt(signal.Signals(number).name)

    signal.signal(signal.SIGTERM, asked)
    began = time.monotonic()
    try:
        ended = run(options.areas, options.jobs, options.logs)
    except KeyboardInterrupt:
        _say("interrupted")
        return 130
    failed = [area.name for area in ended if area.process.returncode]
    print(table(ended, options.areas), flush=True)
    minutes = (time.monotonic() - began) / 60
    _say(f"{minutes:.1f} min, " + (f"failed: {', '.join(sorted(failed))}" if failed else "all passed"))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
