"""The quickstart's parts, shrunken, one run after another: each begins with the weights of the one before."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.warm import ROOT, genac

SMALL = (
    "evaluation={prompts: 4, samples: 2, mc_states: 0}",
    "roles.actor.model.shape.hidden=32", "roles.actor.model.shape.ffn=64",
    "roles.critic.model.shape.hidden=32", "roles.critic.model.shape.ffn=64",
    "task.heldout_size=16", "judging.max_new_tokens=12", "observe={tensorboard: false, plots: false}",
)  # fmt: skip
ROLLOUT = "{prompts: 4, samples: 2, max_new_tokens: 12}"
PARTS = {
    "sft": (
        "stages.sft-actor.size=16", "stages.sft-actor.heldout=null", "stages.sft-actor.epochs=1",
        "stages.sft-critic.size=6", "stages.sft-critic.heldout=null", "stages.sft-critic.epochs=1",
        "stages.sft-critic.gate.action=off",
        f"stages.sft-actor.rollout={ROLLOUT}", f"stages.sft-critic.rollout={ROLLOUT}",
        "judging.max_new_tokens=48",
    ),
    "reinforce": (
        "stages.reinforce.steps=1", "stages.reinforce.gate.action=off", f"stages.reinforce.rollout={ROLLOUT}",
    ),
    "ppo": ("stages.ppo.steps=1", "stages.ppo.gate.action=off", f"stages.ppo.rollout={ROLLOUT}"),
}  # fmt: skip


def play(part: str, folder: Path) -> list[dict[str, Any]]:
    """Run a part in `folder`; its evaluations."""
    recipe = ROOT / "recipes" / "quickstart" / f"{part}.yaml"
    done = genac("run", str(recipe), *SMALL, *PARTS[part], cwd=folder)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    lines = (folder / "runs" / f"quickstart-{part}" / "evaluations.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_the_parts_run_one_after_another(tmp_path: Path) -> None:
    ends, starts = {}, {}
    for part in PARTS:
        found = play(part, tmp_path)
        starts[part], ends[part] = found[0], found[-1]
    for before, after in (("sft", "reinforce"), ("reinforce", "ppo")):
        # The same held-out prompts, seeds and weights: the same responses.
        assert starts[after]["name"] == "start"
        assert starts[after]["actor"]["outcomes"] == ends[before]["actor"]["outcomes"]
    rows = [
        json.loads(line)
        for line in (tmp_path / "runs" / "quickstart-ppo" / "metrics.jsonl").read_text().splitlines()
    ]
    assert rows[0]["critic/p_bar"] == starts["ppo"]["actor"]["accuracy"], "p_bar is seeded by the evaluation"
