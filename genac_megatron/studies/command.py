"""`genac study FILE`: its grammar, and from start to table. No torch."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from genac_megatron.errors import EXIT_OK, InputError
from genac_megatron.observe.lock import held
from genac_megatron.observe.runinfo import write_json_atomic, write_text_atomic
from genac_megatron.studies.schema import cells_of, read_study, swept

Kept = dict[tuple[str, int], dict[str, Any]]  # figures by cell and seed


def add_command(commands: Any) -> None:
    """Add `study` to the command line's subparsers."""
    study = commands.add_parser("study", help="run a study (recipes/studies), or go on with it")
    study.add_argument("file", help="a study's YAML file")
    study.add_argument("--seeds", help="for example 1,2,3; else those of the file")
    study.add_argument("--cells", help="for example genac,ppo; else all")
    study.add_argument("--out", default="experiments", help="where its table, plots and figures go")
    study.add_argument("--work", default="runs/studies", help="where its runs go")
    study.add_argument("--jobs", type=_positive, default=1, help="runs at once; else 1")
    study.add_argument(
        "--override", action="append", default=[], metavar="key.path=value",
        help="in every recipe, for example world.ranks=1",
    )  # fmt: skip
    study.add_argument("--again", action="store_true", help="run also what stands in its figures.json")
    study.add_argument("--dry-run", action="store_true", help="list what is left to do")
    study.add_argument("--collect", action="store_true", help="run nothing: show what is done so far")


def run_command(options: argparse.Namespace) -> int:
    """Run what is left, then write `<out>/<name>`: figures.json, table.md and plots."""
    from rich.console import Console

    from genac_megatron.studies.places import Places

    file, console = Path(options.file), Console(highlight=False)
    study = read_study(file)
    seeds = _seeds(options.seeds) if options.seeds else study.seeds
    places = Places(
        study, file, Path(options.out) / study.name, Path(options.work), overrides=options.override
    )
    cells = options.cells.split(",") if options.cells else None
    if options.dry_run:
        _list(places, seeds, cells, console, {} if options.again else _kept(places))
        return EXIT_OK
    if not options.collect:
        with held(places.work, "the study", other="a study beside it needs another --work"):
            _run(places, seeds, cells, console, options.jobs, again=options.again)
    _write(places, seeds, console)
    return EXIT_OK


def _run(
    places: Any, seeds: list[int], cells: list[str] | None, console: Any, jobs: int, *, again: bool
) -> None:
    """What is left; once base runs are here, also what was kept and turns out to stand on others."""
    from genac_megatron.studies.kept import FIGURES

    kept: Kept = {} if again else _kept(places)
    while True:
        if kept:
            console.print(f"{len(kept)} run(s) stand in {places.out / FIGURES} (--again runs them again)")
        _run_left(places, seeds, cells, console, jobs, kept)
        if kept.keys() <= (still := _kept(places)).keys():
            return
        kept = still
        console.print("some of them stand on other base runs than are here now: those are run again")


def _kept(places: Any) -> Kept:
    """Cells and audits whose figures are there without a run."""
    from genac_megatron.studies.audits import kept_audits
    from genac_megatron.studies.kept import kept_records

    return kept_records(places) | kept_audits(places)


def _run_left(
    places: Any, seeds: list[int], cells: list[str] | None, console: Any, jobs: int, kept: Kept
) -> None:
    """Every cell with the seeds of the sweep, then the best of each label with the others."""
    from genac_megatron.studies.runner import run_all, tasks_of

    first, others = swept(places.study, seeds)
    run_all(tasks_of(places, first, cells, kept), console, jobs)
    if others:
        best = _best(places, cells)
        console.print(f"with seeds {', '.join(map(str, others))}: {', '.join(best)}")
        run_all(tasks_of(places, others, best, kept), console, jobs)


