"""Processes that score: what ends them, what does not, and what becomes of their jobs."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from genac_megatron.tasks.workers import Shared, Workers

ROOT = Path(__file__).resolve().parents[2]
IN_A_GROUP = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


def obeying() -> Callable[[Any], float]:
    """Does what a job says: (what, what that needs)."""

    def score(job: tuple[str, Any]) -> float:
        what, given = job
        if what == "die":  # the first so many times, by the file's lines
            with open(given[0], "a") as file:
                file.write("x\n")
            if len(Path(given[0]).read_text().splitlines()) <= given[1]:
                os.kill(os.getpid(), signal.SIGKILL)
        if what == "sleep":
            Path(given[0]).write_text(str(os.getpid()))
            time.sleep(given[1])
        return float(os.getpid()) if what == "pid" else 1.0

    return score


def slow_to_start(folder: str) -> Callable[[Any], float]:
    (Path(folder) / "starting").write_text(str(os.getpid()))
    time.sleep(0.5)
    return lambda job: 1.0


@pytest.fixture
def workers() -> Iterator[Workers]:
    made = Workers(obeying, limit_s=20.0)
    yield made
    made.close()


def written(path: Path) -> int:
    """The process id in a file, once it is there."""
    until = time.monotonic() + 60
    while not path.exists() or not path.read_text():
        assert time.monotonic() < until
        time.sleep(0.01)
    return int(path.read_text())


def signalled(path: Path) -> subprocess.Popen[bytes]:
    """A process that sends all of IN_A_GROUP to the one that the file will name."""
    code = (
        "import os, sys, time, pathlib\n"
        "path = pathlib.Path(sys.argv[1])\n"
        "while not path.exists() or not path.read_text(): time.sleep(0.01)\n"
        "for number in sys.argv[2:]: os.kill(int(path.read_text()), int(number))\n"
    )
    return subprocess.Popen([sys.executable, "-c", code, str(path), *(str(int(n)) for n in IN_A_GROUP)])


def test_signals_to_the_whole_group_are_the_parents_to_answer(workers: Workers, tmp_path: Path) -> None:
    [before] = workers.run([("pid", None)])
    sender = signalled(tmp_path / "busy")
    assert workers.run([("sleep", (str(tmp_path / "busy"), 1.0)), ("pid", None)]) == [1.0, before]
    assert sender.wait(30) == 0
    assert workers.late == 0


def test_a_process_that_is_starting_takes_no_signal_either(tmp_path: Path) -> None:
    starting = Workers(partial(slow_to_start, str(tmp_path)))
    sender = signalled(tmp_path / "starting")
    assert starting.run(["any"]) == [1.0]
    assert sender.wait(30) == 0
    starting.close()


def test_a_lost_process_is_replaced_and_its_job_given_again(workers: Workers, tmp_path: Path) -> None:
    [idle] = workers.run([("pid", None)])
    os.kill(int(idle), signal.SIGKILL)
    time.sleep(0.2)
    assert workers.run([("any", None), ("any", None)]) == [1.0, 1.0], "lost between two calls"
    assert workers.run([("die", (str(tmp_path / "once"), 1)), ("any", None)]) == [1.0, 1.0], "lost at a job"
    assert workers.late == 0


def test_a_job_that_kills_every_process_counts_as_0(
    workers: Workers, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tries = tmp_path / "tries"
    assert workers.run([("any", None), ("die", (str(tries), 99)), ("any", None)]) == [1.0, 0.0, 1.0]
    assert tries.read_text() == "x\n" * 2
    assert workers.late == 1
    assert "lost 2 processes at it" in caplog.text


def test_what_an_interrupted_call_left_is_no_later_jobs_answer(
    workers: Workers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "busy"
    monkeypatch.setattr(workers, "_collect", interrupted(workers, path))
    with pytest.raises(KeyboardInterrupt):
        workers.run([("any", None), ("any", None), ("sleep", (str(path), 0.5))])
    monkeypatch.undo()
    assert workers.run([("any", None)]) == [1.0]


def interrupted(workers: Workers, path: Path) -> Callable[..., Any]:
    """`_collect`, and Ctrl-C once the job is at work that writes the file."""
    collect = workers._collect

    def collected(*given: Any) -> Any:
        if any(worker.job == 2 for worker in workers._workers):
            written(path)
            raise KeyboardInterrupt
        return collect(*given)

    return collected


PARENT = """
import sys
from genac_megatron.tasks import workers
workers.OVERTIME_S = 0.5
def make():
    import re
    return lambda job: float(re.fullmatch("(a+)+b", "a" * job) is None)
