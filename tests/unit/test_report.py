"""The report of a fabricated run, of parts of it, and of odd content."""

from __future__ import annotations

import base64
import json
import math
import random
import re
from collections.abc import Callable
from contextlib import suppress
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import yaml
from fabricated_run import (
    RECIPE,
    T0,
    critic_block,
    evaluation_rows,
    fabricate,
    metric_rows,
    part,
    write_lines,
)
from matplotlib.figure import Figure

from genac_megatron.errors import GateFailed, GenacError, InputError, StopRequested
from genac_megatron.observe.history import attempts, history, meaning, note_start
from genac_megatron.observe.origin import Origin
from genac_megatron.observe.report import write_report
from genac_megatron.observe.report_canvas import per_cent
from genac_megatron.observe.report_data import RunData, brier_interval, read_run, summarise, what_is_missing
from genac_megatron.observe.report_page import chosen_rollouts, page, segments
from genac_megatron.observe.report_plots import PLOTS, Plot, _fold_small, draw_all
from genac_megatron.observe.runinfo import RunFolder

PROMISED = (
    "actor/accuracy_sft",
    "actor/accuracy_ppo",
    "critic/brier_constant",
    "critic/brier_sft",
    "critic/brier_reinforce",
    "critic/brier_ppo",
    "critic/brier_constant_ppo",
    "critic/parse_rate",
    "parity/logp_p99",
    "publish/actor_version",
    "publish/critic_version",
    "time/total_s",
    "memory/peak_gib",
)


