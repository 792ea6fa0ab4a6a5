"""Build, once, the Python environment that a lock file describes, and print its interpreter's path.

    python tools/env.py NAME        cpu: the default. cpu-next: megatron-core 0.19. serve: SGLang.
                                    environments: verifiers and textarena. trl: for a benchmark alone

Environments live in ${GENAC_CACHE:-~/.cache/genac}/envs/NAME-KEY, where KEY is hashed from the lock, the
Python version and this build recipe: a second clone starts at once, a changed lock builds anew. The project
itself is not installed there: the Makefile puts the clone on PYTHONPATH.

The path goes to stdout, progress to stderr. Exit code 2: not Python 3.11, or a package cannot be had.
Where the user's index has no CPU build of torch, pip takes the CUDA build, and its CUDA libraries are then
installed too (gigabytes); PIP_EXTRA_INDEX_URL may name PyTorch's own index of CPU builds instead. Standard
library only.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

LOCKS = Path(__file__).resolve().parent.parent / "requirements"
LOCK_OF = {
    "cpu": "cpu.lock",
    "cpu-next": "cpu-next.lock",
    "serve": "serve-cpu.lock",
    "environments": "environments.lock",
    "trl": "trl.lock",
}
PYTHON = (3, 11)
RECIPE = "1"  # raise it when what _build does to an environment changes
MARKER = "complete.json"  # written last: without it an environment is half-built
WAIT_S = 3600.0  # for another process that builds the same environment


class EnvError(Exception):
    """A failure whose message says what is wrong and the way out."""


@dataclass(frozen=True)
class Lock:
    """The pins of a lock file, by how they are installed."""

    wheels: tuple[str, ...]  # all at once, without dependencies
    source: tuple[str, ...]  # tagged [source]: built against the wheels, declared Python range ignored
    optional: tuple[str, ...]  # tagged [optional]: a failure is a warning


def read_lock(text: str) -> Lock:
    """Sort the pins of a lock file by their tag. Raises EnvError at a line that is not an exact pin."""
    groups: dict[str, list[str]] = {"": [], "source": [], "optional": []}
    for number, line in enumerate(text.splitlines(), 1):
        pin, _, comment = (part.strip() for part in line.partition("#"))
        if not pin:
            continue
        if not re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9._!+-]+", pin):
            raise EnvError(f"line {number} of the lock is not an exact pin (name==version): {line}")
        tag = re.match(r"\[(source|optional)\]", comment)
        groups[tag[1] if tag else ""].append(pin)
    return Lock(tuple(groups[""]), tuple(groups["source"]), tuple(groups["optional"]))


def environment_key(lock_text: str) -> str:
    """The first 12 hex digits of sha256 over the lock, the Python version and machine, and the recipe."""
    parts = (lock_text, platform.python_version(), platform.system(), platform.machine(), RECIPE)
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]


def cache_folder() -> Path:
    return Path(os.environ.get("GENAC_CACHE") or "~/.cache/genac").expanduser().absolute()


def ensure(name: str, lock_path: Path) -> Path:
    """The interpreter of a complete environment for this lock, built first where there is none."""
    text = lock_path.read_text()
    folder = cache_folder() / "envs" / f"{name}-{environment_key(text)}"
    python = folder / "bin" / "python"
    if _complete(folder):
        return python
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _exclusive(folder.with_suffix(".lock")):
        if not _complete(folder):  # another process may have built it while this one waited
            _build(folder, read_lock(text), name)
    return python


def _complete(folder: Path) -> bool:
    # The interpreter is a link to the Python that built it, which may be gone since.
    return (folder / MARKER).is_file() and (folder / "bin" / "python").exists()


@contextlib.contextmanager
def _exclusive(path: Path) -> Iterator[None]:
    """Hold a file lock, which ends with this process however it ends."""
    with open(path, "w") as file:
        start, told = time.monotonic(), False
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not told:
                    _say(f"waiting for another process that builds this environment ({path})")
                    told = True
                if time.monotonic() - start > WAIT_S:
                    raise EnvError(
                        f"waited {WAIT_S:.0f} s for the process that holds {path}: end it and try again"
                    ) from None
                time.sleep(0.5)
        yield


def _build(folder: Path, lock: Lock, name: str) -> None:
    start = time.monotonic()
    if folder.exists():
        _say(f"removing a half-built environment: {folder}")
        shutil.rmtree(folder)
    _say(f"building the environment '{name}' in {folder} (once per lock; some minutes)")
    log = folder.with_suffix(".log")
    log.write_text("")
    _run([sys.executable, "-m", "venv", str(folder)], log, "a virtual environment cannot be made", 0)
    pip = [str(folder / "bin" / "python"), "-I", "-m", "pip", "--disable-pip-version-check", "install"]
    _install(folder, lock, [*pip, "--no-input"], log)
    seconds = time.monotonic() - start
    marker = {"name": name, "python": platform.python_version(), "build_s": round(seconds, 1)}
    temporary = folder / (MARKER + ".part")
    temporary.write_text(json.dumps(marker) + "\n")
    temporary.rename(folder / MARKER)
    _say(f"built '{name}' in {seconds:.0f} s")


def _install(folder: Path, lock: Lock, pip: list[str], log: Path) -> None:
    if lock.wheels:
        listed = folder / "lock.txt"
        listed.write_text("\n".join(lock.wheels) + "\n")
        _run([*pip, "--no-deps", "-r", str(listed)], log, "a package cannot be installed", len(lock.wheels))
    torch = next((pin for pin in lock.wheels if pin.startswith("torch==")), None)
    probe = [pip[0], "-I", "-c", "import torch"]
    if torch and subprocess.run(probe, capture_output=True).returncode:
        # A CUDA build does not import without the libraries it declares, each with an exact version.
        _say("the index offers torch as a CUDA build: fetching its CUDA libraries too")
        _run([*pip, torch], log, f"the libraries of {torch} cannot be installed", 0)
        _run(probe, log, f"{torch} cannot be imported", 0)
    for pin in lock.source:
        _say(f"building {pin} from source")
        package = pin.partition("==")[0]
        flags = ["--no-deps", "--no-build-isolation", "--ignore-requires-python", "--no-binary", package]
        _run([*pip, *flags, pin], log, f"{pin} cannot be built (it needs a C++ compiler)", 0)
    for pin in lock.optional:
        try:
            _run([*pip, "--no-deps", pin], log, f"{pin} cannot be installed", 0)
        except EnvError as error:
            _say(f"left out, it is optional: {error}")


def _run(command: list[str], log: Path, what: str, packages: int) -> None:
    """Run one step, its output to the log, progress to stderr. Raises EnvError with its last error lines."""
    env = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
    tail: list[str] = []
    seen, told = 0, time.monotonic()
    with (
        open(log, "a") as file,
        subprocess.Popen(
            command,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            file.write(line)
            tail = [*tail[-19:], line.rstrip()]
            seen += line.startswith("Collecting ")
            if line.startswith("Installing "):
                _say("installing what was fetched")
            elif packages and time.monotonic() - told > 5 and line.startswith("Collecting "):
                told = time.monotonic()
                _say(f"package {seen} of {packages}: {line.split()[1]}")
    if process.returncode:
        errors = [line for line in tail if "error" in line.lower()] or tail
        raise EnvError("\n  ".join([what, *errors[-3:], f"the whole output: {log}"]))


def _say(message: str) -> None:
    print(f"env: {message}", file=sys.stderr, flush=True)


def main(arguments: list[str]) -> int:
    if len(arguments) != 1 or arguments[0] not in LOCK_OF:
        _say(f"usage: python tools/env.py {'|'.join(LOCK_OF)}")
        return 2
    if sys.version_info[:2] != PYTHON:
        wanted = ".".join(map(str, PYTHON))
        _say(
            f"this is Python {platform.python_version()} ({sys.executable}); the locks are for {wanted}.\n"
            f"  way out: install Python {wanted}, or name it: make PYTHON=/path/to/python{wanted} ..."
        )
        return 2
    try:
        print(ensure(arguments[0], LOCKS / LOCK_OF[arguments[0]]))
    except (EnvError, OSError) as error:
        _say(str(error))
        return 2
    except KeyboardInterrupt:
        _say("interrupted; the next call starts this environment afresh")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
