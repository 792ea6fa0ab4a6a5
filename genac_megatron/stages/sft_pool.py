"""Samples that all ranks have, in memory that a node has once.

Where they are made by several ranks, or read by one, their tokens and figures go to rank 0, which writes them
into a file of the run folder; every rank maps it, so ranks of a node share its pages. Of each sample the rest
(where loss begins, what it was made of) is on every rank.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from genac_megatron import compact
from genac_megatron.errors import InputError
from genac_megatron.observe.runinfo import write_parts_atomic
from genac_megatron.records import Sample
from genac_megatron.training.agreement import gathered
from genac_megatron.training.exchange import Bytes, exchanged, gathered_rows

if TYPE_CHECKING:
    from genac_megatron.stages.runtime import Run

ENDING, MAKING = ".numbers", "."  # of a file's name; the beginning of one that is not the stage's last
ID, FIGURE = np.dtype(np.int32), np.dtype(np.float64)  # as compact.py has them


def held_once(run: Run, mine: Sequence[Sample], name: str) -> list[Sample]:
    """Every rank's samples, one rank's after the other's, on all of them. Collective.

    name: of the file in the run's data folder, an earlier one's place is taken. Raises GenacError, on every
    rank, where it cannot be written, or not be read by another rank.
    """
    if run.world.size == 1:
        return compacted(mine)
    path = run.folder.path / "data" / f"{name}{ENDING}"
    size = _written_by_first(run, mine, path)
    heads = gathered([_head(sample) for sample in mine])
    view = run.together(lambda: _mapped(path, size))
    return _whole([head for part in heads for head in part], view)


def _written_by_first(run: Run, mine: Sequence[Sample], path: Path) -> int:
    """The file's bytes."""
    numbers = _numbers(mine)
    sizes = [int(size) for (size,) in gathered_rows(np.array([len(numbers)], np.int64))]
    parts = [numbers, *[np.zeros(0, np.uint8)] * (run.world.size - 1)]
    found = exchanged(parts, sizes if run.world.rank == 0 else [0] * len(sizes))
    first = run.world.rank == 0
    run.together(lambda: write_parts_atomic(path, [one.data for one in found]) if first else None)
    return sum(sizes)


def forget(run: Run, name: str) -> None:
    """Remove the files of a stage's making: its samples are in the last one. Collective."""
    folder, first = run.folder.path / "data", run.world.rank == 0

    def remove() -> None:
        for file in folder.glob(f"{MAKING}{name}-*{ENDING}") if first else ():
            file.unlink()

    run.together(remove)


def compacted(samples: Iterable[Sample]) -> list[Sample]:
    """The samples with compact numbers for lists: 4 bytes a token and 8 a figure for 36 and 32."""
    made = []
    for sample in samples:
        fields: dict[str, Sequence[float]] = {
            name: compact.figures(values) for name, values in sample.fields.items()
        }
        made.append(replace(sample, tokens=compact.ids(sample.tokens), fields=fields))
    return made


Head = tuple[Sample, int, tuple[int, ...]]  # without numbers; how many tokens; of each field, figures


def _head(sample: Sample) -> Head:
    nothing: dict[str, Sequence[float]] = dict.fromkeys(sample.fields, ())
    counts = tuple(map(len, sample.fields.values()))
    return replace(sample, tokens=(), fields=nothing), len(sample.tokens), counts


def _numbers(samples: Sequence[Sample]) -> Bytes:
    """Of each sample its tokens, then each field."""
    arrays = [np.zeros(0, np.uint8)]
    for sample in samples:
        arrays.append(np.asarray(sample.tokens, ID).view(np.uint8))
        arrays += [np.asarray(one, FIGURE).view(np.uint8) for one in sample.fields.values()]
    return np.concatenate(arrays)


def _whole(heads: Sequence[Head], view: memoryview) -> list[Sample]:
    at = 0

    def take(count: int, kind: np.dtype[Any]) -> memoryview:
        nonlocal at
        begin, at = at, at + count * kind.itemsize
        return view[begin:at]

    samples = []
    for head, tokens, counts in heads:
        ids = compact.ids_in(take(tokens, ID))
        fields: dict[str, Sequence[float]] = {
            name: compact.figures_in(take(count, FIGURE))
            for name, count in zip(head.fields, counts, strict=True)
        }
        samples.append(replace(head, tokens=ids, fields=fields))
    return samples


def _mapped(path: Path, size: int) -> memoryview:
    if not size:
        return memoryview(b"")
    try:
        with path.open("rb") as file:
            view = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except OSError as error:
        raise _unshared(path, str(error)) from error
    if len(view) != size:
        raise _unshared(path, f"it has {len(view)} bytes, not {size}")
    return view


def _unshared(path: Path, why: str) -> InputError:
    return InputError(
        f"the samples that rank 0 has written cannot be read: {why}",
        where=str(path),
        way_out="put the run folder on a file system that all nodes share",
    )
