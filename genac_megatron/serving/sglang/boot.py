"""Starts SGLang's own server, in the serving environment: standard library and sglang only.

    python boot.py serve PARENT ARGS...     one server; ARGS are those of `sglang serve`
    python boot.py zygote PARENT            for a CPU: import SGLang once, fork one server per line of stdin

PARENT is the process id of the launcher, -1 for none: when it is gone, the server and all its processes end.
It is polled: PR_SET_PDEATHSIG fires when the launcher's *thread* ends, and a pipe stays open in whatever the
launcher forked. A zygote's line is a JSON object with `args`, `log` (a path) and `env` (more variables); the
answer is a line with the server's process id, which is also its process group. The key that clients must
show comes in the variable GENAC_SERVER_KEY, as command lines are public; the hardware threads that it runs
on come in GENAC_SERVER_CORES, "0,1,2".

Without a GPU (`--device cpu`) PyPI's SGLang runs on its own torch-native layers, once without_cuda.py, which
lies beside this file, has filled what it imports and a CPU machine lacks. On a GPU that is never read.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import itertools
import json
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from typing import Any

PARENT_POLL_S = 0.5
SHARED = "/dev/shm/sgl"  # how SGLang's shared memory is called: sgl_shm_mq_..., sglang_loads_...
KEY = "GENAC_SERVER_KEY"
CORES = "GENAC_SERVER_CORES"
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",  # model folders are local
    "SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION": "0",  # /health answers at once; /health_generate generates
    # Its GPUs may hold unlike parts of the trainer: the share goes by the one with least room.
    "SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK": "0",
}


def without_cuda() -> Any:
    """What a CPU needs; found beside this file, as that is run by its path."""
    return importlib.import_module("without_cuda")


def group_members(group: int) -> list[int]:
    """The processes of a group that have not ended."""
    found = []
    for entry in os.scandir("/proc"):
        if not entry.name.isdecimal():
            continue
        try:
            with open(f"{entry.path}/stat") as file:
                fields = file.read().rpartition(")")[2].split()
        except OSError:  # it has ended meanwhile
            continue
        ended = fields[0] in "ZX" and int(fields[17]) <= 1  # its threads may outlive it, files still open
        if int(fields[2]) == group and not ended:
            found.append(int(entry.name))
    return found


def shared_files(pids: Sequence[int]) -> set[str]:
    """SGLang's shared-memory files that these processes have mapped: a killed server leaves them behind."""
    found = set()
    for pid in pids:
        with contextlib.suppress(OSError), open(f"/proc/{pid}/maps") as file:
            paths = (line.split(maxsplit=5)[-1].rstrip("\n") for line in file if SHARED in line)
            found |= {path for path in paths if path.startswith(SHARED) and os.path.exists(path)}
    return found


def follow(parent: int) -> None:
    """End this process's group once `parent` is no longer its parent."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(PARENT_POLL_S)
        print(
            f"boot: process {parent}, which started this server, is gone: ending", file=sys.stderr, flush=True
        )
        for path in shared_files(group_members(os.getpgrp())):
            with contextlib.suppress(OSError):
                os.unlink(path)
        os.killpg(0, signal.SIGKILL)

    if parent > 0:
        threading.Thread(target=watch, name="follow-parent", daemon=True).start()


def take_cores() -> None:
    """Run on the hardware threads that the launcher named, as all that this process starts from now on."""
    named = os.environ.pop(CORES, "")
    if not named:
        return
    try:
        os.sched_setaffinity(0, map(int, named.split(",")))
    except OSError as error:  # a cgroup that has changed: better slow than not at all
        print(f"boot: warning: no cores {named}: {error}", file=sys.stderr, flush=True)
    held = ",".join(map(str, sorted(os.sched_getaffinity(0))))
    print(f"boot: this server runs on cores {held}", file=sys.stderr, flush=True)


def serve(arguments: Sequence[str]) -> None:
    """Run one server until it ends. Its own processes end with it."""
    from sglang.launch_server import run_server
    from sglang.srt.server_args import prepare_server_args
    from sglang.srt.utils import kill_process_tree

    key = os.environ.pop(KEY, "")
    try:
        run_server(prepare_server_args([*arguments, *(["--api-key", key] if key else [])]))
    finally:
        kill_process_tree(os.getpid(), include_parent=False)


def zygote(parent: int) -> None:
    """Fork a server per line of stdin until it closes; then, or when `parent` is gone, all end."""
    without_cuda().prepare()
    gc.collect()
    gc.freeze()  # SGLang collects garbage at every flush on a CPU: over all that is imported it takes 0.3 s
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps them
    print(json.dumps({"ready": os.getpid()}), flush=True)
    for line in _lines(parent):
        asked = json.loads(line)
        me = os.getpid()
        pid = os.fork()
        if pid == 0:
            _become_server(asked, me)
        with contextlib.suppress(OSError):  # the child does so too: whichever comes first
            os.setpgid(pid, pid)
        print(json.dumps({"pid": pid}), flush=True)


def _lines(parent: int) -> Any:
    """Lines of stdin, for as long as it is open and `parent` lives. A thread would not survive the forks."""
    import select

    pending = b""
    while parent <= 0 or os.getppid() == parent:
        if not select.select([0], [], [], PARENT_POLL_S)[0]:
            continue
        got = os.read(0, 65536)
        if not got:
            return
        *whole, pending = (pending + got).split(b"\n")
        yield from whole


def _become_server(asked: dict[str, Any], parent: int) -> None:
    """In the forked process: take leave of the zygote's group and files, and never return."""
    code = 1
    try:
        os.setpgid(0, 0)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        log = os.open(asked["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        for stream, target in enumerate((os.open(os.devnull, os.O_RDONLY), log, log)):
            os.dup2(target, stream)
        os.environ.update(asked["env"])
        take_cores()
        tempfile.tempdir = None  # it was asked for before TMPDIR came
        follow(parent)
        serve(asked["args"])
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(code)


def main(arguments: Sequence[str]) -> int:
    mode, parent, *rest = arguments
    os.environ.update(ENVIRONMENT)
    if mode == "zygote":
        zygote(int(parent))
        os._exit(0)  # at once: its servers end when it is gone
    take_cores()
    follow(int(parent))
    if "cpu" in (after for option, after in itertools.pairwise(rest) if option == "--device"):
        without_cuda().prepare()
    serve(rest)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
