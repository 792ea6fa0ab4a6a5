"""tools/areas.py: areas side by side, by a Makefile of the test's own."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import signal
import subprocess
import sys
import termios
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

TOOL = Path(__file__).resolve().parents[2] / "tools" / "areas.py"
MAKEFILE = """\
test-good:
	@touch good.begun; while [ ! -e other.begun ]; do sleep 0.05; done; echo "tests/a.py .. [ 50%]"
	@echo "===== 2 passed, 1 skipped in 0.10s ====="
test-other:
	@touch other.begun; while [ ! -e good.begun ]; do sleep 0.05; done; echo "3 passed in 0.10s"
test-bad:
	@echo "the reason it failed"; echo "1 failed, 2 passed in 0.10s"; exit 1
test-long:
	@trap 'echo cleaned > cleaned; exit 1' INT; echo $$$$ > pid; touch long.begun; \\
	while :; do sleep 0.05; done
"""
LIMIT_S = 120.0  # of waiting for an event, on a busy machine
MARK = "AREAS_TEST"
FAKE_MAKE = """\
#!{python}
import os, signal, sys, time
from pathlib import Path

def stubborn(name):
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    Path(name + ".begun").touch()
    time.sleep(600)
    os._exit(0)

if os.fork() == 0:  # as a worker of pytest-xdist
    stubborn("worker") if sys.argv[-1] == "test-stay" else os._exit(0)
if os.fork() == 0:  # as a rank
    os.setsid()
    stubborn("rank")
if os.fork() == 0:  # as a daemon
    os.setsid()
    stubborn("daemon") if os.fork() == 0 else os._exit(0)
if sys.argv[-1] == "test-leave":
    while not (Path("rank.begun").exists() and Path("daemon.begun").exists()):
        time.sleep(0.05)
    print("3 passed in 0.10s")
    sys.exit(0)
Path("main.begun").touch()
try:
    time.sleep(600)
except KeyboardInterrupt:
    Path("cleaned").touch()
"""


def areas(folder: Path, *names: str) -> subprocess.CompletedProcess[str]:
    environ = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}
    return subprocess.run(
        [sys.executable, str(TOOL), *names],
        cwd=folder, env=environ, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "Makefile").write_text(MAKEFILE)
    return tmp_path


def test_two_areas_run_at_once_and_a_table_tells_their_ends(folder: Path) -> None:
    """Each of the two waits for the other to have begun."""
    done = areas(folder, "good", "other")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.split() for line in done.stdout.splitlines() if line.startswith("  ")]
    assert [row[0] for row in rows] == ["good", "other"]
    assert " ".join(rows[0][3:]) == "2 passed, 1 skipped in 0.10s"
    assert "all passed" in done.stdout
    assert "[ 50%]" in (folder / "runs/test-logs/good.log").read_text()


def test_a_failed_area_is_shown_whole_and_the_others_still_run(folder: Path) -> None:
    done = areas(folder, "bad", "good", "other")
    assert done.returncode == 1
    assert "the reason it failed" in done.stdout
    assert "failed: bad" in done.stdout
    assert "3 passed" in done.stdout


def wait_for(event: Callable[[], bool]) -> None:
    until = time.monotonic() + LIMIT_S
    while not event():
        assert time.monotonic() < until
        time.sleep(0.05)


def test_asked_to_end_it_lets_areas_clean_up(folder: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, str(TOOL), "long"],
        cwd=folder, stdout=subprocess.PIPE, text=True, start_new_session=True,
        env={key: value for key, value in os.environ.items() if not key.startswith("MAKE")},
    )  # fmt: skip
    wait_for((folder / "long.begun").exists)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 128 + signal.SIGTERM
    assert "interrupted" in said
    assert (folder / "cleaned").exists()
    pid = int((folder / "pid").read_text())
    assert not Path(f"/proc/{pid}").exists()


def living(mark: str) -> dict[int, str]:
    """Command lines of processes that a test started, at whatever remove."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"{MARK}={mark}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                found[int(folder.name)] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
    return found


