"""What is cited is this version; the changelog has it."""

from __future__ import annotations

from pathlib import Path

import yaml

from genac_megatron import __version__

ROOT = Path(__file__).resolve().parents[2]


def test_the_citation_and_the_changelog_name_this_version() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert cited["version"] == __version__
    assert cited["license"] == "Apache-2.0"
    assert cited["preferred-citation"]["url"].endswith("2604.10701")
    changes = (ROOT / "docs" / "changelog.md").read_text(encoding="utf-8")
    assert f"## {__version__}" in changes
    assert f"`v{__version__}`" in changes