def _list(places: Any, seeds: list[int], cells: list[str] | None, console: Any, kept: Kept) -> None:
    from genac_megatron.studies.runner import tasks_of

    for cell, seed in sorted(kept):
        console.print(f"done  {cell}, seed {seed} (its figures)")
    first, others = swept(places.study, seeds)
    tasks = tasks_of(places, first, cells, kept)
    if others and all(task.done for task in tasks):
        tasks += tasks_of(places, others, _best(places, cells), kept)
    elif others:
        console.print(f"then, with seeds {', '.join(map(str, others))}, the best cell of each label")
    for task in tasks:
        console.print(f"{'done' if task.done else 'left'}  {task.key}")


def _best(places: Any, cells: list[str] | None) -> list[str]:
    """Of those cells (None: all), the best of each label with the sweep's seeds. Raises InputError."""
    from genac_megatron.studies.collect import records_of
    from genac_megatron.studies.summary import best_cells

    study = places.study
    members: dict[str, list[str]] = {}
    for cell in cells_of(study, str(places.file)):
        if cells is None or cell.name in cells:
            members.setdefault(cell.label, []).append(cell.name)
    records = [r for r in records_of(places, study.sweep_seeds) if cells is None or r["cell"] in cells]
    judged = {record["cell"] for record in records if study.best in record["figures"]}
    open_ = [name for names in members.values() if len(names) > 1 for name in names if name not in judged]
    if open_:
        seeds = ",".join(map(str, study.sweep_seeds))
        raise InputError(
            f"which of a sweep is best is not known: no {study.best} with seed {seeds} of {', '.join(open_)}",
            where=str(places.file),
            way_out=f"begin with --seeds {seeds}, or leave --seeds out; or give `best` another figure",
        )
    best = {label: found[0]["cell"] for label, found in best_cells(study, records).items()}
    chosen = [best[label] if len(names) > 1 else names[0] for label, names in members.items()]
    return chosen + [name for name in study.audits if cells is None or name in cells]


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return number


def _seeds(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise InputError(
            f"--seeds {text} is no list of numbers", way_out="for example --seeds 1,2,3"
        ) from None


def _write(places: Any, seeds: list[int], console: Any) -> None:
    """All that is done, with these seeds, the file's, and those of earlier figures."""
    from genac_megatron.studies import audits
    from genac_megatron.studies.collect import records_of
    from genac_megatron.studies.kept import FIGURES, of_other_bases
    from genac_megatron.studies.plots import draw_all
    from genac_megatron.studies.runner import all_tasks, refuse_other_bases
    from genac_megatron.studies.summary import markdown

    if others := of_other_bases(places) + audits.audits_of_other_bases(places):
        names = ", ".join(f"{cell} (seed {seed})" for cell, seed in others)
        raise InputError(
            f"figures that stand on other base runs than are here, so that they cannot be compared: {names}",
            where=str(places.out / FIGURES),
            way_out="run them again (the same command without --cells, --seeds and --collect), "
            "or name another --out",
        )
    known = {*seeds, *places.study.seeds, *(seed for _, seed in _kept(places))}
    refuse_other_bases(all_tasks(places, sorted(known)))
    records, audited = records_of(places, sorted(known)), audits.audit_records(places, sorted(known))
    seeds_done = sorted({record["seed"] for record in [*records, *audited]})
    study = places.study.model_copy(update={"seeds": seeds_done})
    if not (records or audited):
        way_out = "run the study first: the same command without --collect"
        raise InputError("none of its runs is done", where=str(places.work), way_out=way_out)
    found = {"study": study.model_dump(mode="json"), "records": records}
    write_json_atomic(places.out / FIGURES, found | ({"audits": audited} if study.audits else {}))
    tables = ([markdown(study, records)] if records else []) + [audits.markdown(study, audited)]
    text = "\n\n".join([f"# {study.name}", study.about, *(part for part in tables if part)])
    write_text_atomic(places.out / "table.md", text)
    draw_all(study, records, places.out)
    audits.draw_audits(study, audited, places.out)
    console.print(text, soft_wrap=True)
    console.print(f"written to {places.out}")
