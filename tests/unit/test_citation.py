"""A version is one number and one day, wherever they stand; the changelog has it on top, but for news."""

from __future__ import annotations

import datetime
import re
import tomllib
from pathlib import Path

import pytest
import yaml

from genac_megatron import __version__
from genac_megatron.cli import main

ROOT = Path(__file__).resolve().parents[2]


def test_the_citation_and_the_changelog_name_this_version_and_its_day() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert cited["version"] == __version__
    assert cited["license"] == "Apache-2.0"
    assert cited["preferred-citation"]["url"].endswith("2604.10701")
    assert isinstance(cited["date-released"], datetime.date)
    changes = (ROOT / "docs" / "changelog.md").read_text(encoding="utf-8")
    headings = [
        heading for heading in re.findall(r"^## (.+)$", changes, re.MULTILINE) if heading != "Unreleased"
    ]
    assert headings[0] == f"{__version__} ({cited['date-released']})"
    assert f"`v{__version__}`" in changes


def test_the_package_and_the_command_say_it(capsys: pytest.CaptureFixture[str]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert "version" in project["project"]["dynamic"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "genac_megatron.__version__"}
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"genac-megatron {__version__}\n"
