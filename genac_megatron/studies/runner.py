"""A study's runs, in order or several at once; what is done is not done again, what was cut off goes on."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rich.console import Console

from genac_megatron.errors import EXIT_REQUEUE, GenacError, InputError, StopRequested
from genac_megatron.observe.runinfo import METRICS
from genac_megatron.studies.digests import digests_of
from genac_megatron.studies.places import STAMP, Places, beside, made_from, newer
from genac_megatron.studies.schema import RunSpec, bases_of, cells_of
from genac_megatron.studies.standing import began_with_others, tell, trained

TAIL = 15  # lines of a failed run that are shown
LOG = ".log"  # beside what a task makes
STOPS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
POLL_S = 0.2


@dataclass(frozen=True)
class Task:
    """One `genac run`, or one command on what runs have left."""

    key: str  # for people
    makes: tuple[Path, ...]  # all there once it is done
    command: tuple[str, ...]
    log: Path
    resumable: Path | None = None  # a folder of checkpoints: with one in it, the run goes on
    needs: tuple[Path, ...] = ()  # there before it can begin: made by other tasks
    of: Path | None = None  # what it looks at, where that may be made anew: older products are another's
    made_from: str = ""  # digest of its recipes, kept beside what it makes
    ended: Path | None = None  # written once it has ended well: a report can be made of half a run
    begins_with: Callable[[], dict[str, str]] | None = None  # digests of the base runs that it begins with
    others: Callable[[], list[str]] | None = None  # those that were made anew since it began

    @property
    def folder(self) -> Path:
        return self.log.parent / self.log.name.removesuffix(LOG)

    @property
    def done(self) -> bool:
        """Whether all that it makes is there, and later than what it was made of."""
        return all(path.exists() and (self.of is None or newer(path, self.of)) for path in self.makes)


def tasks_of(
    places: Places,
    seeds: Sequence[int],
    only: Sequence[str] | None = None,
    kept: Collection[tuple[str, int]] = (),
) -> list[Task]:
    """Everything a study does, in an order in which each finds what it starts from.

    only: these cells and audits, and what they need. kept: those, with seeds, whose figures are there without
    a run. Raises InputError where there is none of that name, or what is there was made from other recipes.
    """
    study, made = places.study, list[Task]()
    cells = cells_of(study, str(places.file))
    names = [*(cell.name for cell in cells), *study.audits]
    if unknown := sorted(set(only or ()) - set(names)):
        raise InputError(
            f"the study has no cell {', '.join(unknown)}",
            where=str(places.file),
            way_out=f"its cells are: {', '.join(names)}",
        )
    for seed in seeds:
        wanted = [cell for cell in cells if only is None or cell.name in only]
        of_cells = list[Task]()
        for cell in wanted:
            if (cell.name, seed) not in kept:
                of_cells.append(_run(places, cell.name, cell.spec, seed))
                of_cells += [_score(places, cell.name, cell.spec, seed)] if study.banks else []
        for name in study.audits:
            if (only is None or name in only) and (name, seed) not in kept:
                of_cells.append(_audit(places, name, seed))
        before = [_run(places, name, spec, seed) for name, spec in bases_of(study)]
        before += [_build(places, name, seed) for name in study.banks]
        made += _needed(before, of_cells)
    _refuse_others(made)
    refuse_other_bases(made)
    return made


def _refuse_others(tasks: Sequence[Task]) -> None:
    """A run of an edited recipe's elder would be taken for its own."""
    others = [
        task.folder
        for task in tasks
        if task.made_from and task.folder.exists() and made_from(task.folder) != task.made_from
    ]
    if others:
        raise InputError(
            "not made from what the study's recipes say today, or not known from what: "
            + ", ".join(folder.name for folder in others),
            where=str(others[0].parent),
            way_out="move them away or remove them, and they are made again; or name another --work",
        )


def refuse_other_bases(tasks: Sequence[Task]) -> None:
    """Raise InputError where what a task has made or begun stands on base runs that were made anew since."""
    found = {task.folder: others for task in tasks if task.others and (others := task.others())}
    if found:
        raise InputError(
            "begun with other base runs than are here now: "
            + ", ".join(f"{folder.name} ({', '.join(names)})" for folder, names in found.items()),
            where=str(next(iter(found)).parent),
            way_out="move them away or remove them, and they are made again; or name another --work",
        )