class Document(HTMLParser):
    """What tags and addresses a page has, and its visible text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "srcset", "href")]

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fabricate(tmp_path_factory.mktemp("fabricated_run"))


@pytest.fixture(scope="module")
def summary(run: Path) -> dict[str, Any]:
    return write_report(run)


@pytest.fixture
def html(run: Path, summary: dict[str, Any]) -> str:
    assert summary
    return (run / "report" / "index.html").read_text(encoding="utf-8")


def test_the_page_stands_alone(html: str) -> None:
    document = Document(html)
    assert "script" not in document.tags
    assert "link" not in document.tags
    assert all(link.startswith(("data:image/png;base64,", "#")) for link in document.links)
    assert "url(" not in html
    assert "http" not in document.text
    assert document.tags.count("img") == len(PLOTS)
    images = [base64.b64decode(link.split(",", 1)[1]) for link in document.links if link.startswith("data:")]
    assert len(images) == 2 * len(PLOTS)
    assert len(set(images)) == len(images)
    assert all(image.startswith(b"\x89PNG") for image in images)
    assert "width=device-width" in html
    assert "prefers-color-scheme:dark" in html


def test_the_page_says_what_the_summary_says(html: str, summary: dict[str, Any]) -> None:
    text = Document(html).text
    for name in ("brier_sft", "brier_reinforce", "brier_ppo"):
        assert f"{summary[f'critic/{name}']:.4f}" in text
    assert f"{100 * summary['actor/accuracy_ppo']:.1f} %" in text
    assert "objects: 4" in text  # the recipe
    assert "Not all of a run is here" not in text


def test_what_a_model_wrote_is_shown_and_not_run(html: str) -> None:
    assert "<script" not in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    assert "&lt;b&gt;Final&lt;/b&gt;: blue green red &amp; done" in html
    assert "? (0.60)" in html  # a judgement that did not parse, and what was used


def test_summary_figures_come_from_the_rows_they_should(run: Path, summary: dict[str, Any]) -> None:
    assert json.loads((run / "report" / "summary.json").read_text()) == summary
    assert all(not isinstance(v, (dict, list)) for v in summary.values())
    assert all(summary[key] is not None for key in PROMISED)
    rows = evaluation_rows(0)
    at = {(r["stage"], r["name"]): r for r in rows}
    assert summary["actor/accuracy_sft"] == at["ppo", "start"]["actor"]["accuracy"]
    assert summary["actor/accuracy_ppo"] == at["ppo", "end"]["actor"]["accuracy"]
    assert summary["critic/brier_sft"] == at["sft-critic", "end"]["critic"]["brier"]
    assert summary["critic/brier_reinforce"] == at["reinforce", "end"]["critic"]["brier"]
    assert summary["critic/brier_constant"] == at["reinforce", "end"]["critic"]["brier_constant"]
    assert summary["critic/brier_ppo"] == at["ppo", "end"]["critic"]["brier"]
    assert summary["critic/brier_constant_ppo"] == at["ppo", "end"]["critic"]["brier_constant"]
    assert summary["critic/parse_rate"] == at["ppo", "end"]["critic"]["parse_rate"]
    assert summary["critic/brier_ppo_low"] < summary["critic/brier_ppo"] < summary["critic/brier_ppo_high"]
    gain = summary["actor/accuracy_ppo"] - summary["actor/accuracy_sft"]
    assert summary["actor/accuracy_gain"] == pytest.approx(gain)
    assert summary["actor/accuracy_gain_low"] < gain < summary["actor/accuracy_gain_high"]


def test_summary_totals(summary: dict[str, Any]) -> None:
    # 74 steps train 1 s each; 50 of them generate 4 s, judge 6 s, publish 0.5 s; 0.25 s of each is no phase
    assert summary["run/steps"] == 74
    assert summary["time/train_s"] == 74
    assert summary["time/generate_s"] == 200
    assert summary["time/judge_s"] == 300
    assert summary["time/total_s"] == pytest.approx(74 + 200 + 300 + 25 + 74 * 0.25)
    assert summary["share/time_judge"] == pytest.approx(300 / summary["time/total_s"])
    shares = [v for k, v in summary.items() if k.startswith("share/time_")]
    assert sum(shares) == pytest.approx(1.0)
    assert summary["tokens/generate"] == 250_000
    assert summary["tokens/total"] == 74_000 + 250_000 + 600_000
    assert summary["parity/logp_p99"] == pytest.approx(5e-5)
    assert summary["parity/critic_p99"] == 1e-5
    assert summary["publish/actor_version"] == 30
    assert summary["publish/critic_version"] == 50
    assert summary["publish/seconds"] == 25.0
    assert summary["memory/peak_gib"] == pytest.approx(2.3)
    assert summary["memory/peak_rank_gib"] == pytest.approx(1.3)
    assert summary["report/complete"] is True


def test_a_run_in_its_first_stage(tmp_path: Path) -> None:
    got = write_report(part(tmp_path / "run", steps=5, evaluations=0, rollouts=0))
    assert all(key in got for key in PROMISED)
    assert got["actor/accuracy_ppo"] is None
    assert got["critic/brier_sft"] is None
    assert got["publish/actor_version"] is None
    assert got["report/complete"] is False
    assert got["time/train_s"] == 5
    text = Document((tmp_path / "run/report/index.html").read_text()).text
    for words in ("stage reinforce has not begun", "evaluations.jsonl has no rows", "Critic: reliability"):
        assert words in text


def test_the_critic_after_sft_is_the_one_reinforce_starts_with(tmp_path: Path) -> None:
    """Where sft evaluated no critic itself."""
    rows = [r for r in evaluation_rows(0) if r["stage"] != "sft-critic"][:3]
    run = part(tmp_path / "run", steps=40, evaluations=0, rollouts=1)
    write_lines(run / "evaluations.jsonl", rows)
    got = summarise(read_run(run))
    assert rows[1]["name"] == "start"
    assert got["critic/brier_sft"] == rows[1]["critic"]["brier"]
    assert got["critic/brier_reinforce"] == rows[2]["critic"]["brier"]
    assert math.isnan(got["critic/brier_ppo"])
    assert "stage reinforce is at step 16 of 20" in got["report/missing"]


def test_the_start_of_ppo_is_not_its_end(tmp_path: Path) -> None:
    got = summarise(read_run(part(tmp_path / "run", steps=46, evaluations=6, rollouts=4)))
    assert got["actor/accuracy_sft"] > 0
    assert math.isnan(got["actor/accuracy_ppo"])
    assert math.isnan(got["critic/brier_ppo"])
    assert got["critic/brier_reinforce"] > 0
    assert "no evaluation of the actor after a ppo step" in got["report/missing"]


def test_nothing_but_metrics(tmp_path: Path) -> None:
    run = part(tmp_path / "run", steps=60, evaluations=0, rollouts=0, recipe=False)
    data = read_run(run)
    plots, absent = draw_all(data)
    assert {"reward", "optimisation", "mismatch", "costs"} <= {p.id for p in plots}
    assert "Actor: held-out accuracy" in absent
    assert page(data, summarise(data), plots, absent, what_is_missing(data)).count("<img") == len(plots)


def test_tokens_of_evaluations_are_a_phase_of_their_own(tmp_path: Path) -> None:
    run = fabricate(tmp_path / "run")
    before = summarise(read_run(run))["tokens/total"]
    rows = metric_rows(random.Random(0))
    for row in (rows[30], rows[-1]):
        row |= {"tokens/evaluate": 350, "tokens/evaluate_prompt": 150, "time/evaluate_s": 2.0}
    write_lines(run / "metrics.jsonl", rows)
    data = read_run(run)
    summary = summarise(data)
    assert (summary["tokens/evaluate"], summary["tokens/evaluate_prompt"]) == (700, 300)
    assert summary["tokens/total"] == before + 1000
    shown = page(data, summary, None, [], what_is_missing(data))
    assert re.search(r"evaluate</td>.*?<td[^>]*>700</td>", shown), "the table of phases has it"


def test_a_stages_end_is_no_step_of_its_own(tmp_path: Path) -> None:
    """Its evaluation is logged in a further row of the last step."""
    run = fabricate(tmp_path / "run")
    rows = metric_rows(random.Random(0))
    last = max(i for i, row in enumerate(rows) if row["stage"] == "sft-actor")
    end = {key: rows[last][key] for key in ("stage", "kind", "step", "time")} | {"tokens/evaluate": 10}
    write_lines(run / "metrics.jsonl", [*rows[: last + 1], end, *rows[last + 1 :]])
    summary, text = seen(run)
    assert summary["run/steps"] == 74
    assert f"sft-actor ({rows[last]['step']} steps)" in text


def test_a_critic_that_cannot_be_read_is_said_to_be_none(tmp_path: Path) -> None:
    run = fabricate(tmp_path / "run")
    assert "have a score that can be read" not in seen(run)[1]
    evaluations = evaluation_rows(0)
    for row in evaluations:
        if row["kind"] == "ppo":
            row["critic"]["parse_rate"] = 0.125
    write_lines(run / "evaluations.jsonl", evaluations)
    data = read_run(run)
    summary = summarise(data)
    shown = page(data, summary, [], [], what_is_missing(data))
    assert "only 12.5 % after ppo have a score that can be read" in Document(shown).text
    assert f"<span class=bad>{summary['critic/ece_ppo']:.4f}</span>" in shown
    assert f"<span class=bad>{summary['critic/ece_reinforce']:.4f}</span>" not in shown
    assert "<b class=bad>12.5 %</b>" in shown


def test_phases_beyond_the_colours_are_one(tmp_path: Path) -> None:
    """Every colour once, the small ones together, and nothing lost."""
    totals = [{f"phase{i}": float(i + 1) for i in range(14)} | {"other": 3.0}]
    before = sum(totals[0].values())
    *named, last = _fold_small([totals], 10)
    assert (named, last) == ([f"phase{i}" for i in range(4, 14)], "other")
    drawn = {name: totals[0][name] for name in [*named, "other"]}
    assert drawn["other"] == 3.0 + 1 + 2 + 3 + 4
    assert sum(drawn.values()) == before


def test_where_every_phase_has_a_colour_there_is_no_other() -> None:
    assert _fold_small([[{"a": 1.0}, {"b": 2.0}]], 2) == ["a", "b"]


def test_an_axis_of_shares_shows_no_more_than_there_can_be() -> None:
    for values, wanted in (
        ([0.0, 0.0], (0.0, 0.055)),
        ([0.2, 1.0], (0.16, 1.0252)),
        ([0.0, 1.0], (0.0, 1.03)),
    ):
        axes = Figure().subplots()
        axes.plot([0, 1], values)
        per_cent(axes)
        assert axes.get_ylim() == pytest.approx(wanted, abs=1e-9)


def seen(run: Path) -> tuple[dict[str, Any], str]:
    """The summary, and the page's text without its plots."""
    data = read_run(run)
    summary = summarise(data)
    return summary, Document(page(data, summary, [], [], what_is_missing(data))).text


