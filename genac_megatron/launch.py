"""Start a run's ranks on this machine, or take part as one of those that torchrun or srun started.

Why not torchrun: it ends with 1 whatever a rank's exit code was, and on Ctrl-C it kills ranks that are
about to save. Here each rank's exit code means something (errors.py) and a stop is passed on once.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from types import FrameType
from typing import IO

from genac_megatron.errors import (
    EXIT_FAILED,
    EXIT_GATE,
    EXIT_INPUT,
    EXIT_LOST,
    EXIT_OK,
    EXIT_REQUEUE,
    InputError,
    on_all_ranks,
)

GRACE_S = 20.0  # how long other ranks may go on after one has failed
LEAVE_S = 2.0  # and after a second Ctrl-C, which a rank inside a collective does not see
PATIENCE_S = 5.0  # between SIGTERM and SIGKILL
LAUNCHER = "GENAC_LAUNCHER_PID"
MEETING = "GENAC_MEETING"  # of ranks that a launcher started: rank 0's listening socket, the others' is ""
PR_SET_PDEATHSIG = 1  # linux/prctl.h
POLL_S = 0.1
FIRST_SPECIAL_STEP = 0xFFFFFFF0  # slurm.h: SLURM_MAX_NORMAL_STEP_ID
FOLLOW_S = 0.5  # between looks at a parent
RENDEZVOUS = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
WORLD_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
CAUSES = (EXIT_INPUT, EXIT_GATE, EXIT_REQUEUE)  # exit codes that say why
INTERRUPTED = 128 + signal.SIGINT
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


def in_world(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether this process is already a rank of a world."""
    return "RANK" in environ or _in_srun(environ)


def _in_srun(environ: Mapping[str, str]) -> bool:
    """Whether srun started this process as one of several tasks.

    A batch script has SLURM_PROCID and SLURM_NTASKS too, but no step of its own, or one numbered above
    all that srun starts; the same holds for the interactive and the extern step.
    """
    step = environ.get("SLURM_STEP_ID", "")
    real = step.isdecimal() and int(step) < FIRST_SPECIAL_STEP
    return real and "SLURM_PROCID" in environ and int(environ.get("SLURM_NTASKS", "1")) > 1


def adopt_slurm(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """RANK, WORLD_SIZE and LOCAL_RANK from srun's variables, where torchrun did not set them."""
    if "RANK" in environ or not _in_srun(environ):
        return {}
    if "MASTER_ADDR" not in environ or "MASTER_PORT" not in environ:
        raise InputError(
            "MASTER_ADDR and MASTER_PORT are not set",
            where="srun",
            way_out="export them in the batch script: the first node's address and a free port; in a shell "
            "or notebook that srun has started: unset SLURM_STEP_ID, and the command starts its own ranks",
        )
    return {
        "RANK": environ["SLURM_PROCID"],
        "WORLD_SIZE": environ["SLURM_NTASKS"],
        "LOCAL_RANK": environ.get("SLURM_LOCALID", "0"),
    }


def check_world(ranks: int, environ: Mapping[str, str] = os.environ) -> None:
    """Raise InputError, alike on every rank, where RANK and its kin do not make this process one of `ranks`.

    Container platforms (Kubeflow, SageMaker) preset them for a torchrun of their own.
    """
    found = {name: environ.get(name, "") for name in RENDEZVOUS}
    numbers = [found[name] for name in ("RANK", "WORLD_SIZE", "MASTER_PORT")]
    whole = all(number.isascii() and number.isdecimal() for number in numbers) and found["MASTER_ADDR"]
    if not whole:
        told = ", ".join(f"{name}={value}" if value else f"no {name}" for name, value in found.items())
        what = f"RANK is set in the environment, as by torchrun, but not all that goes with it: {told}"
    elif int(found["WORLD_SIZE"]) != ranks:
        what = f"the recipe wants {ranks} ranks, {int(found['WORLD_SIZE'])} were started (by WORLD_SIZE)"
    elif int(found["RANK"]) >= ranks:
        what = f"RANK is {found['RANK']}, of a WORLD_SIZE of {ranks}"
    else:
        return
    error = InputError(
        what,
        where="world.ranks",
        way_out=f"where a platform has set them for every process: unset {' '.join(WORLD_VARIABLES)}, and "
        f"the command starts its own ranks; else start {ranks} (torchrun, srun), or set world.ranks to what "
        "is started",
    )
    raise on_all_ranks(error) if whole else error


def follow_launcher() -> None:
    """Ask the kernel (Linux) for a SIGTERM should the launcher that started this rank die."""
    launcher = os.environ.get(LAUNCHER)
    if launcher is None or sys.platform != "linux":
        return
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)
    if launcher != str(os.getppid()):  # it was gone before we asked
        os.kill(os.getpid(), signal.SIGTERM)


