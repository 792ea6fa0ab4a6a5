"""A study's file: which runs, over which seeds, and what is shown of them. No torch.

    name: joint
    seeds: [1, 2, 3]
    base:                                  # runs that others start from, once per seed
      actor: {recipe: ../baselines/sft.yaml}
    cells:                                 # what is compared
      grpo: {recipe: ../baselines/grpo.yaml, start: {actor: actor}}
    axes:                                  # or every combination of options, whose keys are put together
      size: {s: {set: [...]}, m: {set: [...]}}
      critic: {generative: {recipe: generative.yaml}, dense-1: {recipe: value.yaml, label: dense}, ...}

    audits:                                # estimators of one actor's gradient, beside cells or without any
      short: {recipe: audit.yaml, actor: actor, critic: critic, predicted: {exact-0: 3.3}}

Paths are relative to the file. `start` names, per role, the base run whose weights it begins with, `beside`
the one whose model its adapters stand beside. With
`extends: FILE` in the same folder, mappings are merged with that file's key by key, null takes one out.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationError

from genac_megatron.errors import InputError
from genac_megatron.recipe.block import Block
from genac_megatron.recipe.document import YAML
from genac_megatron.recipe.loader import in_words


class RunSpec(Block):
    """A recipe, what is set in it, and whose weights its roles begin with."""

    recipe: str | None = None
    set: list[str] = []  # overrides: key.path=value
    start: dict[str, str] = {}  # role: a base run; {axis} stands for the option's name
    beside: dict[str, str] = {}  # role: the base run whose model its adapters stand beside
    label: str | None = None  # cells of one label compete: the best stands for them; None: its own name

    @property
    def runs(self) -> list[str]:
        """The base runs that it needs."""
        return [*self.start.values(), *self.beside.values()]


class BaseRun(RunSpec):
    over: list[str] = []  # axes: the run is made once per combination of their options


class Bank(Block):
    """States with Monte-Carlo values (`genac evaluate bank`), once per seed; it scores every critic."""

    recipe: str
    actor: str  # the base run whose actor makes and continues the responses
    states_from: str | None = None  # another bank: its states, under this actor
    p_bar_of: str | None = None  # another bank: what critics are told of how strong the actor is
    set: list[str] = []
    options: list[str] = []  # of `genac evaluate bank build`


class Audit(Block):
    """Estimators of one actor's policy gradient (`genac evaluate gradients`), once per seed."""

    recipe: str
    actor: str  # the base run whose actor it is
    critic: str | None = None  # a base run with a generative critic
    scalar: str | None = None  # a base run whose critic is a scalar one
    set: list[str] = []
    options: list[str] = []  # of `genac evaluate gradients`
    # By estimator: its signal to noise over the base estimator's, written down before it is run
    predicted: dict[str, float] = {}

    @property
    def bases(self) -> list[str]:
        """The base runs that it looks at."""
        return [name for name in (self.actor, self.critic, self.scalar) if name is not None]


class Curve(Block):
    """Held-out accuracy against what was spent."""

    x: Literal["steps", "tokens", "decoded", "flops", "seconds"]


class Lines(Block):
    """A figure against an axis, a line for each label of another."""

    figure: str
    x: str
    lines: str


class Study(Block):
    """Everything of a study's file."""

    name: str
    about: str = ""
    seeds: Annotated[list[int], Field(min_length=1)] = [1, 2, 3]
    set: list[str] = []  # overrides of every recipe, before a run's own
    base: dict[str, BaseRun] = {}
    cells: dict[str, RunSpec] = {}
    axes: dict[str, dict[str, RunSpec]] = {}
    banks: dict[str, Bank] = {}
    audits: dict[str, Audit] = {}
    figures: list[str] = []  # of the table, besides those that every study has
    best: str = "critic/brier"  # the figure by which the best of a label is chosen: the least
    # with them all cells of a label are run and judged, with others its best alone
    sweep_seeds: list[int] = []
    reference: str | None = None  # the cell that others are compared with, seed by seed
    curves: list[Curve] = []
    lines: list[Lines] = []
    dots: list[str] = []  # figures drawn side by side, a row for each cell
    differences: list[str] = []  # figures of which the table has what they are less the reference's
    # By figure of the table, by label: what it was said to be before the first run; shown beside it
    predicted: dict[str, dict[str, float]] = {}


class Cell(Block):
    """One run of a study, over all its seeds."""

    name: str
    label: str
    options: dict[str, str]  # axis: option's label
    spec: RunSpec


def read_study(path: Path) -> Study:
    """Raises InputError where the file, or one that it extends, is not a study."""
    try:
        study = Study.model_validate(_read(path, ()))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"]) or "the file"
        known, way_out = "a study has: " + ", ".join(Study.model_fields), ""
        match first["type"]:
            case "extra_forbidden":
                what, way_out = "is no key of a study", known
            case "missing":
                what, way_out = "is missing", known
            case kind:
                words = in_words(kind, first.get("ctx", {}), first["msg"], first["input"])
                what, way_out = words[0], words[1] or known
        raise InputError(f"'{place}' {what}", where=str(path), way_out=way_out) from None
    _check_names(study, str(path))
    return study


