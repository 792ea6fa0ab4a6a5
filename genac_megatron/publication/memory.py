"""The most memory that a stretch of work took beyond what there was before."""

from __future__ import annotations

import threading
from types import TracebackType

import psutil
import torch

PERIOD_S = 0.005


class PeakMemory:
    """`host` and `device`: bytes above the level at the start; shared memory that is mapped counts.

    Host memory is sampled every few milliseconds; of the device, torch's allocator knows the peak.
    """

    def __init__(self) -> None:
        self.host = self.device = 0.0
        self._process = psutil.Process()
        self._stop = threading.Event()
        self._cuda = torch.cuda.is_available()

    def __enter__(self) -> PeakMemory:
        self._before = self._process.memory_info().rss
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()
            self._device_before = torch.cuda.memory_allocated()
        self._thread = threading.Thread(target=self._sample, name="peak-memory", daemon=True)
        self._thread.start()
        return self

    def _sample(self) -> None:
        while not self._stop.wait(PERIOD_S):
            self.host = max(self.host, float(self._process.memory_info().rss - self._before))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        if self._cuda:
            self.device = float(torch.cuda.max_memory_allocated() - self._device_before)
