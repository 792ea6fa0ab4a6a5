"""Why a request over HTTP got no reply: httpx names neither the system's error nor which limit ran out."""

from __future__ import annotations

import errno
import resource

import httpx

OUT_OF_FILES = (errno.EMFILE, errno.ENFILE)


def system_error(error: BaseException) -> OSError | None:
    """The system's own error behind one of httpx's; None where there is none."""
    seen: set[int] = set()
    waiting: list[BaseException | None] = [error]
    while waiting:
        found = waiting.pop()
        if found is None or id(found) in seen:
            continue
        seen.add(id(found))
        if isinstance(found, OSError) and found.errno is not None:
            return found
        waiting += [found.__context__, found.__cause__]
        waiting += found.exceptions if isinstance(found, BaseExceptionGroup) else ()
    return None


def no_reply(error: Exception, limit_s: float, connect_s: float) -> str:
    """What went wrong before there was a reply. limit_s: of the request; connect_s: of its connection."""
    reason = system_error(error)
    if isinstance(error, httpx.ConnectTimeout):
        return f"no connection within {connect_s:g} s ({error!r})"
    if isinstance(error, TimeoutError | httpx.TimeoutException):
        return f"no answer within {limit_s:g} s ({error!r})"
    if reason is None:
        return f"{error!r}"
    name = errno.errorcode.get(reason.errno or 0, reason.errno)
    what = f"{type(error).__name__}: {reason.strerror} ({name})"
    if reason.errno in OUT_OF_FILES:
        what += f", this process may have {resource.getrlimit(resource.RLIMIT_NOFILE)[0]}"
    return what
