"""A folder that one command at a time may write to, over nodes and shared file systems. No torch.

    FOLDER/.lock/00000001.json    who holds it: node, process, job; a thread of the holder touches the file

Whoever takes a dead holder's folder creates the file of the next number, which one process alone can: nothing
that a living process holds is ever removed. No flock, which not every shared file system passes on to other
nodes. Clocks are not compared: a holder on another node lives while its file is seen to be touched.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from genac_megatron.errors import GenacError, InputError

logger = logging.getLogger(__name__)

LOCK = ".lock"
BEAT_S = 5.0  # between touches
SILENT_S = 60.0  # not touched for so long: the holder is gone, or its node
LOOK_S = 0.5
LEAVE_S = 60.0  # for a holder that is about to end: its launcher has gone, and it saves
NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
LAUNCHER = "GENAC_LAUNCHER_PID"  # launch.py: of ranks that a launcher of this machine has started
Holder = dict[str, Any]


class Held(InputError):
    """Another process works in the folder."""


class FolderLock:
    """One process's hold on a folder.

    what: the work that is done in it, as a message names it. other: the way out for work beside it.
    silent_s: as SILENT_S, of a shorter wait.
    """

    def __init__(
        self, folder: Path, what: str, *, other: str = "", name: str = LOCK, silent_s: float = SILENT_S
    ) -> None:
        self.folder, self.what, self.other, self.silent_s = folder, what, other, silent_s
        self.place = folder / name
        self._path: Path | None = None  # of the file that says that we hold it
        self._id = ""  # in it
        self._ended = threading.Event()
        self._made = False  # the folder: one that stays empty goes with the lock

    def acquire(self) -> None:
        """Take the folder, or a dead holder's. Waits `silent_s` to see whether one on another node lives.

        Raises Held where somebody else works in it, GenacError where it cannot be written.
        """
        me = _this_process() | {"place": os.path.realpath(self.place)}
        self._id, self._made = me["id"], not self.folder.exists()
        while self._path is None:
            held = self._newest()
            if held is not None and self._lives(held):
                raise self._refused(_read(held))
            number = 1 if held is None else int(held.stem) + 1
            try:
                self._take(self.place / f"{number:08d}.json", me)
            except OSError as error:
                raise GenacError(
                    f"cannot be written: {error.strerror or error}",
                    where=str(self.place),
                    way_out="free space or make it writable, and run the same command again",
                ) from error
        threading.Thread(target=self._beat, args=(self._path,), name="genac-lock", daemon=True).start()
        atexit.register(self.release)

    def refuse(self) -> None:
        """Raises Held where somebody is known at once to work in the folder; takes nothing."""
        held = self._newest()
        if held is None or not (holder := _read(held)) or _is_copy(held, holder):
            return
        if _lives(holder) and not _leaves(holder):
            raise self._refused(holder)

    def check(self) -> None:
        """Raises GenacError where the folder is no longer this process's: another has taken it while this one
        stood still, or it is gone. One small file is read.
        """
        if self._path is None or self._mine():
            return
        try:
            self._path.read_bytes()
        except FileNotFoundError:
            pass
        except OSError:  # the file system's or a limit's: no sign that another has it
            return
        newest = self._newest()
        holder = {} if newest is None else _read(newest)
        if _is_this_process(holder):
            return
        if newest is not None:
            raise GenacError(
                f"another process has taken {self.what} over while this one stood still: "
                f"{_told(holder)} has it",
                where=str(self.folder),
                way_out="let one of the two go on; what is saved stands",
            )
        raise GenacError(
            f"{self._path} is gone: the folder, or its {self.place.name}, was removed or moved while "
            f"{self.what} was under way",
            where=str(self.folder),
            way_out="nothing more is written there; what is left of it stands, and the same command goes on "
            "from that once the folder is back in its place",
        )

    def release(self) -> None:
        """Let the folder go. Safe to call twice."""
        mine, path, self._path = self._path is not None and self._mine(), self._path, None
        self._ended.set()
        atexit.unregister(self.release)
        if path is not None:
            with contextlib.suppress(OSError):
                if mine:
                    path.unlink()
                self.place.rmdir()
                if self._made:
                    self.folder.rmdir()

    def _mine(self) -> bool:
        """Whether our file is there, and still ours: a person may have removed it, and another made one."""
        return self._path is not None and _read(self._path).get("id") == self._id

    # --- taking ----------------------------------------------------------------------------------

    def _newest(self) -> Path | None:
        """The file of the last who took the folder."""
        files = sorted(self.place.glob("[0-9]*.json"))
        return files[-1] if files else None

    def _take(self, path: Path, me: Holder) -> None:
        """Create `path`, unless another process has, or has gone beyond it."""
        self.place.mkdir(parents=True, exist_ok=True)
        try:
            made = _create(path, me)
        except FileNotFoundError:  # who held it has let go, and taken its empty folder with it
            return
        if not made:
            return
        if self._newest() != path:  # what we saw of the folder was old
            path.unlink(missing_ok=True)
            return
        for earlier in self.place.glob("[0-9]*.json"):
            if earlier.name < path.name:
                earlier.unlink(missing_ok=True)
        self._path = path

    def _lives(self, path: Path) -> bool:
        """Whether the holder that `path` names lives. Waits where only its touches can tell."""
        holder = _read(path)
        lives = not _is_copy(path, holder) and _lives(holder)
        if lives and _leaves(holder):
            wait_s = min(LEAVE_S, self.silent_s)
            self._note(holder, f"it is about to end; waiting for it, {wait_s:g} s at most")
            until = time.monotonic() + wait_s
            while _lives(holder) and time.monotonic() < until:
                time.sleep(LOOK_S)
            return bool(_lives(holder))
        if lives is not None:
            return lives
        self._note(holder, f"waiting {self.silent_s:g} s to see whether it lives")
        seen, until = _touched(path), time.monotonic() + self.silent_s
        while (now := _touched(path)) == seen and now is not None:
            if time.monotonic() > until:
                return False
            time.sleep(LOOK_S)
        return now is not None  # None: it has let go

    def _note(self, holder: Holder, then: str) -> None:
        logger.warning("genac: %s is held by %s; %s", self.folder, _told(holder), then)

    def _refused(self, holder: Holder) -> Held:
        ways = ["wait for its end or stop it first", self.other]
        ways.append(f"if that process is surely gone, remove {self.place}")
        return Held(
            f"{self.what} is under way: {_told(holder)} works in this folder",
            where=str(self.folder),
            way_out="; ".join(way for way in ways if way),
        )

    def _beat(self, path: Path) -> None:
        while not self._ended.wait(BEAT_S):
            with contextlib.suppress(OSError):  # the file system's: it may come back
                os.utime(path)


@contextmanager
def held(folder: Path, what: str, *, other: str = "", name: str = LOCK) -> Iterator[FolderLock]:
    """Hold a folder while the block runs."""
    lock = FolderLock(folder, what, other=other, name=name)
    lock.acquire()
    try:
        yield lock
    finally:
        lock.release()


def run_lock(folder: Path, silent_s: float = SILENT_S) -> FolderLock:
    """The hold on a run's folder, by its rank 0."""
    return FolderLock(folder, "the run", other="a run beside it needs another name=...", silent_s=silent_s)


