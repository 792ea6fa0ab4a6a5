"""In-Context Conditioning (arXiv 2604.10701): what the critic's prompt says about the current actor.

No torch. The figures are the actor's name, p_bar (an exponential moving average of its success
rate), the training step, and the tokens used and allowed (values here are finite-horizon).
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from genac_megatron.recipe.schema import JudgingConfig


@dataclass(frozen=True)
class IccBlock:
    """The figures one critic prompt shows. `actor`, `p_bar` and `step` are None where ICC is off."""

    actor: str | None
    p_bar: float | None
    step: int | None
    used: int  # response tokens written so far
    limit: int  # response tokens allowed

    def figures(self) -> dict[str, str]:
        """Placeholder name to shown text; names that are off are absent. p_bar has two digits."""
        shown = {"used": str(self.used), "limit": str(self.limit)}
        if self.actor is not None and self.p_bar is not None and self.step is not None:
            shown |= {"actor": self.actor, "p_bar": f"{self.p_bar:.2f}", "step": str(self.step)}
        return shown


@dataclass
class IccState:
    """p_bar, the actor's moving success rate in [0, 1], and the step that the critic is told.

    Call `update` only after the batch is scored: a p_bar that holds a rollout's own outcome would
    leak it to the critic.
    """

    p_bar: float
    step: int = 0
    momentum: float = 0.9
    seed: int = 0  # of the draws of the shuffled mode
    actor: str | None = None  # its name, where a run has several; None: judging.actor_name

    def __post_init__(self) -> None:
        if not 0.0 <= self.p_bar <= 1.0:
            raise ValueError(f"p_bar must lie in [0, 1], got {self.p_bar}")
        if not 0.0 <= self.momentum <= 1.0:
            raise ValueError(f"momentum must lie in [0, 1], got {self.momentum}")

    @classmethod
    def from_evaluation(
        cls, outcomes: Sequence[float], momentum: float = 0.9, seed: int = 0, step: int = 0
    ) -> IccState:
        """The state seeded by the outcomes of a first evaluation of the actor, which is at `step`."""
        return cls(p_bar=_mean(outcomes), momentum=momentum, seed=seed, step=step)

    def update(self, outcomes: Sequence[float], *, advance: bool = True) -> None:
        """p_bar <- momentum * p_bar + (1 - momentum) * mean(outcomes).

        `advance`: the actor was trained on the batch, so the step it is said to be at moves on.
        """
        self.p_bar = self.momentum * self.p_bar + (1.0 - self.momentum) * _mean(outcomes)
        self.step += int(advance)

    def block(self, judging: JudgingConfig, key: str, used: int, limit: int) -> IccBlock:
        """The figures to show for one state.

        `off` drops what describes the actor and keeps the token budget, which describes the state.
        `shuffled` (the ablation) shows a p_bar drawn uniformly; the draw is a function of (seed,
        step, `key`), so ranks and resumed runs agree. Give the prompt's id as `key`: the states of
        one prompt then show one p_bar and still share their prefix.
        """
        if judging.icc == "off":
            return IccBlock(None, None, None, used, limit)
        p_bar = self.p_bar
        if judging.icc == "shuffled":
            p_bar = random.Random(f"{self.seed}/{self.step}/{key}").random()
        return IccBlock(self.actor or judging.actor_name, p_bar, self.step, used, limit)

    def state_dict(self) -> dict[str, Any]:
        """Everything a checkpoint needs, as plain numbers."""
        return {"p_bar": self.p_bar, "step": self.step, "momentum": self.momentum, "seed": self.seed}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        self.p_bar, self.step = float(state["p_bar"]), int(state["step"])
        self.momentum, self.seed = float(state["momentum"]), int(state["seed"])


def _mean(outcomes: Sequence[float]) -> float:
    if not outcomes:
        raise ValueError("no outcomes to average")
    if not all(0.0 <= outcome <= 1.0 for outcome in outcomes):
        raise ValueError("outcomes must lie in [0, 1]")
    # The sum is rounded, so the quotient can pass 1 by an ulp.
    return min(sum(outcomes) / len(outcomes), 1.0)