def gated(path: Path, *, action: str, stages: int, auc: float = 0.97) -> Path:
    """A run whose stage reinforce asks for an AUC; its first `stages` stages are over."""
    steps = {3: 44, 4: 74}[stages]
    run = part(path, steps=steps, evaluations={3: 5, 4: 8}[stages], rollouts=4)
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe["stages"][2]["gate"] = {"action": action, "auc": auc}
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return run


def test_a_gate_that_stopped_the_run_is_seen(tmp_path: Path) -> None:
    run = gated(tmp_path / "run", action="stop", stages=3)
    got, text = seen(run)
    auc = got["critic/auc_reinforce"]
    assert got["gate/failed"] == f"reinforce: AUC {auc:.3f} is not above 0.97"
    assert got["gate/stopped"] == "reinforce"
    for words in ("Stage reinforce did not reach its gate", f"AUC {auc:.3f} is not above 0.97", "a coin",
                  "What usually helps", "stages.reinforce.steps=40 --resume"):  # fmt: skip
        assert words in text
    assert "went on" not in text


def test_a_critic_that_went_back_is_seen(tmp_path: Path) -> None:
    run = gated(tmp_path / "run", action="fallback", stages=4)
    got, text = seen(run)
    assert got["gate/failed"].startswith("reinforce: AUC")
    assert (got["gate/fallback"], got["gate/stopped"]) == ("reinforce", None)
    assert "the critic went back to the weights that the stage began with" in text
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe["stages"][2]["gate"]["fallback"] = "sft-critic"
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert "the critic went back to the weights of the stage sft-critic" in seen(run)[1]


