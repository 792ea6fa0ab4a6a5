"""python -m benchmarks.gpu.minutes STEP --results FILE --logs FOLDER [--tiny]: one step, here and now.

Exit code: 0 where every case of it went well, 1 where one failed, 2 where the arguments are wrong.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

from benchmarks.gpu.common import need_gpu
from benchmarks.gpu.minutes import facts, figures, layers, servers
from benchmarks.gpu.minutes.rows import Step
from genac_megatron.platform.megatron import install

STEPS: dict[str, Callable[[Step], bool]] = {
    "facts": facts.run,
    "parity": layers.parity,
    "fp8": layers.fp8,
    "server": servers.run,
    "serverfp8": partial(servers.run, quantization="fp8"),
    "train8b": figures.train,
    "train1b": figures.train,
    "train0b": figures.train,
    "logprobs": figures.log_probs,
    "publish": figures.publish,
    "joint": figures.joint,
    "accuracy": figures.accuracies,
    "memory": figures.peaks,
}


def main() -> int:
    grammar = argparse.ArgumentParser(description=__doc__)
    grammar.add_argument("step", choices=STEPS)
    grammar.add_argument("--results", type=Path, required=True, help="lines of JSON are added to it")
    grammar.add_argument("--logs", type=Path, required=True, help="a folder, for servers' logs")
    grammar.add_argument("--tiny", action="store_true", help="tiny shapes, on a CPU too; figures say nothing")
    options = grammar.parse_args()
    need_gpu(options.tiny)
    install()
    return 0 if STEPS[options.step](Step(options.step, options.tiny, options.results, options.logs)) else 1


if __name__ == "__main__":
    raise SystemExit(main())
