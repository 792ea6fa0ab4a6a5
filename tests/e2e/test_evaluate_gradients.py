"""`genac evaluate gradients` and a study with an audit, by the command line: two ranks, trained models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from tests.e2e.test_evaluate import able_recipe
from tests.warm import genac

pytestmark = pytest.mark.timeout(900)
ROLLOUT = {"prompts": 4, "samples": 2, "max_new_tokens": 40}
OPTIONS = ["--reference", "64", "--chunks", "4", "--batches", "6", "--prompts", "4", "--samples", "2"]
# One of each source, lambda and form: all that are possible is what a choice of none means (unit tests).
ASKED = ["rloo", "vc_ppo", "genac-0", "genac-prompt", "exact-0", "exact-1-raw"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An actor that is right now and then, critics after a step or two, and the audit's recipe."""
    path = tmp_path_factory.mktemp("audit")
    base = able_recipe() | {"evaluation": {"prompts": 4, "samples": 2}}
    actor, critic = base["stages"]
    value = {**base["roles"]["critic"], "model": {**base["roles"]["critic"]["model"], "head": "value"}}
    stages = {
        "actor": [actor],
        "critic": [critic],
        "scalar": [{"kind": "value", "steps": 2, "start_from": "actor", "rollout": ROLLOUT,
                    "gate": {"action": "off"}}],
        "audit": [{"kind": "sft", "name": "sampling", "role": "actor", "data": "demonstrations",
                   "rollout": ROLLOUT}],
    }  # fmt: skip
    roles = {
        "actor": {"actor": base["roles"]["actor"]},
        "critic": base["roles"],
        "scalar": base["roles"] | {"critic": value},
        "audit": base["roles"] | {"scalar": value},
    }
    for name, own in stages.items():
        world = {**base["world"], "ranks": 2 if name == "audit" else 1}
        text = yaml.safe_dump({**base, "name": name, "world": world, "roles": roles[name], "stages": own})
        (path / f"{name}.yaml").write_text(text)
    study = {
        "name": "estimators",
        "seeds": [4],
        "base": {
            "actor": {"recipe": "actor.yaml"},
            "critic": {"recipe": "critic.yaml", "start": {"actor": "actor"}},
            "scalar": {"recipe": "scalar.yaml", "start": {"actor": "actor"}},
        },
        "audits": {
            "short": {"recipe": "audit.yaml", "actor": "actor", "critic": "critic", "scalar": "scalar",
                      "options": [*OPTIONS, "--estimators", ",".join(ASKED)], "predicted": {"exact-0": 3.0}},
        },
    }  # fmt: skip
    (path / "study.yaml").write_text(yaml.safe_dump(study))
    return path


def test_a_study_audits_estimators_of_its_base_runs(folder: Path) -> None:
    done = genac("study", "study.yaml", cwd=folder)
    logs = "".join(path.read_text()[-3000:] for path in folder.glob("runs/studies/estimators/*.log"))
    assert done.returncode == 0, done.stdout + done.stderr + logs
    out = folder / "experiments" / "estimators"
    (record,) = json.loads((out / "figures.json").read_text())["audits"]
    found = record["report"]["estimators"]
    assert found.keys() == set(ASKED)
    assert 0 < record["report"]["success_rate"] < 1
    assert all({"cosine", "snr", "ratio", "bias"} <= one.keys() for one in found.values())
    assert record["stands_on"].keys() == {"actor", "critic", "scalar"}
    assert "predicted" in (out / "table.md").read_text()
    assert (out / "estimators.png").stat().st_size > 5000
    again = genac("study", "study.yaml", cwd=folder)
    assert "4 of 4 are done already" in again.stdout, again.stdout + again.stderr


def test_a_critic_of_the_other_kind_and_cut_weights_are_refused(folder: Path) -> None:
    runs = folder / "runs" / "studies" / "estimators"
    given = ["evaluate", "gradients", "audit.yaml", "--checkpoint", str(runs / "actor-s4"), *OPTIONS]
    done = genac(*given, "--scalar", str(runs / "critic-s4"), "--out", "other", cwd=folder)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "its critic is no scalar one" in done.stderr
    done = genac(*given, "--override", "roles.actor.layout={tp: 2}", "--out", "cut", cwd=folder)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "tp 2" in done.stderr
    assert not (folder / "cut" / "gradients.jsonl").exists()
