"""Processes that a tool starts, whatever becomes of them: found, and ended for certain.

Standard library only. On Linux a tool that has called `adopt_orphans` is the parent of every descendant
whose own parent has ended, whatever its session; elsewhere no descendant is found.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Collection
from pathlib import Path

PATIENCE_S = 3.0  # between SIGTERM and SIGKILL
GIVE_UP_S = 30.0  # on what SIGKILL does not end, such as a process amid a read of a dead disk
LOOK_S = 0.1
PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
PROC = Path("/proc")
SHOWN_WORDS = 200  # characters of a process's command line


def adopt_orphans() -> None:
    """From now on (Linux) a descendant whose parent ends becomes our child, and not init's."""
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        print(f"cannot adopt orphans: {os.strerror(ctypes.get_errno())}", file=sys.stderr, flush=True)


def reap(spared: Collection[int]) -> None:
    """Let adopted children that have ended go, but for `spared`, for whom a Popen waits."""
    with contextlib.suppress(ChildProcessError):
        while found := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            if found.si_pid in spared:
                return
            os.waitpid(found.si_pid, 0)


def descendants(spared: Collection[int] = ()) -> list[int]:
    """Living processes that descend from this one, but not from `spared`; ended children are let go."""
    # One that forks and ends while we look escapes a look, but not two.
    return _look(spared) or _look(spared)


def _look(spared: Collection[int]) -> list[int]:
    me, parents, living = os.getpid(), dict[int, int](), list[int]()
    for folder in PROC.glob("[0-9]*"):
        with contextlib.suppress(OSError):
            state, parent = (folder / "stat").read_bytes().rpartition(b")")[2].split()[:2]
            pid = int(folder.name)
            parents[pid] = int(parent)
            if state not in (b"Z", b"X"):
                living.append(pid)
            elif parents[pid] == me and pid not in spared:
                os.waitpid(pid, os.WNOHANG)

    def ours(pid: int) -> bool:
        while pid not in spared and (pid := parents.get(pid, 0)):
            if pid == me:
                return True
        return False

    return [pid for pid in living if ours(pid)]


def end_all(spared: Collection[int] = (), leader: subprocess.Popen[bytes] | None = None) -> list[str]:
    """End every descendant but `spared` and theirs; in words what they were.

    Again and again, as they may start others, or end and leave orphans. leader: of a process group, which is
    killed where descendants cannot be found.
    """
    if leader is not None and sys.platform != "linux":
        with contextlib.suppress(ProcessLookupError):
            os.killpg(leader.pid, signal.SIGKILL)
        leader.wait()
        return []
    met: dict[int, str] = {}
    began = time.monotonic()
    while found := descendants(spared):
        spent = time.monotonic() - began
        if spent > GIVE_UP_S:
            return [*met.values(), *(f"NOT ENDED, even by SIGKILL: {met.get(pid, pid)}" for pid in found)]
        for pid in found:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                if pid not in met:
                    met[pid] = _words(pid)
                    os.kill(pid, signal.SIGTERM)
                if spent > PATIENCE_S:
                    os.kill(pid, signal.SIGKILL)
        time.sleep(LOOK_S)
    return list(met.values())


def _words(pid: int) -> str:
    """Its id, its command and, where it was started by a test, which."""

    def parts(name: str) -> list[str]:
        try:
            return (PROC / str(pid) / name).read_bytes().decode(errors="replace").split("\0")
        except OSError:  # it ends just now
            return []

    command = " ".join(parts("cmdline")).strip() or "".join(parts("comm")).strip()
    test = [part.partition("=")[2] for part in parts("environ") if part.startswith("PYTEST_CURRENT_TEST=")]
    return f"{pid} {' '.join(command.split())[:SHOWN_WORDS]}" + (
        f", of {test[0][:SHOWN_WORDS]}" if test else ""
    )
