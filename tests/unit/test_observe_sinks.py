"""Sinks that fail: no run ends of it, it is told once, and what they lack is sent when they answer again."""

from __future__ import annotations

import logging
import os
import re
import resource
import shutil
import subprocess
import sys
import types
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest

from genac_megatron.observe import sinks
from genac_megatron.observe.metrics import MetricsLog
from genac_megatron.observe.runinfo import METRICS, RunFolder
from genac_megatron.recipe.schema import ObserveConfig, WandbConfig

TENSORBOARD = ObserveConfig()
ONLINE = ObserveConfig(tensorboard=False, wandb=WandbConfig(mode="online"))
OWED = "W&B does not have row 1 on"


def train(log: MetricsLog, first: int, last: int, names: int = 1) -> None:
    for step in range(first, last + 1):
        log.log("rl", "reinforce", step, {f"a/{n}": step + n for n in range(names)})


def shown(run: Path, name: str = "a/0") -> list[tuple[int, float]]:
    """What TensorBoard shows of a run."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    return [(e.step, e.value) for e in events.Scalars(name)]


def synced(told: str) -> list[int]:
    """The rows in the offline run that a message says to sync."""
    folder = Path(told.rpartition("wandb sync ")[2].splitlines()[0].strip("'"))
    (file,) = folder.glob("*.wandb")
    return steps_in(records_in(file.read_bytes()))


def records_in(data: bytes) -> bytes:
    """The records of a W&B run's file, end to end, without what frames them: LevelDB's log after 7 bytes, in
    blocks of 32 KiB, in which a record lies in pieces of a checksum, a length, a kind and bytes.
    """
    found, at = b"", 7
    while at < len(data):
        left = 32768 - at % 32768
        if left > 7:
            size = int.from_bytes(data[at + 4 : at + 6], "little")
            found += data[at + 7 : at + 7 + size]
            left = 7 + size
        at += left
    return found


def steps_in(data: bytes) -> list[int]:
    """The rows that a W&B run's records hold."""
    # Of each record the key, its field's tag and length, and the value as JSON: in history and in summary.
    # What follows the value may look like a digit.
    found = re.finditer(rb"(?s)global_step\x82\x01(.)", data)
    return sorted({int(data[one.end() : one.end() + one[1][0]]) for one in found})


def test_a_row_ends_where_its_length_says() -> None:
    assert steps_in(b"global_step\x82\x01\x0212\x00global_step\x82\x01\x0121") == [2, 12]


def test_a_record_may_be_cut_by_the_end_of_a_block() -> None:
    first, second = b"x" * (32768 - 7 - 7 - 2) + b"ab", b"cd"
    pieces = b"".join(
        bytes(4) + len(piece).to_bytes(2, "little") + b"\x01" + piece for piece in (first, second)
    )
    assert records_in(b":W&B..." + pieces) == first + second
    assert records_in(b":W&B..." + pieces[: len(first) + 7]) == first


# --- TensorBoard ---------------------------------------------------------------------------------


def test_a_folder_that_cannot_be_made(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "tensorboard").write_text("in the way")
    with MetricsLog(tmp_path, TENSORBOARD) as log:
        train(log, 1, 3)
        assert caplog.text.count("TensorBoard failed (FileExistsError") == 1
        (tmp_path / "tensorboard").unlink()
        train(log, 4, 4)
    assert shown(tmp_path) == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0)]
    assert "the rows that it lacked were sent" in caplog.text
    assert "does not have" not in caplog.text


def test_what_never_came_is_named_at_the_end(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "tensorboard").write_text("in the way")
    with MetricsLog(tmp_path, TENSORBOARD) as log:
        train(log, 1, 3)
        state = log.state_dict()
    assert "TensorBoard does not have row 1 on (FileExistsError" in caplog.messages[-1]
    assert METRICS in caplog.messages[-1]
    (tmp_path / "tensorboard").unlink()
    with MetricsLog(tmp_path, TENSORBOARD, resume=state) as log:  # the resumed run catches up
        train(log, 4, 4)
    assert [step for step, _ in shown(tmp_path)] == [1, 2, 3, 4]


