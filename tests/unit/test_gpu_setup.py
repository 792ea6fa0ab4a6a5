"""tools/gpu_setup.sh on bundles made for the test: two interpreters that do not see each other's packages."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "tools" / "gpu_setup.sh"


def setup(*arguments: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, "PYTHON": sys.executable, **variables}
    command = ["sh", str(TOOL), *map(str, arguments)]
    return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=250)


def bundle(folder: Path, inner: str, modules: dict[str, str]) -> Path:
    """A tar file like those that GPU machines are given."""
    for name, text in modules.items():
        path = folder / "made" / inner / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    path = folder / f"{inner}.tar.xz"
    with tarfile.open(path, "w:xz") as tar:
        tar.add(folder / "made" / inner, arcname=inner)
    return path


def ran(python: str, code: str) -> str:
    environ = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run([python, "-c", code], env=environ, capture_output=True, text=True, timeout=60)
    return done.stdout.strip() or done.stderr.strip().splitlines()[-1]


def test_bundles_become_two_interpreters(tmp_path: Path) -> None:
    te = bundle(tmp_path, "te", {"engine_made_up": "name = 'te'", "both_made_up": "name = 'te'"})
    sgl = bundle(tmp_path, "sgl", {"server_made_up": "name = 'sgl'", "both_made_up": "name = 'sgl'"})
    done = setup(tmp_path / "gpu", "--te", te, "--sgl", sgl)
    assert done.returncode == 0, done.stderr
    found = dict(line.removeprefix("export ").split("=", 1) for line in done.stdout.splitlines())
    trainer, server = found["GENAC_GPU_PYTHON"], found["GENAC_SERVE_PYTHON"]
    assert ran(trainer, "import engine_made_up, both_made_up as b; print(b.name)") == "te"
    assert ran(server, "import server_made_up, both_made_up as b; print(b.name)") == "sgl"
    assert "ModuleNotFoundError" in ran(server, "import engine_made_up")
    assert ran(trainer, "import server_made_up as s; print(s.name)") == "sgl"  # transformers comes from there
    assert "not here: torch" in done.stderr or ran(sys.executable, "import torch") == ""


def wheel(folder: Path) -> Path:
    """A wheel of one module."""
    folder.mkdir()
    path = folder / "made_up_part-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("made_up_part.py", "name = 'wheel'")
        info = "made_up_part-1.0.dist-info"
        file.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: made-up-part\nVersion: 1.0\n")
        file.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr(f"{info}/RECORD", "")
    return folder


def test_wheels_fill_what_bundles_lack(tmp_path: Path) -> None:
    te, wheels = bundle(tmp_path, "te", {"engine_made_up": ""}), wheel(tmp_path / "wheels")
    lock = tmp_path / "extra.lock"
    lock.write_text("made-up-part==1.0\n")
    done = setup(tmp_path / "gpu", "--te", te, "--wheels", wheels, EXTRA_LOCK=str(lock))
    assert done.returncode == 0, done.stderr
    trainer = done.stdout.strip().removeprefix("export GENAC_GPU_PYTHON=")
    assert ran(trainer, "import made_up_part as p; print(p.name)") == "wheel"
    lock.write_text("another-made-up-part==1.0\n")
    done = setup(tmp_path / "other", "--te", te, "--wheels", wheels, EXTRA_LOCK=str(lock))
    assert done.returncode == 2
    assert "lacks a wheel" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "variables", "said"),
    [
        ([], {}, "no folder named"),
        (["gpu", "--te"], {}, "--te needs a file"),
        (["gpu", "--te", "missing.tar.xz"], {}, "there is no file missing.tar.xz"),
        (["gpu", "--other", str(TOOL)], {}, "unknown argument --other"),
        (["gpu"], {"PYTHON": "python-of-nobody"}, "python-of-nobody was not found"),
        (["gpu"], {"TRAINER_LOCK": "missing.lock"}, "there is no lock missing.lock"),
    ],
)
def test_a_wrong_call_is_told_its_way_out(
    tmp_path: Path, arguments: list[str], variables: dict[str, str], said: str
) -> None:
    given = [str(tmp_path / "gpu") if a == "gpu" else a for a in arguments]
    done = setup(*given, **variables)
    assert done.returncode == 2
    assert said in done.stderr
    assert "way out" in done.stderr


def test_a_file_that_is_no_bundle_is_named(tmp_path: Path) -> None:
    wrong = bundle(tmp_path, "other", {"module": ""})
    done = setup(tmp_path / "gpu", "--te", wrong)
    assert done.returncode == 2
    assert "holds no folder te" in done.stderr
