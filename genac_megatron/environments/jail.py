"""Runs one Python program shut in; started by sandbox.py as a script of its own, the standard library alone.

Three processes: this one leaves the machine's namespaces; its child, the first of new ones, builds a file
system that has the interpreter and nothing else, waits for the program and ends it in time; the child's child
gives up all rights and becomes the program. Whatever the program does, the second one's death ends it.

stdin: a JSON object (`Wanted` of sandbox.py). The descriptor `told` gets one back: {"code"}, {"signal"},
{"late"} or {"fault"}.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import resource
import signal
import struct
import sys
from typing import Any, NoReturn

LIBC = ctypes.CDLL(None, use_errno=True)
# unshare(2): mount, UTS, IPC, process and network namespaces; users only where this one has no right to them
SPACES, USERS = 0x00020000 | 0x04000000 | 0x08000000 | 0x20000000 | 0x40000000, 0x10000000
BIND, REC, PRIVATE, NOSUID, NODEV = 0x1000, 0x4000, 0x40000, 0x2, 0x4  # mount(2)
DETACH = 0x2  # umount2(2)
ALL_BELOW, READ_ONLY = 0x8000, 0x1  # mount_setattr(2)
SET_DEATH_SIGNAL, SET_SECCOMP, NO_NEW_PRIVS = 1, 22, 38  # prctl(2)
NOBODY = 65534
WORK = "/.genac-work"  # a path that no interpreter lies below
WORK_MIB, FILE_MIB, FILES = 16, 8, 64

# What no program of a model's needs: sockets (a virtual socket knows no namespace), processes and threads,
# memory that no limit counts, other processes, further namespaces and mounts, and young parts of the kernel.
_LATER = {
    "io_uring_setup": 425, "open_tree": 428, "move_mount": 429, "fsopen": 430, "fsmount": 432, "clone3": 435,
    "pidfd_getfd": 438, "mount_setattr": 442, "memfd_secret": 447,
}  # fmt: skip
CALLS: dict[str, dict[str, int]] = {
    "x86_64": {
        "shmget": 29, "socket": 41, "clone": 56, "fork": 57, "vfork": 58, "semget": 64, "msgget": 68,
        "ptrace": 101, "pivot_root": 155, "mount": 165, "umount2": 166, "mq_open": 240, "add_key": 248,
        "request_key": 249, "keyctl": 250, "unshare": 272, "perf_event_open": 298, "setns": 308,
        "process_vm_readv": 310, "process_vm_writev": 311, "memfd_create": 319, "bpf": 321,
        "userfaultfd": 323, **_LATER,
    },
    "aarch64": {
        "umount2": 39, "mount": 40, "pivot_root": 41, "unshare": 97, "ptrace": 117, "mq_open": 180,
        "msgget": 186, "semget": 190, "shmget": 194, "socket": 198, "add_key": 217, "request_key": 218,
        "keyctl": 219, "clone": 220, "perf_event_open": 241, "setns": 268, "process_vm_readv": 270,
        "process_vm_writev": 271, "memfd_create": 279, "bpf": 280, "userfaultfd": 282, **_LATER,
    },
}  # fmt: skip
ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}  # linux/audit.h


class Fault(Exception):
    """Why the program cannot be shut in."""


def _need(what: str, done: int) -> None:
    if done < 0:
        raise Fault(f"{what}: {os.strerror(ctypes.get_errno())}")


def _mount(source: str, target: str, kind: str, flags: int, data: str = "") -> None:
    given = (source.encode(), target.encode(), kind.encode() or None, flags, data.encode() or None)
    _need(f"mount {target}", LIBC.mount(*given))


def _write(path: str, text: str) -> None:
    with open(path, "w", encoding="ascii") as file:
        file.write(text)


def leave() -> bool:
    """Leave the machine's namespaces; True where that took a namespace of users."""
    user, group = os.getuid(), os.getgid()
    if LIBC.unshare(SPACES) == 0:
        return False
    _need("unshare (namespaces)", LIBC.unshare(SPACES | USERS))
    _write("/proc/self/setgroups", "deny")
    _write("/proc/self/uid_map", f"{NOBODY} {user} 1")
    _write("/proc/self/gid_map", f"{NOBODY} {group} 1")
    return True


