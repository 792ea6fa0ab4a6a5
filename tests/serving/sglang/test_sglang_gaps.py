"""What boot.py fills is still missing: where this fails, take the filling out."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from genac_megatron.models.registry import FAMILIES
from genac_megatron.serving.sglang.boot import MODELS
from genac_megatron.serving.sglang.server import BOOT

PROBE = """
import json, os, sys
sys.path.insert(0, sys.argv[1])
import boot
os.environ.update(boot.CPU_ENVIRONMENT)
gaps, others = boot.fill_gaps(), boot.other_models()
import torch
print(json.dumps([torch.version.cuda, gaps, len(others)]))
"""


@pytest.mark.slow
def test_the_import_gaps_are_still_there(python: Path) -> None:
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [python, "-W", "ignore", "-c", PROBE, BOOT.parent],
        capture_output=True,
        text=True,
        env=environ,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    cuda, gaps, others = json.loads(done.stdout.splitlines()[-1])
    # A CUDA build of torch, which some indexes offer to a CPU too, comes with triton and suits torchvision.
    wanted = ["triton", "sgl_kernel", "torchvision", "allocator"]
    assert others > 100, "SGLang's models are elsewhere now: see boot.other_models"
    assert gaps == [gap for gap in wanted if cuda is None or gap not in ("triton", "torchvision")]


def test_a_server_imports_the_models_of_every_family() -> None:
    assert set(MODELS) == set(FAMILIES)
