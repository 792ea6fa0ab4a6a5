"""`genac status RUN`: where a run stands by its heartbeats; the summary on a job's stdout. No torch."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from genac_megatron.cluster.heartbeat import STALL, behind, describe, read_beats, silent
from genac_megatron.errors import EXIT_LOST, EXIT_OK, InputError
from genac_megatron.observe.progress import format_duration
from genac_megatron.observe.runinfo import RunFolder
from genac_megatron.recipe.trains import trains

LOOK_S = 2.0
READS_PER_S = 50.0  # of heartbeats
QUIET_S = 300.0  # a line at least so often
SHOWN_RANKS = 16
Beat = dict[str, Any]


def attempt(run: Path) -> Path:
    """The log folder of the run's latest attempt. Raises InputError where there is none."""
    if not run.is_dir():
        raise InputError("there is no such folder", where=str(run), way_out="give the folder of a run")
    latest = run / "logs" / "latest"
    if latest.exists():
        return latest.resolve()
    folders = sorted(run.glob("logs/*/heartbeats"), key=lambda path: path.stat().st_mtime)
    if not folders:
        raise InputError(
            "no rank has left a heartbeat yet",
            where=str(run / "logs"),
            way_out="ask again once the run has begun; squeue shows a job that still waits",
        )
    return folders[-1].parent


def status(run: Path) -> tuple[str, int]:
    """What a person wants to know, and 0; or 4 where a rank is silent or the run is stalled."""
    folder = attempt(run)
    beats = read_beats(folder)
    if not beats:
        return f"{run.name}: attempt {folder.name} has no heartbeats yet", EXIT_OK
    lines = [f"{run.name}: attempt {folder.name}, {len(beats)} rank(s)", line(beats)]
    lines += [f"  {role}: {told}" for role, told in trains(RunFolder(run).resolved_recipe()).items()]
    ill = [beat for beat in beats if silent(beat) or beat.get("stalled")]
    shown = _chosen(beats, ill)
    lines += [_row(beat) for beat in shown]
    if len(shown) < len(beats):
        lines.append(f"  and {len(beats) - len(shown)} more ranks")
    if (text := stall(folder)) is not None and ill:
        lines.append(text)
    lines.append(f"logs: {folder}")
    return "\n".join(lines), EXIT_LOST if ill else EXIT_OK


def stall(folder: Path) -> str | None:
    """What the watchdog wrote last, if anything."""
    try:
        return str(json.loads((folder / STALL).read_text(encoding="utf-8"))["text"])
    except (OSError, ValueError, KeyError):
        return None


def line(beats: Sequence[Beat], until: float = 0.0) -> str:
    """One line: stage, step, pace, time to the stage's end and to the job's (`until`, Unix time)."""
    first = beats[0]
    parts = [describe(first)]
    if "stages" in first:
        number = first["stages"].index(first["stage"]) + 1
        parts[0] = f"[{number}/{len(first['stages'])}] " + parts[0]
    if first.get("step_s") is not None:
        parts.append(f"{first['step_s']:.3g} s/step")
    if first.get("eta_s") is not None:
        parts.append(f"stage ends in {format_duration(first['eta_s'])}")
    if until:
        left = until - time.time()
        parts.append(f"job ends in {format_duration(left)}")
        if first.get("eta_s") is not None and first["eta_s"] > left:
            parts.append("which is sooner: it will be requeued")
    if first["state"] != "running":
        parts.append(first["state"])
    return "; ".join(parts)


def _chosen(beats: Sequence[Beat], ill: Sequence[Beat]) -> list[Beat]:
    """All ranks where they are few; else the ill ones, those behind, and the first."""
    if len(beats) <= SHOWN_RANKS:
        return list(beats)
    wanted = {beat["rank"] for beat in (*ill, *behind(list(beats)))} | {beats[0]["rank"]}
    return [beat for beat in beats if beat["rank"] in wanted][:SHOWN_RANKS]


def _row(beat: Beat) -> str:
    age = time.time() - beat["time"]
    note = "SILENT" if silent(beat) else "STALLED" if beat.get("stalled") else beat["state"]
    where = f" at {beat['where']}" if beat.get("where") and beat["state"] == "running" else ""
    return (
        f"  rank {beat['rank']:>4} {beat['node']} pid {beat['pid']}: {note}, beat {age:.0f} s ago, "
        f"{beat['rss_gib']:.2f} GiB; {describe(beat)}{where}"
    )


def follow(run: Path, until: float = 0.0) -> int:
    """Print a line for every new stage, for a step at most once a minute, and every stall; until all ranks
    have ended or the process that started this one is gone."""
    folder = attempt(run)
    parent, shown, told = os.getppid(), ("", -1), None
    last = 0.0
    while os.getppid() == parent:
        beats = read_beats(folder)
        if beats:
            at = (str(beats[0].get("stage", "")), int(beats[0].get("step", -1)))
            age = time.monotonic() - last
            if at[0] != shown[0] or (at != shown and age > 60.0) or age > QUIET_S:
                print(f"{time.strftime('%H:%M:%S')} {line(beats, until)}", flush=True)
                shown, last = at, time.monotonic()
            if (text := stall(folder)) != told and text is not None:
                told = text
                print(text, file=sys.stderr, flush=True)
            if all(beat["state"] != "running" for beat in beats):
                return EXIT_OK
        time.sleep(max(LOOK_S, len(beats) / READS_PER_S))
    return EXIT_OK
