"""SFT: data that do not fit are named before anything is trained."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from genac_megatron.errors import InputError
from genac_megatron.recipe.schema import SftStage
from genac_megatron.records import Sample
from genac_megatron.stages.sft import check_room, with_room


def test_samples_longer_than_the_model_are_named() -> None:
    stage = SftStage.model_validate(
        {"kind": "sft", "name": "demos", "role": "actor", "data": "demonstrations"}
    )
    samples = [Sample([1] * length, 1) for length in (4, 9, 8, 10)]
    check_room(stage, samples, 10)
    with pytest.raises(InputError, match="1 of 4 samples") as caught:
        check_room(stage, samples, 9)
    assert "number 4, has 10 tokens" in str(caught.value)
    assert "stage demos" in str(caught.value)
    assert "9 positions of actor" in str(caught.value)
    assert caught.value.agreed


def test_traces_that_have_no_room_are_left_out_and_told() -> None:
    stage = SftStage.model_validate({"kind": "sft", "name": "traces", "role": "critic", "data": "traces"})
    notes: list[str] = []
    run: Any = SimpleNamespace(progress=SimpleNamespace(note=notes.append))  # no more of a run is used
    samples = [Sample([1] * length, 1) for length in (4, 9, 8, 10)]
    assert with_room(run, stage, samples, 8) == [samples[0], samples[2]]
    assert "2 of 4 traces do not fit into the 8 positions of critic's model" in notes[0]
    assert with_room(run, stage, samples, 10) == samples
    assert with_room(run, stage, samples, 3) == samples, "check_room ends the stage then"
    assert len(notes) == 1
