"""`genac run --profile`: traces of a few steps by torch's profiler, with the run's phases in them.

    runs/<name>/profile/<stage>-<step>-rank<r>.json.gz     for chrome://tracing or ui.perfetto.dev
    runs/<name>/profile/<stage>-<step>-rank<r>.txt         operators by their own time
    runs/<name>/profile/<stage>-<step>-rank<r>.pickle      GPU allocations (observe.profile.memory), for
                                                           pytorch.org/memory_viz

`mark` names what a thread is doing: an NVTX range wherever CUDA is (so Nsight Systems shows phases with or
without this profiler) and, while a step is profiled, a range of the trace. Touching runs/<name>/profile/now
has a running job profile its next step. Imports torch only where something is profiled or a GPU is used.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from genac_megatron.errors import GenacError
from genac_megatron.recipe.training import ProfileConfig

FOLDER = "profile"
REQUEST = "now"  # a file in that folder: profile the next step
TABLE_ROWS = 40
_profiling = False  # whether a step of this process is being profiled


@functools.cache
def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


@contextmanager
def mark(name: str) -> Iterator[None]:
    """Give a block of work its name in traces. Costs next to nothing where nobody looks."""
    if not (_profiling or _has_cuda()):
        yield
        return
    import torch

    with ExitStack() as ranges:
        if _has_cuda():
            ranges.enter_context(torch.cuda.nvtx.range(name))
        if _profiling:
            ranges.enter_context(torch.profiler.record_function(name))
        yield


class Profiler:
    """Profiles this rank's steps that the recipe asks for: `with profiler.step(stage, step): ...`.

    It does nothing collective: a rank that is profiled is slower, and the others wait for it.
    """

    def __init__(self, run: Path, config: ProfileConfig, rank: int) -> None:
        self.folder, self.config, self.rank = run / FOLDER, config, rank
        self._asked = self._requested_at()

    def _requested_at(self) -> float:
        with suppress(OSError):
            return (self.folder / REQUEST).stat().st_mtime
        return 0.0

    def due(self, index: int) -> bool:
        """Whether the stage's `index`-th step since it began or was resumed, from 1, is to be profiled."""
        config = self.config
        if self.rank not in config.ranks:
            return False
        asked = self._requested_at()
        if asked > self._asked:
            self._asked = asked
            return True
        return config.on and config.first <= index < config.first + config.steps

    @contextmanager
    def step(self, stage: str, step: int, index: int) -> Iterator[None]:
        """Profile the block where it is due; its files appear when it ends, also where it raises."""
        global _profiling
        if not self.due(index):
            yield
            return
        import torch
        from torch.profiler import ProfilerActivity

        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if _has_cuda() else [])]
        path = self.folder / f"{stage}-{step:05d}-rank{self.rank}"
        profile = torch.profiler.profile(
            activities=activities,
            record_shapes=self.config.shapes,
            profile_memory=self.config.memory,
            with_stack=self.config.stacks,
        )
        if self.config.memory and _has_cuda():
            torch.cuda.memory._record_memory_history()
        profile.start()
        _profiling = True
        try:
            with mark(f"{stage} step {step}"):
                yield
        finally:
            _profiling = False
            profile.stop()
            self._write(profile, path)

    def _write(self, profile: Any, path: Path) -> None:
        import torch

        by = "self_cuda_time_total" if _has_cuda() else "self_cpu_time_total"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            profile.export_chrome_trace(f"{path}.json.gz")
            table = profile.key_averages().table(sort_by=by, row_limit=TABLE_ROWS)
            path.with_name(path.name + ".txt").write_text(table + "\n", encoding="utf-8")
            if self.config.memory and _has_cuda():
                torch.cuda.memory._dump_snapshot(f"{path}.pickle")
                torch.cuda.memory._record_memory_history(enabled=None)
        except OSError as error:
            raise GenacError(
                f"the profile cannot be written: {error.strerror or error}",
                where=str(self.folder),
                way_out="free space there, or run without --profile",
            ) from error