if __name__ == "__main__":
    made = workers.Workers(make, limit_s=float(sys.argv[1]))
    made.run([1])
    print(made._workers[0].process.pid, flush=True)
    if len(sys.argv) > 2:
        made.run([60])
    raise SystemExit(7)
"""


def parent(folder: Path, *given: str) -> subprocess.Popen[str]:
    path = folder / "parent.py"
    path.write_text(PARENT)
    return subprocess.Popen(
        [sys.executable, str(path), *given],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def gone(pid: int) -> bool:
    """Whether a process ends soon."""
    until = time.monotonic() + 20
    while time.monotonic() < until:
        try:
            if re.search(r"^State:\s+Z", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE):
                return True
        except OSError:
            return True
        time.sleep(0.05)
    return False


def test_a_process_that_scores_starts_without_the_schema() -> None:
    """Of a run's many: what they unpickle imports no pydantic, half of the time that a start would take."""
    names = "own_prompts, own_reward, grading"
    code = f"import sys; from genac_megatron.tasks import {names}; print('pydantic' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_processes_end_with_a_parent_that_ends(tmp_path: Path) -> None:
    process = parent(tmp_path, "5")
    assert process.stdout is not None
    pid = int(process.stdout.readline())
    assert process.wait(30) == 7, "its exit waits for nobody"
    assert gone(pid)
    process.stdout.close()


def test_a_process_at_a_hostile_job_ends_after_a_killed_parent(tmp_path: Path) -> None:
    """Backtracking without end holds the interpreter, so that the process itself can do nothing more."""
    process = parent(tmp_path, "2", "hostile")
    assert process.stdout is not None
    pid = int(process.stdout.readline())
    time.sleep(1.0)
    process.kill()
    process.wait(30)
    assert gone(pid)
    process.stdout.close()


# --- several threads -----------------------------------------------------------------------------


def test_one_late_answer_holds_up_its_own_thread_alone(tmp_path: Path) -> None:
    shared: Shared[float] = Shared(partial(Workers, obeying, 1, 60.0, "sleeping"))
    begun = tmp_path / "begun"
    with ThreadPoolExecutor(2) as threads:
        slow = threads.submit(shared.run, [("sleep", (str(begun), 3.0))])
        while not begun.exists():
            assert not slow.done()
            time.sleep(0.01)
        quick = threads.submit(shared.run, [("pid", None)] * 2)
        one, same = quick.result(300)
        assert one == same != int(begun.read_text())
        assert slow.result(300) == [1.0]
    assert shared.late == 0
    shared.close()


def test_a_further_process_is_started_where_there_is_work_for_it() -> None:
    shared: Shared[float] = Shared(partial(Workers, obeying, 1, 60.0, "sleeping"), 3)
    assert shared.run([]) == []
    assert [len(pool._workers) for pool in shared.pools] == [0, 0, 0]
    for _ in range(3):
        assert shared.run([("ok", None)]) == [1.0]
    assert sorted(len(pool._workers) for pool in shared.pools) == [0, 0, 1]
    shared.close()


def test_an_answer_that_is_late_is_counted_whichever_pool_it_was_given_to(tmp_path: Path) -> None:
    shared: Shared[float] = Shared(partial(Workers, obeying, 1, 2.0, "sleeping"))
    with ThreadPoolExecutor(2) as threads:
        found = list(threads.map(shared.run, [[("sleep", (str(tmp_path / name), 30.0))] for name in "ab"]))
    assert found == [[0.0], [0.0]]
    assert shared.late == 2
    assert shared.run([("ok", None)]) == [1.0]
    shared.close()


def test_a_thread_that_runs_ends_with_what_is_closed_and_starts_no_other_process(tmp_path: Path) -> None:
    """Its job's process is lost by the closing: before, that job was tried again in a new one."""
    shared: Shared[float] = Shared(partial(Workers, obeying, 1, 60.0, "sleeping"))
    begun = tmp_path / "begun"
    with ThreadPoolExecutor(1) as threads:
        slow = threads.submit(shared.run, [("sleep", (str(begun), 30.0))])
        pid, began = written(begun), time.monotonic()
        begun.unlink()
        shared.close()
        with pytest.raises(RuntimeError, match="sleeping was ended"):
            slow.result(20)
    assert time.monotonic() - began < 20
    assert gone(pid)
    assert not begun.exists(), "the job was begun again"
    assert [pool._workers for pool in shared.pools] == [[], []]
    with pytest.raises(RuntimeError, match="sleeping was ended"):
        shared.run([("ok", None)])
    shared.close()
