"""Values by verl's own functions on random batches, written to verl_values.json, which a test reads.

Not run by the tests. To make the file anew, in an environment that has torch and transformers:
    pip install --no-deps --target ORACLE -r tests/oracle/verl.lock
    PYTHONPATH=ORACLE python tests/oracle/verl_values.py
"""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from verl.trainer.config import AlgoConfig
from verl.trainer.ppo import core_algos as verl

GROUPS, SAMPLES, LONGEST = 4, 3, 7


def batch(seed: int) -> dict[str, torch.Tensor]:
    """Responses of uneven length: outcomes, values, log-probs, a mask; padding holds zeros."""
    g = torch.Generator().manual_seed(seed)
    count = GROUPS * SAMPLES
    lengths = torch.randint(1, LONGEST + 1, (count,), generator=g)
    mask = (torch.arange(LONGEST) < lengths[:, None]).double()
    made = {
        "lengths": lengths,
        "mask": mask,
        "outcomes": torch.rand(count, generator=g).double().round(decimals=1),
    }
    for name in ("values", "new_values", "old", "logp", "advantages"):
        made[name] = torch.randn(count, LONGEST, generator=g).double() * mask
    made["logp"] = made["old"] + 0.3 * made["logp"]
    return made


def case(seed: int) -> dict[str, Any]:
    b = batch(seed)
    rewards, mask = torch.zeros_like(b["mask"]), b["mask"]
    rewards[torch.arange(len(mask)), b["lengths"] - 1] = b["outcomes"]
    index = np.repeat(np.arange(GROUPS), SAMPLES)
    config = AlgoConfig(gamma=1.0, lam=1.0)
    found: dict[str, Any] = {}
    for name, std in (("grpo", True), ("dr_grpo", False)):
        found[name] = verl.compute_grpo_outcome_advantage(
            rewards.clone(), mask, index, norm_adv_by_std_in_grpo=std
        )[0]
    found["rloo"] = verl.compute_rloo_outcome_advantage(rewards.clone(), mask, index)[0]
    found["reinforce_pp"] = verl.compute_reinforce_plus_plus_outcome_advantage(
        rewards.clone(), mask, config=config
    )[0]
    found["reinforce_pp_baseline"] = verl.compute_reinforce_plus_plus_baseline_outcome_advantage(
        rewards.clone(), mask, index
    )[0]
    for lam in (1.0, 0.95):
        whitened, returns = verl.compute_gae_advantage_return(rewards, b["values"], mask, 1.0, lam)
        found[f"gae_whitened_{lam}"], found[f"returns_{lam}"] = whitened * mask, returns * mask
    for mode in ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum-norm"):
        found[f"policy_{mode}"] = verl.compute_policy_loss(
            b["old"], b["logp"], b["advantages"], mask, 0.2, 0.2, 0.28, 3.0, mode
        )[0]
    targets = b["outcomes"][:, None] * mask
    found["value_loss"] = verl.compute_value_loss(b["new_values"], targets, b["values"], mask, 0.5)[0]
    plain = {key: value.tolist() for key, value in (b | found).items()}
    return {key: value for key, value in plain.items() if key != "mask"}


if __name__ == "__main__":
    content = {
        "verl": version("verl"),
        "groups": GROUPS,
        "samples": SAMPLES,
        "cases": [case(s) for s in range(3)],
    }
    Path(__file__).with_suffix(".json").write_text(json.dumps(content) + "\n")