def test_no_space_left(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """By a limit on the size of files: a write is cut short, then refused, as on a full disk."""
    real = resource.getrlimit(resource.RLIMIT_FSIZE)
    with MetricsLog(tmp_path, TENSORBOARD) as log:
        train(log, 1, 2, names=100)
        (events,) = (tmp_path / "tensorboard").iterdir()
        size = events.stat().st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + size // 4, real[1]))
        try:
            train(log, 3, 4, names=100)
            assert events.stat().st_size == size  # no half row
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, real)
        assert caplog.text.count("TensorBoard failed (OSError: [Errno 27] File too large)") == 1
        train(log, 5, 5, names=100)
    for n in (0, 99):
        assert shown(tmp_path, f"a/{n}") == [(step, step + n) for step in range(1, 6)]
    assert len(RunFolder(tmp_path).rows(METRICS)[0]) == 5


def test_a_checkpoint_of_before_says_nothing_of_sinks(tmp_path: Path) -> None:
    with MetricsLog(tmp_path, TENSORBOARD) as log:
        train(log, 1, 2)
    with MetricsLog(tmp_path, TENSORBOARD, resume={"rows": {METRICS: 2}, "wandb_id": None}) as log:
        train(log, 3, 3)
    assert [step for step, _ in shown(tmp_path)] == [1, 2, 3]


# --- W&B -----------------------------------------------------------------------------------------

SCRIPT = """
import sys
from genac_megatron.observe import sinks
from genac_megatron.observe.metrics import MetricsLog
from genac_megatron.recipe.schema import ObserveConfig, WandbConfig
sinks.INIT_S = 3.0
with MetricsLog(sys.argv[1], ObserveConfig(tensorboard=False, wandb=WandbConfig(mode="online"))) as log:
    for step in range(1, 4):
        log.log("rl", "reinforce", step, {"a/0": step})
"""


@pytest.mark.parametrize(
    ("more", "cause"),
    [
        ({}, "UsageError: No API key configured"),
        ({"WANDB_API_KEY": "a" * 40, "WANDB_BASE_URL": "http://127.0.0.1:9"}, "connection refused"),
    ],
    ids=["no key", "nothing listens"],
)
def test_wandb_itself_without_a_key_or_a_server(tmp_path: Path, more: dict[str, str], cause: str) -> None:
    pytest.importorskip("wandb")
    plain = {key: value for key, value in os.environ.items() if not key.startswith("WANDB")}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "my run")],
        env=plain | {"HOME": str(tmp_path), "NETRC": str(tmp_path / "netrc")} | more,
        capture_output=True, text=True, timeout=240, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("W&B failed (") == 1
    assert cause in done.stderr
    assert OWED in done.stderr
    assert synced(done.stderr) == [1, 2, 3]
    assert len(RunFolder(tmp_path / "my run").rows(METRICS)[0]) == 3


HANGS = """
import signal, sys, psutil
from genac_megatron.observe import sinks
from genac_megatron.observe.metrics import MetricsLog
from genac_megatron.recipe.schema import ObserveConfig, WandbConfig
sinks.HANGS_S, sinks.SPARED = 20.0, 0.0
with MetricsLog(sys.argv[1], ObserveConfig(tensorboard=False, wandb=WandbConfig(mode="offline"))) as log:
    for step in range(1, 601):
        log.log("rl", "reinforce", step, {f"a/{n}": step + n / 3 for n in range(60)})
        if step == 3:
            for process in psutil.Process().children(recursive=True):
                process.send_signal(signal.SIGSTOP)
"""