# --- holders --------------------------------------------------------------------------------------


def _this_process() -> Holder:
    launcher = os.environ.get(LAUNCHER, "")
    job = os.environ.get("SLURM_JOB_ID")
    return {
        "id": secrets.token_hex(8),
        "node": os.environ.get("SLURMD_NODENAME") or socket.gethostname(),
        "machine": _machine(),
        "pid": os.getpid(),
        "began": _began(os.getpid()),
        "launcher": [int(launcher), _began(int(launcher))] if launcher.isdecimal() else None,
        "job": f"{os.environ.get('SLURM_CLUSTER_NAME', '')}:{job}" if job else None,
        "attempt": int(os.environ.get("SLURM_RESTART_COUNT") or 0),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


def _machine() -> list[str] | None:
    """What names this start of this machine and its process numbers (a container has its own)."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return [boot, os.readlink("/proc/self/ns/pid")]
    except OSError:
        return None


def _began(pid: int) -> str | None:
    """When a process of this machine began, in its clock ticks; None where it is gone, or a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


def _lives(holder: Holder) -> bool | None:
    """Whether a holder lives; None where this process cannot know at once."""
    me = _this_process()
    job = holder.get("job")
    if job is not None and job == me["job"] and holder.get("attempt", 0) < me["attempt"]:
        return False  # Slurm has requeued the job: its attempt before has ended
    if not holder.get("machine") or holder["machine"] != me["machine"]:
        return None
    if _is_this_process(holder):
        return False  # it has come back
    return _began(holder["pid"]) == holder["began"]


def _is_this_process(holder: Holder) -> bool:
    me = _this_process()
    return all(holder.get(key) == me[key] for key in ("machine", "pid", "began"))


def _is_copy(path: Path, holder: Holder) -> bool:
    """Whether `path` came here with a copy of its folder, while its holder works in the original."""
    place, with_id = holder.get("place"), holder.get("id")
    if place is None:
        return False
    original = Path(place) / path.name
    with contextlib.suppress(OSError):
        return _read(original).get("id") == with_id and not same_folder(path.parent, original.parent)
    return False


def same_folder(here: Path, there: Path) -> bool:
    """Whether two paths are of one folder. Writes to `here` for a moment. Raises OSError."""
    if here.samefile(there):
        return True
    # One folder that is mounted twice has two device numbers: what is made here appears there.
    mark = here / f".{secrets.token_hex(8)}.part"
    mark.touch()
    try:
        return (there / mark.name).exists()
    finally:
        mark.unlink()


def _leaves(holder: Holder) -> bool:
    """Whether a living holder of this machine has lost its launcher, and so saves and ends."""
    launcher = holder.get("launcher")
    return launcher is not None and (launcher[1] is None or _began(launcher[0]) != launcher[1])


def _told(holder: Mapping[str, Any]) -> str:
    if "pid" not in holder:
        return "a process that its file does not name"
    job = f" (job {holder['job'].rpartition(':')[2]})" if holder.get("job") else ""
    return f"process {holder['pid']} on {holder['node']}{job}, since {holder['since']}"


# --- files ----------------------------------------------------------------------------------------


def _read(path: Path) -> Holder:
    """What a holder's file says; nothing where it is gone or damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _touched(path: Path) -> int | None:
    """When a file was touched last; None where it is gone. Opened: a network file system then asks anew."""
    try:
        try:
            with path.open("rb") as file:
                return os.fstat(file.fileno()).st_mtime_ns
        except PermissionError:  # another user's
            return path.stat().st_mtime_ns
    except OSError:
        return None


def _create(path: Path, holder: Holder) -> bool:
    """Whether this process has made `path`, which then is whole at once: at most one process can."""
    text = json.dumps(holder)
    part = path.with_name(f".{holder['id']}.part")
    try:
        part.write_text(text, encoding="utf-8")
        os.link(part, path)
    except FileExistsError:
        return bool(_read(path).get("id") == holder["id"])  # NFS may do a link and lose its answer
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        try:
            with path.open("x", encoding="utf-8") as file:
                file.write(text)
        except FileExistsError:
            return False
    finally:
        part.unlink(missing_ok=True)
    return True
