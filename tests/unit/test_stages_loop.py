"""The end of a step: what the loop asks of a save that is under way."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from genac_megatron.stages.loop import Loop


class StubCheckpoints:
    def __init__(self) -> None:
        self.polls = 0

    def poll(self) -> bool:
        self.polls += 1
        return True


def test_a_save_under_way_is_asked_for_once_a_step() -> None:
    """Each time is a collective over the world."""
    run: Any = SimpleNamespace(
        at=SimpleNamespace(step=0),
        log_step=lambda *row: {},
        stop_requested=lambda: False,
        recipe=SimpleNamespace(checkpoint=SimpleNamespace(every=0)),
    )
    checkpoints: Any = StubCheckpoints()
    stage: Any = SimpleNamespace(name="ppo", kind="ppo", expect=[])
    loop = Loop(run, stage, checkpoints, None)
    for step, evaluate in ((1, None), (2, dict)):
        loop.done(step, {}, evaluate)
    assert checkpoints.polls == 2
