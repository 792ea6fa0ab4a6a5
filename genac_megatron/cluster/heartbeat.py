"""A thread beside each rank: a heartbeat file, requests to stop, and the stacks of all ranks on a stall.

Files, in the attempt's log folder: heartbeats/rank-00003.json, stop (made by the batch script), and after a
stall stacks/rank-00003.txt and stall.json. Nothing here takes part in a collective.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from genac_megatron import platform
from genac_megatron.errors import EXIT_OK
from genac_megatron.observe import progress

BEAT_S, SLOW_BEAT_S = 5.0, 20.0  # between heartbeats, of few ranks and of many; a stop is seen within LOOK_S
WRITES_PER_S = 50.0  # of all ranks together, which the shared file system bears
LOOK_S = 1.0
SILENT_S = 60.0  # a heartbeat older than this: the process hangs as a whole, or is gone
OLD_S = 10.0  # a heartbeat older than this is told with its age
STALL_S = 600.0  # without progress, and LONGER times what the phase took last
LONGER = 3.0
SETTLE_S = 10.0  # for all ranks to dump before one names the culprit
BEATS, STACKS, STOP, STALL = "heartbeats", "stacks", "stop", "stall.json"
PACKAGE = str(Path(__file__).resolve().parents[1])
MOST_FRAMES, SHOWN_SLOW = 60, 8


def node_name() -> str:
    """The node as Slurm calls it, else the host's name."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def attempt_folder(run: Path, environ: Mapping[str, str] = os.environ) -> Path | None:
    """The log folder of a batch script's attempt at this run; None outside of one.

    A command beside the run (an evaluation in the same job, say) has a folder and logs of its own.
    """
    named = environ.get("GENAC_LOGS")
    mine = Path(environ.get("GENAC_RUN") or run).absolute() == run.absolute()
    return Path(named) if named and mine else None


def logs_folder(run: Path, environ: Mapping[str, str] = os.environ) -> Path:
    """The attempt's log folder: what the batch script names, else logs/local of the run."""
    return attempt_folder(run, environ) or run / "logs" / "local"


def world_size() -> int:
    """How many ranks there are, by the environment."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def heartbeat(run: Path) -> Iterator[None]:
    """While the block runs, this rank's heart beats. A file that cannot be written stops nothing."""
    pace = min(SLOW_BEAT_S, max(BEAT_S, world_size() / WRITES_PER_S))
    asks = attempt_folder(run) is not None
    beat = Heartbeat(logs_folder(run), int(os.environ.get("RANK", "0")), beat_s=pace, asks=asks)
    beat.start()
    try:
        yield
    except BaseException as error:
        # srun ends ranks that are slow to leave, and then reports their signal: what they meant is here.
        beat.stop(f"ended by {type(error).__name__}", getattr(error, "exit_code", 1))
        raise
    else:
        beat.stop("done", EXIT_OK)


