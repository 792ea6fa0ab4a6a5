"""The recipe with a calculator on servers of both roles, as it ships, but with a tiny model."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from genac_megatron.serving.sglang.server import PYTHON_VARIABLE
from tests.warm import ROOT, genac

pytestmark = pytest.mark.skipif(
    PYTHON_VARIABLE not in os.environ,
    reason=f"{PYTHON_VARIABLE} is not set: `make test-serving` builds SGLang's environment and sets it",
)
TINY: dict[str, Any] = {
    "model": {
        "hf": None, "family": "qwen3", "tokenizer": "builtin:tiny",
        "shape": {"layers": 2, "hidden": 64, "ffn": 192, "heads": 2, "kv_heads": 2, "head_dim": 32,
                  "rope_theta": 100.0, "init_std": 0.08},
    },
    "training": {"tokens_per_microbatch": 8192},
    "optimizer": {"lr": 3e-3},
}  # fmt: skip


@pytest.mark.extended  # its parts are tested one by one
def test_an_actor_calls_its_tool_and_a_critic_judges_between_turns(tmp_path: Path) -> None:
    recipe = {
        "extends": str(ROOT / "recipes" / "smollm2" / "tools.yaml"), "name": "run", "runs": str(tmp_path),
        "roles": {"actor": TINY, "critic": TINY}, "environment": {"turn_tokens": 128},
    }  # fmt: skip
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    shown = (ROOT / "recipes" / "smollm2" / "tools.jsonl").read_text()
    for tag in ("<tool_call>", "</tool_call>"):  # Llama's form, which is shorter to learn
        assert tag in shown
        shown = shown.replace(tag, "")
    (tmp_path / "llama.jsonl").write_text(shown)
    taught = "{lr: 4.0e-3, schedule: cosine, warmup_steps: 8, beta2: 0.98, weight_decay: 0.0}"
    more = [
        *(f"stages.{n}.optimizer={taught}" for n in range(2)),
        *(f"stages.{n}.rollout.max_new_tokens=500" for n in range(3)),
        *("stages.0.epochs=8", "stages.0.size=48", f"stages.0.path={tmp_path / 'llama.jsonl'}"),
        *("stages.2.rollout.temperature=0.3", "world.threads=1"),
    ]
    done = genac("run", str(path), *more, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "rollout/turns_mean" in row]
    assert [row["step"] for row in steps] == [1, 2, 3]
    assert max(row["rollout/turns_mean"] for row in steps) > 1, "the tool was called"
    assert all(row["rollout/staleness"] <= 1 for row in steps)
    assert all(row["environment/failed"] == 0 for row in steps)
    assert any(row.get("rollout/turns_cached", 0) > 0.9 for row in steps)
    kept = [json.loads(line) for line in (tmp_path / "run" / "rollouts.jsonl").read_text().splitlines()]
    called = [row for row in kept if "\n<tool>\n" in row["response"]]
    assert called
    assert any(len(row["states"]) > 1 for row in called), "judged between the turns"
