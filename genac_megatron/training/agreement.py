"""Failing together: what goes wrong on one rank is raised on all of them.

The acts given here are local: they take no part in a collective. Where one rank failed inside a
collective, the others wait in it, and only that rank's end brings them out.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, TypeVar

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


def gathered(value: Any) -> list[Any]:
    """`value` of every rank, in order of rank, on all of them. Collective over the world."""
    if dist.get_world_size() == 1:
        return [value]
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, value)
    return parts


def lost_peer(error: BaseException) -> bool:
    """Whether a collective failed because another rank ended or did not come."""
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in PEER_SIGNS)


def unexpected(error: Exception) -> GenacError:
    """What `agree` makes of an error that is none of ours."""
    return GenacError(f"{type(error).__name__}: {error}", where=f"rank {dist.get_rank()}")


def agree(act: Callable[[], T], explain: Callable[[Exception], GenacError] = unexpected) -> T:
    """Run `act` on every rank; where it fails on one, raise the first such rank's error on all.

    It also names what other ranks failed of, where that differs. `explain` words an error that is no
    GenacError; its traceback goes to the log. Collective.
    """
    failure: GenacError | None = None
    try:
        result = act()
    except GenacError as error:
        failure = error
    except Exception as error:
        logger.error("rank %d failed", dist.get_rank(), exc_info=True)
        failure = explain(error)
    told = None if failure is None else (family(failure), failure.what, failure.where, failure.way_out)
    failures = {rank: other for rank, other in enumerate(gathered(told)) if other is not None}
    if failures:
        kind, what, where, way_out = failures[min(failures)]
        raise on_all_ranks(kind(what + _others(failures), where=where, way_out=way_out)) from failure
    return result


def _others(failures: dict[int, tuple[Any, str, str, str]]) -> str:
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
    found = agree(lambda: act() if dist.get_rank() == 0 else None)
    if dist.get_world_size() == 1:
        return found  # type: ignore[return-value]
    box = [found]
    dist.broadcast_object_list(box, src=0)
    return box[0]  # type: ignore[return-value]