def build(paths: list[str], code: bytes) -> None:
    """A file system of the `paths`, to be read only, and a folder to work in; the old one is gone."""
    _mount("none", "/", "", REC | PRIVATE)
    root = "/proc"  # a folder that every machine has, and nothing in it is needed any more
    _mount("tmpfs", root, "tmpfs", NOSUID | NODEV, "size=1m,mode=755")
    for path in paths:
        here = root + path
        if os.path.islink(path):  # /lib, where it is a part of /usr
            os.makedirs(os.path.dirname(here), exist_ok=True)
            os.symlink(os.readlink(path), here)
        elif os.path.isdir(path):
            os.makedirs(here, exist_ok=True)
            _mount(path, here, "", BIND | REC)
        elif os.path.exists(path):
            os.makedirs(os.path.dirname(here), exist_ok=True)
            os.close(os.open(here, os.O_CREAT, 0o644))
            _mount(path, here, "", BIND)
    os.makedirs(root + WORK)
    os.makedirs(root + "/dev", exist_ok=True)  # an interpreter may lie below it: /dev/shm
    os.close(os.open(root + "/dev/null", os.O_CREAT, 0o644))
    wanted = struct.pack("4Q", READ_ONLY | NOSUID | NODEV, 0, 0, 0)
    done = LIBC.syscall(_LATER["mount_setattr"], -100, root.encode(), ALL_BELOW, wanted, len(wanted))
    _need("mount_setattr (Linux 5.12 has it)", done)
    _mount("/dev/null", root + "/dev/null", "", BIND)
    data = f"size={WORK_MIB}m,nr_inodes=1024,mode=777"
    _mount("tmpfs", root + WORK, "tmpfs", NOSUID | NODEV, data)
    os.chdir(root)
    _need("pivot_root", LIBC.syscall(CALLS[platform.machine()]["pivot_root"], b".", b"."))
    _need("umount2", LIBC.umount2(b".", DETACH))
    os.chdir(WORK)
    with open("main.py", "wb") as file:
        file.write(code)


def deny() -> None:
    """No calls of the kernel's that are in CALLS, for this process and what it becomes."""
    machine = platform.machine()
    numbers = sorted(CALLS[machine].values())
    code = [(0x20, 0, 0, 4), (0x15, 1, 0, ARCHITECTURES[machine]), (0x06, 0, 0, 0x80000000)]
    code.append((0x20, 0, 0, 0))
    code.append((0x35, len(numbers) + 1, 0, 0x40000000))  # the other numbering of x86
    for place, number in enumerate(numbers):
        code.append((0x15, len(numbers) - place, 0, number))
    code += [(0x06, 0, 0, 0x7FFF0000), (0x06, 0, 0, 0x00050001)]  # allowed; else EPERM
    lines = b"".join(struct.pack("HBBI", *line) for line in code)
    held = ctypes.create_string_buffer(lines, len(lines))
    program = struct.pack("HxxxxxxQ", len(code), ctypes.addressof(held))
    _need("prctl (no new privileges)", LIBC.prctl(NO_NEW_PRIVS, 1, 0, 0, 0))
    _need("prctl (seccomp)", LIBC.prctl(SET_SECCOMP, 2, program, 0, 0))


def become(python: str, mib: int, seconds: float) -> NoReturn:
    """The program, with no rights and bounded."""
    os.dup2(os.open("/dev/null", os.O_RDONLY), 0)
    if os.getuid() == 0:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    limits = {
        resource.RLIMIT_AS: mib << 20,
        resource.RLIMIT_CPU: int(seconds) + 1,
        resource.RLIMIT_FSIZE: FILE_MIB << 20,
        resource.RLIMIT_NOFILE: FILES,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NPROC: 0,
    }
    for which, most in limits.items():
        resource.setrlimit(which, (most, most))
    deny()
    alone = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    seen = {"PATH": "/usr/bin:/bin", "HOME": WORK, "TMPDIR": WORK, "LANG": "C.UTF-8", **alone}
    os.execve(python, [python, "-I", "-B", "main.py"], seen)


def guard(wanted: dict[str, Any], told: int) -> None:
    """The first process of the new namespaces: has the program run, and tells what became of it."""
    _need("prctl (death signal)", LIBC.prctl(SET_DEATH_SIGNAL, int(signal.SIGKILL), 0, 0, 0))
    _write("/proc/self/oom_score_adj", "1000")  # the first to go where memory is short
    build(wanted["paths"], wanted["code"].encode("utf-8", "replace"))
    child = os.fork()
    if child == 0:
        _or_tell(told, become, wanted["python"], wanted["mib"], wanted["seconds"])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a program of the same user might send it
    late = False

    def end(*_: object) -> None:
        nonlocal late
        late = True
        os.kill(child, signal.SIGKILL)

    signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, wanted["seconds"])
    status = os.waitpid(child, 0)[1]
    signal.setitimer(signal.ITIMER_REAL, 0)
    code = os.waitstatus_to_exitcode(status)
    _tell(told, {"late": True} if late else {"code": code} if code >= 0 else {"signal": -code})


def _tell(told: int, what: dict[str, Any]) -> None:
    os.write(told, json.dumps(what).encode() + b"\n")


def _or_tell(told: int, work: Any, *given: Any) -> NoReturn:
    """Do it and end this process; what is wrong is told."""
    try:
        work(*given)
        os._exit(0)
    except (Fault, OSError) as error:
        _tell(told, {"fault": str(error)})
    except BaseException as error:
        _tell(told, {"fault": f"{type(error).__name__}: {error}"})
    os._exit(1)


def main(told: int, parent: int) -> None:
    """As a script: TOLD PARENT, a descriptor and the process that waits."""
    os.set_inheritable(told, False)
    LIBC.prctl(SET_DEATH_SIGNAL, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != parent:
        return
    wanted = json.loads(sys.stdin.buffer.read())

    def begin() -> None:
        if platform.machine() not in CALLS:
            raise Fault(f"{platform.machine()}: only {' and '.join(CALLS)} are known")
        leave()
        child = os.fork()
        if child == 0:
            _or_tell(told, guard, wanted, told)
        os.waitpid(child, 0)

    _or_tell(told, begin)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