def test_a_gate_that_only_warned_is_seen_too(tmp_path: Path) -> None:
    run = gated(tmp_path / "run", action="warn", stages=4)
    got, text = seen(run)
    assert got["gate/failed"].startswith("reinforce: AUC")
    assert got["gate/stopped"] is None
    assert "Stage reinforce did not reach its gate; the run went on" in text
    assert "--resume" not in text


@pytest.mark.parametrize("action", ["stop", "off"])
def test_a_gate_that_is_reached_or_off_is_not_told_of(tmp_path: Path, action: str) -> None:
    got, text = seen(gated(tmp_path / "run", action=action, stages=3, auc=0.5 if action == "stop" else 1.0))
    assert (got["gate/failed"], got["gate/stopped"]) == ("", None)
    assert "its gate" not in text


def test_a_stage_that_went_on_since_is_at_no_gate(tmp_path: Path) -> None:
    run = gated(tmp_path / "run", action="stop", stages=3)
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"stage": "reinforce", "kind": "reinforce", "step": 21}) + "\n")
    assert seen(run)[0]["gate/failed"] == ""


def test_a_held_out_target_that_was_missed_is_seen(tmp_path: Path) -> None:
    run = part(tmp_path / "run", steps=12, evaluations=2, rollouts=0)
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe["stages"][0]["heldout"] = {"metric": "loss", "target": 0.1}
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    rows = metric_rows(random.Random(0))[:12]
    rows[5]["actor/heldout_loss"], rows[11]["actor/heldout_loss"] = 0.2, 0.4
    write_lines(run / "metrics.jsonl", rows)
    assert seen(run)[0]["gate/failed"] == "sft-actor: held-out loss 0.200 is above 0.1", "of the best weights"


