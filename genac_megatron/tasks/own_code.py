"""Loading the user's functions and calling them with what they ask for, in a process of their own."""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Collection, Mapping, Sequence
from types import ModuleType
from typing import Any, TypeVar

from genac_megatron.errors import InputError
from genac_megatron.recipe.own_code import Named
from genac_megatron.tasks.workers import Pool

T = TypeVar("T")
MODULE = "_genac_own"  # what a file is imported as


class OwnCodeError(Exception):
    """The user's code cannot be used as it is; the text says why."""


class Called:
    """A user's function, sync or async, called with those of the given arguments that it takes by name.

    An async one runs in one event loop per process, so its clients stay open between calls.
    """

    def __init__(self, named: Named, names: Collection[str], others: Mapping[str, str] | None = None) -> None:
        """`names`: the arguments there are; `others`: further names, each of one of them.

        Raises OwnCodeError where the function cannot be loaded or takes what there is not.
        """
        self.named = named
        self._function = load_own(named)
        self._taken, self._rest = _taken(self._function, names, others or {})
        self._names = tuple(names)
        self._loop: asyncio.AbstractEventLoop | None = None

    def __call__(self, given: Mapping[str, Any]) -> Any:
        """What the function returns. Raises OwnCodeError for what it raises, SystemExit among it."""
        positional = [given[source] for source, by_place in self._taken.values() if by_place]
        keywords = {name: given[source] for name, (source, by_place) in self._taken.items() if not by_place}
        if self._rest:
            keywords = {**{name: given[name] for name in self._names}, **keywords}
        try:
            result = self._function(*positional, **keywords)
            return self._awaited(result) if inspect.isawaitable(result) else result
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            raise OwnCodeError(f"raised {told(error, self.named)}") from error

    def _awaited(self, result: Any) -> Any:
        async def wait() -> Any:
            return await result

        if self._loop is None:
            self._loop = asyncio.new_event_loop()
        return self._loop.run_until_complete(wait())


def run_jobs(pool: Pool[T], jobs: Sequence[Any], named: Named) -> list[T]:
    """`pool.run`. Raises InputError where a process does not start."""
    try:
        return pool.run(jobs)
    except RuntimeError as error:
        raise InputError(
            "its process did not start: importing it ends the process, or takes too long",
            where=str(named),
            way_out="put what the file does when it is run under if __name__ == '__main__':",
        ) from error


def told(error: BaseException, named: Named) -> str:
    """An error in a line: its type, what it says, and the user's last line that it went through."""
    text = " ".join(str(error).split())
    shown = f"{type(error).__name__}: {text}" if text else type(error).__name__
    frames = traceback.extract_tb(error.__traceback__)
    if isinstance(error, SyntaxError) and error.filename:
        return f"{shown} ({error.filename}:{error.lineno})"
    own = [
        f for f in frames if named.in_file and os.path.realpath(f.filename) == os.path.realpath(named.path)
    ]
    last = (own or [f for f in frames if f.filename != __file__ and "importlib" not in f.filename])[-1:]
    return f"{shown} ({last[0].filename}:{last[0].lineno})" if last else shown


def load_own(named: Named) -> Callable[..., Any]:
    try:
        module = _from_file(named) if named.in_file else _from_name(named)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # SystemExit too: a script without a main guard
        raise OwnCodeError(f"cannot be imported: {told(error, named)}") from error
    function = getattr(module, named.function, None)
    if not callable(function):
        kind = (
            "has no such function" if function is None else f"is a {type(function).__name__}, not a function"
        )
        raise OwnCodeError(kind)
    return function  # type: ignore[no-any-return]


def _from_file(named: Named) -> ModuleType:
    """The file as a module; its neighbours can be imported by name."""
    path = named.path.resolve()
    sys.path.insert(0, str(path.parent))
    spec = importlib.util.spec_from_file_location(f"{MODULE}_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # as an import does, so that its classes can be pickled
    spec.loader.exec_module(module)
    return module


def _from_name(named: Named) -> ModuleType:
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    return importlib.import_module(named.place)


def _taken(
    function: Callable[..., Any], names: Collection[str], others: Mapping[str, str]
) -> tuple[dict[str, tuple[str, bool]], bool]:
    """({parameter: (argument, whether by position alone)}, whether it takes any keyword)."""
    known = {**{name: name for name in names}, **others}
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError) as error:
        raise OwnCodeError(f"its parameters cannot be read: {error}") from error
    taken: dict[str, tuple[str, bool]] = {}
    rest = False
    for parameter in parameters:
        if parameter.kind is parameter.VAR_KEYWORD:
            rest = True
        elif parameter.kind is parameter.VAR_POSITIONAL:
            continue
        elif parameter.name in known:
            taken[parameter.name] = known[parameter.name], parameter.kind is parameter.POSITIONAL_ONLY
        elif parameter.default is parameter.empty:
            raise OwnCodeError(
                f"takes '{parameter.name}', which there is not; there is: {', '.join(known) or 'nothing'}"
            )
    return taken, rest