def all_tasks(places: Places, seeds: Sequence[int]) -> list[Task]:
    """Every base run, cell, bank and audit of these seeds."""
    specs = [*bases_of(places.study)]
    specs += [(cell.name, cell.spec) for cell in cells_of(places.study, str(places.file))]
    runs = [_run(places, name, spec, seed) for name, spec in specs for seed in seeds]
    runs += [_build(places, name, seed) for name in places.study.banks for seed in seeds]
    return runs + [_audit(places, name, seed) for name in places.study.audits for seed in seeds]


def _needed(before: Sequence[Task], tasks: Sequence[Task]) -> list[Task]:
    """Tasks, after those of `before` that they need, directly or not. Each task comes after its needs."""
    found = [*tasks]
    for task in reversed(before):
        if any(path in other.needs for other in found for path in task.makes):
            found.insert(0, task)
    return found


def _run(places: Places, name: str, spec: RunSpec, seed: int) -> Task:
    folder = places.run(name, seed)
    command = [*_settings(places, spec, seed), f"name={folder.name}", f"runs={folder.parent}"]
    return Task(
        key=f"{name}, seed {seed}",
        makes=(folder, places.ended(name, seed)),
        ended=places.ended(name, seed),
        needs=tuple(places.ended(base, seed) for base in spec.runs),
        command=("run", str(places.recipe(spec)), *command),
        log=beside(folder, LOG),
        resumable=folder / "checkpoints",
        made_from=digests_of(places).runs[name],
        begins_with=partial(trained, places, spec.runs, seed),
        others=partial(began_with_others, places, folder, seed),
    )


def _settings(places: Places, spec: RunSpec, seed: int) -> list[str]:
    starts = [f"roles.{role}.model.checkpoint={places.run(base, seed)}" for role, base in spec.start.items()]
    starts += [f"roles.{role}.model.base={places.run(base, seed)}" for role, base in spec.beside.items()]
    return [f"seed={seed}", *places.study.set, *spec.set, *starts, *places.overrides]


def _build(places: Places, name: str, seed: int) -> Task:
    bank, folder = places.study.banks[name], places.bank(name, seed)
    options, needs = [*bank.options], [places.ended(bank.actor, seed)]
    if bank.states_from is not None:
        options += ["--states-from", str(places.bank(bank.states_from, seed))]
        needs.append(places.manifest(bank.states_from, seed))
    if bank.p_bar_of is not None:
        options += ["--p-bar-of", str(places.bank(bank.p_bar_of, seed))]
        needs.append(places.manifest(bank.p_bar_of, seed))
    return Task(
        key=f"bank {name}, seed {seed}",
        makes=(places.manifest(name, seed),),
        needs=tuple(needs),
        command=(
            "evaluate", "bank", "build", str(places.file.parent / bank.recipe), f"seed={seed}",
            *places.study.set, *bank.set, *places.overrides,
            "--checkpoint", str(places.run(bank.actor, seed)), "--out", str(folder), *options,
        ),
        log=beside(folder, LOG),
        made_from=digests_of(places).banks[name],
        begins_with=partial(trained, places, [bank.actor], seed),
        others=partial(began_with_others, places, folder, seed),
    )  # fmt: skip


def _audit(places: Places, name: str, seed: int) -> Task:
    audit, folder = places.study.audits[name], places.audit(name, seed)
    runs = {"--checkpoint": audit.actor, "--critic": audit.critic, "--scalar": audit.scalar}
    named = {option: str(places.run(base, seed)) for option, base in runs.items() if base is not None}
    return Task(
        key=f"audit {name}, seed {seed}",
        makes=(folder / "figures.json",),
        needs=tuple(places.ended(base, seed) for base in audit.bases),
        command=(
            "evaluate", "gradients", str(places.file.parent / audit.recipe), f"seed={seed}",
            *places.study.set, *audit.set, *places.overrides,
            *(word for pair in named.items() for word in pair), "--out", str(folder), *audit.options,
        ),
        log=beside(folder, LOG),
        made_from=digests_of(places).audits[name],
        begins_with=partial(trained, places, audit.bases, seed),
        others=partial(began_with_others, places, folder, seed),
    )  # fmt: skip