@pytest.fixture
def reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., list[str]]:
    """End a run that has logged `rows` with an error, or without, on the only rank: the reports written."""
    from genac_megatron.stages import pipeline

    folder = RunFolder(tmp_path / "runs/x").create()
    note_start(folder, Origin(["run", "x.yaml"], "x.yaml"))

    def end(error: Exception | None, rows: int, failure: Exception | None = None) -> list[str]:
        written = []

        def report(of: RunFolder, plots: bool) -> None:
            if failure is not None:
                raise failure
            _, noted = attempts(history(of))[-1]
            assert noted is not None
            written.append(meaning(noted["code"]))

        monkeypatch.setattr(pipeline, "_report", report)
        monkeypatch.setattr(pipeline.dist, "get_world_size", lambda: 1)
        for step in range(rows):
            folder.append("metrics.jsonl", {"stage": "sft", "step": step})
        log = cast(Any, SimpleNamespace(rows=rows, folder=folder))
        with suppress(GenacError, ValueError), pipeline._reported(log, True):
            if error is not None:
                raise error
        return written

    return end


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (GateFailed("low"), "ended: a gate is not reached"),
        (StopRequested("as asked"), "stopped as asked, with a checkpoint"),
        (GenacError("full"), "failed"),
        (ValueError("a fault of ours"), "failed"),
        (None, "done"),
    ],
)
def test_a_run_notes_its_end_before_its_report_is_written(
    error: Exception | None, said: str, reported: Callable[..., list[str]]
) -> None:
    assert reported(error, 1) == [said]


def test_where_nothing_was_logged_there_is_no_report(reported: Callable[..., list[str]]) -> None:
    assert reported(InputError("no"), 0) == []


def test_a_report_that_fails_is_said(
    reported: Callable[..., list[str]], caplog: pytest.LogCaptureFixture
) -> None:
    reported(GateFailed("not reached"), 1, ValueError("odd\nand long"))
    assert [record.getMessage() for record in caplog.records] == [
        "genac: warning: the report could not be written: odd"
    ]


def test_only_a_recipe(tmp_path: Path) -> None:
    run = part(tmp_path / "run", steps=0, evaluations=0, rollouts=0)
    assert write_report(run, draw=False)["run/steps"] == 0
    assert "The recipe wants no plots" in (run / "report" / "index.html").read_text()


def test_rows_with_gaps_and_broken_lines(tmp_path: Path) -> None:
    run = fabricate(tmp_path / "run")
    rows = metric_rows(random.Random(0))
    rows[30] |= {"critic/loss": None, "nonfinite": ["critic/loss"]}
    write_lines(run / "metrics.jsonl", rows)
    evaluations = evaluation_rows(0)
    evaluations[4]["critic"] |= {"mse": None, "values": [None, *evaluations[4]["critic"]["values"][1:]]}
    evaluations[4]["critic"]["errors"][0] = None
    del evaluations[5]["critic"]["scores_hist"]
    evaluations[6]["actor"]["outcomes"] = {}
    write_lines(run / "evaluations.jsonl", evaluations)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "ppo", "st')
    got = write_report(run)
    assert got["metrics/nonfinite"] == 1
    assert got["run/steps"] == 74
    assert "1 unreadable line(s) of metrics.jsonl" in got["report/missing"]


def test_a_briers_interval_is_of_the_score_that_is_shown() -> None:
    """Where much does not parse, a score with the values used instead lies far below it."""
    block = critic_block(np.random.default_rng(0), 0.6, 0.9, parse=0.7)
    low, high = brier_interval({"critic": block})
    assert block["brier"] > 0.3
    assert low < block["brier"] < high
    assert (high + low) / 2 == pytest.approx(block["brier"], abs=0.01)  # a mean's bootstrap is centred on it


def test_an_evaluation_made_again_after_a_resume_counts_once(tmp_path: Path) -> None:
    run = fabricate(tmp_path / "run")
    again = [*evaluation_rows(0), {**evaluation_rows(1)[-1]}]
    write_lines(run / "evaluations.jsonl", again)
    data = read_run(run)
    assert len(data.evaluations) == len(again) - 1
    assert summarise(data)["actor/accuracy_ppo"] == again[-1]["actor"]["accuracy"]


