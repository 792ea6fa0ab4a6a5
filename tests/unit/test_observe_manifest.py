"""Which of a folder's checkpoints are whole, and what is said of the others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from genac_megatron.errors import InputError
from genac_megatron.observe.manifest import complete, files_of, read_manifest, survey


def checkpoint(folder: Path, name: str, serial: int, **changes: Any) -> Path:
    path = folder / name
    (path / "weights").mkdir(parents=True)
    (path / "weights" / "__0_0.distcp").write_bytes(b"x" * 1000)
    (path / "common.pt").write_bytes(b"y" * 10)
    manifest = {"format": 1, "serial": serial, "roles": {}, "trained": [], "state": {}, **changes}
    (path / "manifest.json").write_text(json.dumps({"files": files_of(path), **manifest}))
    return path


def test_whole_ones_are_in_the_order_of_their_saves(tmp_path: Path) -> None:
    for name, serial in (("sft-end", 2), ("ppo-00004", 3), ("sft-00002", 1)):
        checkpoint(tmp_path, name, serial)
    assert [path.name for path in complete(tmp_path)] == ["sft-00002", "sft-end", "ppo-00004"]
    assert survey(tmp_path).told() == []
    assert read_manifest(tmp_path / "sft-end")["files"] == {"common.pt": 10, "weights/__0_0.distcp": 1000}


def truncated(path: Path) -> None:
    with (path / "weights" / "__0_0.distcp").open("r+b") as file:
        file.truncate(400)


def without_a_file(path: Path) -> None:
    (path / "common.pt").unlink()


def without_manifest(path: Path) -> None:
    (path / "manifest.json").unlink()


def with_half_a_manifest(path: Path) -> None:
    text = (path / "manifest.json").read_text()
    (path / "manifest.json").write_text(text[: len(text) // 2])


def of_another_program(path: Path) -> None:
    (path / "manifest.json").write_text("{}")


def of_another_format(path: Path) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**manifest, "format": 2}))


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (truncated, "weights/__0_0.distcp has 400 bytes, not 1,000"),
        (without_a_file, "common.pt is missing"),
        (without_manifest, "no manifest.json"),
        (with_half_a_manifest, "the manifest cannot be read"),
        (of_another_program, "the manifest cannot be read: no 'format'"),
        (of_another_format, "format 2, this version reads 1"),
    ],
)
def test_a_damaged_one_is_passed_over_and_said(tmp_path: Path, harm: Any, said: str) -> None:
    before = checkpoint(tmp_path, "ppo-00002", 1)
    harm(checkpoint(tmp_path, "ppo-00004", 2))
    found = survey(tmp_path)
    assert found.newest == before
    assert len(found.told()) == 1
    assert found.told()[0].startswith(f"ppo-00004 is damaged: {said}")


def test_an_unfinished_one_is_no_checkpoint(tmp_path: Path) -> None:
    checkpoint(tmp_path, "ppo-00002", 1)
    checkpoint(tmp_path, ".part-ppo-00004", 2)
    assert [path.name for path in complete(tmp_path)] == ["ppo-00002"]
    assert survey(tmp_path).told() == ["ppo-00004 was not finished"]


def test_many_damaged_files_are_counted(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, "ppo-00002", 1, files={f"weights/{n}": 1 for n in range(9)})
    assert survey(tmp_path).refused[path].endswith("weights/2 is missing and 6 more")


def test_what_names_no_files_is_believed(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, "ppo-00002", 1, files={})
    assert complete(tmp_path) == [path]


def test_a_manifest_of_nothing_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"manifest\.json"):
        read_manifest(tmp_path)