def _score(places: Places, cell: str, spec: RunSpec, seed: int) -> Task:
    """Every bank by one cell's critic, which is loaded once."""
    banks = [*places.study.banks]
    first, *others = (str(places.bank(bank, seed)) for bank in banks)
    return Task(
        key=f"{cell} on the banks, seed {seed}",
        makes=tuple(places.scores(bank, cell, seed) / "scores.json" for bank in banks),
        needs=(*(places.manifest(bank, seed) for bank in banks), places.ended(cell, seed)),
        of=places.run(cell, seed) / METRICS,
        command=(
            "evaluate", "bank", "score", first, str(places.recipe(spec)),
            *(text for text in _settings(places, spec, seed) if "model.checkpoint" not in text),
            "--checkpoint", str(places.run(cell, seed)), "--name", cell, "--again",
            *(word for other in others for word in ("--also", other)),
        ),
        log=beside(places.scores(banks[0], cell, seed), LOG),
    )  # fmt: skip


def run_all(tasks: Sequence[Task], console: Console, jobs: int = 1) -> None:
    """Do what is left, up to `jobs` tasks at once, each after those that it needs.

    Raises GenacError at the first that fails, with the end of its log; those that run beside it end first.
    Raises StopRequested on a signal of STOPS, once what ran has saved and ended.
    """
    left = [task for task in tasks if not task.done]
    if len(left) < len(tasks):
        console.print(f"{len(tasks) - len(left)} of {len(tasks)} are done already")
    began, total, running = time.monotonic(), len(left), dict[str, _Running]()
    failed: GenacError | None = None
    with _told_to_stop(), _ended(running):
        while running or (left and failed is None):
            while len(running) < jobs and failed is None and (task := _ready(left, running)):
                left.remove(task)
                console.print(f"[{total - len(left)}/{total}] {task.key}{_eta(began, total, left, running)}")
                running[task.key] = _Running(task)
            for key in [key for key, one in running.items() if one.process.poll() is not None]:
                failed = _failure(running.pop(key)) or failed
            time.sleep(POLL_S)
    if failed is not None:
        raise failed


@contextlib.contextmanager
def _told_to_stop() -> Iterator[None]:
    """Signals that end a job become StopRequested; by default they would leave its runs behind."""

    def stop(number: int, frame: object) -> None:
        raise _stopped()

    before = {number: signal.signal(number, stop) for number in STOPS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _ended(running: Mapping[str, _Running]) -> Iterator[None]:
    """On leaving, whatever still runs is told to end, and waited for."""
    try:
        yield
    finally:
        for one in running.values():
            one.process.terminate()
        for one in running.values():
            one.process.wait()


class _Running:
    """A task's process, which writes to its log."""

    def __init__(self, task: Task) -> None:
        begun = task.resumable is not None and any(task.resumable.glob("*/manifest.json"))
        refuse_other_bases([task])  # of one that was cut off: its base runs may be of this very command
        task.log.parent.mkdir(parents=True, exist_ok=True)
        if task.begins_with is not None:
            tell(task.folder, task.begins_with())
        if task.ended is not None:
            task.ended.unlink(missing_ok=True)  # of a run that was removed
        if task.made_from:
            beside(task.folder, STAMP).write_text(task.made_from + "\n", encoding="utf-8")
        words = [sys.executable, "-m", "genac_megatron", *task.command, *(["--resume"] if begun else [])]
        self.task = task
        with task.log.open("a") as log:
            # A session of its own: Ctrl-C is passed on once, by us, and a second one would cut it short.
            self.process = subprocess.Popen(
                words, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )


def _ready(left: Sequence[Task], running: Mapping[str, _Running]) -> Task | None:
    """The first whose needs are there. Raises GenacError where nothing runs and nothing can begin."""
    for task in left:
        if all(need.exists() for need in task.needs):
            return task
    if left and not running:
        missing = next(need for need in left[0].needs if not need.exists())
        raise GenacError(f"{left[0].key} needs what no run of the study makes", where=str(missing))
    return None


def _eta(began: float, total: int, left: Sequence[Task], running: Mapping[str, _Running]) -> str:
    ended = total - len(left) - len(running) - 1
    if not ended:
        return ""
    return f", about {(time.monotonic() - began) / ended * (total - ended) / 60:.0f} min left"


def _stopped() -> StopRequested:
    return StopRequested("stopped as asked", way_out="the same command goes on from here")


def _failure(ended: _Running) -> GenacError | None:
    task, code = ended.task, ended.process.returncode
    if code == EXIT_REQUEUE:
        return _stopped()
    if not code and task.ended is not None:
        task.ended.touch()
    if code or not task.done:
        lines = task.log.read_text(errors="replace").splitlines()[-TAIL:]
        return GenacError(
            f"{task.key} ended with {code}:\n  " + "\n  ".join(lines),
            where=str(task.log),
            way_out="mend the cause; the same command goes on from here",
        )
    return None
