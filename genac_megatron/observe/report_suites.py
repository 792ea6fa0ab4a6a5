"""The report's part on benchmarks asked beside training, the best checkpoint, and the test at the end."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from genac_megatron import metrics as figures
from genac_megatron.errors import InputError
from genac_megatron.observe.manifest import BEST, complete, read_manifest
from genac_megatron.observe.report_data import Row, RunData, groups, number
from genac_megatron.observe.runinfo import TEST, read_json


def suite_summary(run: RunData) -> Row:
    """Of every suite its first and last average; what the best checkpoint is; what the test gave."""
    result: Row = {}
    for name, rows in _asked(run).items():
        result |= {f"suite/{name}_first": rows[0][1]["average"], f"suite/{name}": rows[-1][1]["average"]}
        low, high = interval(rows[-1][1])
        result |= {f"suite/{name}_low": low, f"suite/{name}_high": high}
    best = best_kept(run.path)
    if best is not None:
        result |= {f"best/{key}": best[key] for key in ("figure", "value", "stage", "step")}
    for which in ("final", "best"):
        for name, row in ((read_json(run.path / TEST) or {}).get(which) or {}).items():
            low, high = interval(row)
            key = f"test/{name}_{which}"
            result |= {key: number(row.get("average")), f"{key}_low": low, f"{key}_high": high}
    return result


def best_kept(path: Path) -> Row | None:
    """Of the best checkpoint its figure, value, stage and step; None where none is kept."""
    found = complete(path / BEST)
    try:
        state: Row = read_manifest(found[-1])["state"] if found else {}
    except InputError:
        return None
    best = state.get("best")
    return None if not best else {**best, "stage": state["position"][0], "step": state["position"][1]}


def interval(row: Mapping[str, Any]) -> tuple[float, float]:
    """95 % interval of a suite's average, questions resampled."""
    flat = [(prompt, x) for prompt, samples in groups(row.get("outcomes")).items() for x in samples]
    return figures.bootstrap_mean([x for _, x in flat], [prompt for prompt, _ in flat])


def suite_section(run: RunData) -> str:
    """Tables of suites by evaluation and of the test; "" where the run has neither."""
    asked = _asked(run)
    tested = read_json(run.path / TEST) or {}
    parts = []
    if asked:
        rows = []
        for name, found in asked.items():
            best = max(found, key=lambda one: number(one[1].get("average")))
            cells = [_cell(*one) for one in (found[0], best, found[-1])]
            rows.append([name, *cells, str(found[-1][1]["samples"])])
        parts.append(_table(["suite", "first", "highest", "last", "samples"], rows))
    if best_row := best_kept(run.path):
        parts.append(
            f"<p>The best weights, by {escape(str(best_row['figure']))} ({escape(str(best_row['mode']))}), "
            f"are those of {escape(str(best_row['stage']))}, step {best_row['step']}: "
            f"{number(best_row['value']):.4g}. They lie in <code>best/</code>: "
            f"<code>roles.actor.model.checkpoint={escape(str(run.path))}/best</code>.</p>"
        )
    if tested.get("final"):
        rows = [
            [name, *(_cell("", (tested.get(which) or {}).get(name)) for which in ("final", "best"))]
            for name in tested["final"]
        ]
        parts.append("<p>The test, asked once at the end; it has chosen nothing:</p>")
        parts.append(_table(["test", "final weights", "best weights"], rows))
    return f"<section><h2>Benchmarks</h2><div class=card>{''.join(parts)}</div></section>" if parts else ""


def _asked(run: RunData) -> dict[str, list[tuple[str, Row]]]:
    """By suite, in order: at which evaluation, and what it gave."""
    found: dict[str, list[tuple[str, Row]]] = {}
    for row in run.evaluations:
        for name, one in (row.get("suites") or {}).items():
            found.setdefault(name, []).append((f"{row.get('stage')}, {row.get('name')}", one))
    return found


def _cell(at: str, row: Mapping[str, Any] | None) -> str:
    if not row:
        return "–"
    low, high = interval(row)
    between = "" if low != low else f" ({100 * low:.1f} to {100 * high:.1f})"
    return f"{100 * number(row.get('average')):.1f} %{between}" + (f", {at}" if at else "")


def _table(head: list[str], rows: list[list[str]]) -> str:
    top = "".join(f"<th>{name}</th>" for name in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<div class=scroll><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>"