def end_with(parent: int) -> None:
    """From now on this process ends, without a word, when `parent` is no longer its parent.

    A thread looks: what the kernel would tell (prctl) is the end of the thread that started this process.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(FOLLOW_S)
        os._exit(EXIT_LOST)

    threading.Thread(target=watch, name="end-with-parent", daemon=True).start()


def cause(ends: Sequence[int]) -> int | None:
    """The end that the others follow from, by the codes alone; None where they do not tell.

    ends: ranks' exit codes, none of them 0, negative for a signal. A rank that failed by itself has 1, and
    its peers then 4; where a signal ended a rank, what its peers say is that they lost it, whatever a
    third makes of it. SIGABRT is how NCCL's watchdog ends a rank whose peer has gone.
    """
    killed = any(end < 0 and end != -signal.SIGABRT for end in ends)
    order = (*CAUSES, EXIT_LOST) if killed else (*CAUSES, EXIT_FAILED, EXIT_LOST)
    return next((code for code in order if code in ends), None)


class Launcher:
    """Starts `ranks` copies of a command, each a rank, and waits for them.

    grace_s: seconds that the others may go on once a rank has failed. errors: a file for what ranks write to
    stderr; what they print is then not shown. environ: theirs, where it is not this process's.
    """

    def __init__(
        self,
        command: Sequence[str],
        ranks: int,
        threads: int,
        *,
        grace_s: float = GRACE_S,
        errors: IO[str] | None = None,
        environ: Mapping[str, str] | None = None,
    ) -> None:
        self.command, self.ranks, self.threads, self.grace_s = list(command), ranks, threads, grace_s
        self._errors, self._environ = errors, environ
        self._children: list[subprocess.Popen[bytes]] = []
        self._asked = 0
        self._deadline = math.inf  # on the monotonic clock: who is left then is ended

    def run(self) -> int:
        """The exit code of the failure that the others follow from (`cause`), else the first's, or 0.

        128 + n where a signal n ended that rank.
        """
        with self._signals():
            try:
                self._start()
                return self._wait()
            finally:
                self._end()

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Meanwhile stops are passed on; a thread of a program cannot, and leaves them to the program."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._pass_on) for number in STOPS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _start(self) -> None:
        # Bound here and handed to rank 0: a port that is only named may be taken while rank 0 imports.
        with socket.create_server(("127.0.0.1", 0), backlog=max(self.ranks, 128)) as meeting:
            self._start_ranks(meeting)

    def _start_ranks(self, meeting: socket.socket) -> None:
        for rank in range(self.ranks):
            held = (meeting.fileno(),) if rank == 0 else ()
            environ = {
                **(os.environ if self._environ is None else self._environ),
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(self.ranks),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(meeting.getsockname()[1]),
                MEETING: ",".join(map(str, held)),
                "OMP_NUM_THREADS": str(self.threads),
                LAUNCHER: str(os.getpid()),
            }
            # A session of its own: a Ctrl-C reaches the ranks through us, once.
            self._children.append(
                subprocess.Popen(
                    self.command,
                    env=environ,
                    start_new_session=True,
                    pass_fds=held,
                    stdout=None if self._errors is None else subprocess.DEVNULL,
                    stderr=self._errors,
                )
            )

    def _pass_on(self, number: int, _frame: FrameType | None) -> None:
        self._asked += number == signal.SIGINT
        if self._asked == 1 and number == signal.SIGINT:
            print(
                "\nstopping after this step, with a checkpoint; press Ctrl-C again to leave at once",
                flush=True,
            )
        elif self._asked == 2:
            self._deadline = min(self._deadline, time.monotonic() + LEAVE_S)
        for child in self._children:
            if child.poll() is None:
                child.send_signal(number)

    def _wait(self) -> int:
        code = EXIT_OK
        while True:
            codes = [child.poll() for child in self._children]
            failed = [got for got in codes if got]
            if failed and code == EXIT_OK:
                self._deadline = min(self._deadline, time.monotonic() + self.grace_s)
            if failed and code not in CAUSES:
                # The cause may come later: its rank's end takes longer than its peers' notice of it.
                got = cause(failed) or code or failed[0]
                code = got if got > 0 else 128 - got
            if all(got is not None for got in codes):
                return code
            if time.monotonic() > self._deadline:
                return code or INTERRUPTED
            time.sleep(POLL_S)

    def _end(self) -> None:
        """Nothing of ours outlives us, helper processes of the ranks included."""
        self._end_ranks()
        for child in self._children:
            with contextlib.suppress(ProcessLookupError):  # nothing of its session is left
                os.killpg(child.pid, signal.SIGKILL)

    def _end_ranks(self) -> None:
        for number in (signal.SIGTERM, signal.SIGKILL):
            alive = [child for child in self._children if child.poll() is None]
            for child in alive:
                os.killpg(child.pid, number)  # it leads a session of its own
            until = time.monotonic() + PATIENCE_S
            for child in alive:
                try:
                    child.wait(max(0.1, until - time.monotonic()))
                except subprocess.TimeoutExpired:
                    continue


def rank_command(arguments: Sequence[str]) -> list[str]:
    """The command that runs `genac` with these arguments as a rank."""
    return [sys.executable, "-m", "genac_megatron", *arguments]
