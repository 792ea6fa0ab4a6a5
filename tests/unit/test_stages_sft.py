"""SFT: data that do not fit are named before anything is trained."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from genac_megatron.errors import InputError
from genac_megatron.recipe.schema import SftStage
from genac_megatron.records import Sample
from genac_megatron.stages.sft_data import _read_samples, _write_samples, check_room, with_room
from genac_megatron.stages.sft_pool import compacted


def test_kept_samples_are_all_of_them_or_refused(tmp_path: Path) -> None:
    """A copy of a run folder may be cut short, at a line's end too: fewer samples would be trained."""
    path = tmp_path / "data" / "demos.jsonl"
    samples = [Sample([1, 2, n], 1, source=f"train/{n}") for n in range(5)]
    _write_samples(path, samples)
    whole = path.read_bytes()
    assert _read_samples(path) == samples
    for size in range(len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(InputError, match="not all of them"):
            _read_samples(path)
    path.write_bytes(whole.replace(b', "of": 5', b""))  # of an earlier version
    assert _read_samples(path) == samples
    path.unlink()
    assert _read_samples(path) is None


def test_samples_as_arrays_are_the_same_in_a_few_bytes(tmp_path: Path) -> None:
    figures = {"weights": [1 / 3, 0.0, 1.0]}
    samples = [
        Sample([100_000 + n, 2, 3, 4], 1, figures, source="a", part="x", problem="p") for n in range(3)
    ]
    kept = compacted(samples)
    for one, other in zip(kept, samples, strict=True):
        assert replace(one, tokens=list(one.tokens), fields={"weights": list(one.fields["weights"])}) == other
    path = tmp_path / "data" / "x.jsonl"
    _write_samples(path, kept)
    assert _read_samples(path) == samples
    long = Sample(list(range(100_000, 110_000)), 1)
    assert sys.getsizeof(compacted([long])[0].tokens) < 41_000 < sys.getsizeof(long.tokens)


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
