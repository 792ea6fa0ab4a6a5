"""tools/env.py with a real venv and a lock without packages."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "tools" / "env.py"
LOCKS = sorted((ROOT / "requirements").glob("*.lock"))


@pytest.fixture
def env(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("env_tool", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "env_tool", module)  # its dataclasses look themselves up there
    spec.loader.exec_module(module)
    monkeypatch.setenv("GENAC_CACHE", str(tmp_path / "cache"))
    return module


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@pytest.fixture
def no_index(monkeypatch: pytest.MonkeyPatch) -> None:
    """pip looks nowhere: whatever a lock names cannot be had."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")


@pytest.mark.usefixtures("no_index")
def test_a_half_built_environment_is_built_afresh_then_found(
    env: ModuleType, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    text = "there-is-no-such-package==1.0  # [optional] a warning is all it costs\n"
    lock = write(tmp_path / "a.lock", text)
    folder = env.cache_folder() / "envs" / f"a-{env.environment_key(text)}"
    (folder / "bin").mkdir(parents=True)
    (folder / "bin" / "python").write_text("interrupted here")

    python = env.ensure("a", lock)
    told = capfd.readouterr()
    assert not told.out
    assert "half-built" in told.err
    assert "left out, it is optional" in told.err
    assert json.loads((folder / env.MARKER).read_text())["name"] == "a"
    prefix = [python, "-c", "import sys; print(sys.prefix)"]
    done = subprocess.run(prefix, capture_output=True, text=True, check=True)
    assert Path(done.stdout.strip()) == folder == python.parent.parent

    built = (folder / env.MARKER).stat().st_mtime_ns
    assert env.ensure("a", lock) == python
    assert (folder / env.MARKER).stat().st_mtime_ns == built
    assert not capfd.readouterr().err  # found, not built


@pytest.mark.usefixtures("no_index")
def test_a_package_that_cannot_be_had_is_one_message_and_no_environment(env: ModuleType, tmp_path: Path):
    with pytest.raises(env.EnvError, match="cannot be installed") as caught:
        env.ensure("a", write(tmp_path / "a.lock", "there-is-no-such-package==1.0\n"))
    assert "there-is-no-such-package" in str(caught.value)
    assert not list((env.cache_folder() / "envs").rglob(env.MARKER))


def test_the_key_follows_the_lock_the_python_and_the_recipe(env: ModuleType, monkeypatch: pytest.MonkeyPatch):
    keys = {env.environment_key("a==1\n"), env.environment_key("a==2\n")}
    monkeypatch.setattr(env.platform, "python_version", lambda: "3.11.99")
    keys.add(env.environment_key("a==1\n"))
    monkeypatch.setattr(env, "RECIPE", "other")
    keys.add(env.environment_key("a==1\n"))
    assert len(keys) == 4
    assert all(len(key) == 12 and int(key, 16) >= 0 for key in keys)


def test_a_lock_is_sorted_by_tags(env: ModuleType):
    lock = env.read_lock(
        "# head\na==1\nb==2.0.post1  # [source] why\n\nc==3 # [optional] why\nd==4  # plain\n"
    )
    assert (lock.wheels, lock.source, lock.optional) == (("a==1", "d==4"), ("b==2.0.post1",), ("c==3",))


@pytest.mark.parametrize("line", ["a>=1", "a", "-r other.txt", "a==1; python_version>'3'", "a @ file:x"])
def test_a_line_that_is_no_exact_pin_is_refused_by_number(env: ModuleType, line: str):
    with pytest.raises(env.EnvError, match="line 2"):
        env.read_lock(f"# head\n{line}\n")


def test_waiting_for_another_builder_ends_and_says_so(
    env: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(env, "WAIT_S", 0.0)
    path = tmp_path / "x.lock"
    with env._exclusive(path), pytest.raises(env.EnvError, match="waited"), env._exclusive(path):
        pass


@pytest.mark.parametrize("arguments", [[], ["nothing"], ["cpu", "cpu-next"]])
def test_an_unknown_name_is_refused(arguments: list[str]):
    done = subprocess.run([sys.executable, TOOL, *arguments], capture_output=True, text=True)
    assert done.returncode == 2
    assert not done.stdout
    assert "usage" in done.stderr


def test_another_python_is_refused(env: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr(env, "PYTHON", (2, 7))
    assert env.main(["cpu"]) == 2
    told = capsys.readouterr()
    assert not told.out
    assert "way out" in told.err


def test_the_locks_that_are_built_hold_exact_pins(env: ModuleType):
    for name in env.LOCK_OF.values():
        lock = env.read_lock((ROOT / "requirements" / name).read_text())
        names = [pin.partition("==")[0].lower().replace("_", "-") for pin in lock.wheels + lock.source]
        assert len(names) == len(set(names))
        torch = [pin for pin in lock.wheels + lock.source if pin.startswith("torch==")]
        # Other packages' environments neither train nor generate
        assert torch == ([] if name == "environments.lock" else ["torch==2.13.0"]), name
        assert "apex" not in names


def test_both_megatron_environments_differ_in_megatron_alone(env: ModuleType):
    pins = []
    for name in ("cpu.lock", "cpu-next.lock"):
        lock = env.read_lock((ROOT / "requirements" / name).read_text())
        pins.append({*lock.wheels, *lock.source})
    cpu, other = pins
    assert cpu - other == {"megatron-core==0.16.1"}
    assert {pin.partition("==")[0] for pin in other - cpu} == {"megatron-core", "pybind11", "triton"}


@pytest.mark.parametrize("path", LOCKS, ids=lambda path: path.name)
def test_no_lock_names_the_unrelated_apex(path: Path):
    assert not any(line.startswith("apex") for line in path.read_text().splitlines())
