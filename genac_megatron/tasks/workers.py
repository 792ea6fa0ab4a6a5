"""Functions that may run for ever, called in processes that can be ended.

Verifiers read what models write: sympy can run for minutes on a hostile answer, a scorer's regular
expression can backtrack without end. A thread cannot be stopped, so a late process is ended, with what it has
started itself, and its job is given up.

Ctrl-C and a scheduler's signals reach a whole group of processes: these leave them to their parent, which may
still have answers to be scored, and end with it.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from multiprocessing.util import Finalize
from queue import LifoQueue
from typing import Any, Generic, TypeVar

import psutil

from genac_megatron.launch import end_with

TIME_LIMIT_S = 5.0
BESIDE = 2  # responses that a task verifies at a time, beside generation
START_LIMIT_S = 120.0  # a fresh process imports its libraries first, on a machine that may be busy
OVERTIME_S = 5.0  # beyond its limit, after which a late process whose parent is gone ends itself
TRIES = 2  # processes that a job may lose before it is given up
SHOWN_JOB = 200  # characters of a late job that the log shows
IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

T = TypeVar("T")
logger = logging.getLogger(__name__)


def _serve(pipe: Connection, make: Callable[[], Callable[[Any], Any]], parent: int, alarm_s: float) -> None:
    """A worker's process: makes its function, says it is ready, then answers jobs until its pipe closes.

    A job above `alarm_s` ends it: its parent would have, were it there.
    """
    for number in IGNORED:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, IGNORED)
    end_with(parent)
    work = make()
    try:
        pipe.send(None)  # ready
        while True:
            job = pipe.recv()
            # The kernel's own alarm: a regular expression without end lets no thread of ours run.
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.setitimer(signal.ITIMER_REAL, alarm_s)
            done = _done(work, job)
            signal.setitimer(signal.ITIMER_REAL, 0.0)
            pipe.send(done)
    except (EOFError, OSError):
        return  # the parent is gone


def _done(work: Callable[[Any], Any], job: Any) -> tuple[bool, Any]:
    """(True, the result), or (False, what was raised)."""
    try:
        return True, work(job)
    except Exception as error:  # whatever hostile text makes a library raise
        return False, f"raised {type(error).__name__}: {error}"


def _kill(process: BaseProcess) -> None:
    """End a process and what it has started: a compiler, a program under test."""
    if process.pid is None:
        return
    started: list[psutil.Process] = []
    with contextlib.suppress(psutil.Error):
        started = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    for child in started:
        with contextlib.suppress(psutil.Error):
            child.kill()


class _Worker:
    """One process, what it works on, and until when it may."""

    def __init__(self, make: Callable[[], Callable[[Any], Any]], alarm_s: float, start_s: float) -> None:
        context = multiprocessing.get_context("spawn")  # fork would copy the caller's threads' locks
        self.pipe, far = context.Pipe()
        given = (far, make, os.getpid(), alarm_s)
        self.process: BaseProcess = context.Process(target=_serve, args=given, daemon=True)
        # At exit multiprocessing ends daemons by SIGTERM, which this one ignores, and waits for them.
        Finalize(self, _kill, (self.process,), exitpriority=0)
        resource_tracker.ensure_running()  # here, for it unblocks signals
        # The process begins with them blocked, so that none ends it before it can ignore them.
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, IGNORED)
        try:
            self.process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        far.close()
        self.job: int | None = None
        self.ready = False
        self.deadline = time.monotonic() + start_s

    def give(self, job: int, what: Any, limit_s: float) -> None:
        self.job, self.deadline = job, time.monotonic() + limit_s
        self.pipe.send(what)

    def end(self) -> None:
        _kill(self.process)
        self.process.join()
        self.pipe.close()


class Pool(Generic[T]):
    """Works on jobs in `count` processes, started at first use and kept; they end with this process.

    `make` is called once in each process and returns its function from a job to a result; both cross
    to the process by pickle. A job that raises or takes longer than `limit_s` has the result `failed(why)`;
    one whose process is lost is given to another, and fails where that is lost too. `late` counts those whose
    process was ended. One thread at a time may call `run`.
    """

    def __init__(
        self,
        make: Callable[[], Callable[[Any], T]],
        failed: Callable[[str], T],
        count: int = 1,
        limit_s: float = TIME_LIMIT_S,
        name: str = "scoring",
        start_s: float = START_LIMIT_S,
    ) -> None:
        self.make, self.failed, self.limit_s, self.name = make, failed, limit_s, name
        self.start_s = start_s
        self.late = 0
        self._count = count
        self._workers: list[_Worker] = []
        self._ended = False

    def run(self, jobs: Sequence[Any]) -> list[T]:
        """Results in order. Raises RuntimeError where a process does not start, and after `end_now`."""
        found: dict[int, T] = {}
        waiting = deque(range(len(jobs)))
        lost = Counter[int]()  # processes, by the job they were lost at
        try:
            while waiting or any(worker.job is not None for worker in self._workers):
                if self._ended:
                    raise RuntimeError(f"{self.name} was ended")
                while waiting and len(self._workers) < min(self._count, len(jobs)):
                    self._workers.append(_Worker(self.make, self.limit_s + OVERTIME_S, self.start_s))
                for worker in self._give(jobs, waiting):
                    self._again(worker, jobs, waiting, lost, found)
                for worker in self._collect(jobs, found):
                    self._again(worker, jobs, waiting, lost, found)
        except BaseException:
            for worker in [worker for worker in self._workers if worker.job is not None]:
                self._drop(worker)  # its answer would be taken for a later job's
            raise
        return [found[number] for number in range(len(jobs))]

    def end_now(self) -> None:
        """From another thread than the one that runs: end what runs."""
        self._ended = True
        for worker in list(self._workers):
            _kill(worker.process)

    def close(self) -> None:
        """End the processes."""
        while self._workers:
            self._workers.pop().end()

    def _give(self, jobs: Sequence[Any], waiting: deque[int]) -> list[_Worker]:
        """Give waiting jobs to who is free; the workers that turn out to be lost."""
        lost = []
        for worker in self._workers:
            if worker.ready and worker.job is None and waiting:
                job = waiting.popleft()
                try:
                    worker.give(job, jobs[job], self.limit_s)
                except OSError:
                    lost.append(worker)
        return lost

    def _collect(self, jobs: Sequence[Any], found: dict[int, T]) -> list[_Worker]:
        """Wait for an answer or the next deadline; take answers in, end what is late; the lost workers."""
        busy = [worker for worker in self._workers if worker.job is not None or not worker.ready]
        if not busy:
            return []
        first_deadline = min(worker.deadline for worker in busy)
        wait([worker.pipe for worker in busy], timeout=max(0.0, first_deadline - time.monotonic()))
        lost = []
        for worker in busy:
            try:
                if worker.pipe.poll():
                    done = worker.pipe.recv()
                    if worker.job is not None:
                        whole, result = done
                        found[worker.job] = result if whole else self.failed(result)
                    worker.ready, worker.job = True, None
                    continue
            except (EOFError, OSError):
                lost.append(worker)
                continue
            if time.monotonic() >= worker.deadline:
                self._late(worker, jobs, found)
        return lost

    def _again(
        self,
        worker: _Worker,
        jobs: Sequence[Any],
        waiting: deque[int],
        lost: Counter[int],
        found: dict[int, T],
    ) -> None:
        """The worker is lost: its job waits again, or fails."""
        job = self._drop(worker)
        lost[job] += 1
        if lost[job] < TRIES:
            waiting.appendleft(job)
            return
        self._give_up(job, jobs, f"lost {TRIES} processes at it", found)

    def _late(self, worker: _Worker, jobs: Sequence[Any], found: dict[int, T]) -> None:
        job = self._drop(worker)
        self._give_up(job, jobs, f"took longer than {self.limit_s:g} s", found)

    def _give_up(self, job: int, jobs: Sequence[Any], why: str, found: dict[int, T]) -> None:
        self.late += 1
        found[job] = self.failed(why)
        self._tell(why, jobs[job])

    def _tell(self, why: str, job: Any) -> None:
        """Whoever makes something of `failed` tells of it there."""

    def _drop(self, worker: _Worker) -> int:
        """End a worker; its job. Raises RuntimeError where it had not even started."""
        worker.end()
        self._workers.remove(worker)
        if worker.job is None:
            self.close()
            raise RuntimeError(f"a process for {self.name} did not start: is what it imports installed?")
        return worker.job


def _nothing(why: str) -> float:
    return 0.0


class Workers(Pool[float]):
    """Scores jobs: one that fails scores 0, and the log says so where its process was ended."""

    def __init__(
        self,
        make: Callable[[], Callable[[Any], float]],
        count: int = 1,
        limit_s: float = TIME_LIMIT_S,
        name: str = "scoring",
    ) -> None:
        super().__init__(make, _nothing, count, limit_s, name)

    def _tell(self, why: str, job: Any) -> None:
        logger.warning("%s %s and counts as 0: %s", self.name, why, _shown(job))


class Shared(Generic[T]):
    """Pools of one process each; a thread that calls `run` has one of them to itself.

    So a job that takes long holds up its own thread alone. The pool that became free last is taken first: a
    further process is started where there is work for it, and not before.
    """

    def __init__(self, make: Callable[[], Pool[T]], count: int = BESIDE) -> None:
        self.pools = [make() for _ in range(count)]
        self._free: LifoQueue[Pool[T]] = LifoQueue()
        for pool in self.pools:
            self._free.put(pool)

    @property
    def late(self) -> int:
        """Jobs whose process was ended so far."""
        return sum(pool.late for pool in self.pools)

    def run(self, jobs: Sequence[Any]) -> list[T]:
        """As `Pool.run`, from any thread; it waits for a pool that is free. None after `close`."""
        if not jobs:
            return []
        pool = self._free.get()
        try:
            return pool.run(jobs)
        finally:
            self._free.put(pool)

    def close(self) -> None:
        """End the processes, whatever they are at: who is in `run` then raises, and starts no further one."""
        for pool in self.pools:
            pool.end_now()
        for pool in [self._free.get() for _ in self.pools]:  # once nobody is at it
            pool.close()
            self._free.put(pool)


def _shown(job: Any) -> str:
    """The end of a job, for the log."""
    text = repr(job)
    return text if len(text) <= SHOWN_JOB else f"...{text[-SHOWN_JOB:]}"
