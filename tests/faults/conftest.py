"""One run without a fault, which every test compares with; and a small file system of one's own."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.faulty import INJECT, run, write_recipe

MOUNT_MIB = 96


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run from beginning to end; checkpoints after steps 2 and 4 and the end of ppo."""
    folder = tmp_path_factory.mktemp("reference")
    write_recipe(folder)
    ended = run(folder)
    assert ended.code == 0, ended.text[-5000:]
    return folder


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Path]:
    """The `runs` folder of tmp_path as a small file system, which may be filled or made read-only."""
    folder = tmp_path / "runs"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={MOUNT_MIB}m", "genac-test", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("a file system cannot be mounted here: run as root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture(scope="session")
def clock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library that shifts the wall clock of the process that preloads it."""
    if (compiler := shutil.which("cc")) is None:
        pytest.skip("no C compiler to make inject/clock.c with")
    made = tmp_path_factory.mktemp("clock") / "clock.so"
    source = str(INJECT / "clock.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", str(made), source, "-ldl"], check=True)
    return made
