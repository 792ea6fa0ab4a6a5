"""Failing together: what goes wrong on one rank is raised on all of them.

The acts given here are local: they take no part in a collective. Where one rank failed inside a
collective, the others wait in it, and only that rank's end brings them out.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch.distributed as dist

from genac_megatron.errors import GenacError, on_all_ranks

PEER_SIGNS = (
    *("Connection closed by peer", "Timed out waiting", "timeout", "Connection reset by peer"),  # gloo
    *("Connection was likely closed", "Broken pipe"),  # the store, which rank 0 holds
    "remote process exit",  # NCCL (ncclRemoteError)
)
SHOWN_OTHERS = 3

T = TypeVar("T")
logger = logging.getLogger(__name__)


class Circle(NamedTuple):
    """Some ranks of the world, in order, and their group; None of a single one."""

    ranks: tuple[int, ...]
    group: dist.ProcessGroup | None


def gathered(value: Any, circle: Circle | None = None) -> list[Any]:
    """`value` of every rank, in order of rank, on all of them. Collective over the circle, or the world."""
    count = dist.get_world_size() if circle is None else len(circle.ranks)
    if count == 1:
        return [value]
    parts: list[Any] = [None] * count
    dist.all_gather_object(parts, value, group=None if circle is None else circle.group)
    return parts


def lost_peer(error: BaseException) -> bool:
    """Whether a collective failed because another rank ended or did not come."""
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in PEER_SIGNS)


def unexpected(error: Exception) -> GenacError:
    """What `agree` makes of an error that is none of ours."""
    return GenacError(f"{type(error).__name__}: {error}", where=f"rank {dist.get_rank()}")


def agree(
    act: Callable[[], T],
    explain: Callable[[Exception], GenacError] = unexpected,
    circle: Circle | None = None,
) -> T:
    """Run `act` on every rank; where it fails on one, raise the first such rank's error on all.

    It also names what other ranks failed of, where that differs. `explain` words an error that is no
    GenacError; its traceback goes to the log. Collective over the circle, or the world.
    """
    failure: GenacError | None = None
    try:
        result = act()
    except GenacError as error:
        failure = error
    except Exception as error:
        logger.error("rank %d failed", dist.get_rank(), exc_info=True)
        failure = explain(error)
    told = None if failure is None else told_of(failure)
    ranks = range(dist.get_world_size()) if circle is None else circle.ranks
    answers = zip(ranks, gathered(told, circle), strict=True)
    failures = {rank: other for rank, other in answers if other is not None}
    if failures:
        kind, what, where, way_out = failures[min(failures)]
        raise on_all_ranks(kind(what + _others(failures), where=where, way_out=way_out)) from failure
    return result


Told = tuple[type[GenacError], str, str, str]  # an error as other ranks can raise it


def told_of(error: GenacError) -> Told:
    """An error as `raised` makes it again."""
    return family(error), error.what, error.where, error.way_out


def raised(told: Told) -> GenacError:
    """Another rank's error, as all raise it."""
    kind, what, where, way_out = told
    return on_all_ranks(kind(what, where=where, way_out=way_out))


def _others(failures: dict[int, Told]) -> str:
    """A line for each error that is not the first rank's, up to SHOWN_OTHERS."""
    texts = {
        f"{where}: {what}" if where else what: rank
        for rank, (_, what, where, _) in reversed(failures.items())
    }
    others = sorted((rank, text) for text, rank in texts.items())[1:]
    lines = [f"\n  also on rank {rank}: {text}" for rank, text in others[:SHOWN_OTHERS]]
    more = len(others) - SHOWN_OTHERS
    return "".join(lines) + (f"\n  and {more} more" if more > 0 else "")


def family(error: GenacError) -> type[GenacError]:
    """The class of errors.py that an error belongs to: those alone are made of a message."""
    return next(kind for kind in type(error).__mro__ if kind.__module__ == GenacError.__module__)


def from_first(act: Callable[[], T]) -> T:
    """What `act` returns on rank 0, on every rank; its error likewise. Collective."""
    return from_rank(0, agree(lambda: act() if dist.get_rank() == 0 else None))  # type: ignore[return-value]


def from_rank(source: int, value: T) -> T:
    """The `value` of one rank, on every rank. Collective over the world."""
    if dist.get_world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=source)
    return box[0]
