"""An engine over SGLang servers: who gets which request, retries, and exact completions."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import math
import time
import uuid
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

import numpy as np
from torch import Tensor

from genac_megatron import platform
from genac_megatron.errors import GenacError, InputError, PeerLost
from genac_megatron.models.families.base import Shape
from genac_megatron.models.sizes import hf_names
from genac_megatron.recipe.schema import EngineConfig
from genac_megatron.records import Completion, Finish, Request
from genac_megatron.serving.engine import Engine, check_ids, check_request
from genac_megatron.serving.experts import as_experts
from genac_megatron.serving.sglang.adapters import adapter_name
from genac_megatron.serving.sglang.client import Generated, ServerClient, ServerError
from genac_megatron.serving.sglang.loading import Loader
from genac_megatron.serving.sglang.routing import Route, Router, group_of

if TYPE_CHECKING:
    from genac_megatron.records import Experts

RETRY_S = 0.5  # between attempts
ABORT_S = 10.0
ABORT_AGAIN_S = 0.5  # a request that has not reached its server yet cannot be aborted there
OTHER_FILES = 128  # that a rank has open besides connections to servers
MORE_FILES = (
    "raise the hard limit of open files (ulimit -Hn; limits.conf, or LimitNOFILE of the daemon that starts "
    "jobs or containers), or lower engine.max_in_flight"
)
T = TypeVar("T")
_group: ContextVar[str] = ContextVar("group", default="")  # of this task's last request


class Weights(NamedTuple):
    """What an attempt is made with: the version, and its adapter's name where servers load adapters."""

    version: int
    adapter: str | None


@dataclass(eq=False)
class Live:
    """A request under way. `client` and `rid` are those of the present attempt."""

    key: str
    work: asyncio.Task[Generated | None] | None = None
    client: ServerClient | None = None
    rid: str = ""
    aborted: bool = False


