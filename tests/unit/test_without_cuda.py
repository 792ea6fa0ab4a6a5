"""What stands in for CUDA is read where a server runs on a CPU, and nowhere else."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

BOOT = Path(__file__).resolve().parents[2] / "genac_megatron" / "serving" / "sglang"
CODE = """
import sys; sys.path.insert(0, sys.argv[1])
import boot
read = []
class Prepared:
    def prepare(self): read.append("without_cuda")
boot.without_cuda = Prepared
boot.serve = lambda arguments: print(arguments, read)
boot.main(["serve", "-1", *sys.argv[2:]])
print([name for name in sys.modules if "without_cuda" in name])
"""


@pytest.mark.parametrize(("device", "read"), [("cuda", []), ("cpu", ["without_cuda"])])
def test_a_server_on_a_gpu_reads_nothing_of_it(device: str, read: list[str]) -> None:
    words = ["--device", device]
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(BOOT), *words], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"{words} {read}\n[]\n"
