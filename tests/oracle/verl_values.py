"""Values by verl's own functions on random batches, written to verl_values.json, which a test reads.

Not run by the tests. To make the file anew, in an environment that has torch and transformers:
    pip install --no-deps --target ORACLE -r tests/oracle/verl.lock
    PYTHONPATH=ORACLE python tests/oracle/verl_values.py
"""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from verl.trainer.config import AlgoConfig
from verl.trainer.ppo import core_algos as verl
from verl.workers.reward_manager.dapo import DAPORewardManager

GROUPS, SAMPLES, LONGEST = 4, 3, 7
CACHE = 3  # tokens of DAPO's penalty


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
    # wide enough for ratios beyond the dual clip's 3
    made["logp"] = made["old"] + 0.8 * made["logp"]
    return made


class Rows:
    """As much of verl's DataProto as its reward manager asks for: responses of so many tokens."""

    def __init__(self, lengths: torch.Tensor) -> None:
        self.lengths, self.batch = lengths, {"responses": torch.zeros(len(lengths), LONGEST)}

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, i: int) -> SimpleNamespace:
        mask = (torch.arange(LONGEST) < self.lengths[i]).long()
        tensors = {
            "prompts": torch.zeros(1), "responses": torch.zeros(LONGEST),
            "attention_mask": torch.cat([torch.ones(1, dtype=torch.long), mask]),
        }  # fmt: skip
        texts = {"reward_model": {"ground_truth": i}, "data_source": "none"}
        return SimpleNamespace(batch=tensors, non_tensor_batch=texts)


def dapo_rewards(outcomes: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Of verl's own manager, for rule rewards of -1 to 1: on each response's last token."""
    overlong = SimpleNamespace(enable=True, len=CACHE, penalty_factor=1.0, log=False)
    words = SimpleNamespace(decode=lambda *_, **__: "", eos_token="<eos>")
    manager = DAPORewardManager(
        words, 0, compute_score=lambda ground_truth, **_: 2.0 * float(outcomes[ground_truth]) - 1.0,
        max_resp_len=LONGEST, overlong_buffer_cfg=overlong,
    )  # fmt: skip
    manager._extract_reward_from_rm_scores = lambda *_: None
    return manager(Rows(lengths)).double()


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
    found["dapo_rewards"] = dapo_rewards(b["outcomes"], b["lengths"])
    found["dapo"] = verl.compute_grpo_outcome_advantage(found["dapo_rewards"], mask, index)[0]
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
    found["kl"] = verl.kl_penalty(b["logp"], b["old"], "low_var_kl") * mask
    found["value_loss"] = verl.compute_value_loss(b["new_values"], targets, b["values"], mask, 0.5)[0]
    plain = {key: value.tolist() for key, value in (b | found).items()}
    return {key: value for key, value in plain.items() if key != "mask"}


if __name__ == "__main__":
    content = {
        "verl": version("verl"),
        "cache": CACHE,
        "longest": LONGEST,
        "groups": GROUPS,
        "samples": SAMPLES,
        "cases": [case(s) for s in range(3)],
    }
    Path(__file__).with_suffix(".json").write_text(json.dumps(content) + "\n")
