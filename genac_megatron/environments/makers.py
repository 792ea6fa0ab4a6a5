"""What makes an environment for each episode, by what a recipe names; called in the environment's process."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from genac_megatron.environments.base import OfTranscript
from genac_megatron.environments.host import Host
from genac_megatron.recipe.own_code import parse_named
from genac_megatron.tasks.own_code import OwnCodeError, load_own, told

if TYPE_CHECKING:
    from genac_megatron.tasks.theirs.process import Theirs


def of_task(kind: str, chars: int) -> Host:
    """Episodes of a task's own environment. chars: the most characters of a message."""
    from genac_megatron.environments.lock import LockGame

    games: dict[str, Callable[[], Any]] = {"lock": LockGame}
    return Host(games[kind], chars, lambda error: f"raised {type(error).__name__}: {error}")


def of_tools(names: tuple[str, ...], seconds: float, mib: int, chars: int) -> Host:
    """Episodes with tools. seconds, mib: of programs (environments/tools.py)."""
    from genac_megatron.environments.tools import Tools

    return Host(lambda: Tools(names, seconds, mib), chars, str)


def of_package(theirs: Theirs, chars: int) -> Host:
    """Episodes of another package's environment, played in a process under that package's interpreter."""
    from genac_megatron.environments.theirs import make_theirs

    return Host(make_theirs(theirs), chars, str)


def of_user(name: str, chars: int) -> Host:
    """Episodes of an environment of the user's own: a class, or a function of the transcript."""
    named = parse_named(name)
    try:
        found = load_own(named)
    except OwnCodeError as error:
        why = str(error)

        def fails() -> Any:
            raise OwnCodeError(why)

        return Host(fails, chars, str)
    make = found if inspect.isclass(found) else lambda: OfTranscript(found)
    return Host(make, chars, lambda error: f"raised {told(error, named)}")
