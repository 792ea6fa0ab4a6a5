"""The process that commands of `tests.warm` are forked from: `python -m tests.warm.parent SOCKET`.

A child has nothing of the parent's that a fresh Python would not have (files, signal handlers, finalizers)
but its modules. torch's number of threads is read when it is imported, so a command that wants another one is
started cold.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import json
import multiprocessing.process
import multiprocessing.util
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import traceback
import types
import warnings
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from tests.warm import REQUEST, python_words

PACKAGE = "genac_megatron"
# With what each imports in turn; the rest is light, and left to the commands.
HEAVY = (
    "stages.pipeline",
    "stages.parity_check",
    "observe.report_plots",
    "evaluation.session",
    "evaluation.compare",
)
LOOK_S = 0.02
COLD = "OMP_NUM_THREADS"  # read when torch is imported: another number needs another process


class WarmPopen(subprocess.Popen[Any]):
    """A Popen that forks where this Python would be started anew: a launcher's ranks, a study's runs."""

    def _execute_child(self, args: Any, executable: Any, preexec_fn: Any, *rest: Any) -> None:
        (_close_fds, pass_fds, cwd, env, _info, _flags, shell, p2cread, p2cwrite, c2pread, c2pwrite,
         errread, errwrite, _restore, _gid, _gids, _uid, _umask, new_session, group) = rest  # fmt: skip
        environ = dict(os.environ if env is None else env)
        words = None if shell or preexec_fn or executable else python_words(args)
        if words is not None and "-m" in words[:3] and PACKAGE not in words[:4]:
            words = None  # a helper, such as a reader of shared memory: it must not have its writer's state
        if words is None or environ.get(COLD) != os.environ.get(COLD) or group != -1:
            super()._execute_child(args, executable, preexec_fn, *rest)  # type: ignore[misc]
            return
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            _run_child(words, cwd, environ, [p2cread, c2pwrite, errwrite], set(pass_fds), new_session)
        self._child_created = True
        self._close_pipe_fds(  # type: ignore[attr-defined]
            p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite
        )


def _run_child(
    words: Sequence[str],
    cwd: str | None,
    environ: Mapping[str, str],
    streams: Sequence[int],
    kept: set[int],
    new_session: bool,
) -> NoReturn:
    """A child's life: what a fresh Python would have, then the command, then the end."""
    code = 1
    try:
        for target, given in enumerate(streams):
            if given != -1:
                os.dup2(given, target)
        _lose_files(kept)
        if new_session:
            os.setsid()
        if cwd is not None:
            os.chdir(cwd)
        _forget(environ)
        sys.path[0] = os.getcwd()
        code = _command(words)
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(code)


def _lose_files(kept: set[int]) -> None:
    """Files of the parent that a new process would not have. Their numbers stay taken: objects that know
    them are still there, and close them some day.
    """
    with open(os.devnull, "r+b") as nothing:
        for name in os.listdir("/proc/self/fd"):
            number = int(name)
            if number > 2 and number not in kept | {nothing.fileno()}:
                try:
                    os.fstat(number)
                except OSError:
                    continue  # that of the listing itself
                os.dup2(nothing.fileno(), number)


def _forget(environ: Mapping[str, str]) -> None:
    """What the parent would do at its end, its signal handlers, its variables, its way to start processes."""
    weakref.finalize._registry.clear()  # type: ignore[attr-defined]
    multiprocessing.util._finalizer_registry.clear()  # type: ignore[attr-defined]
    multiprocessing.process._children.clear()  # type: ignore[attr-defined]
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(environ)
    subprocess.Popen = WarmPopen  # type: ignore[misc]


def _command(words: Sequence[str]) -> int:
    """What Python does with these words; its exit code."""
    if words[0] == "-W":
        warnings.simplefilter(words[1])  # type: ignore[arg-type]
        words = words[2:]
    kind, what, *rest = words
    sys.argv = [what if kind == "-m" else kind, *rest]
    try:
        if kind == "-m":
            runpy.run_module(what, run_name="__main__", alter_sys=True)
        else:
            sys.modules["__main__"] = main = types.ModuleType("__main__")
            exec(compile(what, "<string>", "exec"), main.__dict__)
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    return 0


def serve(pipe: socket.socket) -> None:
    """A child for each request, until who asks is gone. On the socket that comes with a request go the
    child's pid and, once it has ended, its wait status.
    """
    children: dict[int, socket.socket] = {}
    pipe.send(b"ready")
    while True:
        if select.select([pipe], [], [], LOOK_S if children else None)[0]:
            message, files, _flags, _sender = socket.recv_fds(pipe, REQUEST, 4)
            if not message:
                break
            pid, life = _fork(json.loads(message), files)
            children[pid] = life
        while children:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                break
            with children.pop(pid) as life, contextlib.suppress(BrokenPipeError):  # nobody waits for it
                life.send(str(status).encode())
    for pid in children:
        os.kill(pid, signal.SIGKILL)


def _fork(request: Mapping[str, Any], files: Sequence[int]) -> tuple[int, socket.socket]:
    pid = os.fork()
    if pid == 0:
        _run_child(
            request["words"], request["cwd"], request["environ"], files[:3], set(), request["new_session"]
        )
    for file in files[:3]:
        os.close(file)
    life = socket.socket(fileno=files[3])
    life.send(str(pid).encode())
    return pid, life


def main() -> None:
    from genac_megatron.platform import uncollected
    from genac_megatron.platform.megatron import install

    install()
    with uncollected():  # and children need not copy the pages that a collection would touch
        for name in HEAVY:
            importlib.import_module(f"{PACKAGE}.{name}")
    assert threading.active_count() == 1, "a process with threads cannot be forked"
    serve(socket.socket(fileno=int(sys.argv[1])))


if __name__ == "__main__":
    main()
