"""Where sockets lie, a server's and torch's: their paths have a limit, and a job's TMPDIR may be longer."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from genac_megatron import platform
from genac_megatron.errors import InputError
from genac_megatron.platform import socket_folder
from genac_megatron.serving.sglang.server import SOCKETS


@pytest.mark.parametrize("length", [90, 102, 300])
def test_a_long_tmpdir_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, length: int) -> None:
    long = tmp_path
    while len(str(long)) < length:
        long /= "ü" * 50
    long.mkdir(parents=True)
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setenv("TMPDIR", str(long))
    folder = Path(socket_folder(SOCKETS))
    assert not folder.is_relative_to(long)
    assert len(os.fsencode(folder)) + SOCKETS <= platform.SOCKET_PATH
    with tempfile.TemporaryDirectory(dir=folder) as inside, socket.socket(socket.AF_UNIX) as bound:
        bound.bind(f"{inside}/{'n' * 30}")


def test_a_short_tmpdir_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory(prefix="my tmp", dir="/tmp") as short:
        monkeypatch.setattr(tempfile, "tempdir", None)
        monkeypatch.setenv("TMPDIR", short)
        assert socket_folder(SOCKETS) == short


def test_no_folder_at_all_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = tmp_path / ("x" * 100)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setenv("TMPDIR", str(long))
    monkeypatch.setattr(platform, "SHORT_FOLDERS", ("/proc/none",))
    with pytest.raises(InputError, match=r"at most 107 bytes.* left for it; /proc/none cannot be") as raised:
        socket_folder(SOCKETS)
    assert raised.value.where == "TMPDIR"


BUFFERS = """
import os, sys, tempfile
from genac_megatron.publication.payload import shared_buffer
for folder in sys.argv[1:]:
    if os.fork() == 0:
        os.environ["TMPDIR"], tempfile.tempdir = folder, None
        buffer = shared_buffer(64)
        buffer.fill_(7)
        print(int(buffer.sum()), os.environ["TMPDIR"], flush=True)  # of uint8s, in int64
        sys.exit()
    assert os.wait()[1] == 0, folder
"""


def test_a_buffer_that_servers_map_is_made_whatever_tmpdir_is(tmp_path: Path) -> None:
    """In processes of their own: torch starts its manager with the first buffer alone."""
    folders = [tmp_path / ("x" * max(1, length - len(str(tmp_path)) - 1)) for length in (60, 90, 200)]
    for folder in folders:
        folder.mkdir(exist_ok=True)
    done = subprocess.run([sys.executable, "-c", BUFFERS, *map(str, folders)], capture_output=True, text=True)
    wanted = [word for folder in folders for word in ("448", str(folder))]
    assert (done.returncode, done.stdout.split()) == (0, wanted), done.stderr
