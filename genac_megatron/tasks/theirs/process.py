"""The other interpreter's process: started, asked, ended. It plays the environments of one package (main.py).

Lines of JSON over two pipes, so that neither side needs what the other has installed, nor the same Python.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from genac_megatron.errors import InputError

if TYPE_CHECKING:
    from genac_megatron.recipe.tasks import PackageTask

MAIN = Path(__file__).with_name("main.py")
PYTHON_VARIABLE = "GENAC_ENVIRONMENTS_PYTHON"
TAIL_LINES = 6  # of what a process wrote, that are told where it ended
END_LIMIT_S = 10.0
# A set of texts has the same order in every process: what is drawn of one is drawn again elsewhere.
FIXED = {"PYTHONHASHSEED": "0", "PYTHONSAFEPATH": "1"}


class Lost(Exception):
    """The process has ended, or was ended; the text says how."""


class Failed(Exception):
    """It could not do what it was asked for; the text says why."""

    def __init__(self, why: str, way_out: str = "") -> None:
        super().__init__(why)
        self.way_out = way_out


@dataclass(frozen=True)
class Theirs:
    """An environment of another package, as a recipe names it. Plain data: it crosses to processes."""

    kind: str  # the package
    id: str
    args: dict[str, Any]
    python: str  # its interpreter
    path: str | None = None  # a folder that it is looked for in
    sizes: dict[str, Any] = field(
        default_factory=dict
    )  # of what has no rows of its own: train, heldout, seed
    rewards: tuple[float, float] = (0.0, 1.0)  # that are worth 0 and 1
    timeout_s: float = 600.0  # to load it, with its rows

    @property
    def name(self) -> str:
        return f"{self.kind} {self.id}"


def theirs_of(config: PackageTask, seed: int) -> Theirs:
    """What a recipe's task names. Raises InputError where there is no such interpreter."""
    sizes = {"train": config.sizes[0], "heldout": config.sizes[1], "seed": seed} if config.sizes else {}
    return Theirs(
        config.kind,
        config.id,
        config.args,
        _interpreter(config.python),
        config.path,
        sizes,
        config.rewards,
        config.timeout_s,
    )


def _interpreter(configured: str | None) -> str:
    """The one that the recipe or the shell names, else this one."""
    found = configured or os.environ.get(PYTHON_VARIABLE) or sys.executable
    if not os.access(found, os.X_OK):
        raise InputError(
            f"{found} is no interpreter",
            where="task.python" if configured else PYTHON_VARIABLE,
            way_out="`make environments-env` builds one with verifiers and textarena, and prints it",
        )
    return found


class TheirProcess:
    """One process with one environment, once it is loaded."""

    def __init__(self, theirs: Theirs) -> None:
        self._begun = 0  # episodes
        self._over: list[int] = []
        come, there_out = os.pipe()
        there_in, go = os.pipe()
        environ = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
        command = [theirs.python, str(MAIN), str(there_in), str(there_out), theirs.kind]
        try:
            self._process = subprocess.Popen(
                command,
                pass_fds=(there_in, there_out),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                env=environ | FIXED,
                text=True,
                errors="replace",
            )
        except OSError as error:
            os.close(come)
            os.close(go)
            raise InputError(
                f"{theirs.python} cannot be started: {error.strerror}",
                where="task.python",
                way_out="name a Python interpreter that has the package",
            ) from error
        finally:
            os.close(there_in)
            os.close(there_out)
        self._come, self._go = os.fdopen(come, encoding="utf-8"), os.fdopen(go, "w", encoding="utf-8")
        self._tail: deque[str] = deque(maxlen=TAIL_LINES)
        self._reader = threading.Thread(target=self._listen, name="their-words", daemon=True)
        self._reader.start()

    def load(self, theirs: Theirs, *, rows: bool) -> dict[str, Any]:
        """The environment, in the place of the one before; what it says of itself, with its rows.

        rows: whether they are wanted; {} where not. Raises Lost or Failed.
        """
        request = {"do": "load", "id": theirs.id, "args": theirs.args, "path": theirs.path, **theirs.sizes}
        loaded: dict[str, Any] = self.ask({**request, "rows": rows}, theirs.timeout_s)["loaded"]
        return loaded

    def _listen(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            if line.strip():
                self._tail.append(line.rstrip())

    def begin(self) -> int:
        """The number of a further episode."""
        self._begun += 1
        return self._begun

    def over(self, episode: int) -> None:
        """It is told with the next request."""
        self._over.append(episode)

    def ask(self, request: dict[str, Any], limit_s: float | None = None) -> dict[str, Any]:
        """The answer to a request. Raises Lost, also where it takes longer than `limit_s`; Failed."""
        over, self._over = self._over, []
        late = threading.Event()

        def end() -> None:
            late.set()
            self._process.kill()

        timer = threading.Timer(limit_s, end) if limit_s is not None else None
        try:
            if timer is not None:
                timer.start()
            self._go.write(json.dumps({**request, "over": over}) + "\n")
            self._go.flush()
            line = self._come.readline()
        except OSError:
            line = ""
        finally:
            if timer is not None:
                timer.cancel()
        if not line:
            raise Lost(f"took longer than {limit_s:g} s" if late.is_set() else self._last_words())
        try:
            answer: dict[str, Any] = json.loads(line)
        except ValueError:
            raise Lost(f"answered what is no answer: {line[:80]!r}") from None
        if "failed" in answer:
            raise Failed(answer["failed"], answer.get("way_out", ""))
        return answer

    def _last_words(self) -> str:
        self._process.wait()
        self._reader.join(END_LIMIT_S)
        code = self._process.returncode
        how = f"ended its process with {code}" if code >= 0 else f"its process was ended by signal {-code}"
        return "\n  ".join([how, *self._tail])

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._come, self._go):
            try:
                pipe.close()
            except OSError:
                pass
