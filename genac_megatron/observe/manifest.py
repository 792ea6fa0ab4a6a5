"""Which folders are checkpoints: manifests, and whether the files that they name are there. No torch.

A folder without a manifest is none; one whose files are missing or shorter than its manifest says is
damaged: it is passed over, and said, for the newest whole one.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from genac_megatron.errors import InputError

FORMAT = 1
PART = ".part-"  # a checkpoint that is being written, or was left unfinished
MANIFEST, COMMON, WEIGHTS = "manifest.json", "common.pt", "weights"
BEST = "best"  # in a run folder: the folder of its best checkpoint
SHOWN = 3  # damaged files of one checkpoint in a message


@dataclass
class Survey:
    """A checkpoint folder's contents: whole checkpoints, oldest first, and why others are none."""

    whole: list[Path] = field(default_factory=list)
    refused: dict[Path, str] = field(default_factory=dict)
    unfinished: list[Path] = field(default_factory=list)

    @property
    def newest(self) -> Path | None:
        """The newest whole checkpoint."""
        return self.whole[-1] if self.whole else None

    def told(self) -> list[str]:
        """A line for each folder that is passed over."""
        lines = [f"{path.name} is damaged: {why}" for path, why in self.refused.items()]
        return lines + [f"{path.name.removeprefix(PART)} was not finished" for path in self.unfinished]


def read_manifest(path: Path) -> dict[str, Any]:
    """A checkpoint's manifest. Raises InputError where it is unreadable or of another format."""
    try:
        manifest: dict[str, Any] = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        known = manifest["format"], manifest["serial"], manifest["roles"], manifest["trained"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        what = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise InputError(
            f"the manifest cannot be read: {what}", where=str(path / MANIFEST), way_out="remove this folder"
        ) from error
    if known[0] != FORMAT:
        raise InputError(
            f"format {known[0]!r}, this version reads {FORMAT}",
            where=str(path / MANIFEST),
            way_out="load it with the version that wrote it (report/index.html, history.jsonl)",
        )
    return manifest


def files_of(folder: Path) -> dict[str, int]:
    """Every file under `folder` with its bytes, as a manifest keeps them.

    Opened, not only looked at: a network file system then asks for what other nodes have written.
    """
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                found[path.relative_to(folder).as_posix()] = file.seek(0, 2)
    return found


def damage(path: Path, manifest: dict[str, Any]) -> str:
    """What is wrong with the files that a manifest names; "" where nothing is.

    Checkpoints of earlier versions and converted ones name none: those are believed.
    """
    wrong = []
    for name, size in manifest.get("files", {}).items():
        file = path / name
        if not file.is_file():
            wrong.append(f"{name} is missing")
        elif (got := file.stat().st_size) != size:
            wrong.append(f"{name} has {got:,} bytes, not {size:,}")
    more = len(wrong) - SHOWN
    return "; ".join(wrong[:SHOWN]) + (f" and {more} more" if more > 0 else "")


def survey(folder: Path) -> Survey:
    """The checkpoints of a folder, judged."""
    found, order = Survey(), {}
    for path in sorted(folder.glob("*")):
        if path.name.startswith(PART):
            found.unfinished.append(path)
        elif path.name.startswith(".") or not path.is_dir():
            continue
        elif not (path / MANIFEST).exists():
            found.refused[path] = f"no {MANIFEST}"
        else:
            try:
                manifest = read_manifest(path)
            except InputError as error:
                found.refused[path] = error.what
                continue
            if why := damage(path, manifest):
                found.refused[path] = why
            else:
                order[path] = manifest["serial"]
    found.whole = sorted(order, key=lambda path: order[path])
    return found


def complete(folder: Path) -> list[Path]:
    """The folder's whole checkpoints, oldest first."""
    return survey(folder).whole


def find_checkpoint(path: Path) -> Path:
    """`path` itself where it is a checkpoint, else a run folder's newest complete one. Raises InputError."""
    if (path / MANIFEST).exists():
        return path
    found = complete(path / "checkpoints") or complete(path)
    if not found:
        raise InputError(
            "no complete checkpoint there",
            where=str(path),
            way_out="give a run folder, or one checkpoint of it",
        )
    return found[-1]
