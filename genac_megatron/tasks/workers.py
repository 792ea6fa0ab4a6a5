"""Functions that may run for ever, called in processes that can be ended.

Verifiers read what models write: sympy can run for minutes on a hostile answer, a scorer's regular
expression can backtrack without end. A thread cannot be stopped, so a late process is ended and its
answer counts as wrong.
"""

from __future__ import annotations

import logging
import multiprocessing
import time
from collections import deque
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

TIME_LIMIT_S = 5.0
START_LIMIT_S = 120.0  # a fresh process imports its libraries first, on a machine that may be busy
SHOWN_JOB = 200  # characters of a late job that the log shows

Score = Callable[[Any], float]
logger = logging.getLogger(__name__)


def _serve(pipe: Connection, make: Callable[[], Score]) -> None:
    """A worker's process: makes its function, says it is ready, then answers jobs until its pipe closes."""
    score = make()
    pipe.send(True)
    while True:
        try:
            job = pipe.recv()
        except EOFError:
            return
        try:
            result = float(score(job))
        except Exception:  # whatever hostile text makes a library raise, it is not a right answer
            result = 0.0
        pipe.send(result)


class _Worker:
    """One process, what it works on, and until when it may."""

    def __init__(self, make: Callable[[], Score]) -> None:
        context = multiprocessing.get_context("spawn")  # fork would copy the caller's threads' locks
        self.pipe, far = context.Pipe()
        self.process: BaseProcess = context.Process(target=_serve, args=(far, make), daemon=True)
        self.process.start()
        far.close()
        self.job: int | None = None
        self.ready = False
        self.deadline = time.monotonic() + START_LIMIT_S

    def give(self, job: int, what: Any, limit_s: float) -> None:
        self.job, self.deadline = job, time.monotonic() + limit_s
        self.pipe.send(what)

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


class Workers:
    """Scores jobs in `count` processes, started at first use and kept; they end with this process.

    `make` is called once in each process and returns its function from a job to a score; both cross
    to the process by pickle. A job that raises, takes longer than `limit_s` or kills its process
    scores 0. `late` counts those that were ended.
    """

    def __init__(
        self, make: Callable[[], Score], count: int = 1, limit_s: float = TIME_LIMIT_S, name: str = "scoring"
    ) -> None:
        self.make, self.limit_s, self.name = make, limit_s, name
        self.late = 0
        self._count = count
        self._workers: list[_Worker] = []

    def run(self, jobs: Sequence[Any]) -> list[float]:
        """Scores in order. Raises RuntimeError where a process does not start."""
        results = [0.0] * len(jobs)
        waiting = deque(range(len(jobs)))
        while waiting or any(worker.job is not None for worker in self._workers):
            while waiting and len(self._workers) < min(self._count, len(jobs)):
                self._workers.append(_Worker(self.make))
            for worker in self._workers:
                if worker.ready and worker.job is None and waiting:
                    job = waiting.popleft()
                    worker.give(job, jobs[job], self.limit_s)
            self._collect(jobs, results)
        return results

    def close(self) -> None:
        """End the processes."""
        while self._workers:
            self._workers.pop().end()

    def _collect(self, jobs: Sequence[Any], results: list[float]) -> None:
        """Wait for an answer or the next deadline; take answers in, end what is late or lost."""
        busy = [worker for worker in self._workers if worker.job is not None or not worker.ready]
        first_deadline = min(worker.deadline for worker in busy)
        wait([worker.pipe for worker in busy], timeout=max(0.0, first_deadline - time.monotonic()))
        for worker in busy:
            try:
                if worker.pipe.poll():
                    result = worker.pipe.recv()
                    if worker.job is not None:
                        results[worker.job] = result
                    worker.ready, worker.job = True, None
                    continue
                lost = False
            except (EOFError, OSError):
                lost = True
            if lost or time.monotonic() >= worker.deadline:
                self._drop(worker, jobs)

    def _drop(self, worker: _Worker, jobs: Sequence[Any]) -> None:
        worker.end()
        self._workers.remove(worker)
        if not worker.ready:
            self.close()
            raise RuntimeError(f"a process for {self.name} did not start: is what it imports installed?")
        assert worker.job is not None
        self.late += 1
        shown = repr(jobs[worker.job])
        shown = shown if len(shown) <= SHOWN_JOB else f"...{shown[-SHOWN_JOB:]}"
        logger.warning("%s took longer than %g s and counts as 0: %s", self.name, self.limit_s, shown)
