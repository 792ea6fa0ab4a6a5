"""`genac evaluate gradients` in this process, by one rank with real tiny models of random weights.

Their responses are never right, so the verifier alone is replaced here: the outcome is a parity of the text.
The command itself, two ranks and trained models: tests/e2e/test_evaluate_gradients.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from genac_megatron.critic.prompt import TEMPLATES, load_template
from genac_megatron.errors import InputError, StopRequested
from genac_megatron.evaluation.estimators import choose
from genac_megatron.evaluation.gradients import (
    Audit,
    GradientOptions,
    _with_roles,
    audit_gradients,
    check_options,
    rollout_of,
    sources,
)
from genac_megatron.recipe.schema import Recipe
from genac_megatron.stages.judging import StateJudge
from genac_megatron.stages.session import session
from genac_megatron.stages.stopping import StopFlag
from genac_megatron.tasks.state_tracking import StateTracking
from genac_megatron.training.layout import init_world
from genac_megatron.training.role import Role

SHAPE = {"layers": 1, "hidden": 16, "ffn": 32, "heads": 2, "kv_heads": 2, "init_std": 0.3}
NAMES = ("rloo", "vc_ppo", "genac-0", "exact-1-raw", "rloo-raw")


def recipe(**changes: Any) -> Recipe:
    role: dict[str, Any] = {
        "model": {"family": "qwen3", "tokenizer": "builtin:tiny", "shape": SHAPE},
        "training": {"dtype": "fp32", "tokens_per_microbatch": 512},
        "engine": {"dtype": "fp32"},
    }
    scalar = {**role, "model": {**role["model"], "head": "value"}}
    given: dict[str, Any] = {
        "name": "audit",
        "task": {"kind": "state_tracking", "objects": 3, "min_swaps": 1, "max_swaps": 2, "heldout_size": 8},
        "roles": {"actor": role, "critic": role, "scalar": scalar},
        "judging": {"template": "brief", "max_new_tokens": 4, "states": {"cutter": "fixed", "fixed_length": 3,
                                                                         "min_segment": 1}},
        "stages": [{"kind": "sft", "role": "actor", "data": "demonstrations",
                    "rollout": {"max_new_tokens": 9}}],
    }  # fmt: skip
    return Recipe.model_validate({**given, **changes})


@pytest.fixture(autouse=True)
def _outcomes_by_parity(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StateTracking, "verify", lambda self, prompt, text: float(len(text) % 2))


class StopsAfter(StopFlag):
    """Asks for the end once it was looked at so often."""

    def __init__(self, looks: int) -> None:
        self.left = looks

    @property
    def asked(self) -> bool:  # type: ignore[override]
        self.left -= 1
        return self.left < 0


def audit(
    folder: Path, options: GradientOptions, stop: StopFlag | None = None, given: Recipe | None = None
) -> None:
    """As the command does it, but that critics keep their random weights."""
    with session(given or recipe(), init_world(), stop or StopFlag(), "gradients", folder / "session") as run:
        estimators = choose(options.estimators, sources(run, options))
        run.publish("actor", "critic")
        work = Audit(run, options, estimators)
        try:
            work.work()
        finally:
            work.parts.release()  # as the process's end does


def options(out: Path) -> GradientOptions:
    return GradientOptions(out, reference=32, chunks=2, batches=4, prompts=2, samples=2, estimators=NAMES)


def test_an_audit_that_was_stopped_goes_on_to_the_same_figures_with_outcomes_by_parity(
    tmp_path: Path,
) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    audit(tmp_path, options(whole))
    for looks in (1, 2):  # after two pieces, and after three more
        with pytest.raises(StopRequested, match="pieces"):
            audit(tmp_path, options(stopped), StopsAfter(looks))
        assert list((stopped / "vectors").glob("*.npy"))
    audit(tmp_path, options(stopped))
    for name in ("gradients.jsonl", "manifest.json", "figures.json", "table.md"):
        assert (stopped / name).read_bytes() == (whole / name).read_bytes(), name
    assert not (stopped / "vectors").exists()
    assert not (stopped / "parts").exists()

    report = json.loads((whole / "figures.json").read_text())
    assert list(report["estimators"]) == [one.name for one in choose(NAMES, every_source())]
    rows = [json.loads(line) for line in (whole / "gradients.jsonl").read_text().splitlines()]
    assert [(row["kind"], row["number"]) for row in rows] == [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2), (1, 3)]
    outcomes = [outcome for row in rows[:2] for outcome in row["outcomes"]]
    assert report["success_rate"] == pytest.approx(np.mean(outcomes))
    assert 0 < np.mean(outcomes) < 1
    products = json.loads((whole / "manifest.json").read_text())["products"]
    assert all(products["chunks"][i][i] > 0 for i in range(2))
    for name in NAMES:  # blocks are of one batch here: their products with themselves are those of the rows
        squares = [row["inner"][name][0][-1] for row in rows[2:]]
        assert np.diag(products["blocks"][name]) == pytest.approx(squares, rel=1e-5), name
    other = GradientOptions(whole, reference=32, chunks=2, batches=6, prompts=2, estimators=NAMES)
    with pytest.raises(InputError, match="another batches"):
        audit(tmp_path, other)


def every_source() -> list[Any]:
    return ["outcomes", "groups", "scalar", "generative", "exact"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"reference": 100, "chunks": 16}, "--reference 100"),
        ({"reference": 16, "chunks": 16}, "--reference 16"),
        ({"chunks": 1}, "--chunks 1"),
        ({"batches": 1}, "--batches 1"),
        ({"prompts": 1, "samples": 1}, "batch of one"),
    ],
)
def test_sizes_that_give_no_figures_are_refused(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        check_options(GradientOptions(tmp_path, **changes), recipe())
    assert "way out" in str(caught.value)


def test_critics_in_each_others_place_are_refused(tmp_path: Path) -> None:
    roles = recipe().roles
    swapped = recipe().model_copy(update={"roles": {**roles, "critic": roles["scalar"]}})
    with pytest.raises(InputError, match=r"roles\.critic\.model\.head"):
        check_options(GradientOptions(tmp_path), swapped)
    without = recipe().model_copy(update={"roles": {"actor": roles["actor"]}})
    wanted = GradientOptions(tmp_path, scalar="somewhere")
    with pytest.raises(InputError, match="no role 'scalar'"):
        audit_gradients(without, init_world(), StopFlag(), wanted, tmp_path / "session")


def test_critics_are_asked_only_where_an_estimator_needs_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both are loaded here; the command does not even load them (`_with_roles`)."""
    names = ("rloo", "exact-0")
    wanted = GradientOptions(
        tmp_path / "out", reference=8, chunks=2, batches=2, prompts=2, samples=2, estimators=names
    )
    asked: list[str] = []
    monkeypatch.setattr(StateJudge, "judge_prompt", lambda *given, **more: asked.append("critic"))
    monkeypatch.setattr(StateJudge, "judge_response", lambda *given, **more: asked.append("critic"))
    monkeypatch.setattr(Role, "values", lambda *given, **more: asked.append("scalar"))
    audit(tmp_path, wanted)
    assert asked == []
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["plan"]["judging"] is None
    both = GradientOptions(tmp_path, critic="a", scalar="b", estimators=names)
    assert [*_with_roles(recipe(), both).roles] == ["actor"]
    every = GradientOptions(tmp_path, critic="a", scalar="b")
    assert [*_with_roles(recipe(), every).roles] == ["actor", "critic", "scalar"]
    with pytest.raises(InputError, match="did you mean 'rloo'"):
        _with_roles(recipe(), GradientOptions(tmp_path, estimators=("rlo",)))