class SglangEngine(Engine):
    """Generates on one or several servers that hold the same weights.

    A request's tokens depend on its seed only on servers with --enable-deterministic-inference, which a CPU
    cannot run: elsewhere the seed is sent and ignored. Requests are spread as routing.py says, at most
    `max_in_flight` per server (fewer where few files may be open); those beyond wait. One that fails, or
    whose server does not work for `request_timeout_s`, is sent again, `attempts` times in all: a completion
    is always that of one attempt, and the server ends an attempt whose connection is closed. What a server
    refuses is an InputError, what none could do a PeerLost.

    Completions carry the version of every token, so weights may change while requests run. `load_weights`
    sends them by value in requests; a publication with a transport of its own sets `version` instead.

    Where servers load adapters an attempt names the newest as it begins and ends on it: it has one version.
    """

    def __init__(
        self,
        clients: Sequence[ServerClient],
        config: EngineConfig,
        shape: Shape,
        *,
        first: int = 0,
        adapter: str | None = None,
    ) -> None:
        """first: the server that takes the first group of requests that was not dealt. adapter: the role
        whose adapters servers load (serving/sglang/adapters.py); None: they hold its whole weights.
        """
        self.clients, self.config, self.shape, self.vocab = list(clients), config, shape, shape.vocab
        self.version = -1
        self._adapter = adapter
        self._using: dict[int, int] = {}  # attempts under way, by version
        self.in_flight = min(config.max_in_flight, connections_each(len(self.clients)))
        self._router = Router(self.clients, self.in_flight, first)
        self._loader = Loader(self.clients, hf_names(shape), fp8=config.quantization == "fp8")
        self._live: set[Live] = set()
        self._enders: set[asyncio.Task[None]] = set()
        self._busy, self._busy_since = 0, 0.0
        self._closed = False
        self._stats: dict[str, float] = {}
        self.stats()

    async def complete(self, request: Request) -> Completion:
        where = f"request {request.key!r}" if request.key else "request"
        self._check_usable(where)
        check_request(request, self.vocab)
        group = group_of(request.key)
        _group.set(group)
        live = Live(request.key)

        async def attempt(route: Route, weights: Weights) -> Generated | None:
            return await self._generate(route.client, request, live, weights)

        live.work = asyncio.ensure_future(self._attempts(attempt, group, where))
        self._live.add(live)
        try:
            sample = await live.work
        except asyncio.CancelledError:
            if not live.aborted:
                raise
            sample = None  # it had no server yet
        finally:
            self._live.discard(live)
        if sample is None:
            return Completion((), (), "abort")
        self._count(sample)
        spans = tuple((int(version), count) for version, count in sample.spans)
        experts = self._experts(request, sample) if self.config.routing_replay else None
        return Completion(
            *(sample.ids, sample.logprobs, cast(Finish, sample.finish), spans, experts),
            cached=sample.cached_tokens,
        )

    async def score(
        self, ids: Sequence[int], continuations: Sequence[Sequence[int]], *, temperature: float = 1.0
    ) -> list[float]:
        """As Engine.score says. One position is asked of a server for each distinct prefix of a continuation:
        its log-probs of *given* tokens are tempered at new positions alone, not in the prompt.
        """
        self._check_usable("score")
        if temperature <= 0:
            raise InputError(f"temperature is {temperature}, not above 0", where="score")
        for part in (ids, *continuations):
            check_ids(part, self.vocab, "score")
        wanted: dict[tuple[int, ...], set[int]] = {}
        for tokens in continuations:
            for at, token in enumerate(tokens):
                wanted.setdefault(tuple(tokens[:at]), set()).add(token)

        async def attempt(route: Route, weights: Weights) -> dict[tuple[int, ...], dict[int, float]]:
            # Requests in flight together share no prefix: the shortest goes ahead and fills the cache.
            found: dict[tuple[int, ...], dict[int, float]] = {}
            order = sorted(wanted, key=len)
            for prefixes in (order[:1], order[1:]):
                found |= await self._next_logprobs(route.client, ids, prefixes, wanted, temperature, weights)
            return found

        found = await self._attempts(attempt, _group.get(), "score")
        return [sum(found[tuple(c[:at])][token] for at, token in enumerate(c)) for c in continuations]

    async def warm(self, ids: Sequence[int], key: str = "") -> None:
        """Have the server that takes `key`'s group read ids into its prefix cache."""
        check_ids(ids, self.vocab, "warm")

        async def attempt(route: Route, weights: Weights) -> Generated:
            nothing_new, limit_s = {"max_new_tokens": 0}, self.config.request_timeout_s
            (sample,) = await route.client.generate(
                ids, nothing_new, limit_s=limit_s, adapter=weights.adapter
            )
            return sample

        self._count(await self._attempts(attempt, group_of(key), f"reading ahead for {key!r}"))

    def in_use(self) -> set[int]:
        """Versions that requests under way were begun with."""
        return set(self._using)

    def deal(self, numbers: Mapping[str, int]) -> None:
        self._router.deal(numbers)

    def abort(self, key: str | None = None) -> None:
        for live in list(self._live):
            if live.aborted or live.work is None or (key is not None and live.key != key):
                continue
            live.aborted = True
            loop = live.work.get_loop()
            if loop.is_closed():
                self._live.discard(live)
            elif live.client is None:
                live.work.cancel()
            else:
                ender = loop.create_task(self._end(live))
                self._enders.add(ender)
                ender.add_done_callback(self._enders.discard)

    def load_weights(
        self, version: int, tensors: Iterable[tuple[str, Tensor]], *, final: bool = True
    ) -> None:
        """As Engine.load_weights says. Raises ServerError where a server is lost."""
        if self._closed:
            raise InputError("the engine is closed", where=f"weights of version {version}")
        self.version = -1
        self._loader.load(version, tensors, final=final)
        if final:
            self.version = version

    def stats(self) -> dict[str, float]:
        """Since the last call: tokens, prompt_tokens, of those cached_tokens and unique_prompt_tokens (the
        others), seconds (with requests under way), batches (requests answered)."""
        now = time.perf_counter()
        if self._stats and self._busy:
            self._stats["seconds"] += now - self._busy_since
        self._busy_since = now
        taken = self._stats
        if taken:
            taken["unique_prompt_tokens"] = taken["prompt_tokens"] - taken["cached_tokens"]
        names = ("tokens", "prompt_tokens", "cached_tokens", "seconds", "batches")
        self._stats = dict.fromkeys(names, 0.0)
        return taken

    def close(self) -> None:
        """Abort what is left. The servers are their owner's to end."""
        self.abort()
        self._closed, self.version = True, -1
        for client in self.clients:
            client.close()

    def _check_usable(self, where: str) -> None:
        if self._closed:
            raise InputError("the engine is closed", where=where)
        if self.version < 0 and not self._loader.loading:
            raise InputError(
                "the engine has no weights", where=where, way_out="publish the role's weights to it first"
            )

    async def _attempts(self, attempt: Callable[[Route, Weights], Awaitable[T]], group: str, where: str) -> T:
        """What the first successful attempt returns."""
        failures: list[str] = []
        files = False
        for number in range(self.config.attempts):
            if number:
                await asyncio.sleep(RETRY_S)
            route = await self._router.take(group)
            if self._busy == 0:
                self._busy_since = time.perf_counter()
            self._busy += 1
            weights = self._weights()
            self._using[weights.version] = self._using.get(weights.version, 0) + 1
            try:
                return await attempt(route, weights)
            except ServerError as error:
                if not error.retryable:
                    raise InputError(f"refused: {error.what}", where=f"{where} at {error.server}") from error
                failures.append(f"{error.server}: {error.what}")
                files = error.files
                if not files:  # else it is not the server's fault
                    self._router.rest(route)
            finally:
                self._router.give_back(route)
                self._let_go(weights.version)
                self._busy -= 1
                if self._busy == 0:
                    self._stats["seconds"] += time.perf_counter() - self._busy_since
        told = f"{len(failures)} attempts failed (engine.attempts):\n    " + "\n    ".join(failures)
        if files:
            raise InputError(told, where=where, way_out=MORE_FILES)
        raise PeerLost(told, where=where)

    def _weights(self) -> Weights:
        """What a request that begins now is asked of."""
        version = self.version
        return Weights(version, None if self._adapter is None else adapter_name(self._adapter, version))

    def _let_go(self, version: int) -> None:
        self._using[version] -= 1
        if not self._using[version]:
            del self._using[version]

    async def _generate(
        self, client: ServerClient, request: Request, live: Live, weights: Weights
    ) -> Generated | None:
        """One attempt; None where it was aborted and nothing came of it."""
        live.client, live.rid = client, uuid.uuid4().hex  # of one length: none is the start of another
        try:
            limit_s = self.config.request_timeout_s
            (sample,) = await client.generate(
                request.ids,
                _sampling(request),
                limit_s=limit_s,
                rid=live.rid,
                experts=self.config.routing_replay,
                adapter=weights.adapter,
            )
            _check_versions(client, sample)
            if sample.finish == "abort" and not live.aborted:  # a publication that failed ends all requests
                raise ServerError(client.name, "/generate", "the server ended it", retryable=True)
        except ServerError:
            if live.aborted:
                return None
            raise
        finally:
            live.client = None
        return sample if weights.adapter is None else _of_version(sample, weights.version)

    def _experts(self, request: Request, sample: Generated) -> Experts | None:
        """Which experts every token that was read went to. Raises InputError where the server sent none."""
        where = f"request {request.key!r}"
        if sample.finish == "abort":  # it may have tokens that were never read
            return None
        if sample.experts is None or self.shape.experts is None or self.shape.experts_per_token is None:
            raise InputError(
                "the server returned no routed experts",
                where=where,
                way_out="start it with --enable-return-routed-experts, or set engine.routing_replay: false",
            )
        flat = np.frombuffer(base64.b64decode(sample.experts), dtype=np.int32)
        wanted = (len(request.ids) + len(sample.ids) - 1, self.shape.layers, self.shape.experts_per_token)
        if flat.size != math.prod(wanted):
            raise GenacError(
                f"{flat.size} routed experts came, not those of {wanted} tokens, layers, top-k", where=where
            )
        return as_experts(flat.reshape(wanted), self.shape.experts, where)

    async def _next_logprobs(
        self,
        client: ServerClient,
        ids: Sequence[int],
        prefixes: Sequence[tuple[int, ...]],
        wanted: dict[tuple[int, ...], set[int]],
        temperature: float,
        weights: Weights,
    ) -> dict[tuple[int, ...], dict[int, float]]:
        """After ids + each prefix: the log-probs of the tokens that are wanted there."""
        if not prefixes:
            return {}
        samples = await client.generate(
            [[*ids, *prefix] for prefix in prefixes],
            {"max_new_tokens": 1, "temperature": temperature, "ignore_eos": True},
            limit_s=self.config.request_timeout_s,
            candidates=[sorted(wanted[prefix]) for prefix in prefixes],
            adapter=weights.adapter,
        )
        found = {}
        for prefix, sample in zip(prefixes, samples, strict=True):
            _check_versions(client, sample)
            self._count(sample)
            if len(sample.candidates) != 1 or not wanted[prefix] <= sample.candidates[0].keys():
                raise ServerError(
                    client.name, "/generate", f"log-probs are missing: {sample}", retryable=True
                )
            found[prefix] = sample.candidates[0]
        return found

    async def _end(self, live: Live) -> None:
        while live in self._live and live.client is not None:
            with contextlib.suppress(ServerError):  # the request's own limit ends it then
                await live.client.abort(live.rid, ABORT_S)
            await asyncio.sleep(ABORT_AGAIN_S)

    def _count(self, sample: Generated) -> None:
        self._stats["tokens"] += len(sample.ids)
        self._stats["prompt_tokens"] += sample.prompt_tokens
        self._stats["cached_tokens"] += sample.cached_tokens
        self._stats["batches"] += 1


