"""What a run notes of its beginning and end, its last words, and what of it the report shows."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from fabricated_run import fabricate, part

from genac_megatron.cluster.ending import job_words
from genac_megatron.errors import EXIT_GATE, EXIT_LOST, EXIT_OK
from genac_megatron.observe.ending import Ending
from genac_megatron.observe.history import (
    HISTORY,
    attempts,
    history,
    meaning,
    note_end,
    note_start,
    other_values,
)
from genac_megatron.observe.origin import TYPED, Origin, again, code, typed
from genac_megatron.observe.report import write_report
from genac_megatron.observe.runinfo import RunFolder
from genac_megatron.recipe.document import files
from genac_megatron.watch.follow import Log

ORIGIN = Origin(["run", "r.yaml", "a=b c"], "r.yaml", ["a=b c"], {"r.yaml": "name: <x>\n"})


@pytest.fixture(autouse=True)
def by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TYPED, "genac")


def git(folder: Path, *words: str) -> None:
    who = ("-c", "user.name=n", "-c", "user.email=e@example.com")
    subprocess.run(["git", "-C", str(folder), *who, *words], check=True, capture_output=True)


# --- the command to type ---------------------------------------------------------------------------


def test_the_last_words_of_a_slurm_job(tmp_path: Path) -> None:
    """What srun's ranks could not say: the end is noted, the report is there; and what submits it again."""
    folder, _ = begun(part(tmp_path / "run", steps=3, evaluations=0, rollouts=0), job="7")
    again, job = "genac slurm r.yaml seed=3", {"SLURM_JOB_ID": "7"}
    lost = job_words(folder.path, EXIT_LOST, again, plots=False, environ=job).splitlines()
    assert lost[0].startswith("genac: ended: an engine or a rank was lost after ")
    assert lost[1:] == [
        f"  run folder: {folder.path}",
        f"  report:     {folder.report / 'index.html'}",
        f"  to go on:   {again}",
    ]
    assert [end and end["code"] for _, end in attempts(history(folder))] == [EXIT_LOST, EXIT_LOST]
    stopped = job_words(folder.path, 75, again, requeued=True, plots=False, environ=job).splitlines()
    assert stopped[-1] == (
        "  Slurm starts it again, and it goes on from its checkpoint; to end it: scancel 7"
    )
    done = job_words(folder.path, EXIT_OK, again, plots=False, environ=job).splitlines()
    assert done[-1].startswith("  its actor:  sbatch /")
    assert done[-1].endswith(f"/slurm/convert.sh to-hf {folder.path} run-hf")
    before = history(folder)
    for another in ({"SLURM_JOB_ID": "8"}, job | {"SLURM_RESTART_COUNT": "1"}):
        other = job_words(folder.path, 2, again, plots=False, environ=another).splitlines()
        assert other[:2] == [
            "genac: ended: the recipe or an input is wrong",
            "  no rank began the run in this attempt",
        ]
        assert other[-1] == f"  to go on:   {again}"
    assert history(folder) == before, "another job's end is not this one's, nor another attempt's"


def test_a_start_notes_its_job_and_how_often_that_was_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "2"}
    for name, value in job.items():
        monkeypatch.setenv(name, value)
    folder = RunFolder(part(tmp_path / "run", steps=3, evaluations=0, rollouts=0))
    note_start(folder, ORIGIN)
    lost = job_words(folder.path, EXIT_LOST, "again", plots=False, environ=job).splitlines()
    assert " after " in lost[0]
    assert attempts(history(folder))[-1][1] is not None


@pytest.mark.parametrize(
    ("before", "wanted"),
    [
        ("genac", "genac run r.yaml 'x=1 $2' --resume"),
        (
            "make quickstart ENGINE=sglang",
            "make quickstart ENGINE=sglang ARGS=" + shlex.quote("'x=1 $$2' --resume"),
        ),
        ("make genac", "make genac ARGS=" + shlex.quote("run r.yaml 'x=1 $$2' --resume")),
    ],
)
def test_the_command_is_what_a_shell_takes(before: str, wanted: str) -> None:
    assert again(["run", "r.yaml", "x=1 $2"], "r.yaml", "--resume", before=before) == wanted


