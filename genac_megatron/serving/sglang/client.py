"""HTTP client of one SGLang server: generation for the event loop, control calls for everybody else.

It speaks to versions 0.5.17 and later. The servers' replies are checked, as not every failure has a status.
"""

from __future__ import annotations

import asyncio
import functools
import ssl
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import httpx

from genac_megatron.errors import PeerLost
from genac_megatron.serving.sglang.pulse import Pulse
from genac_megatron.serving.transport import OUT_OF_FILES, no_reply, system_error

PauseMode = Literal["abort", "retract", "in_place"]
CONNECT_S = 10.0
CONTROL_S = 120.0  # of a control call; waits for one decoding step at most
WEIGHTS_S = 600.0  # of a call that moves weights
RETRIED = (408, 409, 425, 429)  # and 5xx
LOADS = "/v1/loads?include=core"
SHOWN = 500  # characters of a reply in an error


class ServerError(PeerLost):
    """One call to one server failed. `retryable`: the same call may succeed elsewhere, or later. `files`: it
    never left, as this process or machine has no file descriptor left for a connection.
    """

    def __init__(self, server: str, call: str, body: str, *, retryable: bool, files: bool = False) -> None:
        self.server, self.call, self.body, self.retryable = server, call, body, retryable
        self.files = files
        super().__init__(f"{call}: {body[:SHOWN]}", where=f"SGLang server {server}")


@dataclass(frozen=True)
class Generated:
    """One sample as a server returned it."""

    ids: tuple[int, ...]  # the stop token included
    logprobs: tuple[float, ...]  # one per id, temperature applied
    finish: str  # stop, length, abort
    spans: tuple[tuple[str, int], ...]  # (weight version, tokens), in order; one span before 0.5.20
    prompt_tokens: int
    cached_tokens: int  # of the prompt, served from the prefix cache
    candidates: tuple[dict[int, float], ...] = ()  # per new token: log-probs of the token ids asked for
    experts: str | None = field(default=None, repr=False)  # base64 of int32 [tokens, layers, top-k]