def connections_each(servers: int) -> int:
    """Requests that may be in flight on each of a role's servers, by how many files may be open here.

    Half of what is left is another role's.
    """
    files = platform.raise_open_files()
    return max(1, (files - min(OTHER_FILES, files // 2)) // 2 // max(1, servers))


def _sampling(request: Request) -> dict[str, Any]:
    params = request.params
    sampling: dict[str, Any] = {
        "max_new_tokens": params.max_new_tokens,
        "temperature": params.temperature,
        "sampling_seed": request.seed % 2**63,
    }
    # ignore_eos would switch these off too; the model's own are switched off where the server is started.
    stops = {"stop_token_ids": list(params.stop_token_ids)} if params.stop_token_ids else {"ignore_eos": True}
    return sampling | stops


def _of_version(sample: Generated, version: int) -> Generated:
    """A server's own spans are of its base, which stays: all of an adapter's tokens have its version."""
    return replace(sample, spans=((str(version), len(sample.ids)),) if sample.ids else ())


def _check_versions(client: ServerClient, sample: Generated) -> None:
    """A server that was restarted, or never published to, names its weights "default"."""
    for version, _ in sample.spans:
        if not version.isdecimal():
            what = f"its weights are of version {version!r}: none were published to it"
            raise ServerError(client.name, "/generate", what, retryable=True)
