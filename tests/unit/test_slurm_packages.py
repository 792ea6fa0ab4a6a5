"""tools/slurm_packages.py, with an apt-get of the test's own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tools.slurm_packages import PROGRAMS

TOOL = Path(__file__).resolve().parents[2] / "tools" / "slurm_packages.py"
PATCHED = """\
import os, runpy, sys
sys.argv = [{tool!r}]
os.geteuid = lambda: {user}
import shutil
real = shutil.which
# Not the machine's own Slurm: what stands in the test's folder alone.
shutil.which = lambda name, mode=1, path=None: real(name, mode, {folder!r})
import time
time.sleep = lambda seconds: None
runpy.run_path({tool!r}, run_name="__main__")
"""
APT = """\
#!/bin/sh
echo "$@" >> {folder}/asked
{body}
"""
MAKES = (
    f'case "$*" in *install*) for p in {" ".join(PROGRAMS)}; do '
    ": > {folder}/$p; chmod +x {folder}/$p; done;; esac"
)


@pytest.fixture
def tool(tmp_path: Path):
    def run(apt: str | None, user: int = 0, **environ: str) -> subprocess.CompletedProcess[str]:
        if apt is not None:
            path = tmp_path / "apt-get"
            path.write_text(APT.format(folder=tmp_path, body=apt.format(folder=tmp_path)))
            path.chmod(0o755)
        code = PATCHED.format(tool=str(TOOL), user=user, folder=str(tmp_path))
        clean = {key: value for key, value in os.environ.items() if key != "CI"}
        clean["PATH"] = f"{tmp_path}{os.pathsep}{clean['PATH']}"
        return subprocess.run(
            [sys.executable, "-c", code], env={**clean, **environ}, capture_output=True, text=True, timeout=60
        )

    return run


def test_in_ci_what_is_missing_is_installed(tool, tmp_path: Path) -> None:
    done = tool(MAKES, CI="true")
    assert done.returncode == 0, done.stderr
    asked = (tmp_path / "asked").read_text().splitlines()
    assert [line.split()[-1] for line in asked] == ["update", "munge"]
    assert tool(MAKES, CI="true").returncode == 0
    assert len((tmp_path / "asked").read_text().splitlines()) == 2  # it is there: not asked again


@pytest.mark.parametrize(("user", "environ"), [(0, {}), (1000, {"CI": "true"})])
def test_elsewhere_it_is_said_and_nothing_is_installed(tool, tmp_path: Path, user, environ) -> None:
    done = tool(MAKES, user=user, **environ)
    assert done.returncode == 0
    assert "will be skipped" in done.stderr
    assert "apt-get install slurm-wlm munge" in done.stderr
    assert not (tmp_path / "asked").exists()


@pytest.mark.parametrize("apt", ["echo no such package; exit 100", "true"])
def test_ci_without_slurm_fails_rather_than_skip(tool, tmp_path: Path, apt: str) -> None:
    done = tool(apt, CI="true")
    assert done.returncode == 2
    assert "could not be installed" in done.stderr
