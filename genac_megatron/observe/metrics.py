"""One row of figures per step: metrics.jsonl always, TensorBoard and Weights & Biases where asked for."""

from __future__ import annotations

import importlib.util
import logging
import math
import os
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from genac_megatron.errors import InputError
from genac_megatron.observe.lock import same_folder
from genac_megatron.observe.runinfo import METRICS, RunFolder
from genac_megatron.observe.sinks import Sink, TensorBoard, Wandb
from genac_megatron.recipe.schema import ObserveConfig

logger = logging.getLogger(__name__)
_EXTRA = {
    "tensorboard": ("tensorboard", "observe.tensorboard: false"),
    "wandb": ("wandb", "observe.wandb.mode: off"),
}


class MetricsLog:
    """Writes a step's figures to every sink. One per run, on rank 0.

    `resume` is the `state_dict` of a checkpoint: metrics.jsonl, evaluations.jsonl and rollouts.jsonl are cut
    to the rows that they had. Without it the run starts from nothing and logs of an earlier one are set
    aside. TensorBoard and W&B plot over the row's number in the file, so that stages follow one another on
    one axis. W&B keeps rows that were logged after the checkpoint: they lie under the resumed ones at the
    same `global_step`. A copy of a run, of another name or beside the folder that it was made of, gets a W&B
    run of its own, with all rows.

    guard: called before each row; raises where the folder is no longer this run's.
    """

    def __init__(
        self,
        run_dir: str | Path,
        config: ObserveConfig,
        resume: Mapping[str, Any] | None = None,
        *,
        name: str = "",
        recipe: Mapping[str, Any] | None = None,
        guard: Callable[[], None] = lambda: None,
    ) -> None:
        """Raises InputError where a sink's package is missing, or metrics.jsonl is not the checkpoint's."""
        self.folder = RunFolder(run_dir).create()
        self.config = config
        self.name = name or self.folder.path.name
        self.recipe = dict(recipe or {})
        for kind, wanted in (("tensorboard", config.tensorboard), ("wandb", config.wandb.mode != "off")):
            if wanted and importlib.util.find_spec(kind) is None:
                package, off = _EXTRA[kind]
                raise InputError(
                    f"the package {package} is not installed",
                    where=f"observe.{kind}",
                    way_out=f"pip install {package}, or {off}",
                )
        self._guard = guard
        self.counts = self.folder.rewind(None if resume is None else rows_of(resume))  # by log
        kept = resume or {}
        tensorboard = TensorBoard(self.folder) if config.tensorboard else None
        self._wandb: Wandb | None = None
        copied = kept.get("name", self.name) != self.name or self._is_copy(kept)
        if config.wandb.mode != "off":
            wandb_id = str((not copied and kept.get("wandb_id")) or secrets.token_hex(4))
            self._wandb = Wandb(self.folder, config.wandb, wandb_id, self.name, self.recipe)
            self._tell_wandb(kept, copied)
        self._sinks: list[Sink] = [one for one in (tensorboard, self._wandb) if one is not None]
        for sink in self._sinks:  # a checkpoint made before sinks were counted says nothing of them
            sent = 0 if copied and sink is self._wandb else kept.get("sent", {}).get(sink.name, self.rows)
            sink.sent = min(int(sent), self.rows)

    def _is_copy(self, kept: Mapping[str, Any]) -> bool:
        """Whether the folder in which a checkpoint was made is another one, and still there."""
        place = kept.get("place")
        if place is None:  # an earlier version's
            return False
        with suppress(OSError):
            mine, theirs = (_first_row(folder / METRICS) for folder in (self.folder.path, Path(place)))
            return mine == theirs and not same_folder(self.folder.path, Path(place))
        return False

    def _tell_wandb(self, kept: Mapping[str, Any], copied: bool) -> None:
        """Say whose W&B run a folder goes on with that is not where it was."""
        theirs, place = kept.get("wandb_id"), kept.get("place", "another folder")
        if theirs is None or self._wandb is None:
            return
        if copied:
            logger.warning(
                "genac: this run folder is a copy: the W&B run %s is that of %s, and the copy gets one of "
                "its own, %s, with all rows",
                *(theirs, place, self._wandb.id),
            )
        elif kept.get("place", self._place) != self._place:
            logger.warning(
                "genac: this run folder was at %s before, and goes on with its W&B run %s\n  way out: where "
                "it is a copy, and the other one is in use, end this run, and resume it under another name "
                "(of the folder too)",
                *(place, theirs),
            )

    @property
    def _place(self) -> str:
        return os.path.realpath(self.folder.path)

    @property
    def rows(self) -> int:
        """The rows of metrics.jsonl."""
        return self.counts[METRICS]

    def log(self, stage: str, kind: str, step: int, metrics: Mapping[str, Any]) -> dict[str, Any]:
        """Append a row and return it.

        `metrics` maps `group/name` to anything that float() takes. A value that is not finite is
        written as null, named in the row's `nonfinite` and warned of.
        """
        figures = {key: float(value) for key, value in metrics.items()}
        plain = [key for key in figures if "/" not in key]
        if plain:
            raise ValueError(f"metric names are group/name; these are not: {', '.join(plain)}")
        broken = sorted(key for key, value in figures.items() if not math.isfinite(value))
        row: dict[str, Any] = {"stage": stage, "kind": kind, "step": step, "time": time.time()}
        row.update(figures)
        if broken:
            row.update(dict.fromkeys(broken), nonfinite=broken)
            told = ", ".join(f"{key} = {figures[key]}" for key in broken)
            logger.warning("%s step %d: not finite: %s", stage, step, told)
        self.append(METRICS, row)
        for sink in self._sinks:
            sink.offer(self.rows, row)
        return row

    def append(self, log: str, row: Mapping[str, Any]) -> None:
        """Append a row to one of LOGS."""
        self._guard()
        self.folder.append(log, row)
        self.counts[log] += 1

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: each log's number of rows, how many each sink has, the W&B run id."""
        sent = {sink.name: sink.sent for sink in self._sinks}
        return {
            "rows": dict(self.counts),
            "sent": sent,
            "wandb_id": self._wandb.id if self._wandb else None,
            "name": self.name,
            "place": self._place,
        }

    def close(self, failed: bool = False) -> None:
        """Close the sinks, and name what they do not have; `failed` marks the W&B run as such.

        Safe to call twice.
        """
        sinks, self._sinks = self._sinks, []
        for sink in sinks:
            sink.close(self.rows, failed)

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(failed=kind is not None)


def over_ranks(counted: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """What ranks have counted, added up; of the peak of memory that of the largest rank too."""
    found = {key: sum(part.get(key, 0.0) for part in counted) for key in sorted(set().union(*counted))}
    return {**found, "memory/peak_rank_gib": max(part["memory/peak_gib"] for part in counted)}


def rows_of(state: Mapping[str, Any]) -> dict[str, int]:
    """The rows of each log that a checkpoint has counted. Earlier versions counted those of METRICS alone."""
    rows = state["rows"]
    return {METRICS: rows} if isinstance(rows, int) else dict(rows)


def _first_row(path: Path) -> bytes:
    """The first line of a log, which has the time of its writing."""
    with path.open("rb") as file:
        return file.readline()
