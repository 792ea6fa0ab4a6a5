"""The last words of a run: what happened, where its folder and report are, what to type next. No torch."""

from __future__ import annotations

import sys
from pathlib import Path

from genac_megatron.errors import EXIT_OK
from genac_megatron.observe.history import attempts, history, meaning, next_commands, note_end, ran_for
from genac_megatron.observe.lock import run_lock
from genac_megatron.observe.runinfo import METRICS, RunFolder


class Ending:
    """Made before a run's ranks begin, asked for its words once they have ended.

    plots: whether the report has them.
    """

    def __init__(self, path: Path, *, plots: bool) -> None:
        self.folder, self.plots = RunFolder(path), plots
        self._before = len(attempts(history(self.folder)))

    def tell(self, code: int) -> None:
        """Print the words, once the end is noted and the report shows it: what a rank could not do that was
        killed is done here. Nothing of a run that was not begun. Raises nothing: the run's end is not ours.
        """
        try:
            if len(attempts(history(self.folder))) <= self._before:
                return
            complete(self.folder, code, plots=self.plots)
            text = words(self.folder, code)
        except Exception as error:
            text = f"genac: {meaning(code)}\n  its report could not be written: {first_line(error)}"
        print(text, file=sys.stdout if code == EXIT_OK else sys.stderr, flush=True)


def complete(folder: RunFolder, code: int, *, plots: bool) -> None:
    """Note the end of the last attempt where no rank has, or another one, and write the report anew."""
    _, end = attempts(history(folder))[-1]
    if end is not None and end.get("code") == code:
        return
    run_lock(folder.path).refuse()  # another run has begun there meanwhile
    told = "" if end is None else str(end.get("told", ""))
    note_end(folder, code, told)
    if (folder.path / METRICS).exists():
        from genac_megatron.observe.report import write_report

        write_report(folder.path, draw=plots)


def words(folder: RunFolder, code: int) -> str:
    """The words for a run whose last end is noted."""
    start, end = attempts(history(folder))[-1]
    lines = [f"genac: {meaning(code)}{ran_for(start, end)}", f"  run folder: {folder.path}"]
    page = folder.report / "index.html"
    if page.exists():
        lines.append(f"  report:     {page}")
    return "\n".join(lines + _next(folder, start, code))


def _next(folder: RunFolder, start: dict[str, object], code: int) -> list[str]:
    label = "its actor:  " if code == EXIT_OK else "to go on:   "
    found = next_commands(folder, start, code, gate_ways(folder) if code else ())
    return [f"  {label if i == 0 else '        or: '}{command}" for i, command in enumerate(found)]


def gate_ways(folder: RunFolder) -> list[str]:
    """Overrides with which the stage may go on that its gate has stopped."""
    from genac_megatron.observe.report_data import failed_gates, read_run
    from genac_megatron.observe.report_gates import ways_on

    for gate in failed_gates(read_run(folder.path)):
        if gate.stopped:
            return [override for override, _ in ways_on(gate.stage, gate.missed) if "..." not in override]
    return []


def first_line(error: Exception) -> str:
    """Of an error's words."""
    return (str(error) or type(error).__name__).splitlines()[0]
