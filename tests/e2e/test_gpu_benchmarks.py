"""The GPU benchmarks' own code on a CPU, with tiny shapes: a command each, a table, goals, a JSON record."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.warm import ROOT, run

COLUMNS = {
    "training": {"tokens/s", "TFLOP/s", "MFU_%", "times bare", "peak_GiB"},
    "logprobs": {"ms", "beyond_gradients_MiB", "times dense"},
    "publication": {"GB/s", "of a copy"},
    "joint_step": {"phase", "s", "share_%"},
    "memory": {"peak_GiB", "estimate_GiB", "outside_GiB"},
    "accuracy": {"precision", "loss", "grad norm", "log-prob", "engine p99", "fp8 engine p99"},
}
# In layers, log-probs and publications that other tests run, as steps of the GPU minutes too.
LONG = ("training", "accuracy", "logprobs", "publication", "joint_step")


def bench(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return run([sys.executable, "-m", f"benchmarks.gpu.{name}", *arguments], cwd=ROOT)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.extended] if n in LONG else []) for n in COLUMNS]
)
def test_a_tiny_run_gives_a_table_goals_and_a_record(name: str, tmp_path: Path) -> None:
    done = bench(name, "--tiny", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / f"{name}.json").read_text())
    assert COLUMNS[name] <= set(record["rows"][0])
    assert record["gpu"]
    assert {"torch", "megatron-core"} <= set(record["versions"])
    assert all(goal in done.stdout for goal in record["goals"])
    if name == "training":
        losses = [row["loss"] for row in record["rows"]]
        assert max(losses) - min(losses) <= 1e-3  # the loops train alike: fp32 sums in another order


@pytest.mark.parametrize("name", COLUMNS)
def test_without_a_gpu_it_says_so_and_the_way_out(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU here, and it would be used")
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(f"benchmarks.gpu.{name}").main([])
    assert ended.value.code == 2
    said = capsys.readouterr().out
    assert "no CUDA device" in said
    assert "--tiny" in said
