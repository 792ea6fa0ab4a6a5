"""`genac report RUN`: a run folder's logs as report/index.html and report/summary.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from genac_megatron.observe.report_data import read_run, summarise, what_is_missing
from genac_megatron.observe.report_page import page
from genac_megatron.observe.report_suites import suite_summary
from genac_megatron.observe.runinfo import RunFolder, jsonable, write_json_atomic, write_text_atomic


def write_report(run_dir: str | Path, *, draw: bool = True) -> dict[str, Any]:
    """Write report/index.html, report/plots/*.png and report/summary.json; return the summary.

    draw: False leaves the plots out, which take longer than all the rest.

    Reads recipe.yaml, metrics.jsonl, evaluations.jsonl and rollouts.jsonl. A run that is still going or
    lacks stages gets a report that says what is missing. Raises InputError where the folder holds no run.
    """
    run = read_run(run_dir)
    summary: dict[str, Any] = jsonable({**summarise(run), **suite_summary(run)})
    folder = RunFolder(run_dir).report
    plots, absent = None, list[str]()
    if draw:
        from genac_megatron.observe.report_plots import draw_all  # matplotlib takes a second to import

        plots, absent = draw_all(run)
        images = folder / "plots"
        images.mkdir(parents=True, exist_ok=True)
        for plot in plots:
            (images / f"{plot.id}.png").write_bytes(plot.light)
    write_text_atomic(folder / "index.html", page(run, summary, plots, absent, what_is_missing(run)))
    write_json_atomic(folder / "summary.json", summary)
    return summary
