"""What is left of a checkpoint that could not be written goes, also while one of its writers goes on."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from genac_megatron.training.checkpoint import in_background, remove_for_good


@pytest.mark.parametrize(("late", "left"), [(2, False), (10_000, True)])
def test_a_folder_goes_once_nobody_writes_into_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, late: int, left: bool
) -> None:
    """A file that appears between listing the folder and removing it is what rmtree fails on."""
    folder = tmp_path / ".part-ppo-00004"
    folder.mkdir()
    whole, calls = shutil.rmtree, []

    def removed_while_written(path: Path, **options: Any) -> None:
        whole(path, **options)
        calls.append(path)
        if len(calls) <= late:
            path.mkdir()

    monkeypatch.setattr(shutil, "rmtree", removed_while_written)
    remove_for_good(folder, 30.0 if late == 2 else 0.2)
    assert folder.exists() == left
    assert len(calls) == 3 or left


@pytest.mark.parametrize(
    ("asked", "system", "wanted"),
    [(None, "linux", True), (None, "darwin", False), (False, "linux", False), (True, "darwin", True)],
)
def test_writers_are_in_the_background_on_linux_or_where_asked(
    monkeypatch: pytest.MonkeyPatch, asked: bool | None, system: str, wanted: bool
) -> None:
    monkeypatch.setattr("sys.platform", system)
    assert in_background(asked) is wanted
