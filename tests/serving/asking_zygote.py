"""In the serving environment: boot.py's zygote, whose children can also be asked what lines of Python find.

    python asking_zygote.py zygote PARENT

Where a server's arguments are `ask CODE GIVEN ANSWER`, the child runs CODE with `given` (GIVEN is its JSON),
the module `without_cuda` and the gaps that it `filled`, and writes the JSON of `found`, as the code leaves
it, to the file ANSWER.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "genac_megatron" / "serving" / "sglang"))

import boot
import without_cuda

FILLED: list[str] = []
fill_gaps, serve = without_cuda.fill_gaps, boot.serve


def fill_and_note() -> list[str]:
    FILLED.extend(fill_gaps())
    return FILLED


def serve_or_answer(arguments: Sequence[str]) -> None:
    if arguments[0] != "ask":
        serve(arguments)
        return
    _, code, given, answer = arguments
    names = {"given": json.loads(given), "filled": FILLED, "without_cuda": without_cuda}
    exec(code, names)
    Path(answer).write_text(json.dumps(names["found"]))


if __name__ == "__main__":
    without_cuda.fill_gaps, boot.serve = fill_and_note, serve_or_answer
    os._exit(boot.main(sys.argv[1:]))