@pytest.mark.slow
def test_wandb_itself_whose_process_hangs_holds_no_run_up_and_loses_no_row(tmp_path: Path) -> None:
    """Without a limit the run waits for ever once the pipe to it is full."""
    pytest.importorskip("wandb")
    plain = {key: value for key, value in os.environ.items() if not key.startswith("WANDB")}
    done = subprocess.run(
        [sys.executable, "-c", HANGS, str(tmp_path / "run")],
        env=plain | {"HOME": str(tmp_path)},
        capture_output=True, text=True, timeout=240, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("W&B failed (its process did not answer in time") == 1
    assert "does not have" not in done.stderr
    files = (tmp_path / "run").glob("wandb/offline-run-*/*.wandb")
    kept = b"".join(records_in(file.read_bytes()) for file in files)
    assert not set(range(1, 601)).difference(steps_in(kept))


class MockWandb(types.ModuleType):
    """In wandb's place, as no W&B server is here. `fails(what, number)`: whether that call raises."""

    def __init__(self, fails: Callable[[str, int], bool]) -> None:
        super().__init__("wandb")
        self.__spec__ = ModuleSpec("wandb", None)
        self.fails, self.calls = fails, {"init": 0, "log": 0}
        self.rows: list[int] = []
        self.ids: set[str] = set()
        self.dir = "/nowhere/files"
        self.Settings = dict

    def _called(self, what: str) -> None:
        self.calls[what] += 1
        if self.fails(what, self.calls[what]):
            raise RuntimeError(f"{what} {self.calls[what]}")

    def init(self, **given: Any) -> MockWandb:
        self._called("init")
        self.ids.add(given["id"])
        return self

    def log(self, figures: dict[str, Any]) -> None:
        self._called("log")
        self.rows.append(figures["global_step"])

    def define_metric(self, *_: object, **__: object) -> None: ...

    def finish(self, exit_code: int) -> None: ...

    def teardown(self) -> None: ...


@pytest.mark.parametrize(
    "fails",
    [
        lambda what, number: what == "log" and number == 3,
        lambda what, number: what == "log" and 2 <= number < 6,
        lambda what, number: what == "init" and number < 4,
    ],
    ids=["log raises once", "log raises for a while", "init raises for a while"],
)
def test_a_mock_of_wandb_that_answers_again_has_all_rows_once(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    fails: Callable[[str, int], bool],
) -> None:
    mock = MockWandb(fails)
    monkeypatch.setitem(sys.modules, "wandb", mock)
    monkeypatch.setattr(sinks, "SPARED", 0.0)
    with caplog.at_level(logging.WARNING), MetricsLog(tmp_path, ONLINE) as log:
        train(log, 1, 8)
    assert mock.rows == list(range(1, 9))
    assert len(mock.ids) == 1
    assert caplog.text.count("W&B failed") == 1
    assert caplog.text.count("the rows that it lacked were sent") == 1
    assert "does not have" not in caplog.text


def test_a_mock_of_wandb_that_is_slow_to_fail_is_spared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mock = MockWandb(lambda what, number: what == "init")
    clock = [0.0]

    def slow(what: str) -> None:
        clock[0] += 30.0
        raise TimeoutError(what)

    monkeypatch.setattr(mock, "_called", slow)
    monkeypatch.setitem(sys.modules, "wandb", mock)
    monkeypatch.setattr(sinks.time, "monotonic", lambda: clock[0])
    log = MetricsLog(tmp_path, ONLINE)
    for step in range(1, 100):
        clock[0] += 10.0
        train(log, step, step)
    assert clock[0] <= 990.0 + 2 * 30.0
    log.close()
    assert len(RunFolder(tmp_path).rows(METRICS)[0]) == 99


def test_a_mock_of_wandb_that_cannot_send_in_time_at_the_end_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    mock = MockWandb(lambda what, number: False)
    mock.dir = str(tmp_path / "wandb" / "run-1" / "files")

    def finish(exit_code: int) -> None:
        raise TimeoutError("finish")

    monkeypatch.setattr(mock, "finish", finish)
    monkeypatch.setitem(sys.modules, "wandb", mock)
    with MetricsLog(tmp_path, ONLINE) as log:
        train(log, 1, 2)
    assert "W&B does not have its last rows (TimeoutError: finish)" in caplog.text
    assert f"wandb sync {tmp_path / 'wandb' / 'run-1'}" in caplog.text


def test_a_mock_of_wandb_gets_a_copied_run_as_another_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy that is resumed under another name must not write into the original's W&B run."""
    mock = MockWandb(lambda what, number: False)
    monkeypatch.setitem(sys.modules, "wandb", mock)
    with MetricsLog(tmp_path / "run", ONLINE) as log:
        train(log, 1, 3)
        state = log.state_dict()
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    with MetricsLog(tmp_path / "copy", ONLINE, resume=state) as log:
        train(log, 4, 4)
        assert log.state_dict()["wandb_id"] != state["wandb_id"]
    assert mock.rows == [1, 2, 3, 1, 2, 3, 4]
    with MetricsLog(tmp_path / "run", ONLINE, resume={**state, "name": "run"}) as log:
        assert log.state_dict()["wandb_id"] == state["wandb_id"]


def begun(folder: Path) -> dict[str, Any]:
    """The checkpoint's part of a run of three rows."""
    with MetricsLog(folder, ONLINE, name="run") as log:
        train(log, 1, 3)
        return log.state_dict()


def test_a_mock_of_wandb_gets_a_copy_of_the_same_name_as_another_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Two copies under different roots share no W&B run, and the original keeps its own."""
    mock = MockWandb(lambda what, number: False)
    monkeypatch.setitem(sys.modules, "wandb", mock)
    state = begun(tmp_path / "a" / "run")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    with MetricsLog(tmp_path / "b" / "run", ONLINE, resume=state, name="run") as log:
        train(log, 4, 4)
        copy = log.state_dict()
    assert copy["wandb_id"] != state["wandb_id"]
    assert mock.rows == [1, 2, 3, 1, 2, 3, 4]
    assert f"W&B run {state['wandb_id']} is that of {tmp_path / 'a' / 'run'}" in caplog.text
    caplog.clear()
    for folder, kept in (("a", state), ("b", copy)):  # each goes on with its own
        with MetricsLog(tmp_path / folder / "run", ONLINE, resume=kept, name="run") as log:
            assert log.state_dict()["wandb_id"] == kept["wandb_id"]
    assert not caplog.text


@pytest.mark.parametrize("place_is_taken", [False, True])
def test_a_mock_of_wandb_goes_on_with_a_folder_that_was_moved_and_it_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, place_is_taken: bool
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", MockWandb(lambda what, number: False))
    state = begun(tmp_path / "a")
    (tmp_path / "a").rename(tmp_path / "b")
    if place_is_taken:  # by a new run
        assert begun(tmp_path / "a")["wandb_id"] != state["wandb_id"]
    with MetricsLog(tmp_path / "b", ONLINE, resume=state, name="run") as log:
        train(log, 4, 4)
        assert log.state_dict()["wandb_id"] == state["wandb_id"]
    assert f"was at {tmp_path / 'a'} before, and goes on with its W&B run {state['wandb_id']}" in caplog.text
    assert "under another name" in caplog.text


def test_a_mock_of_wandb_takes_a_link_to_a_folder_for_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", MockWandb(lambda what, number: False))
    state = begun(tmp_path / "a")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    for kept in (state, {key: value for key, value in state.items() if key != "place"}):
        with MetricsLog(tmp_path / "b", ONLINE, resume=kept, name="run") as log:
            assert log.state_dict()["wandb_id"] == state["wandb_id"]
    assert not caplog.text


def test_a_mock_of_wandb_that_failed_the_run_before_gets_its_rows_after_a_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mock = MockWandb(lambda what, number: what == "init")
    monkeypatch.setitem(sys.modules, "wandb", mock)
    with MetricsLog(tmp_path, ONLINE) as log:
        train(log, 1, 3)
        state = log.state_dict()
    monkeypatch.setattr(mock, "fails", lambda what, number: False)
    with MetricsLog(tmp_path, ONLINE, resume=state) as log:
        train(log, 4, 4)
    assert mock.rows == [1, 2, 3, 4]
    assert mock.ids == {state["wandb_id"]}
