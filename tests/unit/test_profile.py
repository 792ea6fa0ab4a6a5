"""Which steps are profiled, and what a range costs where nobody looks."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from genac_megatron.errors import GenacError
from genac_megatron.observe import profile
from genac_megatron.observe.profile import Profiler, mark
from genac_megatron.recipe.training import ProfileConfig


def due(profiler: Profiler, steps: int = 5) -> list[int]:
    return [index for index in range(1, steps + 1) if profiler.due(index)]


def test_nothing_is_profiled_unless_asked(tmp_path: Path) -> None:
    assert due(Profiler(tmp_path, ProfileConfig(), 0)) == []


def test_steps_and_ranks_are_the_recipes(tmp_path: Path) -> None:
    config = ProfileConfig(on=True, first=3, steps=2, ranks=[1])
    assert due(Profiler(tmp_path, config, 1)) == [3, 4]
    assert due(Profiler(tmp_path, config, 0)) == []


def test_a_file_asks_a_running_job_for_its_next_step_once(tmp_path: Path) -> None:
    request = tmp_path / "profile" / "now"
    request.parent.mkdir()
    request.touch()
    os.utime(request, (1000, 1000))
    profiler = Profiler(tmp_path, ProfileConfig(), 0)
    assert not profiler.due(1)  # it was there when the run began
    os.utime(request, (2000, 2000))
    assert profiler.due(2)
    assert not profiler.due(3)


def test_a_step_that_raises_leaves_its_trace_and_its_error(tmp_path: Path) -> None:
    profiler = Profiler(tmp_path, ProfileConfig(on=True, first=1), 0)
    with pytest.raises(ValueError, match="of the step"), profiler.step("sft", 1, 1):
        raise ValueError("of the step")
    assert (tmp_path / "profile" / "sft-00001-rank0.json.gz").stat().st_size > 0
    assert not profile._profiling
    with profiler.step("sft", 2, 2), mark("unseen"):
        pass
    assert len(list((tmp_path / "profile").iterdir())) == 2


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "profile").write_text("a file in the way")
    profiler = Profiler(tmp_path, ProfileConfig(on=True, first=1), 0)
    with pytest.raises(GenacError, match="profile cannot be written"), profiler.step("sft", 1, 1):
        pass
