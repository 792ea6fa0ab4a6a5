"""The doctor's judgement on version tables made up for the test, and one look at the machine itself."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from genac_megatron.platform.doctor import PARTS, Facts, Finding, doctor, judge, numbers, render

GOOD = {part.name: part.least for part in PARTS} | {"megatron-core": "0.16.1", "torch": "2.13.0+cpu"}


def facts(versions: dict[str, str] | None = None, without: tuple[str, ...] = (), **changes) -> Facts:
    merged = {key: value for key, value in (GOOD | (versions or {})).items() if key not in without}
    return Facts(**({"python": (3, 11, 7), "versions": merged, "gloo": True} | changes))


def found(machine: Facts, part: str) -> Finding:
    return next(finding for finding in judge(machine) if finding.part == part)


def failed(machine: Facts) -> list[str]:
    return [finding.part for finding in judge(machine) if finding.state == "FAIL"]


def test_faked_cpu_machine_passes_without_what_only_gpus_need():
    assert failed(facts()) == []
    assert {f.part for f in judge(facts()) if f.state == "absent"} == {
        "CUDA",
        "transformer-engine",
        "fp8",
        "apex",
        "fused Adam",
        "sglang",
    }


def test_faked_few_open_files_are_told_and_fail_nothing():
    assert found(facts(files=65_536), "open files").note == ""
    few = found(facts(files=1024), "open files")
    assert (few.found, few.state) == ("1024", "pass")
    assert "ulimit -Hn" in few.note


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.name)
def test_faked_absence_fails_where_needed_and_always_says_its_cost(part):
    finding = found(facts(without=(part.name,)), part.name)
    assert finding.state == ("FAIL" if part.needed else "absent")
    assert part.cost in finding.note


def test_faked_old_and_new_versions_fail():
    assert failed(facts({"torch": "2.10.1", "transformers": "6.0.0"})) == ["torch", "transformers"]
    assert "at least 2.11, below 2.15" in found(facts({"torch": "2.15"}), "torch").note


def test_faked_python_3_10_fails():
    assert failed(facts(python=(3, 10, 1))) == ["python"]


def test_faked_import_errors_fail():
    assert failed(facts(torch_error="libcublas.so.13: not found")) == ["torch"]
    assert failed(facts(megatron_error="No module named 'einops'")) == ["megatron-core"]


def test_faked_new_megatron_needs_triton():
    assert failed(facts({"megatron-core": "0.19.2"})) == ["triton"]
    assert failed(facts({"megatron-core": "0.19.2"}, triton_importable=True)) == []


@pytest.mark.parametrize(
    ("engine", "cublas", "error", "expected"),
    [
        ("2.20.2", "13.1.3.2", "undefined symbol", ["transformer-engine", "nvidia-cublas"]),
        ("2.20.2", "13.2.2.2", "", []),
        ("2.12.0", "13.1.3.2", "", []),
        ("2.20.2", "", "no CUDA headers", ["transformer-engine"]),
    ],
)
def test_faked_cublas_trap(engine: str, cublas: str, error: str, expected: list[str]):
    versions = {"transformer-engine": engine} | ({"nvidia-cublas": cublas} if cublas else {})
    machine = facts(versions, engine_error=error, cuda="13.0", gpus=("H100",), nccl="2.28.9")
    assert failed(machine) == expected
    if "nvidia-cublas" in expected:
        assert "nvidia-cublas==13.2.2.2" in found(machine, "nvidia-cublas").note


def test_faked_unrelated_apex_fails_and_nvidias_passes():
    assert failed(facts({"apex": "0.9.10.dev0"})) == ["apex"]
    assert failed(facts({"apex": "0.1"}, apex_is_nvidia=True)) == []


def test_faked_gpus_are_told_their_fp8_recipes_and_their_adam():
    engine = {"transformer-engine": "2.12.0"}
    hopper = facts(engine, cuda="13.0", gpus=("H100",), nccl="2.28.9", capability=(9, 0))
    assert found(hopper, "fp8").found == "delayed, tensorwise, blockwise"
    assert "mxfp8 needs Blackwell" in found(hopper, "fp8").note
    assert found(hopper, "fused Adam").found == "transformer-engine"
    blackwell = facts(engine, cuda="13.0", gpus=("B200",), nccl="2.28.9", capability=(10, 0))
    assert found(blackwell, "fp8").found == "delayed, tensorwise, blockwise, mxfp8"
    broken = facts(engine, engine_error="undefined symbol", gpus=("H100",), nccl="2.28.9")
    assert "Transformer Engine" in found(broken, "fp8").note
    assert found(broken, "fused Adam").state == "absent"
    assert found(facts({"apex": "0.1"}, apex_is_nvidia=True), "fused Adam").found == "apex"
    assert "never install" in found(facts(), "apex").note


def test_faked_gpu_machine_needs_nccl():
    assert failed(facts(cuda="13.0", gpus=("H100",), nccl="")) == ["NCCL"]
    assert failed(facts(cuda="13.0", gpus=("H100",), nccl="2.28.9")) == []
    assert failed(facts(gloo=False)) == ["gloo"]


def test_faked_failures_are_listed_at_the_end():
    machine = facts(without=("psutil",))
    text = render(machine, judge(machine))
    assert text.splitlines()[-1] == "FAIL: psutil"
    assert "checkpoint save" in text


@pytest.mark.parametrize(
    ("version", "expected"), [("2.13.0+cpu", (2, 13, 0)), ("0.9.10dev", (0, 9, 10)), ("5", (5,)), ("x", ())]
)
def test_version_numbers(version: str, expected: tuple[int, ...]):
    assert numbers(version) == expected


def test_the_ranges_are_those_of_the_project():
    path = Path(__file__).resolve().parents[2] / "pyproject.toml"
    declared: dict[str, tuple[str, str]] = {}
    for line in tomllib.loads(path.read_text())["project"]["dependencies"]:
        name, least, below = re.fullmatch(r"([a-z0-9-]+)>=([\d.]+)(?:,<([\d.]+))?", line).groups()
        declared[name] = (least, below or "")
    assert declared == {part.name: (part.least, part.below) for part in PARTS}


def test_this_machine_has_what_it_needs():
    text, ok = doctor()
    assert ok, text
    assert "megatron-core" in text
