"""The report's parts on where a run comes from and how it ended (observe/history.py)."""

from __future__ import annotations

from datetime import UTC, datetime
from html import escape

from genac_megatron.errors import EXIT_GATE, EXIT_OK, EXIT_REQUEUE
from genac_megatron.observe.history import Row, meaning, next_commands, ran_for
from genac_megatron.observe.report_data import RunData
from genac_megatron.observe.runinfo import RunFolder

SHOWN_COMMIT = 8  # hexadecimal digits


def end_card(run: RunData) -> str:
    """How the last attempt ended, where not well, and what goes on from there."""
    if not run.attempts:
        return ""
    start, end = run.attempts[-1]
    if end is None or end["code"] == EXIT_OK:
        return ""
    code = int(end["code"])
    title = f"This run {meaning(code)}{ran_for(start, end)}"
    told = str(end.get("told") or "")
    said = f"<pre>{escape(told)}</pre>" if told and code not in (EXIT_GATE, EXIT_REQUEUE) else ""
    ways = ""
    if code != EXIT_GATE:  # whose own card says them
        command = next_commands(RunFolder(run.path), start, code)[0]
        ways = f"<p>To go on: <code>{escape(command)}</code></p>"
    return f"<section class='card warn'><h3>{escape(title)}</h3>{said}{ways}</section>"


def origins(run: RunData) -> str:
    """Every attempt: when, how it ended, by which code, where, as what; then the last one's particulars."""
    if not run.attempts:
        return ""
    head = "".join(f"<th>{name}</th>" for name in ("begun", "ended", "code", "host", "command"))
    rows = "".join(_attempt(start, end) for start, end in run.attempts)
    table = (
        f"<div class='scroll origin'><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    )
    start = run.attempts[-1][0]
    return (
        f"<h2>Where it comes from</h2><div class=card>{table}"
        f"<details><summary>Versions and machine</summary>{_machine(start)}</details>{_given(start)}</div>"
    )


def _attempt(start: Row, end: Row | None) -> str:
    begun = datetime.fromtimestamp(float(start["time"]), UTC).strftime("%Y-%m-%d %H:%M UTC")
    ended = "no word of its end: going on, or killed" if end is None else meaning(int(end["code"]))
    cells = [begun, f"{ended}{ran_for(start, end)}", _code(start), str(start.get("host"))]
    if changed := start.get("changed_values"):
        cells[0] += f" (with other values: {'; '.join(changed)})"
    shown = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
    return f"<tr>{shown}<td><code>{escape(str(start.get('command')))}</code></td></tr>"


def _code(start: Row) -> str:
    commit = str(start.get("commit") or "")[:SHOWN_COMMIT]
    dirty = " and changes" if start.get("dirty") else ""
    return f"{start.get('version')}{f' at {commit}' if commit else ', no commit known'}{dirty}"


def _machine(start: Row) -> str:
    facts = {
        **(start.get("packages") or {}),
        "python": start.get("python"),
        "system": start.get("system"),
        "cores": start.get("cores"),
        "ranks": start.get("ranks"),
        "GPUs": ", ".join(start.get("gpus") or []) or "none",
        "Slurm job": start.get("job"),
        "commit": start.get("commit"),
        "changed files": ", ".join(start.get("changed") or []),
        "begun in": start.get("folder"),
    }
    rows = "".join(
        f"<tr><td>{escape(name)}</td><td>{escape(str(value))}</td></tr>"
        for name, value in facts.items()
        if value not in (None, "")
    )
    return f"<div class='scroll origin'><table><tbody>{rows}</tbody></table></div>"


def _given(start: Row) -> str:
    """The recipe as it was given: overrides first, then each file."""
    texts = dict(start.get("files") or {})
    overrides = "\n".join(start.get("overrides") or [])
    if overrides:
        texts = {"overrides": overrides, **texts}
    shown = "".join(f"<h3>{escape(name)}</h3><pre>{escape(text)}</pre>" for name, text in texts.items())
    return f"<details><summary>The recipe as it was given</summary>{shown}</details>" if shown else ""
