"""python -m benchmarks.gpu.minutes STEP --results FILE --logs FOLDER [--tiny]: one step, here and now.

Exit code: 0 where every case of it went well, 1 where one failed, 2 where the arguments are wrong.
"""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path

from benchmarks.gpu.common import need_gpu
from benchmarks.gpu.minutes.rows import Step

# step -> module and function: imported when it is asked, so that what one of them lacks fails no other.
STEPS = {
    "facts": ("facts", "run"),
    "parity": ("layers", "parity"),
    "fp8": ("layers", "fp8"),
    "server": ("servers", "run"),
    "serverfp8": ("servers", "run_fp8"),
    "serverlora": ("servers", "run_lora"),
    "train8b": ("figures", "train"),
    "train1b": ("figures", "train"),
    "train0b": ("figures", "train"),
    "logprobs": ("figures", "log_probs"),
    "publish": ("figures", "publish"),
    "joint": ("figures", "joint"),
    "accuracy": ("figures", "accuracies"),
    "memory": ("figures", "peaks"),
}


def main() -> int:
    grammar = argparse.ArgumentParser(description=__doc__)
    grammar.add_argument("step", choices=STEPS)
    grammar.add_argument("--results", type=Path, required=True, help="lines of JSON are added to it")
    grammar.add_argument("--logs", type=Path, required=True, help="a folder, for servers' logs")
    grammar.add_argument("--tiny", action="store_true", help="tiny shapes, on a CPU too; figures say nothing")
    options = grammar.parse_args()
    need_gpu(options.tiny)
    step = Step(options.step, options.tiny, options.results, options.logs)
    module, function = STEPS[options.step]
    if module != "facts":  # which are of use where Megatron cannot even be imported
        from genac_megatron.platform.megatron import install

        install()
    act = getattr(importlib.import_module(f"benchmarks.gpu.minutes.{module}"), function)
    return 0 if act(step) else 1


if __name__ == "__main__":
    raise SystemExit(main())
