"""A pool of gloo ranks that outlives the tests.

A fork server imports torch and Megatron once a session; the ranks are its children, so that even fresh ones
start in a second.

    def case(rank, x): ...                     # a module-level function; runs on every rank
    def test_it(pool): results = pool.run(case, x, timeout=60)     # one result per rank

The ranks have joined one world (training.layout.init_world); process groups of layouts stay cached in
them. An exception on any rank is raised in the test with that rank's traceback, and a rank that does not end
in time is named with the line it stands at; either way the ranks are then replaced by fresh ones.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import multiprocessing
import multiprocessing.forkserver
import os
import pickle
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from genac_megatron.platform.megatron import install

RANKS = 4
COLLECTIVE_S = 300.0  # a collective whose peers do not come fails after this
GRACE_S = 1.0  # how long other ranks may still report after the first error
EXIT_S = 10.0  # for a process that closed its pipe to be gone
TRACE_S = 5.0  # for a rank to write where it stands
ROOT = Path(__file__).resolve().parents[2]
# Set before torch is imported: one thread per rank (more made a rank 7 times slower), and never a GPU.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).strip(os.pathsep),
}
PRELOAD = ["tests.distributed.preloaded"]


class RankFailed(AssertionError):
    """A rank raised, died, or did not end in time."""


class Pool:
    """`ranks` processes of one gloo world, started at the first run and kept."""

    def __init__(self, ranks: int = RANKS) -> None:
        install()  # from 0.19 on every tensor that a rank pickles makes the reader import megatron.core
        self.ranks = ranks
        self._workers: list[multiprocessing.process.BaseProcess] = []
        self._pipes: list[Connection] = []
        self._folder = tempfile.TemporaryDirectory(prefix="pool-")

    def run(self, case: Callable[..., Any], *args: Any, timeout: float = 120.0) -> list[Any]:
        """case(rank, *args) on every rank at once; their results in order of rank.

        Raises RankFailed with the tracebacks of the ranks that raised, or after `timeout` seconds.
        """
        if not self._workers:
            self._start()
        message = pickle.dumps((case, args))
        for pipe in self._pipes:
            pipe.send_bytes(message)
        answers = self._answers(time.monotonic() + timeout)
        failed = {rank: text for rank, (ok, text) in answers.items() if not ok}
        if len(answers) < self.ranks and not failed:
            late = sorted(set(range(self.ranks)) - answers.keys())
            failed = {rank: f"not done after {timeout:g} s, at\n{self._stack(rank)}" for rank in late}
        if failed:
            self.close()
            test = os.environ.get("PYTEST_CURRENT_TEST", "").split(" ")[0]
            raise RankFailed(
                "\n".join([test, *(f"--- rank {rank}: {text}" for rank, text in sorted(failed.items()))])
            )
        return [pickle.loads(answers[rank][1]) for rank in range(self.ranks)]

    def _answers(self, deadline: float) -> dict[int, tuple[bool, Any]]:
        """Per rank (it returned, its pickled result or its traceback); a missing rank has not answered."""
        answers: dict[int, tuple[bool, Any]] = {}
        waiting = {pipe: rank for rank, pipe in enumerate(self._pipes)}
        while waiting and time.monotonic() < deadline:
            for pipe in wait(list(waiting), timeout=min(1.0, max(0.0, deadline - time.monotonic()))):
                rank = waiting.pop(pipe)  # type: ignore[call-overload]
                try:
                    answers[rank] = pickle.loads(pipe.recv_bytes())  # type: ignore[union-attr]
                except (EOFError, OSError):
                    self._workers[rank].join(EXIT_S)
                    answers[rank] = (False, f"the process died ({self._workers[rank].exitcode})")
                if not answers[rank][0]:
                    deadline = min(deadline, time.monotonic() + GRACE_S)
        return answers

    def _start(self) -> None:
        context = _fork_server()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        for rank in range(self.ranks):
            ours, theirs = context.Pipe()
            # Not daemonic: a rank that saves a checkpoint starts a helper process of its own.
            worker = context.Process(
                target=_work, args=(rank, self.ranks, port, theirs, str(self._trace(rank))), daemon=False
            )
            worker.start()
            theirs.close()
            self._workers.append(worker)
            self._pipes.append(ours)

    def _trace(self, rank: int) -> Path:
        return Path(self._folder.name) / f"rank{rank}.txt"

    def _stack(self, rank: int) -> str:
        """Where a rank stands now."""
        pid = self._workers[rank].pid
        if pid is None or not self._trace(rank).exists():
            return "  (still starting)"
        os.kill(pid, signal.SIGUSR1)
        until = time.monotonic() + TRACE_S
        while not (said := self._trace(rank).read_text()).endswith("\n") and time.monotonic() < until:
            time.sleep(0.1)
        return said

    def close(self) -> None:
        """End the ranks; the next run starts fresh ones. Idle ranks end by themselves, with their helpers."""
        for pipe in self._pipes:
            pipe.close()
        until = time.monotonic() + GRACE_S
        for worker in self._workers:
            worker.join(max(0.0, until - time.monotonic()))
        for worker in self._workers:
            worker.kill()
            worker.join()
            _end_group(worker.pid)
        self._workers, self._pipes = [], []


def _end_group(pid: int | None) -> None:
    """What a rank has started and left behind: the writers of a checkpoint whose rank was killed."""
    with contextlib.suppress(ProcessLookupError):
        if pid is not None:
            os.killpg(pid, signal.SIGKILL)


def _fork_server() -> Any:
    """The multiprocessing context whose server has imported what ranks need."""
    context = multiprocessing.get_context("forkserver")
    before = {name: os.environ.get(name) for name in ENVIRONMENT}
    os.environ |= ENVIRONMENT
    context.set_forkserver_preload(PRELOAD)
    multiprocessing.forkserver.ensure_running()
    for name, value in before.items():
        if value is None:
            del os.environ[name]
        else:
            os.environ[name] = value
    return context


def _work(rank: int, ranks: int, port: int, pipe: Connection, trace: str) -> None:
    """A rank's life: join the world, then run what the pipe brings until it closes."""
    os.setpgid(0, 0)  # so that what it starts can be ended with it, also once it is gone itself
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
    }
    with open(trace, "w") as file:
        faulthandler.register(signal.SIGUSR1, file=file, all_threads=False)
        import torch

        torch.set_num_threads(1)
        from genac_megatron.training.layout import init_world, seed_everything

        try:
            init_world(COLLECTIVE_S)
        except Exception:
            pipe.send_bytes(pickle.dumps((False, traceback.format_exc())))
            return
        while True:
            try:
                message = pipe.recv_bytes()
            except EOFError:
                return
            seed_everything(0)
            pipe.send_bytes(pickle.dumps(_answer(rank, message)))
            gc.collect()


def _answer(rank: int, message: bytes) -> tuple[bool, Any]:
    try:
        case, args = pickle.loads(message)
        return True, pickle.dumps(case(rank, *args))
    except BaseException:
        sys.stdout.flush()
        return False, traceback.format_exc()