def test_a_target_of_make_without_arguments() -> None:
    assert again(["run", "r.yaml"], "r.yaml", before="make quickstart") == "make quickstart"


def test_make_hands_on_what_a_run_says_to_type(tmp_path: Path) -> None:
    """By the real make and shell: each word arrives as it was."""
    (tmp_path / "Makefile").write_text("quickstart:\n\t@printf '[%s]\\n' $(ARGS)\n")
    said = again(["run", "r.yaml", "x=a b", "y={k: '$v'}"], "r.yaml", "--resume", before="make quickstart")
    done = subprocess.run(said, shell=True, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["[x=a b]", "[y={k: '$v'}]", "[--resume]"]


def test_how_it_was_typed(tmp_path: Path) -> None:
    home = str(Path(__file__).resolve().parents[2])
    assert typed({}, ["/v/python", "/v/bin/genac", "run"]) == "genac"
    assert typed({}, ["python", "-m", "genac_megatron", "run"]) == "python -m genac_megatron"
    assert typed({"PYTHONPATH": home}, ["python", "-m"]) == f"PYTHONPATH={home} python -m genac_megatron"
    assert typed({TYPED: "make quickstart"}, ["python"]) == "make quickstart"


# --- where it comes from ---------------------------------------------------------------------------


def test_the_commit_and_what_differs_from_it(tmp_path: Path) -> None:
    git(tmp_path, "init", "-q")
    (tmp_path / "a.py").write_text("1")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "one")
    clean = code(tmp_path)
    assert (len(clean["commit"]), clean["dirty"]) == (40, False)
    (tmp_path / "a.py").write_text("2")
    dirty = code(tmp_path)
    assert (dirty["commit"], dirty["dirty"], dirty["changed"]) == (clean["commit"], True, ["a.py"])
    (tmp_path / "a.py").write_text("3")
    assert code(tmp_path)["changes"] != dirty["changes"]


def test_outside_of_a_clone_there_is_no_commit(tmp_path: Path) -> None:
    assert code(tmp_path)["commit"] is None


