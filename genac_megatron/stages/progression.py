"""How far a run is."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Progression:
    """Everything small that a checkpoint must bring back."""

    stage: int = 0  # index of the stage to work on
    step: int = 0  # its steps that are done
    cursor: int = 0  # training prompts consumed
    versions: dict[str, int] = field(default_factory=dict)  # of each role's published weights
    published: dict[str, int] = field(default_factory=dict)  # Role.serial at that publication
    serials: dict[str, int] = field(default_factory=dict)  # Role.serial, when saved
    icc: dict[str, Any] | None = None
    heldout: dict[str, Any] | None = None  # of an SFT stage that looks at held-out samples: what it has seen
    explained_variance: float | None = None  # the critic's, held-out, as it was measured last
    measured: dict[str, float] = field(default_factory=dict)  # more such figures (stages/heldout.py)
    # By "stage/actor": what the critic is told of each of a stage's several actors (stages/strengths.py)
    told: dict[str, dict[str, Any]] = field(default_factory=dict)
    regime: dict[str, Any] = field(default_factory=dict)  # of a joint stage: its critic's errors so far

    def measure(self, figures: dict[str, Any], names: Iterable[str]) -> None:
        """Take over an evaluation's figures of the critic; one that it could not give stays as it was."""
        found = {name: figures.get(name) for name in ("explained_variance", *names)}
        known = {k: float(v) for k, v in found.items() if v is not None and v == v}
        self.explained_variance = known.pop("explained_variance", self.explained_variance)
        self.measured = self.measured | known

    def forget_critic(self) -> None:
        """The critic, or the actor that it judges, is about to be another one."""
        self.explained_variance, self.measured = None, {}

    def load(self, saved: dict[str, Any]) -> None:
        """Take over what `dataclasses.asdict` gave. Raises TypeError on a field of another version."""
        vars(self).update(vars(Progression(**saved)))
