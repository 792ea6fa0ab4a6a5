"""What boot.py fills is still missing: where this fails, take the filling out."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from genac_megatron.serving.sglang.server import BOOT

PROBE = """
import json, os, sys
sys.path.insert(0, sys.argv[1])
import boot
os.environ.update(boot.CPU_ENVIRONMENT)
print(json.dumps(boot.fill_gaps()))
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
    assert json.loads(done.stdout) == ["triton", "sgl_kernel", "torchvision", "allocator"]
