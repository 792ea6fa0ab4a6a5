"""The most memory that a stretch of work took beyond what there was before."""

from __future__ import annotations

import threading
from types import TracebackType

import psutil
import torch

PERIOD_S = 0.005


class PeakMemory:
    """`host` and `device`: bytes above the level at the start; shared memory that is mapped counts.

    Memory is sampled every few milliseconds; torch's allocator knows the device's peak where it is the
    highest so far. That one is the whole run's: it is read, and never reset.
    """

    def __init__(self) -> None:
        self.host = self.device = 0.0
        self._process = psutil.Process()
        self._stop = threading.Event()
        self._cuda = torch.cuda.is_available()

    def __enter__(self) -> PeakMemory:
        self._before = self._process.memory_info().rss
        if self._cuda:
            self._device = torch.cuda.current_device()  # a thread's own
            self._peak_before = torch.cuda.max_memory_allocated(self._device)
            self._device_before = self._device_seen = torch.cuda.memory_allocated(self._device)
        self._thread = threading.Thread(target=self._sample, name="peak-memory", daemon=True)
        self._thread.start()
        return self

    def _sample(self) -> None:
        while not self._stop.wait(PERIOD_S):
            self.host = max(self.host, float(self._process.memory_info().rss - self._before))
            if self._cuda:
                self._device_seen = max(self._device_seen, torch.cuda.memory_allocated(self._device))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        if self._cuda:
            peak = torch.cuda.max_memory_allocated(self._device)
            highest = peak if peak > self._peak_before else self._device_seen
            self.device = float(highest - self._device_before)
