"""Plays environments of another package, under that package's interpreter: nothing of ours is imported here.

    python main.py IN OUT KIND      IN, OUT: descriptors; KIND: of_KIND.py beside this file

A line of JSON comes in, a line of JSON goes out. A request says what to `do`:
    load     id, args, path, and what KIND wants besides: the environment. Gives its rows and limits
    begin    episode, row, seed: a conversation of that row
    step     episode, turn, content, calls: the actor's turn, as text, and by its tool calls
and may name conversations that are `over`. An answer has what was asked for, or says what `failed`, with a
`way_out` where one is known. Standard library only, from Python 3.10 on.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import json
import os
import random
import signal
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PR_SET_PDEATHSIG = 1  # linux/prctl.h
IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # who started this process ends it
HERE = Path(__file__).resolve().parent


class Refused(Exception):
    """The package or the environment cannot be used as it was asked for; the text says why."""

    def __init__(self, what: str, way_out: str = "") -> None:
        super().__init__(what)
        self.way_out = way_out


def told(error: BaseException) -> str:
    """An error in a line: its type, what it says first, and the last line of a file that it went through."""
    lines = [line.strip(" *\t") for line in str(error).splitlines()]
    text = next((line for line in lines if line), "")
    shown = f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__
    frames = [one for one in traceback.extract_tb(error.__traceback__) if Path(one.filename).parent != HERE]
    return f"raised {shown} ({frames[-1].filename}:{frames[-1].lineno})" if frames else f"raised {shown}"


class Dice:
    """The state of the random generators that everybody shares, one of each conversation's own.

    So what a conversation is dealt depends on its seed and its turns alone, whoever plays beside it.
    """

    def __init__(self) -> None:
        self._kept: dict[int, tuple[Any, Any]] = {}

    @contextlib.contextmanager
    def of(self, episode: int, seed: int | None = None) -> Iterator[None]:
        """seed: of one that begins."""
        numpy: Any = sys.modules.get("numpy")
        if seed is not None:
            random.seed(seed)
            if numpy is not None:
                numpy.random.seed(seed % 2**32)
        else:
            own, arrays = self._kept[episode]
            random.setstate(own)
            if numpy is not None and arrays is not None:
                numpy.random.set_state(arrays)
        try:
            yield
        finally:
            numpy = sys.modules.get("numpy")
            self._kept[episode] = random.getstate(), None if numpy is None else numpy.random.get_state()

    def forget(self, episode: int) -> None:
        self._kept.pop(episode, None)


class Player:
    """Answers requests, one after another."""

    def __init__(self, package: Any) -> None:
        """package: the module of_KIND.py."""
        self._package, self._dice = package, Dice()
        self._environment: Any = None
        self._episodes: dict[int, Any] = {}

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        for number in request.get("over", ()):
            self._end(number)
        try:
            do = request["do"]
            found: dict[str, Any] = getattr(self, f"_{do}")(request)
            return found
        except Refused as error:
            return {"failed": str(error), "way_out": error.way_out}
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # SystemExit too
            return {"failed": told(error)}

    def _load(self, request: dict[str, Any]) -> dict[str, Any]:
        if request["path"] is not None:
            sys.path.insert(0, str(Path(request["path"]).resolve()))
        random.seed(0)
        self._environment = self._package.load(request)
        for number in IGNORED:  # verifiers has handlers of its own
            signal.signal(number, signal.SIG_IGN)
        return {"loaded": self._environment.rows() if request["rows"] else {}}

    def _begin(self, request: dict[str, Any]) -> dict[str, Any]:
        number = request["episode"]
        with self._dice.of(number, request["seed"]):
            self._episodes[number] = self._environment.begin(request["row"])
        return {}

    def _step(self, request: dict[str, Any]) -> dict[str, Any]:
        number = request["episode"]
        with self._dice.of(number):
            return {"step": self._episodes[number].step(request)}

    def _end(self, number: int) -> None:
        episode = self._episodes.pop(number, None)
        if episode is not None:
            with contextlib.suppress(Exception), self._dice.of(number):
                episode.close()
        self._dice.forget(number)


def package_of(kind: str) -> Any:
    """The module beside this file, by its path: packages are looked for in no folder of ours."""
    spec = importlib.util.spec_from_file_location(f"_genac_of_{kind}", HERE / f"of_{kind}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main(come: int, go: int, kind: str) -> None:
    """Until `come` is closed. What packages print goes to stderr."""
    for number in IGNORED:
        signal.signal(number, signal.SIG_IGN)
    with contextlib.suppress(OSError, AttributeError):  # elsewhere than on Linux
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    os.dup2(2, 1)
    sys.path[:] = [path for path in sys.path if Path(path).resolve() != HERE]
    player = Player(package_of(kind))
    with os.fdopen(come, encoding="utf-8") as asked, os.fdopen(go, "w", encoding="utf-8") as answered:
        for line in asked:
            answered.write(json.dumps(player.answer(json.loads(line))) + "\n")
            answered.flush()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
