"""Run folders followed while they are written: half lines, resumes, new folders, where runs stand."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from fabricated_run import RECIPE, fabricate, metric_rows, part, write_lines

from genac_megatron.cluster.heartbeat import write
from genac_megatron.errors import InputError
from genac_megatron.observe.report_data import read_run
from genac_megatron.watch import follow
from genac_megatron.watch.follow import Brief, Followed, Log, Watched
from genac_megatron.watch.standing import paces, standing


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follow, "LOOK_S", 0.0)
    monkeypatch.setattr(follow, "SCAN_S", 0.0)


def append(path: Path, text: str) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(text)


def test_a_half_line_waits_for_its_end_and_no_line_is_read_twice(tmp_path: Path) -> None:
    log = Log(tmp_path / "log")
    log.look()
    assert log.rows == []
    append(log.path, '{"a": 1}\n{"a": "ü')
    log.look()
    assert log.rows == [{"a": 1}]
    seen = log.changes
    log.look()
    assert log.changes == seen
    append(log.path, '"}\nnot json\n[1]\n{"a": 3}\n')
    log.look()
    assert log.rows == [{"a": 1}, {"a": "ü"}, {"a": 3}]
    assert log.bad == 2


@pytest.mark.parametrize("kept", [1, 0])
def test_a_file_that_a_resume_cut_is_read_anew(tmp_path: Path, kept: int) -> None:
    """Also where it has grown beyond its former length by then."""
    log = Log(tmp_path / "log")
    write_lines(log.path, [{"step": n, "way": 1} for n in range(4)])
    log.look()
    part_ = log.path.with_name("part")
    write_lines(
        part_, [{"step": n, "way": 1} for n in range(kept)] + [{"step": n, "way": 2} for n in range(9)]
    )
    part_.replace(log.path)
    log.look()
    assert [row["way"] for row in log.rows] == [1] * kept + [2] * 9
    log.path.unlink()
    log.look()
    assert log.rows == []


def test_a_run_that_is_followed_is_what_the_report_reads(tmp_path: Path) -> None:
    run = Followed("one", fabricate(tmp_path / "one"))
    found, wanted = run.data(), read_run(tmp_path / "one")
    assert found is not None
    assert found.metrics == wanted.metrics
    assert found.evaluations == wanted.evaluations
    assert found.recipe == wanted.recipe
    first = run.version
    append(tmp_path / "one" / "metrics.jsonl", json.dumps(metric_rows(random.Random(1))[0]) + "\n")
    assert run.version != first
    assert run.version == run.version
    assert len(run.data().metrics) == len(wanted.metrics) + 1  # type: ignore[union-attr]


def test_nothing_is_written_in_the_run_folder(tmp_path: Path) -> None:
    folder = fabricate(tmp_path / "one")
    before = {path: path.stat().st_mtime_ns for path in [folder, *folder.rglob("*")]}
    run = Followed("one", folder)
    data = run.data()
    assert data is not None
    standing(data)
    run.rollout(run.rollouts()[0])
    assert {path: path.stat().st_mtime_ns for path in [folder, *folder.rglob("*")]} == before


def test_a_damaged_recipe_is_told_and_goes_when_it_is_mended(tmp_path: Path) -> None:
    folder = fabricate(tmp_path / "one")
    text = (folder / "recipe.yaml").read_text()
    (folder / "recipe.yaml").write_text("a: [1\n")
    run = Followed("one", folder)
    assert run.data() is None
    assert "recipe.yaml: the resolved recipe cannot be read" in run.error
    (folder / "recipe.yaml").write_text(text)
    assert run.data() is not None
    assert run.error == ""


def test_rollouts_are_found_by_what_they_are_in_brief(tmp_path: Path) -> None:
    run = Followed("one", fabricate(tmp_path / "one"))
    briefs = run.rollouts()
    assert [(b.stage, b.outcome, b.unread) for b in briefs] == [
        ("reinforce", 1.0, True), ("reinforce", 0.0, False), ("ppo", 1.0, True), ("ppo", 0.0, False)
    ]  # fmt: skip
    assert briefs[0].error == pytest.approx(0.5)
    assert run.rollout(briefs[2])["stage"] == "ppo"  # type: ignore[index]
    odd = {"states": [3, {"value": True}, {"value": None, "unasked": "x"}], "outcome": "no", "step": None}
    brief = Brief.made(odd, 0, 9)
    assert (brief.outcome, brief.step, brief.unread) == (None, 0, False)


# --- which folders -------------------------------------------------------------------------------


def test_folders_that_appear_later_are_picked_up(tmp_path: Path) -> None:
    fabricate(tmp_path / "runs" / "b")
    later = tmp_path / "runs" / "later"
    watched = Watched([tmp_path / "runs", tmp_path / "elsewhere"])
    assert list(watched.runs()) == ["b"]
    assert watched.waiting() == [tmp_path / "elsewhere"]
    later.mkdir()
    assert list(watched.runs()) == ["b"]
    (later / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    fabricate(tmp_path / "elsewhere")
    assert list(watched.runs()) == ["b", "later", "elsewhere"]
    assert watched.waiting() == []


def test_runs_of_one_name_have_addresses_of_their_own_and_each_run_has_one(tmp_path: Path) -> None:
    paths = [fabricate(tmp_path / place / "run") for place in ("a", "b")]
    watched = Watched([*paths, paths[0]])
    assert {key: run.path for key, run in watched.runs().items()} == {"run": paths[0], "run-2": paths[1]}


def test_what_is_no_run_is_told_at_once(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(InputError, match="not a run folder, but a file"):
        Watched([file])
    with pytest.raises(InputError, match="nor one that it could appear in"):
        Watched([tmp_path / "no" / "where"])
    (tmp_path / "full" / "other").mkdir(parents=True)
    with pytest.raises(InputError, match="no run folder, and none is in it"):
        Watched([tmp_path / "full"])
    for name in ("checkpoints", "logs"):
        (tmp_path / "full" / "begins" / name).mkdir(parents=True)
    assert Watched([tmp_path / "full"]).runs() == {}
    (tmp_path / "empty").mkdir()
    assert Watched([tmp_path / "empty"]).runs() == {}


# --- where a run stands --------------------------------------------------------------------------


def started(folder: Path, when: float, *ends: dict[str, Any]) -> None:
    write_lines(folder / "history.jsonl", [{"event": "start", "time": when, "version": "0.1.0"}, *ends])


def beat(folder: Path, when: float, **more: Any) -> None:
    row = {"rank": 0, "world": 1, "time": when, "state": "running", "code": None, "stalled": False, **more}
    write(folder / "logs" / "local" / "heartbeats" / "rank-00000.json", row)


def at(folder: Path, now: float) -> Any:
    data = Followed("run", folder).data()
    assert data is not None
    return standing(data, now)


def test_phases_and_the_time_of_the_whole_run(tmp_path: Path) -> None:
    """In the third of four stages; the fourth's pace is guessed by its tokens."""
    folder, now = part(tmp_path / "run", steps=40, evaluations=4, rollouts=0), time.time()
    started(folder, now - 500)
    beat(folder, now - 4, stage="reinforce", step=16, steps=20, step_s=11.0, eta_s=44.0,
         phases=["rollout", "judge"], phase_s=6.0, usual_s=20.0)  # fmt: skip
    found = at(folder, now)
    assert found.state == "running"
    assert [(s.name, s.state, s.done, s.total) for s in found.stages] == [
        ("sft-actor", "done", 12, 12), ("sft-critic", "done", 12, 12), ("reinforce", "now", 16, 20),
        ("ppo", "next", 0, 30),
    ]  # fmt: skip
    assert found.phases == [("rollout", None, None), ("judge", pytest.approx(10.0), 20.0)]
    assert found.stage_left == pytest.approx(40.0)
    ppo = found.stages[-1]
    assert ppo.guessed
    assert found.guessed == ["ppo"]
    assert ppo.pace > found.stages[2].pace  # it trains the actor as well
    assert found.run_left == pytest.approx(40.0 + 30 * ppo.pace)
    assert found.unknown == []


