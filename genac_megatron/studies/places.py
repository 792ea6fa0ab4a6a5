"""Where a study's runs and results lie, and what lies beside them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from genac_megatron.studies.schema import RunSpec, Study

STAMP, ENDED = ".made_from", ".ended"  # beside what a task makes


class Places:
    """Where a study's runs and results lie."""

    def __init__(
        self, study: Study, file: Path, out: Path, work: Path, overrides: Sequence[str] = ()
    ) -> None:
        self.study, self.file, self.out, self.work = study, file, out, work / study.name
        self.overrides = overrides  # of every recipe, after all that the file sets

    def run(self, name: str, seed: int) -> Path:
        return self.work / f"{name}-s{seed}"

    def ended(self, name: str, seed: int) -> Path:
        """There once that run has ended well."""
        return beside(self.run(name, seed), ENDED)

    def bank(self, name: str, seed: int) -> Path:
        return self.work / f"bank-{name}-s{seed}"

    def manifest(self, bank: str, seed: int) -> Path:
        return self.bank(bank, seed) / "manifest.json"

    def scores(self, bank: str, cell: str, seed: int) -> Path:
        return self.bank(bank, seed) / "scores" / cell

    def audit(self, name: str, seed: int) -> Path:
        return self.work / f"audit-{name}-s{seed}"

    def recipe(self, spec: RunSpec) -> Path:
        return self.file.parent / str(spec.recipe)


def made_from(folder: Path) -> str:
    """The digest of what a run or bank was made from; empty where nothing says."""
    stamp = beside(folder, STAMP)
    return stamp.read_text(encoding="utf-8").strip() if stamp.exists() else ""


def beside(folder: Path, suffix: str) -> Path:
    return folder.parent / f"{folder.name}{suffix}"


def newer(path: Path, of: Path) -> bool:
    """Whether `path` is there, and not older than what it was made of, should that still be there."""
    return path.exists() and (not of.exists() or path.stat().st_mtime >= of.stat().st_mtime)
