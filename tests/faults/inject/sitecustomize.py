"""Does one harm to one rank of a real run, at one place of its code. Python loads it where PYTHONPATH has it.

FAULT_CALL=module:qualified.name  the place: a function's call ...
FAULT_STEP=ppo:3                  ... in this stage and step (counted from 1), the first such call
FAULT_RANK=1                      ... on this rank
FAULT_DO=kill|stop|usr1|kill-launcher|nap|nan|fill|read-only|jump
FAULT_NOTE=path                   a line that it was done, written before
FAULT_PATH=path                   fill, read-only: the file system; jump: the file that clock.c reads
"""

import importlib.abc
import importlib.machinery
import os
import signal
import subprocess
import sys
import threading
import time


def _launcher():
    return int(os.environ["GENAC_LAUNCHER_PID"])


def _nap():
    """Stopped for a while, as a process that is swapped out."""
    subprocess.Popen(["sh", "-c", f"sleep 6; kill -CONT {os.getpid()}"], start_new_session=True)
    os.kill(os.getpid(), signal.SIGSTOP)


def _fill():
    """Leave no block free."""
    with open(os.path.join(os.environ["FAULT_PATH"], "filler"), "wb", buffering=0) as file:
        for size in (1 << 20, 1 << 12):
            try:
                while file.write(b"x" * size):
                    pass
            except OSError:
                continue


def _read_only():
    """Busy while a heartbeat is being written: again, then."""
    command = ["mount", "-o", "remount,ro", os.environ["FAULT_PATH"]]
    for _ in range(100):
        if subprocess.run(command, capture_output=True).returncode == 0:
            return
        time.sleep(0.05)
    raise RuntimeError("could not be made read-only")


def _jump():
    """Three days ahead, and after two seconds six days back."""

    def write(seconds):
        with open(os.environ["FAULT_PATH"], "w") as file:
            file.write(str(seconds))

    write(3 * 86400)
    threading.Timer(2.0, write, [-3 * 86400]).start()


DEEDS = {
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "usr1": lambda: os.kill(_launcher(), signal.SIGUSR1),
    "kill-launcher": lambda: os.kill(_launcher(), signal.SIGKILL),
    "nap": _nap,
    "fill": _fill,
    "read-only": _read_only,
    "jump": _jump,
}


def _due():
    from genac_megatron.observe import progress

    here = progress.current()
    seen = here.snapshot() if here is not None else {}
    return f"{seen.get('stage')}:{seen.get('step', -1) + 1}" == os.environ["FAULT_STEP"]


def _wrapped(function):
    def call(*arguments, **options):
        note = os.environ["FAULT_NOTE"]
        if _due() and not os.path.exists(note):
            with open(note, "w") as file:
                file.write(os.environ["FAULT_CALL"])
            if os.environ["FAULT_DO"] == "nan":
                arguments[-1].data.fill_(float("nan"))  # what the model gave
            else:
                DEEDS[os.environ["FAULT_DO"]]()
        return function(*arguments, **options)

    return call


class _Finder(importlib.abc.MetaPathFinder):
    """Wraps the function once its module has been executed."""

    def find_spec(self, name, path, target=None):
        module, _, place = os.environ["FAULT_CALL"].partition(":")
        if name != module:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def exec_module(made):
            execute(made)
            *owners, last = place.split(".")
            owner = made
            for part in owners:
                owner = getattr(owner, part)
            setattr(owner, last, _wrapped(getattr(owner, last)))

        spec.loader.exec_module = exec_module
        return spec


if os.environ.get("FAULT_RANK", "-") == os.environ.get("RANK"):
    import importlib.util

    sys.meta_path.insert(0, _Finder())