class ServerClient:
    """One server. Asynchronous calls may come from any event loop, control calls from any thread.

    url: without a path. key: what the server asks for, "" for none. name: for messages. tp: ranks that hold
    its weights.
    """

    def __init__(
        self, url: str, key: str = "", *, name: str = "", tp: int = 1, connections: int = 1024
    ) -> None:
        self.url, self.name, self.tp = url.rstrip("/"), name or url, tp
        # A kept connection may be closed by the server just as it is used again, and outlives its event loop.
        self._options: dict[str, Any] = {
            "base_url": self.url,
            "headers": {"Authorization": f"Bearer {key}"} if key else {},
            "limits": httpx.Limits(max_connections=connections, max_keepalive_connections=0),
            "trust_env": False,  # a proxy has no business between ranks and engines
            "verify": _tls() if url.startswith("https") else False,
        }
        self._control = httpx.Client(**self._options)
        self._here: tuple[httpx.AsyncClient, Pulse] | None = None  # of the event loop below
        self._loop: asyncio.AbstractEventLoop | None = None

    # --- generation -------------------------------------------------------------------------------

    async def generate(
        self,
        ids: Sequence[int] | Sequence[Sequence[int]],
        sampling: Mapping[str, Any],
        *,
        limit_s: float,
        rid: str | None = None,
        candidates: Sequence[int] | Sequence[Sequence[int]] | None = None,
        experts: bool = False,
        adapter: str | None = None,
    ) -> list[Generated]:
        """Samples of one prompt (`sampling["n"]` of them), or of each of several, in their order.

        ids: [tokens] or [prompts][tokens]. candidates: token ids, per prompt where there are several, whose
        log-probs at each new position are wanted. rid: to abort it by; SGLang aborts every request whose id
        *starts* with the one given. experts: those that tokens were sent to are wanted (a server that was
        not started for it returns none). limit_s: without a sign that the server works (pulse.py): what
        it does for others in between does not count. adapter: the name of the one that generates; None: the
        model itself. Raises ServerError where anything at all goes wrong, the limit included.
        """
        body: dict[str, Any] = {"input_ids": _lists(ids), "sampling_params": dict(sampling)}
        body |= {"return_logprob": True} | ({"rid": rid} if rid is not None else {})
        body |= {"return_routed_experts": True} if experts else {}
        body |= {"lora_path": adapter} if adapter is not None else {}
        if candidates is not None:
            body["token_ids_logprob"] = _lists(candidates)
        try:
            reply = await self._ask("/generate", body, limit_s, patient=True)
        except ServerError as error:
            if adapter is None or adapter not in error.body:
                raise
            # It was restarted and does not hold the adapter yet: another may.
            raise self._error("/generate", error.body, retryable=True) from error
        try:
            return [_generated(one) for one in (reply if isinstance(reply, list) else [reply])]
        except (LookupError, TypeError, ValueError) as error:
            raise self._error("/generate", f"not a sample ({error!r}): {reply}", retryable=True) from error

    async def abort(self, rid: str, limit_s: float = CONTROL_S) -> None:
        """End the requests whose id starts with `rid`; they return what they have."""
        await self._ask("/abort_request", {"rid": rid}, limit_s)

    async def _ask(self, path: str, body: Mapping[str, Any], limit_s: float, *, patient: bool = False) -> Any:
        """The answer within `limit_s`; `patient`: for as long as the server is seen to work."""
        client, pulse = self._in_loop()
        timeout = httpx.Timeout(None if patient else limit_s, connect=min(CONNECT_S, limit_s))
        asked = asyncio.ensure_future(client.post(path, json=body, timeout=timeout))
        try:
            if patient:
                await pulse.wait(asked, limit_s)
            async with asyncio.timeout(limit_s):
                reply = await asked
        except (TimeoutError, httpx.HTTPError) as error:
            raise self._not_answered(path, error, limit_s) from error
        finally:
            asked.cancel()
            asked.add_done_callback(_let_go)
        if patient and reply.status_code == 200:  # what others answer comes from before its scheduler
            pulse.seen()
        return self._read(path, reply)

    async def _works(self, limit_s: float) -> bool:
        """Whether its scheduler goes round and has requests: one that has none has lost those asked of it."""
        client, _ = self._in_loop()
        try:
            if (await client.get("/health_generate", timeout=limit_s)).status_code != 200:
                return False
            loads = await client.get(LOADS, timeout=limit_s)
            return loads.status_code != 200 or _requests(loads.json()) > 0
        except (httpx.HTTPError, LookupError, TypeError, ValueError):
            return False

    def _in_loop(self) -> tuple[httpx.AsyncClient, Pulse]:
        loop = asyncio.get_running_loop()
        if self._here is None or self._loop is not loop:  # the old one has no connection left open
            self._here, self._loop = (httpx.AsyncClient(**self._options), Pulse(self._works)), loop
        return self._here

    # --- control ----------------------------------------------------------------------------------

    def abort_all(self, *, limit_s: float = CONTROL_S) -> None:
        """End all requests; they return what they have."""
        self.post("/abort_request", {"abort_all": True}, limit_s)

    def pause(self, mode: PauseMode = "retract", *, limit_s: float = CONTROL_S) -> None:
        """Stop decoding. abort: requests return what they have. retract: they go back to the queue, so the
        cache can be flushed. in_place: they keep their cache. New requests wait, whichever it is.
        """
        self.post("/pause_generation", {"mode": mode}, limit_s)

    def resume(self, *, limit_s: float = CONTROL_S) -> None:
        """Go on after a pause. No error where there was none."""
        self.post("/continue_generation", {}, limit_s)

    def flush_cache(self, *, limit_s: float = CONTROL_S) -> None:
        """Empty the prefix cache. Raises ServerError where requests run (paused "in_place" included)."""
        self.post("/flush_cache", None, limit_s)

    def begin_update(self, *, limit_s: float = CONTROL_S) -> bool:
        """Open a weight update; False where the version has none (before 0.5.21) and needs none."""
        return self._session("/begin_weight_update", limit_s)

    def end_update(self, *, limit_s: float = CONTROL_S) -> bool:
        """Close a weight update; False where the version has none."""
        return self._session("/end_weight_update", limit_s)

    def update_from_tensor(
        self,
        blobs: Sequence[str],
        *,
        load_format: str | None = None,
        version: int | None = None,
        limit_s: float = WEIGHTS_S,
    ) -> None:
        """Load serialised tensors, one blob per tensor-parallel rank. The cache is not flushed.

        The server takes any names: check them before. One it cannot load ends its process.
        """
        body = {"serialized_named_tensors": list(blobs), "load_format": load_format}
        self._update("/update_weights_from_tensor", body, version, limit_s)

    def update_from_distributed(
        self,
        names: Sequence[str],
        dtypes: Sequence[str],
        shapes: Sequence[Sequence[int]],
        *,
        group: str,
        load_format: str | None = None,
        version: int | None = None,
        limit_s: float = WEIGHTS_S,
    ) -> None:
        """Receive tensors by broadcast from rank 0 of `group`, in order: returns once they are loaded.

        dtypes: torch's names, "float32". Call it in a thread and broadcast meanwhile.
        """
        body = {"names": list(names), "dtypes": list(dtypes), "shapes": _lists(shapes), "group_name": group}
        self._update(
            "/update_weights_from_distributed", {**body, "load_format": load_format}, version, limit_s
        )

    def update_from_disk(
        self,
        folder: str,
        *,
        load_format: str = "auto",
        version: int | None = None,
        flush: bool = True,
        limit_s: float = WEIGHTS_S,
    ) -> None:
        """Load a Hugging Face folder that the server's machine can read. It needs no begin and end.

        load_format: a server that was started on dummy weights would load dummy ones by itself.
        """
        body = {"model_path": folder, "load_format": load_format}
        self._update("/update_weights_from_disk", body, version, limit_s, flush=flush)

    def load_adapter(
        self,
        name: str,
        config: Mapping[str, Any],
        blobs: Sequence[str],
        *,
        checksums: Mapping[str, str] | None = None,
        limit_s: float = WEIGHTS_S,
    ) -> None:
        """Load an adapter under a name that it does not hold: a flat bucket per rank, each whole.

        config: PEFT's adapter_config.json. checksums: sha256 of every tensor, which the server compares with
        what has arrived: where one differs its process ends.
        """
        body = {"lora_name": name, "config_dict": dict(config), "serialized_named_tensors": list(blobs)}
        body |= {"load_format": "flattened_bucket"}
        body |= {} if checksums is None else {"expected_checksums": dict(checksums)}
        self.post("/load_lora_adapter_from_tensors", body, limit_s)

    def unload_adapter(self, name: str, *, limit_s: float = CONTROL_S) -> None:
        """Let an adapter go. It waits for requests that name it, and loads and unloads wait for it."""
        self.post("/unload_lora_adapter", {"lora_name": name}, limit_s)

    def adapters(self, *, limit_s: float = CONTROL_S) -> list[str]:
        """The names of the adapters that it holds."""
        reply = self._object("/v1/models", limit_s)
        try:
            return [str(card["id"]) for card in reply["data"] if card.get("parent") is not None]
        except (LookupError, TypeError) as error:
            raise self._error("/v1/models", f"no list of models: {reply}", retryable=False) from error

    def init_group(
        self,
        address: str,
        port: int,
        *,
        rank_offset: int,
        world_size: int,
        group: str,
        backend: str,
        limit_s: float = WEIGHTS_S,
    ) -> None:
        """Join a process group; the server's rank is rank_offset + its tensor-parallel rank.

        Returns once all have joined: call it in a thread.
        """
        where = {"master_address": address, "master_port": port, "backend": backend, "group_name": group}
        body = {**where, "rank_offset": rank_offset, "world_size": world_size}
        self.post("/init_weights_update_group", body, limit_s)

    def destroy_group(self, group: str, *, limit_s: float = CONTROL_S) -> None:
        """Leave a process group."""
        self.post("/destroy_weights_update_group", {"group_name": group}, limit_s)

    def set_version(self, version: int, *, limit_s: float = CONTROL_S) -> None:
        """Name the weights that are loaded. Live requests go on."""
        # abort_all_requests is true by default.
        body = {"new_version": str(version), "abort_all_requests": False}
        self.post("/update_weight_version", body, limit_s)

    def version(self, *, limit_s: float = CONTROL_S) -> str:
        """What the weights were named last; "default" after a start."""
        return str(self.model_info(limit_s=limit_s).get("weight_version"))

    def running(self, *, limit_s: float = CONTROL_S) -> int:
        """Requests that run or wait in its scheduler; those that a pause keeps outside are not counted."""
        return _requests(self._object(LOADS, limit_s))

    def checksums(self, *, limit_s: float = WEIGHTS_S) -> list[dict[str, str]]:
        """Of each tensor-parallel rank, parameter -> checksum. Versions before 0.5.23 need CUDA for it."""
        reply = self.post("/weights_checker", {"action": "checksum"}, limit_s)
        try:
            return [dict(rank["checksums"]) for rank in reply["ranks"]]
        except (LookupError, TypeError, ValueError) as error:
            raise self._error("/weights_checker", f"no checksums: {reply}", retryable=False) from error

    def release_memory(
        self, tags: Sequence[str] = ("kv_cache", "weights"), *, limit_s: float = CONTROL_S
    ) -> None:
        """Give GPU memory back; needs an idle server with --enable-memory-saver. A CPU server frees none."""
        self.post("/release_memory_occupation", {"tags": list(tags)}, limit_s)

    def resume_memory(
        self, tags: Sequence[str] = ("kv_cache", "weights"), *, limit_s: float = CONTROL_S
    ) -> None:
        """Take the memory again. The weights are what they were, the cache is empty."""
        self.post("/resume_memory_occupation", {"tags": list(tags)}, limit_s)

    def info(self, *, limit_s: float = CONTROL_S) -> dict[str, Any]:
        """Its arguments, `version` and `internal_states`."""
        return self._object("/server_info", limit_s)

    def model_info(self, *, limit_s: float = CONTROL_S) -> dict[str, Any]:
        """`model_path`, `weight_version`, `architectures` and more. Says nothing of its scheduler."""
        return self._object("/model_info", limit_s)

    def healthy(self, limit_s: float = CONTROL_S) -> bool:
        """Whether its scheduler answers (in a second or more): that of a hung or paused server does not."""
        try:
            return self._control.get("/health_generate", timeout=limit_s).status_code == 200
        except httpx.HTTPError:
            return False

    def present(self, limit_s: float = CONTROL_S) -> bool:
        """Whether its scheduler tells its state: for a server that has given memory back."""
        try:
            return self._control.get("/server_info", timeout=limit_s).status_code == 200
        except httpx.HTTPError:
            return False

    def close(self) -> None:
        self._control.close()

    def post(self, path: str, body: Mapping[str, Any] | None = None, limit_s: float = CONTROL_S) -> Any:
        """One control call: the reply's JSON, or its text. Raises ServerError."""
        return self._call("POST", path, body, limit_s)

    def _update(
        self,
        path: str,
        body: Mapping[str, Any],
        version: int | None,
        limit_s: float,
        *,
        flush: bool = False,
    ) -> None:
        # flush_cache is true by default, and fails *after* loading where requests wait.
        named = {} if version is None else {"weight_version": str(version)}
        self.post(path, {**body, **named, "flush_cache": flush}, limit_s)

    def _session(self, path: str, limit_s: float) -> bool:
        try:
            self.post(path, {}, limit_s)
        except ServerError as error:
            if error.body.startswith("status 404"):
                return False
            raise
        return True

    def _object(self, path: str, limit_s: float) -> dict[str, Any]:
        reply = self._call("GET", path, None, limit_s)
        if not isinstance(reply, dict):
            raise self._error(path, f"not an object: {reply}", retryable=True)
        return reply

    def _call(self, method: str, path: str, body: Mapping[str, Any] | None, limit_s: float) -> Any:
        timeout = httpx.Timeout(limit_s, connect=min(CONNECT_S, limit_s))
        try:
            reply = self._control.request(method, path, json=body, timeout=timeout)
        except httpx.HTTPError as error:
            raise self._not_answered(path, error, limit_s) from error
        return self._read(path, reply)

    def _not_answered(self, path: str, error: Exception, limit_s: float) -> ServerError:
        """What went wrong before there was a reply, in the system's words where it has any."""
        reason = system_error(error)
        files = reason is not None and reason.errno in OUT_OF_FILES
        what = no_reply(error, limit_s, min(CONNECT_S, limit_s))
        return ServerError(self.name, path, what, retryable=True, files=files)

    def _read(self, path: str, reply: httpx.Response) -> Any:
        code = reply.status_code
        if code != 200:
            retryable = code >= 500 or code in RETRIED
            raise self._error(path, f"status {code}: {reply.text}", retryable=retryable)
        try:
            content = reply.json()
        except ValueError:
            return reply.text
        if isinstance(content, dict) and content.get("success") is False:
            raise self._error(path, f"{content.get('message', content)}", retryable=False)
        return content

    def _error(self, path: str, body: str, *, retryable: bool) -> ServerError:
        return ServerError(self.name, path, body, retryable=retryable)


