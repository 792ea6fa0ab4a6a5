"""Commands in Python that are forked from one process which has imported torch and Megatron.

    done = genac("run", "recipe.yaml", cwd=folder)
    process = Popen(command("run", "recipe.yaml"), cwd=folder, env=environment())

Importing takes each rank of a cold command some ten seconds of a core, which is most of a run of a few tiny
steps. Everything else is as in a cold one: its working directory, environment, output, exit code, signals and
processes (a launcher's ranks are forked in turn). One run from beginning to end is started cold
(tests/e2e/test_run.py), and so are Slurm's jobs (a rank of one is killed), tests/faults and the README's
commands.
"""

from __future__ import annotations

import atexit
import json
import os
import select
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
REQUEST = 1 << 18  # bytes of one
START_S = 300.0  # for the imports, on a busy machine
TIMEOUT_S = 600.0


def environment(**changes: str) -> dict[str, str]:
    """Of a command, cold or warm: this checkout's package, one thread a process."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **changes}


def command(*arguments: str) -> list[str]:
    """`genac ARGUMENTS`, for a Popen."""
    return [sys.executable, "-m", "genac_megatron", *arguments]


def genac(*arguments: str, cwd: Path, timeout: float = TIMEOUT_S) -> subprocess.CompletedProcess[str]:
    """`genac ARGUMENTS` in `cwd`, to its end."""
    return run(command(*arguments), cwd=cwd, timeout=timeout)


def run(
    words: Sequence[str], *, cwd: Path, env: Mapping[str, str] | None = None, timeout: float = TIMEOUT_S
) -> subprocess.CompletedProcess[str]:
    """As subprocess.run, with its output."""
    pipe = subprocess.PIPE
    with Popen(words, cwd=cwd, env=env or environment(), stdout=pipe, stderr=pipe, text=True) as process:
        try:
            out, err = process.communicate(timeout=timeout)
        except BaseException:
            process.kill()
            raise
    return subprocess.CompletedProcess(list(words), process.returncode, out, err)


def python_words(words: Any) -> list[str] | None:
    """[-W ACTION] -m MODULE or -c PROGRAM, and what these are given, of a command that starts this Python;
    None for any other.
    """
    words = [] if isinstance(words, str | bytes | os.PathLike) else [os.fspath(word) for word in words]
    if words[:1] != [sys.executable]:
        return None
    kind = words[3:4] if words[1:2] == ["-W"] else words[1:2]
    return words[1:] if kind in (["-m"], ["-c"]) else None


class Popen(subprocess.Popen[str]):
    """A process that the warm parent forks. Its pid, signals, pipes and end are as subprocess has them."""

    def _execute_child(self, args: Any, executable: Any, preexec_fn: Any, *rest: Any) -> None:
        (_close_fds, pass_fds, cwd, env, _info, _flags, shell, p2cread, p2cwrite, c2pread, c2pwrite,
         errread, errwrite, _restore, _gid, _gids, _uid, _umask, new_session, _group) = rest  # fmt: skip
        words = python_words(args)
        assert words is not None, f"only Python's own commands can be warm: {args}"
        assert not any((shell, preexec_fn, executable, pass_fds))
        request = {
            "words": words,
            "cwd": os.fspath(cwd or os.getcwd()),
            "environ": dict(os.environ if env is None else env),
            "new_session": new_session,
        }
        streams = [own if given == -1 else given for own, given in enumerate((p2cread, c2pwrite, errwrite))]
        self._life = _the_parent().fork(request, streams)
        self.pid = int(self._life.recv(REQUEST))
        self._child_created = True
        self._close_pipe_fds(  # type: ignore[attr-defined]
            p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite
        )

    def _internal_poll(self, _deadstate: int | None = None) -> int | None:
        if self.returncode is None:
            pid, status = self._try_wait(os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def _try_wait(self, wait_flags: int) -> tuple[int, int]:
        if wait_flags and not select.select([self._life], [], [], 0)[0]:
            return 0, 0
        return self.pid, int(self._life.recv(REQUEST) or 9)  # a parent that is gone ends its children


class Parent:
    """The process that has imported everything, and forks a child for each request."""

    def __init__(self) -> None:
        self._pipe, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        words = [sys.executable, "-m", "tests.warm.parent", str(theirs.fileno())]
        self.process = subprocess.Popen(
            words, cwd=ROOT, env=environment(), stdin=subprocess.DEVNULL, stdout=self._log,
            stderr=self._log, pass_fds=[theirs.fileno()], start_new_session=True,
        )  # fmt: skip
        theirs.close()
        self._pipe.settimeout(START_S)
        if not self._pipe.recv(REQUEST):
            self._log.seek(0)
            raise RuntimeError(f"the warm parent has ended:\n{self._log.read()[-3000:]}")

    def fork(self, request: Mapping[str, Any], streams: Sequence[int]) -> socket.socket:
        """Start a child; on what is returned come its pid and, once it has ended, its wait status."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            socket.send_fds(self._pipe, [json.dumps(request).encode()], [*streams, theirs.fileno()])
        return ours

    def close(self) -> None:
        """End it, and what it has forked and nobody has waited for."""
        self._pipe.close()
        self.process.wait()
        self._log.close()


_PARENT: Parent | None = None


def _the_parent() -> Parent:
    global _PARENT
    if _PARENT is None:
        _PARENT = Parent()
        atexit.register(_PARENT.close)
    return _PARENT
