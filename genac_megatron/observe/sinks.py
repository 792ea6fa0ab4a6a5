"""TensorBoard and Weights & Biases: where rows of metrics.jsonl are shown too. A failure here ends no run."""

from __future__ import annotations

import importlib
import logging
import os
import shlex
import socket
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from genac_megatron.observe.runinfo import METRICS, RunFolder
from genac_megatron.recipe.schema import WandbConfig

logger = logging.getLogger(__name__)
SPARED = 20.0  # times as long as a failed attempt took, no other is made: they cost 5 % of a run at most
CHEAP_S = 10.0  # an attempt that took less is made once more at the run's end, whenever the last one was
INIT_S = 30.0  # for W&B to answer; it retries by itself meanwhile
FINISH_S = 120.0  # for W&B to send what it still holds
HANGS_S = 90.0  # a call that takes longer hangs
Row = Mapping[str, Any]


class Sink(ABC):
    """Shows rows in order. One that fails is owed, with all after it, until the sink answers again.

    sent: the number of the last row that it has; rows are numbered from 1, as in the file.
    """

    name = ""  # as in `observe`
    title = ""
    library = ""  # what it imports

    def __init__(self, folder: RunFolder) -> None:
        self.folder, self.sent = folder, 0
        self._cause = ""  # of the failure that stands
        self._told: set[str] = set()
        self._retry_at, self._took = 0.0, 0.0
        self._hung = False
        self._opened = 0  # rows sent when it was opened: one that hangs may have taken more, and lost them

    def offer(self, number: int, row: Row) -> None:
        """Show row `number`, and before it those that are owed. Raises nothing."""
        if not self._cause or time.monotonic() >= self._retry_at:
            self._try(number, row)

    def close(self, rows: int, failed: bool) -> None:
        """Show what is owed of `rows` rows, where that can be, and say what is not. Raises nothing."""
        if self.sent < rows and (self._took < CHEAP_S or time.monotonic() >= self._retry_at):
            self._try(rows)
        try:
            with self._watched(FINISH_S + HANGS_S):
                way_out = self.finish(rows, failed)
        except Exception as error:
            self._fail(error, 0.0)
            way_out = self.kept()
        if self.sent < rows or way_out:
            owed = f"row {self.sent + 1} on" if self.sent < rows else "its last rows"
            told = f"{self.title} does not have {owed} ({self._cause})"
            logger.warning("genac: warning: %s\n  way out: %s", told, way_out or self.kept())

    @abstractmethod
    def show(self, number: int, row: Row) -> None:
        """Open what is not open, and show a row: once this returns the sink has it."""

    @abstractmethod
    def drop(self) -> None:
        """Let go of what failed, so that `show` opens it anew."""

    @abstractmethod
    def finish(self, rows: int, failed: bool) -> str:
        """Close; how to get at what is not shown, "" where all is."""

    def unblock(self) -> bool:
        """Make a call that hangs fail, from another thread; whether its library has a process to end."""
        return False

    @contextmanager
    def _watched(self, limit_s: float) -> Iterator[None]:
        """Unblock the call inside where it takes longer."""

        def hangs() -> None:
            self._hung = self.unblock()

        timer = threading.Timer(limit_s, hangs)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def kept(self) -> str:
        """Where the figures are in any case."""
        return f"all figures are in {self.folder.path / METRICS}"

    def _try(self, number: int, row: Row | None = None) -> None:
        began = time.monotonic()
        try:
            importlib.import_module(self.library)
            began = time.monotonic()  # an import takes long once
            for one in [row] if row and self.sent == number - 1 else self.owed(number):
                with self._watched(HANGS_S):
                    self.show(self.sent + 1, one)
                self.sent += 1
        except Exception as error:  # whatever a sink's library raises
            with suppress(Exception), self._watched(HANGS_S):
                self.drop()
            self._fail(error, time.monotonic() - began)
            return
        if self._cause:
            self._once("back", f"genac: {self.title} answers again; the rows that it lacked were sent")
        self._cause = ""

    def owed(self, number: int) -> list[dict[str, Any]]:
        """The rows up to `number` that it does not have, from the file."""
        return self.folder.rows(METRICS)[0][self.sent : number]

    def _fail(self, error: Exception, took: float) -> None:
        self._cause = f"its process did not answer in time ({error!r})" if self._hung else _in_a_line(error)
        if self._hung:
            self.sent, self._hung = self._opened, False
        self._took, self._retry_at = took, time.monotonic() + SPARED * took
        self._once(
            "failed",
            f"genac: warning: {self.title} failed ({self._cause}); the run goes on, and what it lacks is "
            f"sent when it answers again; {self.kept()}",
        )

    def _once(self, kind: str, text: str) -> None:
        if kind not in self._told:
            self._told.add(kind)
            logger.warning("%s", text)


def _in_a_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__


def figures_of(row: Row) -> dict[str, float]:
    """A row's finite figures: the file has null for the others."""
    return {key: value for key, value in row.items() if "/" in key and isinstance(value, float | int)}


