"""What a critic is told of a stage's further actors: with a stand-in for the run, no weights read."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from genac_megatron.critic.icc import IccState
from genac_megatron.recipe.stages import ActorConfig
from genac_megatron.stages.strengths import Cast

EARLY = ActorConfig(name="early", checkpoint="runs/early")


def test_an_actors_rate_moves_from_turn_to_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    told = {"reinforce/early": IccState(0.5, momentum=0.9).state_dict()}
    at = SimpleNamespace(told=told, versions={"actor": 1})
    run: Any = SimpleNamespace(at=at, icc=IccState(0.8), heldout_cache={}, publish=lambda *_: {})
    for name in "_weights", "_take", "_put":
        monkeypatch.setattr(Cast, name, lambda *_: [])
    stage: Any = SimpleNamespace(name="reinforce")
    for wanted in 0.45, 0.405:
        cast = Cast(run, stage, [EARLY])  # as behind a resume
        with cast.playing(EARLY) as met:
            assert run.icc is met
        met.update([0.0], advance=False)
        cast.remember(EARLY, met)
        assert at.told["reinforce/early"]["p_bar"] == pytest.approx(wanted)
        assert run.icc.p_bar == 0.8, "the run's own is back"