class Heartbeat(threading.Thread):
    """The thread. stall_s: seconds without progress that count as a stall. asks: a batch script asks to stop
    by a file in the folder.
    """

    def __init__(
        self,
        folder: Path,
        rank: int,
        *,
        beat_s: float = BEAT_S,
        stall_s: float | None = None,
        asks: bool = False,
    ):
        super().__init__(name="genac-heartbeat", daemon=True)
        self.folder, self.rank, self.beat_s = folder, rank, beat_s
        self.stall_s = float(os.environ.get("GENAC_STALL_S", STALL_S)) if stall_s is None else stall_s
        self._ended = threading.Event()
        self._state = "running"
        self._code: int | None = None
        self._seen: dict[str, Any] = {}
        self._asked = not asks  # or a stop is passed on already
        self._ticks, self._since = -1, time.monotonic()
        self._stalled_at: float | None = None
        self._told = self._begun = False
        self._main = threading.main_thread().ident

    def stop(self, state: str, code: int = EXIT_OK) -> None:
        """Write a last heartbeat, which says how the rank ended and with what exit code."""
        self._state, self._code = state, code
        self._ended.set()
        self.join(timeout=LOOK_S * 5)

    def run(self) -> None:
        """Until `stop`."""
        next_beat = 0.0
        while True:
            ended = self._ended.wait(0.0 if next_beat == 0.0 else min(LOOK_S, self.beat_s))
            self._pass_on_stop()
            if ended or time.monotonic() >= next_beat:
                with contextlib.suppress(OSError, RuntimeError):  # RuntimeError: read while it was changed
                    self._beat()
                next_beat = time.monotonic() + self.beat_s
            if ended:
                return

    def _pass_on_stop(self) -> None:
        """A stop that the batch script asks for reaches this process alone, not the helpers it started."""
        with contextlib.suppress(OSError):
            if not self._asked and (self.folder / STOP).exists():
                self._asked = True
                os.kill(os.getpid(), signal.SIGUSR1)

    def _beat(self) -> None:
        here = progress.current()
        if here is not None:
            self._seen = here.snapshot()
        seen = dict(self._seen)  # of the run's end, once it is over
        ticks, now = seen.get("ticks", 0), time.monotonic()
        if ticks != self._ticks:
            self._ticks, self._since, self._stalled_at = ticks, now, None
        seen |= {
            "rank": self.rank,
            "world": world_size(),
            "node": node_name(),
            "pid": os.getpid(),
            "time": time.time(),
            "state": self._state,
            "code": self._code,
            "idle_s": now - self._since,
            "rss_gib": platform.rss_gib(),
        }
        frames = self._frames()
        seen["where"] = place_of(frames)
        seen["in_collective"] = any("torch/distributed" in file for file, _, _ in frames[:12])
        self._watch(seen, now)
        seen["stalled"] = self._stalled_at is not None
        # A run folder that is removed under its run is not made again.
        write(self.folder / BEATS / f"rank-{self.rank:05d}.json", seen, make=not self._begun)
        self._begun = True

    def _frames(self) -> list[tuple[str, int, str]]:
        """File, line and function of the main thread's innermost frames."""
        frame: FrameType | None = sys._current_frames().get(self._main or 0)
        found: list[tuple[str, int, str]] = []
        while frame is not None and len(found) < MOST_FRAMES:
            found.append((frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name))
            frame = frame.f_back
        return found

    def _watch(self, seen: Mapping[str, Any], now: float) -> None:
        """Dump this rank's stack once per stall; the lowest rank that is alive names who is behind."""
        limit = max(self.stall_s, LONGER * (seen.get("usual_s") or 0.0))
        if now - self._since < limit or self._ended.is_set():
            return
        if self._stalled_at is None:
            self._stalled_at, self._told = now, False
            path = self.folder / STACKS / f"rank-{self.rank:05d}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("w", encoding="utf-8") as file:
                file.write(f"rank {self.rank} on {node_name()}: {describe(seen)}\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
        elif not self._told and now - self._stalled_at > min(SETTLE_S, self.stall_s):
            self._told = True
            beats = read_beats(self.folder)
            alive = [beat["rank"] for beat in beats if not silent(beat)]
            if not alive or self.rank <= min(alive):
                text = stall_text(beats, self.folder)
                write(self.folder / STALL, {"time": time.time(), "text": text})
                print(text, file=sys.stderr, flush=True)


def place_of(frames: list[tuple[str, int, str]]) -> str:
    """Where the code is: the innermost frame of this package, and of its stages; else of all."""
    ours: list[tuple[str, int, str]] = [
        (file.removeprefix(PACKAGE).lstrip("/"), line, name)
        for file, line, name in frames
        if file.startswith(PACKAGE)
    ]
    told = [f"{file}:{line} in {name}" for file, line, name in (ours or frames)[:1]]
    stages = [f"{file}:{line} in {name}" for file, line, name in ours if file.startswith("stages/")]
    return ", for ".join(dict.fromkeys(told + stages[:1]))


def write(path: Path, value: Any, *, make: bool = True) -> None:
    """JSON that a reader sees whole or not at all; not synced, as a heartbeat is soon replaced.

    make: the folder, where it is missing.
    """
    if make:
        path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    part.write_text(json.dumps(value), encoding="utf-8")
    part.replace(path)


def read_beats(folder: Path) -> list[dict[str, Any]]:
    """The heartbeats of an attempt by rank; one that cannot be read is left out.

    So are those that a larger world has left: runs outside a batch script share a folder of logs.
    """
    found = []
    for path in sorted((folder / BEATS).glob("rank-*.json")):
        with contextlib.suppress(OSError, ValueError):
            found.append(json.loads(path.read_text(encoding="utf-8")))
    world = found[0].get("world") if found and found[0]["rank"] == 0 else None
    return [beat for beat in found if world is None or beat["rank"] < world]


def silent(beat: Mapping[str, Any], now: float | None = None) -> bool:
    """Whether a rank that has not ended has stopped beating."""
    age = (time.time() if now is None else now) - float(beat["time"])
    return beat["state"] == "running" and age > SILENT_S


def behind(beats: list[dict[str, Any]], now: float | None = None) -> list[dict[str, Any]]:
    """The ranks that the others wait for.

    Those whose heart does not beat; else those that have begun and ended fewer phases than the others;
    else those that are in no collective while others are. Nothing where they are all alike.
    """
    running = [beat for beat in beats if beat["state"] == "running"]
    if quiet := [beat for beat in running if silent(beat, now)]:
        return quiet
    for key in (lambda b: b.get("ticks", 0), lambda b: bool(b.get("in_collective"))):
        values = {key(beat) for beat in running}
        if len(values) > 1:
            return [beat for beat in running if key(beat) == min(values)]
    return []


def describe(beat: Mapping[str, Any]) -> str:
    """Stage, step and phase of a heartbeat."""
    text = f"stage {beat['stage']}" if "stage" in beat else "starting"
    if "steps" in beat:  # not known before the stage's data
        text += f", step {min(beat['step'] + 1, beat['steps'])} of {beat['steps']}"
    if beat.get("phases"):
        text += f", phase {' > '.join(beat['phases'])}"
    return text


def stall_text(beats: list[dict[str, Any]], folder: Path, now: float | None = None) -> str:
    """What a person reads about a stall: the phase, who is behind, and where the stacks are."""
    moment = time.time() if now is None else now
    slow = behind(beats, now)
    ahead = max(beats, key=lambda beat: beat.get("ticks", 0), default={})
    lines = [f"genac: stall: no progress for {ahead.get('idle_s', 0.0):.0f} s; {describe(ahead)}"]
    who = "the others wait for rank" if slow else "all ranks are alike, such as rank"
    for beat in (slow or beats[:1])[:SHOWN_SLOW]:
        age = moment - float(beat["time"])
        heard = f" when last heard of, {age:.0f} s ago" if age > OLD_S else ""
        place = f"; at {beat['where']}" if beat.get("where") else ""
        lines.append(f"  {who} {beat['rank']} on {beat['node']}: {describe(beat)}{place}{heard}")
    lines.append(f"  every rank's stack: {folder / STACKS}")
    return "\n".join(lines)
