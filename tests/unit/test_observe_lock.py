"""Who holds a folder: real processes on this machine; for other nodes stands what their file says."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from genac_megatron.errors import GenacError, InputError
from genac_megatron.observe import lock
from genac_megatron.observe.lock import FolderLock, held

ROOT = Path(__file__).resolve().parents[2]
HOLD = """
import sys, time
from pathlib import Path
from genac_megatron.errors import GenacError
from genac_megatron.observe.lock import FolderLock
try:
    FolderLock(Path(sys.argv[1]), "the run").acquire()
except GenacError:
    print("refused", flush=True)
else:
    print("held", flush=True)
    time.sleep(60)
"""


def holder(folder: Path, **environ: str) -> subprocess.Popen[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environ}
    words = [sys.executable, "-c", HOLD, str(folder)]
    return subprocess.Popen(words, env=env, stdout=subprocess.PIPE, text=True)


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


@pytest.fixture
def other(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that holds tmp_path."""
    process = holder(tmp_path)
    assert said(process) == "held"
    yield process
    process.kill()
    process.communicate()


def taken(folder: Path, silent_s: float = 0.8) -> FolderLock:
    mine = FolderLock(folder, "the run", other="use another name", silent_s=silent_s)
    mine.acquire()
    return mine


def file_of(folder: Path) -> Path:
    (path,) = (folder / lock.LOCK).glob("[0-9]*.json")
    return path


def says(folder: Path, **changes: Any) -> Path:
    """Change what the holder's file says."""
    path = file_of(folder)
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return path


def test_a_living_holder_is_told_and_a_killed_one_replaced(
    tmp_path: Path, other: subprocess.Popen[str]
) -> None:
    began = time.monotonic()
    with pytest.raises(InputError) as raised:
        taken(tmp_path, silent_s=60)
    assert time.monotonic() - began < 5
    for words in (f"the run is under way: process {other.pid} on ", str(tmp_path), "use another name"):
        assert words in str(raised.value)
    with pytest.raises(InputError, match="under way"):
        FolderLock(tmp_path, "the run").refuse()
    other.send_signal(signal.SIGKILL)
    while Path(f"/proc/{other.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
        time.sleep(0.01)  # nobody has waited for it: a zombie is dead
    FolderLock(tmp_path, "the run").refuse()
    mine = taken(tmp_path, silent_s=60)
    mine.check()
    mine.release()
    assert list(tmp_path.iterdir()) == []


def test_one_that_ends_lets_go(tmp_path: Path) -> None:
    with held(tmp_path, "the run") as mine:
        mine.check()
        with held(tmp_path, "the run"):  # this process again, as a run after a failed one in it
            pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dead", [False, True])
def test_of_many_that_start_at_once_one_gets_it(tmp_path: Path, dead: bool) -> None:
    if dead:
        first = holder(tmp_path)
        assert said(first) == "held"
        first.kill()
        first.communicate()
    processes = [holder(tmp_path) for _ in range(6)]
    try:
        assert sorted(map(said, processes)) == ["held"] + 5 * ["refused"]
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def test_a_number_that_another_process_has_by_now(tmp_path: Path, other: subprocess.Popen[str]) -> None:
    says(tmp_path, began="1")
    taken(tmp_path, silent_s=60).release()


@pytest.mark.parametrize("container", [False, True])
def test_on_another_node_only_touches_tell(
    tmp_path: Path, other: subprocess.Popen[str], container: bool
) -> None:
    """Whatever its clock says; the same of another container's process numbers."""
    machine = json.loads(file_of(tmp_path).read_text())["machine"]
    path = says(tmp_path, node="far", machine=[machine[0] if container else "another", "pid:[1]"])
    FolderLock(tmp_path, "the run").refuse()  # it would have to wait
    ended = threading.Event()

    def touch() -> None:
        for day in range(100):
            if ended.wait(0.1):
                return
            os.utime(path, (day, day))

    thread = threading.Thread(target=touch)
    thread.start()
    try:
        with pytest.raises(InputError, match="on far"):
            taken(tmp_path, silent_s=20)
    finally:
        ended.set()
        thread.join()
    os.utime(path, (4e9, 4e9))
    mine = taken(tmp_path)
    assert not path.exists()
    mine.release()


def test_while_it_is_watched_it_may_let_go(tmp_path: Path, other: subprocess.Popen[str]) -> None:
    path = says(tmp_path, machine=["another", "pid:[1]"])
    threading.Timer(0.3, path.unlink).start()
    began = time.monotonic()
    taken(tmp_path, silent_s=30).release()
    assert time.monotonic() - began < 15


@pytest.mark.parametrize(("attempt", "quick"), [("1", True), ("0", False)])
def test_a_requeued_job_is_the_same_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, attempt: str, quick: bool
) -> None:
    first = holder(tmp_path, SLURM_JOB_ID="7", SLURM_RESTART_COUNT="0")
    assert said(first) == "held"
    says(tmp_path, machine=["another", "pid:[1]"])
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", attempt)
    began = time.monotonic()
    if quick:
        taken(tmp_path, silent_s=60).release()
        assert time.monotonic() - began < 5
    else:
        with pytest.raises(InputError, match="job 7"):  # its thread touches the file
            taken(tmp_path, silent_s=60)
    first.kill()
    first.communicate()


