"""How far a run is."""

from __future__ import annotations

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
    explained_variance: float | None = None  # the critic's, held-out, best so far

    def load(self, saved: dict[str, Any]) -> None:
        """Take over what `dataclasses.asdict` gave. Raises TypeError on a field of another version."""
        vars(self).update(vars(Progression(**saved)))