class TensorBoard(Sink):
    """An event file, each row written through at once.

    torch's SummaryWriter writes in a thread: where that meets a full disk the writer is lost, and rows that
    were accepted with it. Here a row that did not fit is cut off again, and the same file goes on.
    """

    name, title, library = "tensorboard", "TensorBoard", "torch.utils.tensorboard.summary"

    def __init__(self, folder: RunFolder) -> None:
        super().__init__(folder)
        self._file: IO[bytes] | None = None
        self._whole = 0  # bytes of whole rows

    def show(self, number: int, row: Row) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from torch.utils.tensorboard.summary import scalar

        if self._file is None:
            self._open(number)
        at = float(row.get("time", 0.0))
        figures = figures_of(row).items()
        self._append(*(Event(wall_time=at, step=number, summary=scalar(k, v)) for k, v in figures))

    def _open(self, number: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        folder = self.folder.path / "tensorboard"
        folder.mkdir(parents=True, exist_ok=True)
        seconds, nanos = divmod(time.time_ns(), 10**9)  # files are read in the order of their names
        name = f"events.out.tfevents.{seconds:010d}.{nanos:09d}.{socket.gethostname()}.{os.getpid()}"
        self._file, self._whole = (folder / name).open("xb", buffering=0), 0
        # A session's start hides what an interrupted run wrote from this row on.
        start = SessionLog(status=SessionLog.START)
        now = time.time()
        self._append(
            Event(wall_time=now, step=number, file_version="brain.Event:2"),
            Event(wall_time=now, step=number, session_log=start),
        )

    def _append(self, *events: Any) -> None:
        from tensorboard.summary.writer.record_writer import RecordWriter

        assert self._file is not None
        records = _Bytes()
        for event in events:
            RecordWriter(records).write(event.SerializeToString())
        left = memoryview(bytes(records.data))
        while left:  # a disk that fills up takes a part first
            left = left[self._file.write(left) or 0 :]
        self._whole = self._file.tell()

    def drop(self) -> None:
        if self._file is None:
            return
        file, self._file = self._file, None
        if not self._whole:  # not even its head was written
            file.close()
            os.unlink(file.name)
            return
        file.truncate(self._whole)
        file.seek(self._whole)
        self._file = file

    def finish(self, rows: int, failed: bool) -> str:
        if self._file is not None:
            self._file.close()
            self._file = None
        return self.kept() if self.sent < rows else ""


class _Bytes:
    """What RecordWriter writes to."""

    def __init__(self) -> None:
        self.data = bytearray()

    def write(self, data: bytes) -> None:
        self.data += data


class Wandb(Sink):
    """One W&B run, resumed under its id. What cannot be sent by the run's end is left as an offline run."""

    name, title, library = "wandb", "W&B", "wandb"

    def __init__(
        self, folder: RunFolder, config: WandbConfig, run_id: str, name: str, recipe: Mapping[str, Any]
    ) -> None:
        super().__init__(folder)
        self.config, self.id, self.run_name, self.recipe = config, run_id, name, recipe
        self._run: Any = None

    def show(self, number: int, row: Row) -> None:
        if self._run is None:
            self._opened = self.sent  # first: opening may hang too
            self._run = self._init(online=self.config.mode == "online")
        figures = figures_of(row)
        self._run.log({**figures, "global_step": number, "stage": row["stage"], "stage_step": row["step"]})

    def _init(self, online: bool) -> Any:
        import wandb

        with _no_terminal():
            run = wandb.init(
                mode="online" if online else "offline",
                project=self.config.project,
                entity=self.config.entity,
                name=self.run_name,
                id=self.id,
                resume="allow",
                dir=str(self.folder.path),
                config=dict(self.recipe),
                settings=wandb.Settings(
                    silent=True,
                    init_timeout=INIT_S,
                    finish_timeout=FINISH_S,
                    finish_timeout_raises=True,
                ),
            )
        run.define_metric("*", step_metric="global_step")
        return run

    def drop(self) -> None:
        import wandb

        run, self._run = self._run, None
        if run is not None:
            with suppress(Exception):
                run.finish(exit_code=1)
        wandb.teardown()  # its helper process may be what is gone; and it reads WANDB_ variables anew

    def unblock(self) -> bool:
        """Its helper process is what hangs: calls wait for it without a limit, and so does Python's end."""
        import psutil

        with suppress(psutil.Error):
            for child in psutil.Process().children(recursive=True):
                with suppress(psutil.Error):
                    if child.name().startswith("wandb"):
                        child.kill()
        return True

    def finish(self, rows: int, failed: bool) -> str:
        if self.sent == rows:
            return self._end(failed) if self._run is not None else ""
        owed = self.owed(rows)  # W&B refused them: they wait in a run on the disk
        self._run, self._opened = self._init(online=False), self.sent
        for number, row in enumerate(owed, self.sent + 1):
            self.show(number, row)
        folder = Path(self._run.dir).parent
        return self._end(failed) or _sync(folder)

    def _end(self, failed: bool) -> str:
        run, self._run = self._run, None
        try:
            run.finish(exit_code=int(failed))
        except TimeoutError as error:
            self._cause = self._cause or _in_a_line(error)
            return _sync(Path(run.dir).parent)
        return ""


def _sync(folder: Path) -> str:
    return f"once W&B can be reached: wandb sync {shlex.quote(str(folder.absolute()))}"


@contextmanager
def _no_terminal() -> Iterator[None]:
    """W&B asks at a terminal for a key that it lacks, and waits for ever."""
    real = sys.stdin
    with open(os.devnull, encoding="utf-8") as nothing:
        sys.stdin = nothing
        try:
            yield
        finally:
            sys.stdin = real