def _read(path: Path, extending: tuple[Path, ...]) -> Any:
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"cannot be read: {error.strerror}", where=str(path), way_out="give a study's YAML file"
        ) from None
    except yaml.YAMLError as error:
        raise InputError(f"not YAML: {error}", where=str(path), way_out=YAML) from None
    if not isinstance(found, dict) or "extends" not in found:
        return found
    parent = path.parent / str(found.pop("extends"))
    if parent.parent != path.parent or parent in (path, *extending):
        raise InputError(
            f"cannot extend {parent.name}",
            where=str(path),
            way_out="name another study's file in the same folder, which does not extend this one",
        )
    return _merged(_read(parent, (path, *extending)), found)


def _merged(base: Any, over: Any) -> Any:
    if not (isinstance(base, dict) and isinstance(over, dict)):
        return over
    both = {**base, **{key: _merged(base.get(key), value) for key, value in over.items()}}
    return {key: value for key, value in both.items() if value is not None}


def _check_names(study: Study, where: str) -> None:
    """What names something names what is there. Raises InputError."""
    for name, base in study.base.items():
        _need(base.over, study.axes, f"the base run '{name}' is made over", "axis", where)
    known: list[str] = []
    for name, spec in bases_of(study):
        # Those before it: they are made in this order.
        _need(spec.runs, known, f"the base run '{name}' starts from", "base run before it", where)
        known.append(name)
    for name, bank in study.banks.items():
        _need([bank.actor], known, f"the bank '{name}' is of the actor", "base run", where)
        others = [other for other in (bank.states_from, bank.p_bar_of) if other is not None]
        _need(others, study.banks, f"the bank '{name}' looks at", "bank", where)
    for name, audit in study.audits.items():
        _need(audit.bases, known, f"the audit '{name}' looks at", "base run", where)
    cells = cells_of(study, where)
    labels = {cell.label for cell in cells}
    _need([study.reference] if study.reference else [], labels, "the reference is", "cell's label", where)
    for figure, told in study.predicted.items():
        _need(told, labels, f"what is predicted of {figure} is of", "cell's label", where)
    for lines in study.lines:
        _need([lines.x, lines.lines], study.axes, f"the lines of {lines.figure} are over", "axis", where)
    names = [*known, *(cell.name for cell in cells), *study.audits]
    if both := sorted({name for name in names if names.count(name) > 1}):
        kinds = "a base run and a cell" if not {*both} & {*study.audits} else "an audit and another"
        raise InputError(
            f"{kinds} are both called {', '.join(both)}",
            where=where,
            way_out="give one of them another name: their runs' folders have it",
        )


def _need(names: Iterable[str], known: Collection[str], who: str, what: str, where: str) -> None:
    for name in names:
        if name not in known:
            there = ", ".join(known) or "none"
            raise InputError(
                f"{who} '{name}', which is no {what}", where=where, way_out=f"there are: {there}"
            )


def cells_of(study: Study, where: str = "") -> list[Cell]:
    """All cells: those named, then every combination of the axes' options. Raises InputError."""
    made = [Cell(name=n, label=s.label or n, options={}, spec=s) for n, s in study.cells.items()]
    if study.axes:
        for options in itertools.product(*(axis.items() for axis in study.axes.values())):
            made.append(_combined(list(zip(study.axes, options, strict=True))))
    bases = [name for name, _ in bases_of(study)]
    for cell in made:
        if cell.spec.recipe is None:
            way_out = "give it one, or one of its axes' options"
            raise InputError(f"the cell '{cell.name}' has no recipe", where=where, way_out=way_out)
        _need(cell.spec.runs, bases, f"the cell '{cell.name}' starts from", "base run", where)
    return made


def swept(study: Study, seeds: list[int]) -> tuple[list[int], list[int]]:
    """Seeds with which every cell is run, and those with which the best of each label is."""
    if not study.sweep_seeds:
        return seeds, []
    first = [seed for seed in seeds if seed in study.sweep_seeds]
    return first, [seed for seed in seeds if seed not in first]


def _combined(chosen: list[tuple[str, tuple[str, RunSpec]]]) -> Cell:
    names = {axis: option for axis, (option, _) in chosen}
    labels = {axis: spec.label or option for axis, (option, spec) in chosen}
    recipe, settings, start, beside = None, list[str](), dict[str, str](), dict[str, str]()
    for _, (_, spec) in chosen:
        recipe = spec.recipe or recipe
        settings += spec.set
        start |= {role: _filled(base, names) for role, base in spec.start.items()}
        beside |= {role: _filled(base, names) for role, base in spec.beside.items()}
    spec = RunSpec(recipe=recipe, set=settings, start=start, beside=beside)
    return Cell(name="-".join(names.values()), label="-".join(labels.values()), options=labels, spec=spec)


def _filled(name: str, options: dict[str, str]) -> str:
    """With options in place of {axis}; as it stands where that is no axis."""
    try:
        return name.format(**options)
    except (KeyError, IndexError, ValueError):
        return name


def bases_of(study: Study) -> list[tuple[str, RunSpec]]:
    """Base runs by name, those over axes once per combination: <name>-<option>-..."""
    made: list[tuple[str, RunSpec]] = []
    for name, base in study.base.items():
        for options in itertools.product(*(study.axes[axis].items() for axis in base.over)):
            names = dict(zip(base.over, (option for option, _ in options), strict=True))
            settings = [*base.set, *(text for _, spec in options for text in spec.set)]
            start = {role: _filled(other, names) for role, other in base.start.items()}
            beside = {role: _filled(other, names) for role, other in base.beside.items()}
            spec = RunSpec(recipe=base.recipe, set=settings, start=start, beside=beside)
            made.append(("-".join([name, *names.values()]), spec))
    return made
