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
    same `global_step`. guard: called before each row; raises where the folder is no longer this run's.
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
        for sink, wanted in (("tensorboard", config.tensorboard), ("wandb", config.wandb.mode != "off")):
            if wanted and importlib.util.find_spec(sink) is None:
                package, off = _EXTRA[sink]
                raise InputError(
                    f"the package {package} is not installed",
                    where=f"observe.{sink}",
                    way_out=f"pip install {package}, or {off}",
                )
        self._guard = guard
        self.counts = self.folder.rewind(None if resume is None else rows_of(resume))  # by log
        wandb_id = (resume or {}).get("wandb_id") or secrets.token_hex(4)
        self._wandb_id: str | None = str(wandb_id) if config.wandb.mode != "off" else None
        self._wandb: Any = None
        self._tensorboard: Any = None

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
        finite = {key: value for key, value in figures.items() if math.isfinite(value)}
        row: dict[str, Any] = {"stage": stage, "kind": kind, "step": step, "time": time.time()}
        row.update(figures)
        if broken:
            row.update(dict.fromkeys(broken), nonfinite=broken)
            told = ", ".join(f"{key} = {figures[key]}" for key in broken)
            logger.warning("%s step %d: not finite: %s", stage, step, told)
        self.append(METRICS, row)
        if self.config.tensorboard:
            self._to_tensorboard(finite)
        if self.config.wandb.mode != "off":
            self._to_wandb(stage, step, finite)
        return row

    def append(self, log: str, row: Mapping[str, Any]) -> None:
        """Append a row to one of LOGS."""
        self._guard()
        self.folder.append(log, row)
        self.counts[log] += 1

    def _to_tensorboard(self, figures: Mapping[str, float]) -> None:
        if self._tensorboard is None:
            from torch.utils.tensorboard import SummaryWriter

            # purge_step hides what an interrupted run wrote beyond the checkpoint
            self._tensorboard = SummaryWriter(str(self.folder.path / "tensorboard"), purge_step=self.rows)
        for key, value in figures.items():
            self._tensorboard.add_scalar(key, value, self.rows)
        self._tensorboard.flush()

    def _to_wandb(self, stage: str, step: int, figures: Mapping[str, float]) -> None:
        if self._wandb is None:
            import wandb

            self._wandb = wandb.init(
                mode="online" if self.config.wandb.mode == "online" else "offline",
                project=self.config.wandb.project,
                entity=self.config.wandb.entity,
                name=self.name,
                id=self._wandb_id,
                resume="allow",
                dir=str(self.folder.path),
                config=self.recipe,
                settings=wandb.Settings(silent=True),
            )
            self._wandb.define_metric("*", step_metric="global_step")
        self._wandb.log({**figures, "global_step": self.rows, "stage": stage, "stage_step": step})

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: each log's number of rows and the W&B run id."""
        return {"rows": dict(self.counts), "wandb_id": self._wandb_id}

    def close(self, failed: bool = False) -> None:
        """Flush and close the sinks; `failed` marks the W&B run as such. Safe to call twice."""
        if self._tensorboard is not None:
            self._tensorboard.close()
            self._tensorboard = None
        if self._wandb is not None:
            self._wandb.finish(exit_code=int(failed))
            self._wandb = None

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
