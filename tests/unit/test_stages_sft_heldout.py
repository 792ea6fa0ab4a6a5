"""What an SFT stage holds out, and what looks at it make of the stage's end."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from genac_megatron.errors import GateFailed, InputError
from genac_megatron.observe.runinfo import RunFolder, jsonable
from genac_megatron.recipe.schema import OptimizerConfig, SftHeldout, SftStage, WorldConfig
from genac_megatron.records import Sample
from genac_megatron.stages.gates import check_sft_gate
from genac_megatron.stages.progression import Progression
from genac_megatron.stages.sft_heldout import Watch, heldout_figures, hold_out


def make(sources: list[str]) -> list[Sample]:
    return [Sample([index, 1, 2], 1, source=source) for index, source in enumerate(sources)]


@given(st.lists(st.sampled_from("abcdefghij"), min_size=40, max_size=120), st.integers(0, 5))
def test_nothing_is_lost_and_no_source_is_on_both_sides(names: list[str], seed: int) -> None:
    samples = make(names)
    size = 5
    try:
        train, held = hold_out(samples, SftHeldout(size=size), "stage sft", seed)
    except InputError:
        assert len(set(names)) < 10 or max(map(names.count, set(names))) > len(names) // 4
        return
    assert sorted(s.tokens[0] for s in train + held) == list(range(len(samples)))
    assert not {s.source for s in train} & {s.source for s in held}
    assert len(held) >= size
    assert [s.tokens[0] for s in train] == sorted(s.tokens[0] for s in train)  # the given order


def test_samples_without_a_source_share_none() -> None:
    train, held = hold_out(make([""] * 20), SftHeldout(size=5), "stage sft", 3)
    assert (len(train), len(held)) == (15, 5)


def test_the_choice_is_the_seeds_alone() -> None:
    one, other, same = (hold_out(make([""] * 50), SftHeldout(size=9), "x", seed)[1] for seed in (1, 2, 1))
    assert one == same
    assert one != other


@pytest.mark.parametrize("names", [[""] * 9, ["a"] * 40])
def test_too_few_samples_or_prompts_are_refused(names: list[str]) -> None:
    with pytest.raises(InputError, match="5 samples cannot be held out") as caught:
        hold_out(make(names), SftHeldout(size=5), "stage sft-critic", 0)
    assert "stage sft-critic, heldout.size" in str(caught.value)
    assert caught.value.agreed


@pytest.mark.parametrize("keep", ["best", "last"])
def test_a_stand_in_runs_looks_that_are_never_finite_miss_the_target(tmp_path: Path, keep: str) -> None:
    """A target that no figure was held to must not count as reached, nor after a resume."""
    notes: list[str] = []
    run: Any = SimpleNamespace(
        at=Progression(),
        folder=RunFolder(tmp_path),
        recipe=SimpleNamespace(world=WorldConfig()),
        world=SimpleNamespace(rank=1),
        roles={"actor": SimpleNamespace(config=SimpleNamespace(optimizer=OptimizerConfig()))},
        together=lambda act: act(),
        progress=SimpleNamespace(note=notes.append),
    )
    stage = SftStage.model_validate(
        {"kind": "sft", "role": "actor", "data": "demonstrations",
         "heldout": {"size": 1, "metric": "loss", "target": 0.5, "keep": keep}}
    )  # fmt: skip
    watch = Watch(run, stage, [], 4)
    assert watch.settle(0) == {}  # of an earlier version's checkpoint nothing is known
    for step, figure in ((2, math.inf), (4, math.nan)):
        watch._judge(step, figure, SimpleNamespace())  # type: ignore[arg-type]
    run.at.heldout = json.loads(json.dumps(jsonable(asdict(watch.seen))))
    for one in (watch, Watch(run, stage, [], 4)):
        figures = one.settle(4)
        assert math.isnan(figures["heldout/loss"])
        with pytest.raises(GateFailed, match=r"held-out loss nan is above 0\.5"):
            check_sft_gate(stage, figures)
    assert "held-out loss was never finite" in notes[-1]


def test_figures_by_hand() -> None:
    """Two completions of 2 and 1 tokens, with chances 1/2 * 1/4 and 1/8."""
    figures = heldout_figures([[math.log(0.5), math.log(0.25)], [math.log(0.125)]])
    assert figures["loss"] == pytest.approx(math.log(64) / 3)
    assert figures["exact_match"] == pytest.approx((0.125 + 0.125) / 2)