def test_no_run(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such run folder"):
        write_report(tmp_path / "none")
    with pytest.raises(InputError, match=r"neither recipe\.yaml nor metrics\.jsonl"):
        write_report(tmp_path)


def test_evaluations_lie_where_their_step_is(run: Path) -> None:
    data = read_run(run)
    at = {(r["stage"], r["name"]): data.position(r) for r in data.evaluations}
    assert at["sft-actor", "end"] == 12
    assert at["reinforce", "start"] == 24
    assert at["reinforce", "end"] == 44
    assert at["ppo", "start"] == 44
    assert at["ppo", "step 10"] == 54
    assert at["ppo", "end"] == 74
    assert [s.kind for s in data.spans] == [s["kind"] for s in RECIPE["stages"]]  # type: ignore[index]
    assert data.series("time")[1][0] > T0


def test_what_a_stage_spends_outside_of_its_steps_is_no_step(tmp_path: Path) -> None:
    """Judging before the first step and after the last has a row; the axis ends at the steps' number."""
    run = fabricate(tmp_path / "run")
    rows = metric_rows(random.Random(0))
    ends = [i for i, row in enumerate(rows) if i + 1 == len(rows) or rows[i + 1]["stage"] != row["stage"]]
    for i in reversed(ends):
        spent = {key: rows[i][key] for key in ("stage", "kind", "step")} | {
            "time": 1.0,
            "time/evaluate_s": 2.0,
        }
        rows.insert(i + 1, spent)
        if rows[i]["stage"] == "ppo":
            rows.insert(i - 29, spent | {"step": 0})
    write_lines(run / "metrics.jsonl", rows)
    data = read_run(run)
    assert [data.steps(span) for span in data.spans] == [12, 12, 20, 30]
    assert data.series("critic/loss")[0].max() == data.spans[-1].end == 74
    assert {row["name"]: data.position(row) for row in data.evaluations if row["stage"] == "ppo"} == {
        "start": 44, "step 10": 54, "step 20": 64, "end": 74
    }  # fmt: skip
    assert summarise(data)["run/steps"] == 74
    assert "Stages are drawn equally wide" not in drawn(data)


def drawn(data: RunData) -> str:
    """The page's text with one plot in it."""
    return Document(page(data, summarise(data), [Plot("a", "b", "c", b"", b"")], [], [])).text


def test_unequal_stages_are_said(tmp_path: Path) -> None:
    run = fabricate(tmp_path / "run")
    write_lines(run / "metrics.jsonl", metric_rows(random.Random(0))[8:])
    assert "(steps: sft-actor 4, sft-critic 12, reinforce 20, ppo 30)" in drawn(read_run(run))


def test_segments_give_the_response_back() -> None:
    rollout = {
        "response": "abcdef",
        "states": [{"cut_text": 4, "v": 2}, {"cut_text": 0, "v": 1}, {"cut_text": 99, "v": 3}],
    }
    pieces = segments(rollout)
    assert "".join(text for _, text in pieces) == "abcdef"
    assert [(s and s["v"], t) for s, t in pieces] == [(1, "abcd"), (2, "ef"), (3, "")]
    assert segments({"response": "abc", "states": [{"cut_text": 1}]})[0] == (None, "a")
    assert segments({"response": "abc", "states": None}) == [(None, "abc")]


def test_shown_rollouts_are_late_and_both_right_and_wrong(run: Path) -> None:
    shown = [(r["stage"], r["outcome"]) for r in chosen_rollouts(read_run(run))]
    assert shown == [("ppo", 1.0), ("ppo", 0.0), ("reinforce", 1.0), ("reinforce", 0.0)]


def test_plots_beside_the_page_are_the_embedded_ones(run: Path, html: str) -> None:
    for name, *_ in PLOTS:
        image = (run / "report" / "plots" / f"{name}.png").read_bytes()
        assert base64.b64encode(image).decode() in html
        width, height = np.frombuffer(image[16:24], dtype=">u4")
        assert 600 < width < 1200
        assert 300 < height < 2000
    assert len(re.findall("<figure", html)) == len(PLOTS)
