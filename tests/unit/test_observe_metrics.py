"""Metrics logs and the run folder: nothing doubled, nothing torn, nothing non-finite."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from fabricated_run import fabricate

from genac_megatron.errors import GenacError, InputError
from genac_megatron.observe import runinfo
from genac_megatron.observe.metrics import MetricsLog, over_ranks
from genac_megatron.observe.report_data import read_run, summarise
from genac_megatron.observe.report_page import tiles
from genac_megatron.observe.runinfo import EVALUATIONS, LOGS, METRICS, ROLLOUTS, RunFolder
from genac_megatron.recipe.schema import ObserveConfig, WandbConfig

PLAIN = ObserveConfig(tensorboard=False)


def train(log: MetricsLog, stage: str, first: int, last: int, value: float = 0.0) -> None:
    for step in range(first, last + 1):
        log.log(stage, stage, step, {"critic/loss": value + step})


def kept(run: Path, name: str = METRICS) -> list[tuple[str, int]]:
    return [(row["stage"], row["step"]) for row in RunFolder(run).rows(name)[0]]


def test_a_row_is_flat_and_plain(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, PLAIN)
    log.log("ppo", "ppo", 3, {"actor/loss": np.float32(0.5), "time/train_s": 2})
    (row,) = (json.loads(line) for line in (tmp_path / METRICS).read_text().splitlines())
    assert row.pop("time") > 1e9
    assert row == {"stage": "ppo", "kind": "ppo", "step": 3, "actor/loss": 0.5, "time/train_s": 2.0}
    with pytest.raises(ValueError, match="loss"):
        log.log("ppo", "ppo", 4, {"loss": 1.0})


def test_what_is_not_finite_is_null_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        MetricsLog(tmp_path, PLAIN).log(
            "ppo", "ppo", 1, {"a/x": float("nan"), "a/y": float("-inf"), "a/z": 1.0}
        )
    (row,) = RunFolder(tmp_path).rows(METRICS)[0]
    assert row["a/x"] is None
    assert row["a/y"] is None
    assert row["a/z"] == 1.0
    assert row["nonfinite"] == ["a/x", "a/y"]
    assert "a/x = nan" in caplog.text
    assert "a/y = -inf" in caplog.text
    assert "NaN" not in (tmp_path / METRICS).read_text()


def test_a_resumed_run_has_the_rows_of_one_that_was_not(tmp_path: Path) -> None:
    whole = MetricsLog(tmp_path / "whole", PLAIN)
    train(whole, "sft", 1, 3)
    train(whole, "rl", 1, 6)
    broken = MetricsLog(tmp_path / "broken", PLAIN)
    train(broken, "sft", 1, 3)
    train(broken, "rl", 1, 2)
    state = broken.state_dict()  # the checkpoint
    train(broken, "rl", 3, 4, value=99.0)
    with (tmp_path / "broken" / METRICS).open("a") as file:
        file.write('{"stage": "rl", "step": 5, "cri')  # the crash
    resumed = MetricsLog(tmp_path / "broken", PLAIN, state)
    train(resumed, "rl", 3, 6)
    straight, taken_up = (RunFolder(tmp_path / name).rows(METRICS)[0] for name in ("whole", "broken"))
    assert len(straight) == 9
    assert [{**row, "time": 0} for row in taken_up] == [{**row, "time": 0} for row in straight]


def test_all_three_logs_are_cut_at_the_checkpoint(tmp_path: Path) -> None:
    """A row of the checkpoint's own step that came after it goes too: its number does not tell it."""
    log = MetricsLog(tmp_path, PLAIN)
    for number in range(3):
        for name in LOGS:
            log.append(name, {"stage": "rl", "step": number})
    log.append(EVALUATIONS, {"stage": "rl", "step": 2, "name": "end"})
    state = json.loads(json.dumps(log.state_dict()))
    for name in LOGS:
        log.append(name, {"stage": "rl", "step": 2, "name": "end"})
        log.append(name, {"stage": "ppo", "step": 0})
    resumed = MetricsLog(tmp_path, PLAIN, state)
    assert resumed.state_dict() == state
    for name in LOGS:
        own = [("rl", 2)] if name == EVALUATIONS else []
        assert kept(tmp_path, name) == [("rl", 0), ("rl", 1), ("rl", 2), *own]


def test_a_checkpoint_of_an_earlier_version_counts_metrics_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log = MetricsLog(tmp_path, PLAIN)
    for number in range(3):
        for name in (METRICS, EVALUATIONS):
            log.append(name, {"stage": "rl", "step": number})
    assert MetricsLog(tmp_path, PLAIN, {"rows": 2, "wandb_id": None}).counts == {
        METRICS: 2,
        EVALUATIONS: 3,
        ROLLOUTS: 0,
    }
    assert "evaluations.jsonl" in caplog.text
    assert "does not say its rows" in caplog.text


def test_rows_that_are_gone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    log = MetricsLog(tmp_path, PLAIN)
    log.append(METRICS, {"stage": "rl", "step": 1})
    log.append(ROLLOUTS, {"stage": "rl", "step": 1})
    (tmp_path / ROLLOUTS).unlink()
    assert MetricsLog(tmp_path, PLAIN, log.state_dict()).counts[ROLLOUTS] == 0
    assert "1 of 1 rows are gone" in caplog.text