def test_one_that_was_taken_over_notices(tmp_path: Path) -> None:
    mine = taken(tmp_path)
    says(tmp_path, machine=["another", "pid:[1]"], pid=1)
    thief = taken(tmp_path)
    mine.check()  # this process itself
    path = file_of(tmp_path)
    ours = path.read_text()
    says(tmp_path, pid=os.getppid())
    with pytest.raises(GenacError, match="another process has taken the run over"):
        mine.check()
    path.write_text(ours)
    mine.release()
    thief.check()
    thief.release()


def test_one_whose_file_a_person_has_removed_notices_who_came(tmp_path: Path) -> None:
    """As a refusal tells to where the holder is surely gone: the next one's file has the same number."""
    mine = taken(tmp_path)
    shutil.rmtree(tmp_path / lock.LOCK)
    second = holder(tmp_path)
    assert said(second) == "held"
    assert file_of(tmp_path).name == "00000001.json"
    with pytest.raises(GenacError, match=f"another process has taken .*: process {second.pid} on "):
        mine.check()
    mine.release()
    assert json.loads(file_of(tmp_path).read_text())["pid"] == second.pid  # not ours to remove
    second.kill()
    second.communicate()


@pytest.mark.parametrize("moved", [False, True])
def test_a_folder_that_is_removed_or_moved_under_it(tmp_path: Path, moved: bool) -> None:
    run = tmp_path / "run"
    mine = taken(run)
    run.rename(tmp_path / "elsewhere") if moved else shutil.rmtree(run)
    with pytest.raises(GenacError) as raised:
        mine.check()
    assert "is gone: the folder, or its .lock, was removed or moved while the run was under way" in str(
        raised.value
    )
    assert "another process" not in str(raised.value)
    mine.release()
    assert not run.exists()


def test_a_copy_of_a_folder_that_is_held_is_free(tmp_path: Path) -> None:
    first = holder(tmp_path / "run")
    assert said(first) == "held"
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    FolderLock(tmp_path / "copy", "the run").refuse()
    mine = taken(tmp_path / "copy", silent_s=60)
    mine.check()
    with pytest.raises(InputError, match="under way"):
        FolderLock(tmp_path / "run", "the run").refuse()
    mine.release()
    first.kill()
    first.communicate()


def test_a_stand_in_for_a_folder_that_is_mounted_twice_is_no_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its files then have two device numbers, and are the same all the same."""
    first = holder(tmp_path)
    assert said(first) == "held"
    monkeypatch.setattr(Path, "samefile", lambda *_: False)
    with pytest.raises(InputError, match="under way"):
        taken(tmp_path, silent_s=60)
    assert [path.name for path in (tmp_path / lock.LOCK).iterdir()] == ["00000001.json"]
    first.kill()
    first.communicate()


def test_its_thread_touches_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "BEAT_S", 0.05)
    mine = taken(tmp_path)
    path = file_of(tmp_path)
    os.utime(path, (0, 0))
    until = time.monotonic() + 20
    while path.stat().st_mtime == 0 and time.monotonic() < until:
        time.sleep(0.02)
    assert path.stat().st_mtime > 0
    mine.release()


def test_a_damaged_file_is_somebody_until_it_is_silent(tmp_path: Path) -> None:
    (tmp_path / lock.LOCK).mkdir()
    (tmp_path / lock.LOCK / "00000004.json").write_text("{")
    FolderLock(tmp_path, "the run").refuse()
    mine = taken(tmp_path)
    assert file_of(tmp_path).name == "00000005.json"
    mine.release()


def test_one_whose_launcher_is_gone_is_waited_for(tmp_path: Path) -> None:
    """It saves then, and ends."""
    launcher = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    rank = holder(tmp_path, GENAC_LAUNCHER_PID=str(launcher.pid))
    assert said(rank) == "held"
    with pytest.raises(InputError, match="under way"):
        taken(tmp_path)
    launcher.kill()
    launcher.wait()
    FolderLock(tmp_path, "the run").refuse()
    threading.Timer(0.5, rank.kill).start()
    taken(tmp_path).release()
    rank.communicate()


def test_one_that_is_about_to_end_is_not_waited_for_longer_than_peers_wait(tmp_path: Path) -> None:
    launcher = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    rank = holder(tmp_path, GENAC_LAUNCHER_PID=str(launcher.pid))
    assert said(rank) == "held"
    launcher.kill()
    launcher.wait()
    began = time.monotonic()
    with pytest.raises(InputError, match="under way"):
        taken(tmp_path, silent_s=1.0)
    assert time.monotonic() - began < 20
    rank.kill()
    rank.communicate()


def test_a_stand_in_for_a_file_system_without_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    mine = taken(tmp_path)
    mine.check()
    assert json.loads(file_of(tmp_path).read_text())["pid"] == os.getpid()
    mine.release()


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(GenacError, match="cannot be written"):
        taken(tmp_path / "file")


@pytest.mark.parametrize("kept", [False, True])
def test_a_folder_that_it_made_and_that_stays_empty_goes_with_it(tmp_path: Path, kept: bool) -> None:
    lock = FolderLock(tmp_path / "made", "the study")
    lock.acquire()
    if kept:
        (tmp_path / "made" / "run").mkdir()
    lock.release()
    assert (tmp_path / "made").exists() == kept
