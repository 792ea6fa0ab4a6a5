"""The last words of a Slurm job, in its log: what happened, where the run is, what to type next. No torch."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from pathlib import Path

from genac_megatron.errors import EXIT_GATE, EXIT_OK, EXIT_REQUEUE
from genac_megatron.observe.ending import complete, first_line, gate_ways
from genac_megatron.observe.history import attempts, history, meaning, ran_for
from genac_megatron.observe.origin import job_and_restart
from genac_megatron.observe.runinfo import RunFolder

CONVERT = Path(__file__).resolve().parents[2] / "slurm" / "convert.sh"


def job_words(
    path: Path,
    code: int,
    again: str,
    *,
    requeued: bool = False,
    plots: bool = True,
    environ: Mapping[str, str] = os.environ,
) -> str:
    """The words for a job whose ranks have ended with `code`. The end is noted and the report written where
    no rank could, as none does that was killed.

    again: what submits the same again. requeued: Slurm starts the job again by itself. plots: of the report.
    """
    folder, (job, restart) = RunFolder(path), job_and_restart(environ)
    found = attempts(history(folder))
    lines = [f"genac: {meaning(code)}"]
    # A job that Slurm starts again keeps its number.
    if found and (found[-1][0].get("job"), found[-1][0].get("restart", 0)) == (job, restart):
        try:
            complete(folder, code, plots=plots)
            start, end = attempts(history(folder))[-1]
            lines = [f"genac: {meaning(code)}{ran_for(start, end)}"]
        except Exception as error:  # the run's end is not ours
            lines.append(f"  its report could not be written: {first_line(error)}")
    else:
        lines.append("  no rank began the run in this attempt")
    lines.append(f"  run folder: {path}")
    if (page := folder.report / "index.html").exists():
        lines.append(f"  report:     {page}")
    return "\n".join([*lines, *_next(folder, code, again, f"scancel {job}" if requeued else "")])


def _next(folder: RunFolder, code: int, again: str, end_it: str) -> list[str]:
    if code == EXIT_OK:
        words = shlex.join([str(CONVERT), "to-hf", str(folder.path), f"{folder.path.name}-hf"])
        return [f"  its actor:  sbatch {words}"]
    if code == EXIT_REQUEUE and end_it:
        return [f"  Slurm starts it again, and it goes on from its checkpoint; to end it: {end_it}"]
    ways = [f"{again} {way}" for way in gate_ways(folder)] if code == EXIT_GATE else []
    return [f"  {'to go on:   ' if i == 0 else '        or: '}{one}" for i, one in enumerate(ways or [again])]
