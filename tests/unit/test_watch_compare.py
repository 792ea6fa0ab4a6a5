"""Runs compared: pairs and intervals against ones made by hand, what is refused, what is written."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
import yaml
from fabricated_run import RECIPE, evaluation_rows, fabricate, metric_rows, part, write_lines
from matplotlib.figure import Figure

from genac_megatron.cli import main
from genac_megatron.errors import InputError
from genac_megatron.evaluation.intervals import Estimate
from genac_megatron.observe.report_canvas import LIGHT
from genac_megatron.observe.report_data import read_run
from genac_megatron.watch.compare import LEAST, Comparison, Line, exact, over_steps, shown
from genac_megatron.watch.compare_plots import _difference, draw
from genac_megatron.watch.compared import compare_runs, names_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    for name, seed in (("one", 0), ("two", 3)):
        run = fabricate(root / name, seed=seed)
        recipe = {**RECIPE, "task": {"kind": "state_tracking", "objects": 4}}
        (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return root


def lines_of(made: Comparison) -> dict[str, Line]:
    return {line.key: line for line in made.lines}


def test_held_out_figures_are_paired_by_prompt(folder: Path) -> None:
    made = compare_runs([folder / "one", folder / "two"])
    line = lines_of(made)["heldout/accuracy"]
    ends = [evaluation_rows(seed)[-1]["actor"]["outcomes"] for seed in (0, 3)]
    means = [np.array([np.mean(x) for x in end.values()]) for end in ends]
    assert [v.value for v in line.values if v] == pytest.approx([m.mean() for m in means])
    (less,) = line.less
    assert less is not None
    assert less.value == pytest.approx(means[1].mean() - means[0].mean())
    rng = np.random.default_rng(1)
    draws = [np.mean((means[1] - means[0])[rng.integers(0, 64, 64)]) for _ in range(4000)]
    assert (less.low, less.high) == pytest.approx(np.quantile(draws, [0.025, 0.975]), abs=0.01)
    apart = line.values[1].high - line.values[1].low + line.values[0].high - line.values[0].low  # type: ignore[union-attr]
    assert less.high - less.low < apart, "pairing narrows it"
    brier = lines_of(made)["heldout/brier"]
    wanted = [evaluation_rows(seed)[-1]["critic"]["brier"] for seed in (0, 3)]
    assert [v.value for v in brier.values if v] == pytest.approx(wanted)


def test_logged_figures_are_paired_by_step(folder: Path) -> None:
    made = compare_runs([folder / "one", folder / "two"])
    line = lines_of(made)["rollout/outcome_mean"]
    assert line.of == "ppo, 30 steps"
    runs = [read_run(folder / name) for name in ("one", "two")]
    rewards = [
        np.array([r["rollout/outcome_mean"] for r in run.metrics if r["stage"] == "ppo"]) for run in runs
    ]
    assert [v.value for v in line.values if v] == pytest.approx([r.mean() for r in rewards])
    less = line.less[0]
    assert less is not None
    assert less.value == pytest.approx((rewards[1] - rewards[0]).mean())
    assert less.low < less.value < less.high
    blocks = (rewards[1] - rewards[0]).reshape(5, 6).mean(1)
    half = 2.776 * blocks.std(ddof=1) / math.sqrt(5)  # Student's t, four degrees of freedom
    assert (less.high - less.low) / 2 == pytest.approx(half, rel=0.02)


def test_few_steps_have_no_interval_and_that_is_said(folder: Path, tmp_path: Path) -> None:
    made = Comparison(["one", "two"], [
        read_run(part(tmp_path / name, steps=44 + LEAST - 1, evaluations=6, rollouts=0)) for name in "ab"
    ])  # fmt: skip
    line = lines_of(made)["rollout/outcome_mean"]
    assert line.of == f"ppo, {LEAST - 1} steps, too few for an interval"
    assert [one and (one.value, math.isnan(one.low)) for one in line.less] == [(0.0, True)]
    assert draw(made, "reward", LIGHT) is not None


@pytest.mark.parametrize(("count", "alike", "least"), [(20, 0.0, 0.92), (30, 0.0, 0.92), (60, 0.5, 0.9)])
def test_an_interval_has_the_truth_as_often_as_it_says(count: int, alike: float, least: float) -> None:
    """alike: how much of its neighbour is in a step."""
    noise = np.random.default_rng(7).normal(size=(1500, count + 30))
    for at in range(1, count + 30):
        noise[:, at] += alike * noise[:, at - 1]
    found = [over_steps(row[30:]) for row in noise]
    assert least <= np.mean([one.low <= 0 <= one.high for one in found]) <= 0.97


def test_a_curve_of_differences_has_windows_that_are_wide_enough() -> None:
    axes = Figure().subplots()
    _difference(axes, np.arange(25.0), np.random.default_rng(0).normal(size=25), "red")
    (band,) = axes.collections
    assert np.isfinite(band.get_paths()[0].vertices).all(), "an interval in every window, at the ends too"


def test_a_run_that_is_the_same_differs_by_nothing(folder: Path, tmp_path: Path) -> None:
    made = Comparison(["a", "b"], [read_run(folder / "one")] * 2)
    for line in made.lines:
        assert all(abs(one.value) < 1e-12 for one in line.less if one is not None), line.key
    assert "–" not in made.text().split("\n\n")[0]


def test_other_prompts_are_not_paired_and_that_is_said(folder: Path, tmp_path: Path) -> None:
    other = fabricate(tmp_path / "other", seed=5)
    task = {"kind": "state_tracking", "objects": 5}
    (other / "recipe.yaml").write_text(yaml.safe_dump({**RECIPE, "task": task}))
    made = compare_runs([folder / "one", other])
    lines = lines_of(made)
    assert lines["heldout/accuracy"].less == [None]
    assert "heldout/accuracy_mean" not in lines
    assert lines["rollout/outcome_mean"].less[0] is not None
    assert "not paired" in made.notes[0]
    assert "less one" in made.text()


def test_runs_without_a_step_in_common_have_their_own_means(folder: Path, tmp_path: Path) -> None:
    other = fabricate(tmp_path / "other")
    rows = [{**row, "stage": f"other-{row['stage']}"} for row in metric_rows(random.Random(0))]
    write_lines(other / "metrics.jsonl", rows)
    made = Comparison(["one", "other"], [read_run(folder / "one"), read_run(other)])
    line = lines_of(made)["rollout/outcome_mean"]
    assert line.of == "no step in common"
    assert line.less == [None]
    assert all(v is not None and math.isfinite(v.value) for v in line.values)


# --- what is refused -----------------------------------------------------------------------------


def refused(*paths: Path, unfinished: bool = False) -> str:
    with pytest.raises(InputError) as error:
        compare_runs(paths, unfinished=unfinished)
    return str(error.value)


def test_what_cannot_be_compared_is_told_with_a_way_out(folder: Path, tmp_path: Path) -> None:
    one = folder / "one"
    assert "cannot be compared" in refused(one)
    assert "named twice" in refused(one, folder / "two", folder / "x" / ".." / "one")
    assert "no such run folder" in refused(one, tmp_path / "nowhere")
    assert "not a run folder, but a file" in refused(one, one / "recipe.yaml")
    assert "no run there" in refused(one, tmp_path)
    damaged = fabricate(tmp_path / "damaged")
    (damaged / "recipe.yaml").write_bytes(b"\xff\xfe: [")
    assert "the resolved recipe cannot be read" in refused(one, damaged)
    newer = fabricate(tmp_path / "newer")
    (newer / "recipe.yaml").write_text(yaml.safe_dump({**RECIPE, "warp": 9}))
    write_lines(newer / "history.jsonl", [{"event": "start", "time": 1.0, "version": "9.0"}])
    text = refused(one, newer)
    assert "version 9.0" in text
    assert "warp" in text


@pytest.mark.parametrize(
    ("ends", "told"),
    [
        ([], "goes on, or was killed"),
        ([{"event": "end", "time": 2.0, "code": 3, "told": ""}], "a gate is not"),
    ],
)
def test_an_unfinished_run_is_compared_only_when_asked(
    folder: Path, tmp_path: Path, ends: list[dict[str, object]], told: str
) -> None:
    half = part(tmp_path / "half", steps=60, evaluations=7, rollouts=2)
    (half / "recipe.yaml").write_text((folder / "one" / "recipe.yaml").read_text())
    assert "stage ppo is at step 16 of 30" in refused(folder / "one", half)  # of a version without a history
    write_lines(half / "history.jsonl", [{"event": "start", "time": 1.0, "version": "0.1.0"}, *ends])
    text = refused(folder / "one", half)
    assert told in text
    assert "--unfinished" in text
    made = compare_runs([folder / "one", half], unfinished=True)
    assert any("half: not finished" in note for note in made.notes)
    assert lines_of(made)["rollout/outcome_mean"].of == "ppo, 16 steps, too few for an interval"


def test_a_log_that_cannot_be_read_is_told(folder: Path, tmp_path: Path) -> None:
    odd = fabricate(tmp_path / "odd")
    (odd / "metrics.jsonl").unlink()
    (odd / "metrics.jsonl").mkdir()
    assert "cannot be read: Is a directory" in refused(folder / "one", odd)


def test_the_library_gives_it_as_a_data_frame(folder: Path) -> None:
    import genac_megatron as genac

    frame = genac.compare([folder / "one", str(folder / "two")]).frame()
    row = frame[(frame["figure"] == "heldout/accuracy") & (frame["run"] == "two")].iloc[0]
    assert row["low"] < row["value"] < row["high"]
    assert row["less_low"] < row["less"] < row["less_high"]
    assert frame[frame["run"] == "one"]["less"].isna().all()


def test_figures_are_shown_with_their_digits_and_nothing_is_not_negative() -> None:
    def one(*values: float) -> Estimate:
        return Estimate(*values, np.array([]))

    assert shown(one(0.1234, 0.1, 0.25), 3) == "0.123 [0.100, 0.250]"
    assert shown(one(-0.0001, -0.2, 0.0), 2) == "0.00 [-0.20, 0.00]"
    assert shown(one(-0.4, math.nan, math.nan), 0) == "0"
    assert shown(one(4.56789e-7, -1e-9, 5e-7), None) == "4.57e-07 [-1e-09, 5e-07]"
    assert shown(None, 3) == shown(one(math.nan, 0.0, 1.0), 3) == "–"


def test_names_tell_runs_apart(tmp_path: Path) -> None:
    assert names_of([tmp_path / "a" / "run", tmp_path / "b" / "run"]) == ["a/run", "b/run"]
    clones = [tmp_path / clone / "runs" / "quick" for clone in "ab"]
    assert names_of(clones) == ["a/runs/quick", "b/runs/quick"]
    assert names_of([*clones, tmp_path / "c" / "quick"])[2].endswith("/c/quick")
    below = [Path("/runs"), Path("/runs/runs"), Path("/x/runs/runs")]
    assert names_of(below) == ["/runs", "/runs/runs", "x/runs/runs"]


def test_a_runs_name_takes_no_other_fields_place(folder: Path) -> None:
    runs = [read_run(folder / name) for name in ("one", "two")]
    figure = Comparison(["key", "of"], runs).data()["figures"][0]
    assert (figure["key"], figure["of"]) == ("heldout/accuracy", "ppo, end")
    assert set(figure["runs"]) == {"key", "of"}


# --- the command ---------------------------------------------------------------------------------


def test_the_command_prints_a_table_and_writes_a_page(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in [folder / "one", *(folder / "one").rglob("*")]}
    runs = [str(folder / "one"), str(folder / "two")]
    assert main(["compare", *runs, "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "| held-out accuracy, at the end (ppo, end)" in said
    assert "two less one" in said
    page = (tmp_path / "out" / "index.html").read_text()
    assert page.count("<figure") == 8
    assert "<br><span class=soft>[" in page  # an interval below its figure
    assert "<script" not in page
    data = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert data["runs"] == ["one", "two"]
    assert {"value", "low", "high"} == set(data["figures"][0]["less_the_first"]["two"])
    assert set(data["figures"][0]["runs"]) == {"one", "two"}
    assert len(list((tmp_path / "out" / "plots").glob("*.png"))) == 8
    assert {
        path: path.stat().st_mtime_ns for path in [folder / "one", *(folder / "one").rglob("*")]
    } == before


def test_bad_words_end_with_2_and_one_message(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = str(folder / "one"), str(folder / "two")
    (tmp_path / "file").write_text("")
    for words in (
        ["compare", one], ["compare", one, str(tmp_path / "no")], ["compare", one, two, "--out", two],
        ["compare", one, two, "--out", str(tmp_path / "file")], ["watch", str(tmp_path / "file")],
        ["watch", str(tmp_path / "a" / "b")], ["watch", one, "--port", "70000"],
        ["watch", one, "--host", "192.0.2.1"],
    ):  # fmt: skip
        assert main(words) == 2, words
        said = capsys.readouterr()
        assert said.err.count("genac: error:") == 1, words
        assert "way out" in said.err, words


def test_long_counts_are_readable() -> None:
    assert [shown(exact(value), 0) for value in (280.0, 6692493.0, -5572862.0)] == [
        "280",
        "6,692,493",
        "-5,572,862",
    ]
    assert shown(exact(7.27e-07), None) == "7.27e-07"
