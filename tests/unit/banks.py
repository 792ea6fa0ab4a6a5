"""Banks made by hand, for tests that judge critics without a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from genac_megatron.evaluation.bank import (
    FORMAT,
    Bank,
    BankPrompt,
    BankState,
    bank_parts,
    no_response,
    read_bank,
    to_row,
)
from genac_megatron.records import Completion, Prompt, Rollout, State

K = 32


def made_bank(rng: np.random.Generator, prompts: int, later: int = 3) -> tuple[list[BankPrompt], list[float]]:
    """Prompts with a right and a wrong response of `later` states each; the states' true values beside."""
    bank, truth = [], []
    for number in range(prompts):
        prompt = Prompt(f"heldout/{number}", ({"role": "user", "content": "p"},), "p", {"a": [1]}, (1, 2))
        ids = tuple(range(4 * (later + 1)))
        pair = tuple(
            Rollout(prompt, n, Completion(ids, (-0.5,) * len(ids), "stop"), "text", 1.0 - n) for n in (0, 1)
        )
        places = [(None, 0)] + [(which, k) for which in (0, 1) for k in range(1, later + 1)]
        states = []
        for which, k in places:
            value = float(rng.beta(0.6, 0.6))
            truth.append(value)
            whole = no_response(prompt) if which is None else pair[which]
            draws = tuple(float(x) for x in rng.random(K) < value)
            states.append(BankState(State(whole, k, 4 * k, 4 * k + 4), which, draws))
        bank.append(BankPrompt(prompt, (1.0, 0.0, 1.0), None, pair, tuple(states)))
    return bank, truth


def kept_bank(folder: Path, prompts: int = 6) -> Bank:
    """Such a bank on the disk, its second prompt skipped."""
    made, _ = made_bank(np.random.default_rng(0), prompts)
    made[1] = BankPrompt(made[1].prompt, (0.0, 0.0), "wrong")
    plan: dict[str, Any] = {"seed": 1, "continuations": K, "rollout": {"max_new_tokens": 16}}
    parts = bank_parts(folder)
    parts.begin(plan)
    manifest = {"format": FORMAT, "kind": "bank", "plan": plan, "p_bar": 0.4, "step": 3}
    parts.finish([to_row(number, prompt) for number, prompt in enumerate(made)], manifest)
    return read_bank(folder)
