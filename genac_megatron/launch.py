"""Start a run's ranks on this machine, or take part as one of those that torchrun or srun started.

Why not torchrun: it ends with 1 whatever a rank's exit code was, and on Ctrl-C it kills ranks that are
about to save. Here each rank's exit code means something (errors.py) and a stop is passed on once.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from types import FrameType

from genac_megatron.errors import EXIT_OK, InputError

GRACE_S = 20.0  # how long other ranks may go on after one has failed
POLL_S = 0.1


def in_world(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether this process is already a rank of a world."""
    return "RANK" in environ or "SLURM_PROCID" in environ and int(environ.get("SLURM_NTASKS", "1")) > 1


def adopt_slurm(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """RANK, WORLD_SIZE and LOCAL_RANK from srun's variables, where torchrun did not set them."""
    if "RANK" in environ or "SLURM_PROCID" not in environ:
        return {}
    if "MASTER_ADDR" not in environ or "MASTER_PORT" not in environ:
        raise InputError(
            "MASTER_ADDR and MASTER_PORT are not set",
            where="srun",
            way_out="export them in the batch script: the first node's address and a free port",
        )
    return {
        "RANK": environ["SLURM_PROCID"],
        "WORLD_SIZE": environ["SLURM_NTASKS"],
        "LOCAL_RANK": environ.get("SLURM_LOCALID", "0"),
    }


def free_port() -> int:
    """A port of the loopback interface that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Launcher:
    """Starts `ranks` copies of a command, each a rank, and waits for them."""

    def __init__(self, command: Sequence[str], ranks: int, threads: int) -> None:
        self.command, self.ranks, self.threads = list(command), ranks, threads
        self._children: list[subprocess.Popen[bytes]] = []
        self._asked = 0

    def run(self) -> int:
        """The first failure's exit code, or 0."""
        port = free_port()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._pass_on)
        for rank in range(self.ranks):
            environ = {
                **os.environ,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(self.ranks),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "OMP_NUM_THREADS": str(self.threads),
            }
            # A session of its own: a Ctrl-C reaches the ranks through us, once.
            self._children.append(subprocess.Popen(self.command, env=environ, start_new_session=True))
        try:
            return self._wait()
        finally:
            self._end()

    def _pass_on(self, number: int, _frame: FrameType | None) -> None:
        self._asked += number == signal.SIGINT
        if self._asked == 1 and number == signal.SIGINT:
            print("\nstopping after this step, with a checkpoint; press Ctrl-C again to leave at once", flush=True)
        for child in self._children:
            if child.poll() is None:
                child.send_signal(number)

    def _wait(self) -> int:
        failed_at: float | None = None
        code = EXIT_OK
        while True:
            codes = [child.poll() for child in self._children]
            for got in codes:
                if got not in (None, 0) and code == EXIT_OK:
                    code = got if got > 0 else 128 - got
                    failed_at = time.monotonic()
            if all(got is not None for got in codes):
                return code
            if failed_at is not None and time.monotonic() - failed_at > GRACE_S:
                return code
            time.sleep(POLL_S)

    def _end(self) -> None:
        """Nothing of ours outlives us."""
        for number, patience in ((signal.SIGTERM, 5.0), (signal.SIGKILL, 5.0)):
            alive = [child for child in self._children if child.poll() is None]
            for child in alive:
                child.send_signal(number)
            until = time.monotonic() + patience
            for child in alive:
                try:
                    child.wait(max(0.1, until - time.monotonic()))
                except subprocess.TimeoutExpired:
                    continue


def rank_command(arguments: Sequence[str]) -> list[str]:
    """The command that runs `genac` with these arguments as a rank."""
    return [sys.executable, "-m", "genac_megatron", *arguments]
