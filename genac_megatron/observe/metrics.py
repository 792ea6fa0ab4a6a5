"""One row of figures per step: metrics.jsonl always, TensorBoard and Weights & Biases where asked for."""

from __future__ import annotations

import importlib.util
import logging
import math
import secrets
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from genac_megatron.errors import InputError
from genac_megatron.observe.runinfo import METRICS, Position, RunFolder
from genac_megatron.observe.sinks import Sink, TensorBoard, Wandb
from genac_megatron.recipe.schema import ObserveConfig

logger = logging.getLogger(__name__)
_EXTRA = {
    "tensorboard": ("tensorboard", "observe.tensorboard: false"),
    "wandb": ("wandb", "observe.wandb.mode: off"),
}


class MetricsLog:
    """Writes a step's figures to every sink. One per run, on rank 0.

    `resume_step` is the checkpoint's (stage, steps done): rows after it are dropped from
    metrics.jsonl, evaluations.jsonl and rollouts.jsonl. Without it the run starts from nothing and logs
    of an earlier one are set aside. TensorBoard and W&B plot over the row's number in the file, so that
    stages follow one another on one axis.

    The W&B run id is part of `state_dict`; `load` must come before the first row. W&B keeps rows that
    were logged after the checkpoint: they lie under the resumed ones at the same `global_step`.
    """

    def __init__(
        self,
        run_dir: str | Path,
        config: ObserveConfig,
        resume_step: Position | None = None,
        *,
        name: str = "",
        recipe: Mapping[str, Any] | None = None,
    ) -> None:
        """Raises InputError where a sink is asked for whose package is missing."""
        self.folder = RunFolder(run_dir).create()
        self.config = config
        self.name = name or self.folder.path.name
        self.recipe = dict(recipe or {})
        for sink, wanted in (("tensorboard", config.tensorboard), ("wandb", config.wandb.mode != "off")):
            if wanted and importlib.util.find_spec(sink) is None:
                package, off = _EXTRA[sink]
                raise InputError(
                    f"the package {package} is not installed",
                    where=f"observe.{sink}",
                    way_out=f"pip install {package}, or {off}",
                )
        self.folder.rewind(resume_step)
        self.rows = len(self.folder.rows(METRICS)[0])
        tensorboard = TensorBoard(self.folder) if config.tensorboard else None
        self._wandb: Wandb | None = None
        if config.wandb.mode != "off":
            self._wandb = Wandb(self.folder, config.wandb, secrets.token_hex(4), self.name, self.recipe)
        self._sinks: list[Sink] = [one for one in (tensorboard, self._wandb) if one is not None]
        for one in self._sinks:
            one.sent = self.rows

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
        self.folder.append(METRICS, row)
        self.rows += 1
        for sink in self._sinks:
            sink.offer(self.rows, row)
        return row

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: the number of rows, how many each sink has, and the W&B run id."""
        sent = {sink.name: sink.sent for sink in self._sinks}
        return {"rows": self.rows, "sent": sent, "wandb_id": self._wandb.id if self._wandb else None}

    def load(self, state: Mapping[str, Any]) -> None:
        """Take up a checkpoint's logging. Raises InputError where metrics.jsonl is not the one it left."""
        if self._wandb is not None and self._wandb.opened:
            raise RuntimeError("load the metrics log before its first row")
        if self.rows != int(state["rows"]):
            raise InputError(
                f"the checkpoint counts {state['rows']} rows, the file holds {self.rows} up to that step",
                where=str(self.folder.path / METRICS),
                way_out="put the file back, or resume in a copy of the whole run folder",
            )
        if self._wandb is not None and state.get("wandb_id"):
            self._wandb.id = str(state["wandb_id"])
        for sink in self._sinks:  # a checkpoint made before sinks were counted says nothing of them
            sink.sent = min(int(state.get("sent", {}).get(sink.name, self.rows)), self.rows)

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