@functools.cache
def _tls() -> ssl.SSLContext:
    return ssl.create_default_context()


def _lists(values: Sequence[Any]) -> list[Any]:
    return [list(value) if isinstance(value, list | tuple) else value for value in values]


def _let_go(work: asyncio.Future[Any]) -> None:
    """Take note of an error that nobody waits for any more."""
    if not work.cancelled():
        work.exception()


def _requests(loads: Any) -> int:
    """Requests of all schedulers, by /v1/loads. Raises LookupError, TypeError or ValueError."""
    each = loads.get("loads", [])
    return sum(int(load["num_running_reqs"]) + int(load["num_waiting_reqs"]) for load in each)


def _generated(reply: Any) -> Generated:
    """Raises LookupError, TypeError or ValueError where the reply is not a sample."""
    meta = reply["meta_info"]
    ids = [int(token) for token in reply["output_ids"]]
    pairs = [(float(logprob), int(token)) for logprob, token, *_ in meta.get("output_token_logprobs", ())]
    finish = meta["finish_reason"]["type"]
    if finish == "abort":  # a retracted request may hold log-probs of tokens that were not sent yet
        ids, pairs = ids[: len(pairs)], pairs[: len(ids)]
    if meta["finish_reason"].get("length") == 0:  # none was asked for; in a batch with others one is drawn
        pairs = []
    if ids != [token for _, token in pairs]:
        raise ValueError("its ids are not those of its log-probs")
    if finish not in ("stop", "length", "abort") or isinstance(meta["finish_reason"].get("matched"), str):
        raise ValueError(f"it finished with {meta['finish_reason']}")  # "NaN happened" is a string matched
    return Generated(
        ids=tuple(ids),
        logprobs=tuple(logprob for logprob, _ in pairs),
        finish=finish,
        spans=_spans(meta, len(ids)),
        prompt_tokens=int(meta.get("prompt_tokens", 0)),
        cached_tokens=int(meta.get("cached_tokens", 0)),
        candidates=tuple(
            {int(token): float(logprob) for logprob, token, *_ in position}
            for position in meta.get("output_token_ids_logprobs") or ()
        ),
        experts=meta.get("routed_experts"),
    )


def _spans(meta: Mapping[str, Any], count: int) -> tuple[tuple[str, int], ...]:
    spans = meta.get("weight_versions") or [{"version": meta["weight_version"], "start": 0, "end": count}]
    cut = [(str(span["version"]), min(span["end"], count) - span["start"]) for span in spans]
    kept = tuple((version, length) for version, length in cut if length > 0)
    if sum(length for _, length in kept) != count:
        raise ValueError(f"its version spans {spans} do not cover {count} tokens")
    return kept