class Tree:
    """areas.py over a `make` that starts processes in sessions of their own, which ignore every request."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.mark = folder, str(uuid.uuid4())
        make = folder / "fake-make"
        make.write_text(FAKE_MAKE.format(python=sys.executable))
        make.chmod(0o700)
        self.tool = [sys.executable, str(TOOL), "--grace", "1"]
        kept = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}
        self.environ = {**kept, "FAKE": str(make), "MAKE": str(make), MARK: self.mark}

    def start(self, *command: str, terminal: int | None = None) -> subprocess.Popen[bytes]:
        """terminal: a descriptor of what is to be its terminal."""

        def prepare() -> None:
            for number in (signal.SIGINT, signal.SIGHUP):  # ignored under nohup or in a shell's background
                signal.signal(number, signal.SIG_DFL)
            if terminal is not None:
                fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)

        with (self.folder / "said").open("wb") as said:
            process = subprocess.Popen(
                command, cwd=self.folder, env=self.environ, start_new_session=True, preexec_fn=prepare,
                stdin=subprocess.DEVNULL, stdout=said if terminal is None else terminal,
                stderr=said, pass_fds=() if terminal is None else (terminal,),
            )  # fmt: skip
        names = ("main", "worker", "rank", "daemon")
        wait_for(lambda: all((self.folder / f"{name}.begun").exists() for name in names))
        return process

    def pid(self, *words: str) -> int:
        """Of the one process with these words, one after the other, in its command line."""
        (found,) = [pid for pid, line in living(self.mark).items() if " ".join(words) in line]
        return found

    @property
    def said(self) -> str:
        return (self.folder / "said").read_text()

    def wait_for_no_process(self) -> None:
        wait_for(lambda: not living(self.mark))


@pytest.fixture
def tree(tmp_path: Path) -> Iterator[Tree]:
    made = Tree(tmp_path)
    yield made
    for pid in living(made.mark):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


linux = pytest.mark.skipif(sys.platform != "linux", reason="adopting orphans needs Linux")


@linux
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_asked_to_end_it_leaves_no_process(tree: Tree, number: signal.Signals) -> None:
    process = tree.start(*tree.tool, "stay")
    process.send_signal(number)
    assert process.wait(LIMIT_S) == 128 + number
    assert living(tree.mark) == {}, tree.said  # not even for a moment
    assert f"interrupted ({number.name})" in tree.said
    assert (tree.folder / "cleaned").exists()


@linux
def test_its_terminal_lost_it_leaves_no_process(tree: Tree) -> None:
    """It is told by SIGHUP, and cannot say a word any more."""
    ours, its = pty.openpty()
    process = tree.start(*tree.tool, "stay", terminal=its)
    os.close(its)
    os.close(ours)
    assert process.wait(LIMIT_S) == 128 + signal.SIGHUP
    assert living(tree.mark) == {}
    assert (tree.folder / "cleaned").exists()
    assert tree.said == "", "that goes to stderr"


@linux
def test_a_second_ctrl_c_does_not_wait(tree: Tree) -> None:
    """An area's worker ignores the first."""
    process = tree.start(*tree.tool, "--grace", "10000", "stay")
    process.send_signal(signal.SIGINT)
    wait_for((tree.folder / "cleaned").exists)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(LIMIT_S) == 128 + signal.SIGINT
    assert living(tree.mark) == {}, tree.said


@linux
def test_killed_it_leaves_no_process(tree: Tree) -> None:
    process = tree.start(*tree.tool, "stay")
    process.kill()
    process.wait(LIMIT_S)
    tree.wait_for_no_process()
    assert (tree.folder / "cleaned").exists()


@linux
def test_killed_supervisor_leaves_no_process_and_fails_its_area(tree: Tree) -> None:
    process = tree.start(*tree.tool, "stay")
    os.kill(tree.pid(str(TOOL), "--watch"), signal.SIGKILL)
    assert process.wait(LIMIT_S) == 1
    assert living(tree.mark) == {}, tree.said
    assert "stay: ended with -9" in tree.said


@linux
def test_its_parent_killed_it_leaves_no_process(tree: Tree) -> None:
    """As a shell is by its terminal's end; the `true` keeps it from becoming areas.py itself."""
    shell = tree.start("sh", "-c", '"$@"; true', "sh", *tree.tool, "stay")
    shell.kill()
    shell.wait(LIMIT_S)
    tree.wait_for_no_process()
    assert "interrupted (its parent has ended)" in tree.said
    assert (tree.folder / "cleaned").exists()


@linux
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_its_make_ended_it_leaves_no_process(tree: Tree, number: signal.Signals) -> None:
    (tree.folder / "Makefile").write_text(f"test:\n\t@env MAKE=$(FAKE) {' '.join(tree.tool)} stay\n")
    make = tree.start("make")
    make.send_signal(number)
    make.wait(LIMIT_S)
    tree.wait_for_no_process()
    assert (tree.folder / "cleaned").exists()


@linux
def test_what_an_area_leaves_behind_is_ended_and_told(tree: Tree) -> None:
    environ = {**tree.environ, "PYTEST_CURRENT_TEST": "tests/a.py::b (call)"}
    done = subprocess.run(
        [*tree.tool, "leave"], cwd=tree.folder, env=environ,
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=LIMIT_S, check=False,
    )  # fmt: skip
    assert living(tree.mark) == {}
    assert done.returncode == 0, done.stdout + done.stderr
    told = [line for line in done.stdout.splitlines() if "leave: left behind, now ended" in line]
    assert len(told) == 2, done.stdout
    assert all("test-leave" in line and "tests/a.py::b" in line for line in told)
    assert "3 passed in 0.10s, processes left behind" in done.stdout.splitlines()[-2]