@pytest.mark.parametrize(("key", "value"), [("teacher", "exact"), ("budget", 1000)])
def test_judging_that_is_no_critics_of_one_batch_is_refused(tmp_path: Path, key: str, value: Any) -> None:
    judging = {"template": "brief", "max_new_tokens": 4, key: value}
    given, critic = recipe(judging=judging), tmp_path / "critic"
    with pytest.raises(InputError, match=rf"judging\.{key}") as caught:
        audit_gradients(
            given,
            init_world(),
            StopFlag(),
            GradientOptions(tmp_path, critic=str(critic)),
            tmp_path / "session",
        )
    assert f"judging.{key}=null" in str(caught.value)
    free = GradientOptions(tmp_path, critic=str(critic), estimators=("rloo", "exact-0"))
    check_options(free, _with_roles(given, free))


def test_the_actor_is_sampled_as_it_trains() -> None:
    rollout = {"max_new_tokens": 9, "temperature": 0.7, "prompts": 3}
    stage = {"kind": "sft", "role": "actor", "data": "demonstrations", "rollout": rollout}
    given = recipe(stages=[stage], evaluation={"temperature": 0.2})
    assert rollout_of(given, GradientOptions(Path())) == given.stages[-1].rollout
    shorter = rollout_of(given, GradientOptions(Path(), max_new_tokens=5))
    assert (shorter.temperature, shorter.max_new_tokens) == (0.7, 5)


