"""Where a server's sockets lie: their paths have a limit, and a job's TMPDIR may be longer."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
from pathlib import Path

import pytest

from genac_megatron.errors import InputError
from genac_megatron.serving.sglang import server
from genac_megatron.serving.sglang.server import SOCKET_NAME, SOCKET_PATH, socket_folder


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", None)
    return tmp_path


@pytest.mark.parametrize("length", [90, 102, 300])
def test_a_long_tmpdir_is_passed_over(scratch: Path, monkeypatch: pytest.MonkeyPatch, length: int) -> None:
    long = scratch
    while len(str(long)) < length:
        long /= "ü" * 50
    long.mkdir(parents=True)
    monkeypatch.setenv("TMPDIR", str(long))
    folder = socket_folder()
    try:
        assert not folder.is_relative_to(long)
        assert folder.stat().st_mode & 0o777 == 0o700
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(str(folder / ("n" * (SOCKET_NAME - 1))))
        assert len(os.fsencode(folder)) + SOCKET_NAME <= SOCKET_PATH
    finally:
        shutil.rmtree(folder)


def test_a_short_tmpdir_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory(prefix="my tmp", dir="/tmp") as short:
        monkeypatch.setattr(tempfile, "tempdir", None)
        monkeypatch.setenv("TMPDIR", short)
        assert socket_folder().parent == Path(short)


def test_no_folder_at_all_is_told(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = scratch / ("x" * 100)
    long.mkdir()
    monkeypatch.setenv("TMPDIR", str(long))
    monkeypatch.setattr(server, "SHORT_FOLDERS", ("/proc/none",))
    with pytest.raises(
        InputError, match=r"at most 107 bytes.*are left for it; /proc/none: No such file"
    ) as raised:
        socket_folder()
    assert raised.value.where == "TMPDIR"
