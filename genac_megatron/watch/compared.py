"""Run folders read to be compared, and the comparison written as a page."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from pydantic import ValidationError

from genac_megatron import __version__
from genac_megatron.errors import EXIT_OK, InputError
from genac_megatron.observe.history import meaning
from genac_megatron.observe.report_data import RunData, read_run, what_is_missing
from genac_megatron.observe.runinfo import write_json_atomic, write_text_atomic
from genac_megatron.recipe.schema import Recipe
from genac_megatron.watch.compare import Comparison
from genac_megatron.watch.follow import is_run

WAY_OUT = "give run folders: runs/<name>"


def compare_runs(paths: Sequence[Path], *, unfinished: bool = False) -> Comparison:
    """Run folders beside each other, the first one being what others are compared with.

    Raises InputError where one is no run's, cannot be read, is of another version or, but for `unfinished`,
    is not at its end.
    """
    if len(paths) < 2:
        raise InputError("one run alone cannot be compared", where=str(paths[0]), way_out="name two or more")
    places = [path.resolve() for path in paths]
    for at, place in enumerate(places):
        if place in places[:at]:
            raise InputError("this run is named twice", where=str(paths[at]), way_out="name each run once")
    runs = [read_compared(path, unfinished=unfinished) for path in paths]
    made = Comparison(names_of(paths), runs)
    if unfinished:
        made.notes += [f"{name}: {why}." for name, run in zip(made.names, runs, strict=True)
                       if (why := not_at_its_end(run))]  # fmt: skip
    return made


def read_compared(path: Path, *, unfinished: bool) -> RunData:
    """A run folder that can be compared. Raises InputError."""
    if not path.exists():
        raise InputError("no such run folder", where=str(path), way_out=WAY_OUT)
    if not path.is_dir():
        raise InputError("not a run folder, but a file", where=str(path), way_out=WAY_OUT)
    if not is_run(path):
        raise InputError("no run there", where=str(path), way_out=WAY_OUT)
    try:
        run = read_run(path)
    except OSError as error:
        raise InputError(
            f"cannot be read: {error.strerror or error}", where=str(path), way_out="make it readable"
        ) from error
    if why := of_another_version(run):
        raise InputError(why, where=str(path), way_out="compare it with the version that made it")
    if not unfinished and (why := not_at_its_end(run)):
        raise InputError(why, where=str(path), way_out="--unfinished compares what is there")
    return run


def of_another_version(run: RunData) -> str:
    """Why this version cannot read a run's recipe; "" where it can."""
    try:
        Recipe.model_validate(run.recipe)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"]))
        made_by = run.attempts[-1][0].get("version") if run.attempts else None
        version = f"version {made_by}" if made_by else "another version"
        return f"its recipe is of {version}, this is {__version__}: {key}: {first['msg']}"
    return ""


def not_at_its_end(run: RunData) -> str:
    """In words, how a run is not finished; "" where it is."""
    end = run.attempts[-1][1] if run.attempts else None
    if run.attempts and end is None:
        return "not finished: it goes on, or was killed"
    if end is not None and int(end["code"]) != EXIT_OK:
        return f"not finished: it {meaning(int(end['code']))}"
    stages = [line for line in what_is_missing(run) if line.startswith("stage ")]
    return f"not finished: {'; '.join(stages)}" if stages and end is None else ""


def names_of(paths: Sequence[Path]) -> list[str]:
    """What runs are called: their folders' names, with as many of the folders before as tell all apart."""
    parts = [path.resolve().parts for path in paths]
    for depth in range(1, max(map(len, parts)) + 1):
        names = [Path(*part[-depth:]).as_posix() for part in parts]
        if len(set(names)) == len(names):
            break
    return names


def _make_room(out: Path) -> None:
    """Make the folder. Raises InputError where that cannot be, or where it is a run's own."""
    if is_run(out):
        raise InputError("this is a run's folder", where=f"--out {out}", way_out="name another folder")
    try:
        (out / "plots").mkdir(parents=True, exist_ok=True)
        (out / "index.html").touch()
    except OSError as error:
        why = error.strerror or str(error)
        raise InputError(
            f"cannot be written: {why}", where=f"--out {out}", way_out="name another folder"
        ) from error


def write_comparison(made: Comparison, out: Path) -> Path:
    """Write index.html, compare.json and plots/*.png; the page. Raises InputError where it cannot be."""
    from genac_megatron.observe.report_canvas import DARK, LIGHT
    from genac_megatron.observe.report_page import STYLE, embedded_plot
    from genac_megatron.observe.report_plots import Plot
    from genac_megatron.watch import compare_plots

    _make_room(out)
    figures = []
    for id_, title, caption, _, _ in compare_plots.PLOTS:
        light, dark = (compare_plots.draw(made, id_, theme) for theme in (LIGHT, DARK))
        if light is not None and dark is not None:
            figures.append(embedded_plot(Plot(id_, title, caption, light, dark)))
            (out / "plots" / f"{id_}.png").write_bytes(light)
    notes = "".join(f"<li>{escape(note)}</li>" for note in made.notes)
    title = escape(" and ".join(made.names))
    warn = f"<section class='card warn'><ul>{notes}</ul></section>" if notes else ""
    page = (
        "<!doctype html><html lang=en><head><meta charset=utf-8>"
        '<meta name=viewport content="width=device-width,initial-scale=1">'
        f"<title>{title} · GenAC</title><style>{STYLE}</style></head><body><main><h1>{title}</h1>{warn}"
        f"<h2>Figures</h2><div class=card>{made.html()}</div>"
        f"<h2>Plots</h2><div class=plots>{''.join(figures)}</div></main></body></html>\n"
    )
    write_text_atomic(out / "index.html", page)
    write_json_atomic(out / "compare.json", made.data())
    return out / "index.html"