def plan_of(folder: Path, given: Recipe, names: tuple[str, ...] = NAMES) -> dict[str, Any]:
    wanted = GradientOptions(folder, reference=8, chunks=2, batches=2, prompts=2, samples=2, estimators=names)
    with session(given, init_world(), StopFlag(), "gradients", folder / "session") as run:
        plan = Audit(run, wanted, choose(names, sources(run, wanted))).plan()
        return dict(json.loads(json.dumps(plan)))


def test_the_plan_knows_the_template_the_data_and_the_layout_of_gradients(tmp_path: Path) -> None:
    rows, template = tmp_path / "rows.jsonl", tmp_path / "template.txt"
    template.write_text(TEMPLATES["brief"])
    lines = [json.dumps({"question": f"What is {i} + 1?", "answer": str(i + 1)}) for i in range(40)]
    rows.write_text("\n".join(lines))
    task = {"kind": "jsonl", "path": str(rows), "heldout_size": 4, "verifier": "exact"}
    judging = {"template": str(template), "max_new_tokens": 4}
    names = ("rloo", "genac-1")
    given = recipe(task=task, judging=judging)
    first = plan_of(tmp_path, given, names)
    assert plan_of(tmp_path, given, names) == first
    template.write_text("Look. " + TEMPLATES["brief"])
    load_template.cache_clear()  # as of another process
    second = plan_of(tmp_path, given, names)
    assert [key for key in first if first[key] != second[key]] == ["judging"]
    rows.write_text("\n".join(line.replace("What is", "What's") for line in lines))
    third = plan_of(tmp_path, given, names)
    assert [key for key in first if second[key] != third[key]] == ["texts"]
    roles = {**given.roles}
    training = roles["actor"].training.model_copy(update={"distributed_optimizer": False})
    roles["actor"] = roles["actor"].model_copy(update={"training": training})
    fourth = plan_of(tmp_path, given.model_copy(update={"roles": roles}), names)
    assert [key for key in first if third[key] != fourth[key]] == ["parts"]


def test_a_lost_chunk_of_the_reference_has_the_blocks_made_again(tmp_path: Path) -> None:
    whole, lost = tmp_path / "whole", tmp_path / "lost"
    audit(tmp_path, options(whole))
    with pytest.raises(StopRequested, match="estimators"):
        audit(tmp_path, options(lost), StopsAfter(3))  # two chunks and one block are there, and one more
    (lost / "vectors" / "0-0001-00000.npy").unlink()
    for part in (lost / "parts").glob("*.jsonl"):  # what an older chunk's products would be
        rows = [json.loads(line) for line in part.read_text().splitlines()]
        for row in rows:
            for name, inner in row.get("inner", {}).items():
                row["inner"][name] = [[0.0 for _ in batch] for batch in inner]
        part.write_text("".join(json.dumps(row) + "\n" for row in rows))
    audit(tmp_path, options(lost))
    assert (lost / "gradients.jsonl").read_bytes() == (whole / "gradients.jsonl").read_bytes()