def test_a_recipe_and_all_that_it_extends(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base/b.yaml").write_text("seed: 1\n")
    (tmp_path / "a.yaml").write_text("extends: [base/b.yaml]\nname: a\n")
    found = files(tmp_path / "a.yaml")
    assert list(found.values()) == ["extends: [base/b.yaml]\nname: a\n", "seed: 1\n"]


def test_values_that_a_resume_changes() -> None:
    before = {"stages": [{"name": "ppo", "steps": 4, "gone": 1}], "seed": 1, "list": [1, 2]}
    now = {"stages": [{"name": "ppo", "steps": 8, "new": 1}], "seed": 1, "list": [1, 3]}
    assert other_values(before, now) == ["stages.ppo.steps: 4 -> 8", "list: [1, 2] -> [1, 3]"]
    assert other_values(now, now) == []


# --- the last words --------------------------------------------------------------------------------


def begun(path: Path, **noted: Any) -> tuple[RunFolder, Ending]:
    """A run of which an attempt is over, and a second one has begun."""
    folder = RunFolder(path)
    note_start(folder, ORIGIN)
    note_end(folder, EXIT_LOST, "a peer was lost")
    ending = Ending(path, plots=False)
    note_start(folder, ORIGIN, **noted)
    return folder, ending


def test_a_run_whose_rank_was_killed_is_told_of_by_the_launcher(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No rank could write anything: the end is noted, and the report is there and says it."""
    folder, ending = begun(fabricate(tmp_path / "run"))
    assert not (folder.report / "index.html").exists()
    ending.tell(137)
    told = capsys.readouterr().err.splitlines()
    assert told[0].startswith("genac: ended: a rank was killed by SIGKILL, as where memory runs out after ")
    assert told[1:] == [
        f"  run folder: {folder.path}",
        f"  report:     {folder.report / 'index.html'}",
        "  to go on:   genac run r.yaml 'a=b c'",
    ]
    assert "This run ended: a rank was killed by SIGKILL" in (folder.report / "index.html").read_text()
    assert [end and end["code"] for _, end in attempts(history(folder))] == [EXIT_LOST, 137]


def test_what_a_rank_noted_stands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, ending = begun(part(tmp_path / "run", steps=3, evaluations=0, rollouts=0))
    note_end(folder, EXIT_OK)
    ending.tell(EXIT_OK)
    assert len(history(folder)) == 4
    shown = capsys.readouterr()
    assert shown.err == ""
    assert "genac: done after 0s" in shown.out
    assert f"genac convert to-hf {folder.path} run-hf" in shown.out


@pytest.mark.parametrize("cut", [1, 20])
def test_a_line_that_was_cut_off_swallows_no_further_start(
    cut: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As where the disk was full: the half line is lost, what comes after it is not."""
    folder, _ = begun(part(tmp_path / "run", steps=3, evaluations=0, rollouts=0))
    note_end(folder, EXIT_LOST, "gone")
    path = folder.path / HISTORY
    path.write_bytes(path.read_bytes()[:-cut])
    ending = Ending(folder.path, plots=False)
    note_start(folder, ORIGIN)
    note_end(folder, EXIT_OK)
    ending.tell(EXIT_OK)
    assert "genac: done after 0s" in capsys.readouterr().out
    second = EXIT_LOST if cut == 1 else None  # all but the line's end is there, or its last words are not
    assert [end and end["code"] for _, end in attempts(history(folder))] == [EXIT_LOST, second, EXIT_OK]
    followed = Log(path)
    followed.look()
    assert followed.rows == history(folder), "as a page sees it that follows the run"


def test_of_a_run_that_was_never_begun_nothing_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = RunFolder(tmp_path / "run")
    Ending(folder.path, plots=False).tell(2)
    note_start(folder.create(), ORIGIN)
    Ending(folder.path, plots=False).tell(2)
    assert capsys.readouterr() == ("", "")


def test_a_folder_that_is_gone_hides_no_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, ending = begun(part(tmp_path / "run", steps=3, evaluations=0, rollouts=0))
    (folder.report).write_text("in the way")
    ending.tell(1)
    assert "genac: failed\n  its report could not be written" in capsys.readouterr().err
    shutil.rmtree(folder.path)
    ending.tell(1)


def test_a_gate_names_the_commands_that_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = part(tmp_path / "run", steps=24, evaluations=2, rollouts=0)
    recipe = yaml.safe_load((path / "recipe.yaml").read_text())
    recipe["stages"][1]["gate"] = {"parse_rate": 1.0}
    (path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    rows = [json.loads(line) for line in (path / "evaluations.jsonl").read_text().splitlines()]
    rows[-1] |= {"stage": "sft-critic", "name": "end", "step": 12}
    rows[-1]["critic"]["parse_rate"] = 0.25
    (path / "evaluations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder, ending = begun(path)
    note_end(folder, EXIT_GATE, "not reached")
    ending.tell(EXIT_GATE)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("genac: ended: a gate is not reached")
    command = "genac run r.yaml 'a=b c' stages.sft-critic."
    assert [line.split(command)[-1] for line in lines[2:]] == [
        "epochs=4", "gate.parse_rate=0.249", "gate.action=warn"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("code_", "said"), [(139, "SIGSEGV"), (200, "code 200"), (7, "code 7"), (130, "left at once")]
)
def test_every_code_has_words(code_: int, said: str) -> None:
    assert said in meaning(code_)


# --- the report ------------------------------------------------------------------------------------


def test_the_report_says_where_a_run_comes_from(tmp_path: Path) -> None:
    folder, _ = begun(fabricate(tmp_path / "run"), ranks=2, gpus=[], changed_values=["seed: 1 -> 2"])
    note_end(folder, EXIT_OK)
    summary = write_report(folder.path, draw=False)
    assert summary["run/commit"] == code()["commit"]
    assert (summary["run/attempts"], summary["run/exit_code"], summary["run/ended"]) == (2, 0, "done")
    page = (folder.report / "index.html").read_text()
    for words in (
        *("Where it comes from", "genac run r.yaml &#x27;a=b c&#x27;", "seed: 1 -&gt; 2", "name: &lt;x&gt;"),
        *("ended: an engine or a rank was lost", "megatron-core", "The recipe as it was given"),
    ):
        assert words in page, words
    assert "This run" not in page, "it ended well"
    (folder.path / HISTORY).unlink()
    write_report(folder.path, draw=False)
    assert "Where it comes from" not in (folder.report / "index.html").read_text()