def test_a_stage_whose_pace_nobody_knows_is_named(tmp_path: Path) -> None:
    folder, now = part(tmp_path / "run", steps=6, evaluations=0, rollouts=0), time.time()
    started(folder, now - 50)
    beat(folder, now, stage="sft-actor", step=6, steps=12, step_s=1.0, eta_s=6.0, phases=[])
    found = at(folder, now)
    assert found.run_left == pytest.approx(6.0)
    assert found.unknown == ["sft-critic", "reinforce", "ppo"]


@pytest.mark.parametrize(
    ("ends", "beats", "state", "told"),
    [
        ([{"event": "end", "time": 1e9, "code": 0}], None, "ended", "done"),
        ([{"event": "end", "time": 1e9, "code": 75}], None, "ended", "stopped as asked"),
        ([{"event": "end", "time": 1e9, "code": 3}], None, "failed", "a gate is not reached"),
        ([], None, "starting", "starting"),
        ([], {"age": 300.0}, "silent", "killed"),
        ([], {"age": 2.0, "stalled": True}, "stalled", "no progress on 1 of 1"),
        ([], {"age": 2.0, "state": "ended by PeerLost"}, "failed", "PeerLost"),
    ],
)
def test_how_a_run_is(
    tmp_path: Path, ends: list[dict[str, Any]], beats: dict[str, Any] | None, state: str, told: str
) -> None:
    folder, now = fabricate(tmp_path / "run"), time.time()
    started(folder, now - 400 if beats else now - 10, *ends)
    if beats is not None:
        more = dict(beats)
        beat(folder, now - more.pop("age"), stage="ppo", step=30, steps=30, **more)
    found = at(folder, now)
    assert found.state == state
    assert told in found.told


def test_heartbeats_of_an_attempt_before_are_not_this_ones(tmp_path: Path) -> None:
    folder, now = fabricate(tmp_path / "run"), time.time()
    beat(folder, now - 90, stage="ppo", step=3, steps=30)
    started(folder, now - 5)
    assert at(folder, now).state == "starting"


def test_a_pace_leaves_out_the_night_between_two_attempts(tmp_path: Path) -> None:
    folder = fabricate(tmp_path / "run")
    rows = [{"stage": "ppo", "kind": "ppo", "step": n, "time": 1000.0 + 10 * n + (9e4 if n > 3 else 0)}
            for n in range(1, 7)]  # fmt: skip
    write_lines(folder / "metrics.jsonl", rows)
    started(folder, 999.0, {"event": "start", "time": 1000.0 + 9e4, "version": "0.1.0"})
    data = Followed("run", folder).data()
    assert data is not None
    assert paces(data) == {"ppo": pytest.approx(10.0)}
