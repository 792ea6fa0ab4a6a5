"""Control of a fleet of SGLang servers, all at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from genac_megatron.errors import GenacError, PeerLost
from genac_megatron.serving.sglang.client import ServerClient, ServerError
from genac_megatron.serving.sglang.fleet import Endpoint

T = TypeVar("T")
FLAT_BUCKET = "flattened_bucket"  # SGLang's load format of one buffer and its metadata


class Control(ServerClient):
    """One server of a fleet, with what publication asks of it beyond the client's calls."""

    def __init__(self, endpoint: Endpoint) -> None:
        super().__init__(endpoint.url, endpoint.key, name=endpoint.name)
        self.endpoint = endpoint

    def drain(self, wait_s: float, *, limit_s: float) -> None:
        """Wait up to `wait_s` until no request runs or waits, then empty the prefix cache."""
        self.post(f"/flush_cache?timeout={wait_s:g}", None, limit_s + wait_s)

    def flush_if_idle(self, *, limit_s: float) -> bool:
        """Empty the prefix cache; False where a paused request uses it, so that the server keeps it."""
        try:
            self.flush_cache(limit_s=limit_s)
        except ServerError as error:
            if not error.body.startswith("status 400"):
                raise
            return False
        return True

    def begin_anew(self, *, limit_s: float) -> None:
        """Open a weight update, also where one that was never finished is open."""
        try:
            self.begin_update(limit_s=limit_s)
        except ServerError as error:
            if "already open" not in error.body:
                raise
            self.end_update(limit_s=limit_s)
            self.begin_update(limit_s=limit_s)


class CallsFailed(PeerLost):
    """Calls to some servers of a fleet failed."""

    def __init__(self, failed: Mapping[str, BaseException]) -> None:
        self.failed = dict(failed)
        super().__init__("; ".join(f"server {name}: {words(error)}" for name, error in failed.items()))


def words(error: BaseException) -> str:
    return error.what if isinstance(error, GenacError) else f"{type(error).__name__}: {error}"


def at_once(servers: Sequence[Control], call: Callable[[Control], T]) -> list[T]:
    """`call` on every server in parallel, results in their order. Raises CallsFailed once all have ended."""
    if not servers:
        return []
    with ThreadPoolExecutor(len(servers), thread_name_prefix="servers") as pool:
        futures = [pool.submit(call, server) for server in servers]
    failed = {
        server.name: error
        for server, future in zip(servers, futures, strict=True)
        if (error := future.exception()) is not None
    }
    if failed:
        raise CallsFailed(failed)
    return [future.result() for future in futures]