def test_nothing_is_written_to_a_folder_that_another_has_taken(tmp_path: Path) -> None:
    def lost() -> None:
        raise GenacError("taken over")

    log = MetricsLog(tmp_path, PLAIN, guard=lost)
    with pytest.raises(GenacError, match="taken over"):
        train(log, "rl", 1, 1)
    assert kept(tmp_path) == []


def test_a_run_from_the_start_sets_old_logs_aside(tmp_path: Path) -> None:
    for attempt in range(3):
        train(MetricsLog(tmp_path, PLAIN), "sft", 1, attempt + 1)
    assert kept(tmp_path) == [("sft", 1), ("sft", 2), ("sft", 3)]
    assert kept(tmp_path, f"{METRICS}.1") == [("sft", 1)]
    assert kept(tmp_path, f"{METRICS}.2") == [("sft", 1), ("sft", 2)]


def test_a_log_that_is_not_the_checkpoints_is_refused(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, PLAIN)
    train(log, "sft", 1, 3)
    state = log.state_dict()
    (tmp_path / METRICS).unlink()
    with pytest.raises(InputError, match="counts 3 rows, the file holds 0"):
        MetricsLog(tmp_path, PLAIN, state)


def test_tensorboard_shows_each_step_once_after_a_resume(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    first = MetricsLog(tmp_path, ObserveConfig())
    train(first, "rl", 1, 3, value=100.0)
    state = first.state_dict()
    train(first, "rl", 4, 5, value=100.0)
    first.close()
    with MetricsLog(tmp_path, ObserveConfig(), state) as second:
        train(second, "rl", 4, 6)
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    shown = [(e.step, e.value) for e in events.Scalars("critic/loss")]
    assert shown == [(1, 101.0), (2, 102.0), (3, 103.0), (4, 4.0), (5, 5.0), (6, 6.0)]


def test_wandb_off_is_not_imported(tmp_path: Path) -> None:
    code = (
        "import sys; from genac_megatron.observe.metrics import MetricsLog;"
        "from genac_megatron.recipe.schema import ObserveConfig;"
        f"MetricsLog({str(tmp_path)!r}, ObserveConfig(tensorboard=False)).log('s', 'sft', 1, {{'a/b': 1}});"
        "assert not {'wandb', 'torch', 'tensorboard'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_wandb_offline_keeps_its_run_over_a_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nothing listens: any call out would fail
    config = ObserveConfig(tensorboard=False, wandb=WandbConfig(mode="offline"))
    with MetricsLog(tmp_path, config, recipe={"seed": 1}) as log:
        train(log, "rl", 1, 2)
        state = log.state_dict()
    resumed = MetricsLog(tmp_path, config, state)
    assert resumed.state_dict() == state
    with resumed:
        train(resumed, "rl", 3, 3)
    written = list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    assert written
    assert all(state["wandb_id"] in path.name for path in written)


def test_a_missing_sink_is_an_input_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(InputError, match="tensorboard is not installed"):
        MetricsLog(tmp_path, ObserveConfig())


def test_atomic_files_leave_no_parts_and_survive_a_failed_write(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "summary.json"
    runinfo.write_json_atomic(path, {"a": float("inf"), "b": np.arange(2), "c": np.float64(0.5)})
    assert json.loads(path.read_text()) == {"a": None, "b": [0, 1], "c": 0.5}
    with pytest.raises(UnicodeEncodeError):
        runinfo.write_text_atomic(path, "\ud800")
    assert json.loads(path.read_text())["c"] == 0.5
    runinfo.write_json_atomic(path, {})
    assert [p.name for p in path.parent.iterdir()] == ["summary.json"]


def test_memory_is_added_up_and_the_largest_ranks_is_said_too() -> None:
    ranks = [{"memory/rss_gib": 1.0, "memory/peak_gib": 5.0}, {"memory/rss_gib": 2.0, "memory/peak_gib": 3.0}]
    counted = over_ranks([ranks[0] | {"tokens/train": 7.0}, ranks[1]])
    assert counted == {
        "memory/rss_gib": 3.0, "memory/peak_gib": 8.0, "memory/peak_rank_gib": 5.0, "tokens/train": 7.0
    }  # fmt: skip


def test_the_report_says_whose_memory_it_shows(tmp_path: Path) -> None:
    """Of the largest rank, which is what has to fit; of an earlier version's run only the sum is known."""
    run = fabricate(tmp_path / "run")
    data = read_run(run)
    assert "<b>1.30 GiB</b><span class=soft>of host memory, the largest rank; all ranks 2.30 GiB" in tiles(
        data, summarise(data)
    )
    for row in data.metrics:
        del row["memory/peak_rank_gib"]
    assert "<b>2.30 GiB</b><span class=soft>of host memory, all ranks added up" in tiles(
        data, summarise(data)
    )


def test_unreadable_lines_are_counted(tmp_path: Path) -> None:
    (tmp_path / METRICS).write_text('{"step": 1}\n\n[1]\n{"step": 2}\n{"st')
    assert runinfo.read_jsonl(tmp_path / METRICS) == ([{"step": 1}, {"step": 2}], 2)
    assert runinfo.read_jsonl(tmp_path / "none.jsonl") == ([], 0)
