"""The zygote that all serving tests share: importing SGLang takes a dozen CPU seconds each time."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

from genac_megatron.serving.sglang import server
from genac_megatron.serving.sglang.boot import group_members

SCRIPT = Path(__file__).with_name("asking_zygote.py")
ASK_S = 300.0  # for answers, on a busy machine
LOOK_S = 0.05


class AskingZygote(server.Zygote):
    """Forks servers, and processes that are asked lines of Python, each with SGLang imported."""

    def __init__(self, python: Path, log: Path) -> None:
        with patch.object(server, "BOOT", SCRIPT):
            super().__init__(python, log)

    def ask(self, code: str, given: object = None) -> Any:
        """`found` as the code leaves it, with `given`, `without_cuda` and the gaps `filled` to its hand."""
        return self.ask_all(code, [given], {})[0]

    def ask_all(self, code: str, given: Sequence[object], environ: Mapping[str, str]) -> list[Any]:
        """The same of a process for each of `given`, all at once."""
        with tempfile.TemporaryDirectory() as name:
            answers = [Path(name) / f"{number}.json" for number in range(len(given))]
            groups = [
                self.fork(["ask", code, json.dumps(one), str(answer)], answer.with_suffix(".log"), environ)
                for one, answer in zip(given, answers, strict=True)
            ]
            until = time.monotonic() + ASK_S
            while any(group_members(group) for group in groups):
                assert time.monotonic() < until, f"no answer within {ASK_S:.0f} s"
                time.sleep(LOOK_S)
            for answer in answers:
                assert answer.exists(), answer.with_suffix(".log").read_text()[-4000:]
            return [json.loads(answer.read_text()) for answer in answers]
