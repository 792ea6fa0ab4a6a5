"""Lines of results: written as soon as a figure is known, whatever comes after it."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

Figures = dict[str, Any]
Case = tuple[str, Callable[[], Figures]]
DONE_VARIABLE = "GENAC_MINUTES_DONE"  # cases that a process before this one has tried


@dataclass(frozen=True)
class Step:
    """One step: its name, whether it is a try on a CPU, the file of results and a folder for logs."""

    name: str
    tiny: bool
    results: Path
    logs: Path
    began: float = field(default_factory=time.time)

    def say(self, what: str, **figures: Any) -> None:
        """Append a line, and show it."""
        row = {"step": self.name, "what": what, "at_s": round(time.time() - self.began, 1), **figures}
        line = json.dumps(row, default=str)
        with self.results.open("a") as file:
            file.write(line + "\n")
        print(line, flush=True)

    def each(self, cases: Sequence[Case]) -> bool:
        """Try every case; whether all went well. A failure is a line too.

        A lost CUDA context fails all that comes after it in its process, so the rest is begun in a new one.
        """
        done = int(os.environ.pop(DONE_VARIABLE, "0"))
        well = done == 0  # a process is begun anew because something failed
        for index, case in enumerate(cases):
            if index < done:
                continue
            if not self._tried(*case):
                well = False
                if not self.tiny and _context_lost():
                    self.say("CUDA context lost, the rest in a new process", ok=False, after=case[0])
                    os.environ[DONE_VARIABLE] = str(index + 1)
                    again = [sys.executable, "-W", "ignore", "-m", __name__.rpartition(".")[0]]
                    os.execv(sys.executable, [*again, *sys.argv[1:]])
            _let_go()
        return well

    def chain(self, cases: Sequence[Case]) -> bool:
        """Try cases that each need what came before: in one world, and no further after a failure."""
        return all(self._tried(*case) for case in cases)

    def _tried(self, what: str, act: Callable[[], Figures]) -> bool:
        began = time.time()
        try:
            figures = act()
        except (Exception, SystemExit) as error:
            traceback.print_exc()
            self.say(what, ok=False, s=round(time.time() - began, 2), error=_last_words(error))
            return False
        self.say(what, ok=True, s=round(time.time() - began, 2), **figures)
        return True


def _last_words(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error)[-1500:]}"


def _context_lost() -> bool:
    try:
        torch.zeros(8, device="cuda").sum().item()
        torch.cuda.synchronize()
    except Exception:  # whatever it says, nothing more runs in this process
        return True
    return False


def _let_go() -> None:
    """Leave the next case a world and a GPU as the first one found them."""
    layout = sys.modules.get("genac_megatron.training.layout")
    with contextlib.suppress(Exception):
        if layout is not None:
            layout.close_world()
    gc.collect()
    with contextlib.suppress(Exception):
        torch.cuda.empty_cache()


def beside(model: float, measured: float) -> Figures:
    """A constant of the memory model (recipe/memory.py, assumed until then) and what it is on this GPU."""
    return {"model says": model, "measured": short(measured)}


def short(value: Any) -> Any:
    """A figure in four digits, so that a line can be read."""
    return float(f"{value:.4g}") if isinstance(value, float) else value
