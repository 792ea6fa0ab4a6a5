"""One row of figures per step: metrics.jsonl always, TensorBoard and Weights & Biases where asked for."""

from __future__ import annotations

import importlib.util
import logging
import math
import secrets
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from genac_megatron.errors import InputError
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
    same `global_step`. A copy of a run, of another name, gets a W&B run of its own, with all rows.

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
        copied = kept.get("name", self.name) != self.name  # its W&B run is the original's
        if config.wandb.mode != "off":
            wandb_id = str((not copied and kept.get("wandb_id")) or secrets.token_hex(4))
            self._wandb = Wandb(self.folder, config.wandb, wandb_id, self.name, self.recipe)
        self._sinks: list[Sink] = [one for one in (tensorboard, self._wandb) if one is not None]
        for sink in self._sinks:  # a checkpoint made before sinks were counted says nothing of them
            sent = 0 if copied and sink is self._wandb else kept.get("sent", {}).get(sink.name, self.rows)
            sink.sent = min(int(sent), self.rows)

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


def rows_of(state: Mapping[str, Any]) -> dict[str, int]:
    """The rows of each log that a checkpoint has counted. Earlier versions counted those of METRICS alone."""
    rows = state["rows"]
    return {METRICS: rows} if isinstance(rows, int) else dict(rows)
