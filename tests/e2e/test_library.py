"""The library, frozen: its names and signatures; and the example, run as a person runs it."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import genac_megatron as genac
from genac_megatron.errors import GateFailed, InputError
from tests.e2e.test_gates import SMALL

ROOT = Path(__file__).resolve().parents[2]
GOES_ON = "stages.sft-critic.gate.action=warn"
FROZEN = {
    "compare": "(runs: 'Sequence[str | Path]', *, unfinished: 'bool' = False) -> 'Comparison'",
    "dump_recipe": "(recipe: 'Recipe') -> 'str'",
    "load_recipe": "(path: 'str | Path', overrides: 'Sequence[str]' = ()) -> 'Recipe'",
    "open_run": "(path: 'str | Path') -> 'FinishedRun'",
    "run": "(recipe: 'str | Path', overrides: 'Sequence[str]' = (), *, resume: 'bool' = False, "
    "quiet: 'bool' = False) -> 'FinishedRun'",
    "score": "(transcripts: 'str | Path | Sequence[Mapping[str, Any]]', recipe: 'str | Path', "
    "overrides: 'Sequence[str]' = (), *, out: 'str | Path | None' = None, "
    "checkpoint: 'str | Path | None' = None, p_bar: 'float | None' = None, step: 'int | None' = None, "
    "limit: 'int' = 4096, judgements: 'int' = 1, lines: 'bool' = False, url: 'str | None' = None, "
    "model: 'str | None' = None, api_key_env: 'str | None' = None, quiet: 'bool' = False) -> 'pd.DataFrame'",
    "to_hf": "(checkpoint: 'str | Path', folder: 'str | Path', role: 'str' = 'actor', *, "
    "dtype: 'str' = 'keep') -> 'Path'",
    "to_megatron": "(hf: 'str | Path', folder: 'str | Path', *, dtype: 'str' = 'keep') -> 'Path'",
}


def test_the_surface_is_frozen() -> None:
    """Who changes it changes users' programs: add, and say so; take nothing away."""
    functions = {name: getattr(genac, name) for name in genac.__all__ if name not in ("Recipe", "GenacError")}
    finished, comparison = functions.pop("FinishedRun"), functions.pop("Comparison")
    assert {name: str(inspect.signature(one)) for name, one in functions.items()} == FROZEN
    assert sorted(name for name in vars(finished) if not name.startswith("_")) == [
        "ended", "evaluations", "figures", "recipe", "report", "rollouts", "summary"
    ]  # fmt: skip
    assert {"data", "frame", "lines", "text", "write"} <= set(vars(comparison))
    assert all(inspect.getdoc(one) for one in functions.values())


def test_importing_it_imports_nothing_heavy() -> None:
    heavy = "[name for name in ('torch', 'pandas', 'transformers') if name in sys.modules]"
    script = f"import sys, genac_megatron as g; g.load_recipe; print({heavy})"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_what_is_wrong_is_raised_before_anything_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="did you mean 'steps'"):
        genac.run(ROOT / "recipes/quickstart.yaml", ["stages.ppo.stepz=5"])
    with pytest.raises(InputError, match="no such run"):
        genac.run(ROOT / "recipes/quickstart.yaml", resume=True)
    with pytest.raises(InputError, match="no run there"):
        genac.open_run(tmp_path)
    with pytest.raises(AttributeError, match="it has Comparison, FinishedRun"):
        genac.train  # noqa: B018
    with pytest.raises(InputError, match="it has no problem and response"):
        genac.score([{"problem": "2+2?"}], ROOT / "recipes/quickstart.yaml", p_bar=0.5)
    with pytest.raises(InputError, match="no success rate"):
        genac.score([{"problem": "2+2?", "response": "4"}], ROOT / "recipes/quickstart.yaml", p_bar=2)
    assert list(tmp_path.iterdir()) == []


def test_the_example_and_a_gate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a recipe of a few steps in the quickstart's place; then a gate of it as an exception."""
    monkeypatch.chdir(tmp_path)
    Path("recipes").mkdir()
    Path("recipes/quickstart.yaml").write_text(yaml.safe_dump(SMALL))
    with pytest.raises(GateFailed, match="parse rate"):
        genac.run("recipes/quickstart.yaml", quiet=True)
    assert genac.open_run("runs/run").ended == "ended: a gate is not reached"
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples/library.py"), "name=again", GOES_ON],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "did you mean 'steps'?" in done.stdout
    assert "done runs/again" in done.stdout
    assert Path("runs/again/report/index.html").exists()
    assert Path("runs/again/actor-hf/model.safetensors").exists()
    again = genac.open_run("runs/again")
    figures = again.figures()
    assert list(figures["stage"].unique()) == ["sft-critic", "ppo"]
    assert figures["critic/loss"].notna().any()
    assert {"actor.accuracy", "critic.brier"} <= set(again.evaluations().columns)
    assert again.summary["run/exit_code"] == 0
    assert again.recipe["stages"][0]["gate"]["action"] == "warn"
    rows = [{"problem": "2+2?", "response": "4"}, {"problem": "3+3?", "response": "7"}]
    try:
        values = genac.score(
            rows, "recipes/quickstart.yaml", checkpoint=again.path, out="s.jsonl", quiet=True
        )
        assert list(values["response"]) == ["4", "7"]
        assert values["value"].dropna().between(0, 1).all()
    except InputError as error:  # a critic of three steps may write no score at all
        assert "no judgement parses" in str(error)  # noqa: PT017
    assert [json.loads(line)["problem"] for line in Path("s.jsonl").read_text().splitlines()] == [
        "2+2?",
        "3+3?",
    ]
