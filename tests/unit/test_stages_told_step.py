"""What critics are told of how far an actor is, from its checkpoint."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from genac_megatron.observe.runinfo import write_json_atomic
from genac_megatron.stages.heldout import told_step


def recipe(checkpoint: Path | None) -> Any:
    model = SimpleNamespace(checkpoint=None if checkpoint is None else str(checkpoint))
    return SimpleNamespace(roles={"actor": SimpleNamespace(model=model)})


@pytest.mark.parametrize(
    ("state", "steps"),
    [
        ({"at": {"icc": {"p_bar": 0.5, "step": 40}}}, 40),
        ({"at": {"icc": None}}, 0),  # its SFT was the last that made it
        ({}, 0),  # converted
    ],
)
def test_the_step_is_that_of_the_actors_checkpoint(tmp_path: Path, state: dict[str, Any], steps: int) -> None:
    manifest = {"format": 1, "serial": 1, "roles": {}, "trained": [], "state": state}
    write_json_atomic(tmp_path / "checkpoints" / "c" / "manifest.json", manifest)
    assert told_step(recipe(tmp_path / "checkpoints" / "c")) == steps


def test_a_model_of_no_checkpoint_is_at_step_zero() -> None:
    assert told_step(recipe(None)) == 0
