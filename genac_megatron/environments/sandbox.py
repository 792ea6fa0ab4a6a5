"""A Python program that a model wrote, shut in: no network, no further processes or threads, no files but the
interpreter's, no other process in sight, bounds on time, memory and what it prints (jail.py).

It sees /usr, the libraries and this interpreter's folders with their packages, to be read only, and 16 MiB to
write in, gone when it ends. What is not kept from it: the processor's time until it is ended (`seconds`), the
clock, and the kernel's own faults. Where the kernel or this user's rights allow less, nothing is run.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from genac_megatron.environments.base import EnvironmentFault
from genac_megatron.errors import InputError

MOST_BYTES = 1 << 18  # that are read of what it prints
OVERTIME_S = 5.0  # beyond its limit, for a busy machine to begin and to end it
JAIL = Path(__file__).with_name("jail.py")
LIBRARIES = ("/usr", "/lib", "/lib64", "/lib32", "/bin", "/etc/ld.so.cache")


@dataclass(frozen=True)
class Wanted:
    """What jail.py is asked for."""

    code: str
    seconds: float  # of the program, by the clock
    mib: int  # of its memory
    python: str
    paths: list[str]  # that it sees


def run_python(code: str, seconds: float, mib: int) -> str:
    """What a program prints, and where a limit ended it. Raises EnvironmentFault where it was not run."""
    if "\0" in code:  # of which earlier interpreters read the line's beginning and go on
        return "SyntaxError: source code cannot contain null bytes"
    printed, told = _run(Wanted(code, seconds, mib, sys.executable, seen_paths()))
    text = printed.decode("utf-8", "replace")
    if "fault" in told:
        raise EnvironmentFault(f"could not shut a program in: {told['fault']}")
    if len(printed) >= MOST_BYTES:
        end = f"ended: it printed more than {MOST_BYTES >> 10} KiB"
    elif "late" in told:
        end = f"ended after {seconds:g} s"
    elif "signal" in told:
        end = f"ended by {signal.Signals(told['signal']).name}"
    else:
        end = "" if text.strip() else f"ended with {told['code']}, and printed nothing"
    return "\n".join(part for part in (text.rstrip("\n"), f"[{end}]" if end else "") if part)


def need_sandbox(mib: int = 512) -> None:
    """Raise InputError where this machine shuts no program in, or so much memory is too little for any."""
    try:
        seen = run_python("print(6 * 7)", 60.0, mib)
    except EnvironmentFault as error:
        seen = str(error).removeprefix("could not shut a program in: ")
    if seen != "42":
        raise InputError(
            f"this machine shuts no program in, and none is run that is not ({seen:.200})",
            where="environment.tools, python",
            way_out="allow namespaces of users (sysctl user.max_user_namespaces; in a container "
            "--security-opt seccomp=unconfined, or --cap-add SYS_ADMIN), raise environment.sandbox_mib, or "
            "leave the tool python out",
        )


def seen_paths() -> list[str]:
    """The folders that an interpreter needs, outer ones alone."""
    own = {sys.prefix, sys.base_prefix, sys.exec_prefix}
    behind = {os.path.realpath(path) for path in own}  # links, as package managers make them
    folders = {*LIBRARIES, *own, *behind, os.path.dirname(os.path.realpath(sys.executable))}
    found = sorted(path for path in folders if os.path.lexists(path))
    return [path for path in found if not any(_inside(path, other) for other in found)]


def _inside(path: str, other: str) -> bool:
    return path != other and Path(path).is_relative_to(other)


def _run(wanted: Wanted) -> tuple[bytes, dict[str, Any]]:
    """(what was printed, what jail.py told of its end)."""
    read, write = os.pipe()
    with tempfile.TemporaryFile() as asked, os.fdopen(read, "rb") as told:
        asked.write(json.dumps(asdict(wanted)).encode())
        asked.seek(0)
        try:
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-B", str(JAIL), str(write), str(os.getpid())],
                stdin=asked,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                cwd="/",
                pass_fds=(write,),
                start_new_session=True,
            )
        finally:
            os.close(write)
        until = time.monotonic() + wanted.seconds + OVERTIME_S
        with process:
            try:
                printed = _printed(process, until)
            finally:
                process.kill()  # and so all that it has begun
        line = told.readline()
    if line:
        return printed, json.loads(line)
    ended_here = len(printed) >= MOST_BYTES or time.monotonic() >= until
    return printed, {"late": True} if ended_here else {"fault": printed.decode("utf-8", "replace")[-200:]}


def _printed(process: subprocess.Popen[bytes], until: float) -> bytes:
    """What comes before the end, the limit or that time."""
    assert process.stdout is not None
    found = bytearray()
    with selectors.DefaultSelector() as ready:
        ready.register(process.stdout, selectors.EVENT_READ)
        while len(found) < MOST_BYTES and ready.select(max(0.0, until - time.monotonic())):
            more = os.read(process.stdout.fileno(), 1 << 16)
            if not more:
                break
            found += more
    return bytes(found[:MOST_BYTES])
