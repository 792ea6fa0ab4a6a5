"""The control calls that publication makes to SGLang servers, each within a limit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from genac_megatron.errors import GenacError, PeerLost
from genac_megatron.serving.sglang.client import ServerClient, ServerError
from genac_megatron.serving.sglang.fleet import Endpoint

T = TypeVar("T")


class Control:
    """One server. Calls raise ServerError where it cannot be reached, is late, or reports a failure."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self.client = ServerClient(endpoint.url, endpoint.key, name=endpoint.name)

    @property
    def name(self) -> str:
        return self.endpoint.name

    def pause(self, mode: str, limit_s: float) -> None:
        """Stop generating. mode: "retract" or "in_place"."""
        self.client.post("/pause_generation", {"mode": mode}, limit_s)

    def resume(self, limit_s: float) -> None:
        self.client.post("/continue_generation", {}, limit_s)

    def flush(self, limit_s: float, wait_s: float = 0.0) -> None:
        """Empty the prefix cache, first waiting up to `wait_s` until no request runs or waits."""
        self.client.post(f"/flush_cache?timeout={wait_s:g}", None, limit_s + wait_s)

    def abort_all(self, limit_s: float) -> None:
        self.client.post("/abort_request", {"abort_all": True}, limit_s)

    def begin(self, limit_s: float) -> None:
        """Open a weight update, also where one that was never finished is open."""
        try:
            self._session("/begin_weight_update", limit_s)
        except ServerError as error:
            if "already open" not in error.body:
                raise
            self._session("/end_weight_update", limit_s)
            self._session("/begin_weight_update", limit_s)

    def end(self, limit_s: float) -> None:
        self._session("/end_weight_update", limit_s)

    def _session(self, path: str, limit_s: float) -> None:
        try:
            self.client.post(path, {}, limit_s)
        except ServerError as error:
            if not error.body.startswith("status 404"):  # before 0.5.21 there were none
                raise

    def set_version(self, version: str, limit_s: float) -> None:
        """Name the weights that are loaded; live requests go on."""
        body = {"new_version": version, "abort_all_requests": False}
        self.client.post("/update_weight_version", body, limit_s)

    def version(self) -> str:
        return str(self.client.model_info()["weight_version"])

    def checksums(self, limit_s: float) -> list[dict[str, str]]:
        """Of each tensor-parallel rank, in order: parameter -> checksum."""
        reply = self.client.post("/weights_checker", {"action": "checksum"}, limit_s)
        try:
            ranks = {int(r["parallelism_info"][0]["tp_rank"]): dict(r["checksums"]) for r in reply["ranks"]}
            return [ranks[rank] for rank in range(self.endpoint.tp)]
        except (LookupError, TypeError, ValueError) as error:
            raise PeerLost(
                f"/weights_checker: no checksums of {self.endpoint.tp} ranks ({error!r})",
                where=f"SGLang server {self.name}",
            ) from error

    def update_from_tensor(self, payloads: Sequence[str], limit_s: float) -> None:
        """Load a flat bucket; a payload (publication/payload.py) for each tensor-parallel rank."""
        body = {"serialized_named_tensors": list(payloads), **BUCKET}
        self.client.post("/update_weights_from_tensor", body, limit_s)

    def update_from_group(self, tensors: Mapping[str, Any], group: str, limit_s: float) -> None:
        """Load a flat bucket that comes by broadcast. tensors: its names, dtypes and shapes."""
        body = {**tensors, "group_name": group, **BUCKET}
        self.client.post("/update_weights_from_distributed", body, limit_s)

    def update_from_disk(self, folder: str, limit_s: float) -> None:
        body = {"model_path": folder, "load_format": "auto", "flush_cache": False}
        self.client.post("/update_weights_from_disk", body, limit_s)

    def init_group(self, group: Mapping[str, Any], limit_s: float) -> None:
        """Join a process group; returns once all of it have joined."""
        self.client.post("/init_weights_update_group", group, limit_s)

    def destroy_group(self, name: str, limit_s: float) -> None:
        self.client.post("/destroy_weights_update_group", {"group_name": name}, limit_s)

    def close(self) -> None:
        self.client.close()


BUCKET = {"load_format": "flattened_bucket", "flush_cache": False}  # by default each bucket flushes


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
