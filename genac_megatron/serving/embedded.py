"""The embedded engine: a transformers model of its own, generating in the caller's event loop.

It runs inline, one batch at a time: on a CPU an overlap gains nothing, and a fixed order of batches
makes a run reproducible.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from genac_megatron.dtypes import DTYPES
from genac_megatron.errors import InputError
from genac_megatron.recipe.schema import EngineConfig
from genac_megatron.records import Completion, Request
from genac_megatron.serving.engine import Engine, check_ids, check_request
from genac_megatron.serving.experts import by_file_names, routers
from genac_megatron.serving.generation import (
    CPU_ATTENTION,
    Generation,
    score_continuations,
    unique_tokens,
)
from genac_megatron.serving.rounds import rounds

MOST_READ = 20_000  # prompts that are kept until their prefixes are counted
SETTLE_TURNS = 8  # of the loop between batches: what consumers submit at once joins the next batch


def build_model(hf_config: dict[str, Any] | str | Path, dtype: str, device: torch.device) -> PreTrainedModel:
    """A model with random weights from a Hugging Face config: its dictionary, or a folder with config.json.

    Leaves torch's random state as it was. Raises InputError where the config is not a causal language
    model's that transformers knows.
    """
    where = "config" if isinstance(hf_config, dict) else str(hf_config)
    try:
        if isinstance(hf_config, dict):
            fields = {name: value for name, value in hf_config.items() if name != "model_type"}
            config = AutoConfig.for_model(hf_config["model_type"], **fields)
        else:
            config = AutoConfig.from_pretrained(hf_config, local_files_only=True)
        cuda = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices=cuda), device:
            model = AutoModelForCausalLM.from_config(
                config,
                dtype=DTYPES[dtype],
                attn_implementation=CPU_ATTENTION if device.type == "cpu" else "sdpa",
            )
    except (KeyError, ValueError, OSError) as error:
        raise InputError(
            f"no causal language model can be built from it ({error})",
            where=where,
            way_out="give a folder with a config.json, or its contents, model_type included",
        ) from error
    model.generation_config = GenerationConfig()  # nothing but what the engine asks for
    return model.eval().requires_grad_(False)


@dataclass(eq=False)
class Waiting:
    """A request in the queue."""

    request: Request
    future: asyncio.Future[Completion]


class EmbeddedEngine(Engine):
    """Generates with transformers, in the process and the event loop of its caller.

    Requests of one turn of the loop are batched together, similar prompts side by side, within
    `max_batch` and `max_batch_tokens`; a request above the latter runs alone. The loop runs between
    batches, so completions are consumed while others still wait; and answers from outside of the loop are
    waited for (serving/rounds.py).
    """

    inline = True

    def __init__(
        self, hf_config: dict[str, Any] | str | Path, config: EngineConfig, device: torch.device | str = "cpu"
    ) -> None:
        self.config = config
        self.device = torch.device(device)
        self.version = -1
        self._model: PreTrainedModel | None = build_model(hf_config, config.dtype, self.device)
        if config.routing_replay and not routers(self._model):
            raise InputError("its model has no experts to replay", where="engine.routing_replay")
        self._queue: list[Waiting] = []  # oldest first
        self._loop: asyncio.AbstractEventLoop | None = None  # of those in the queue
        self._scheduled = False
        self._running: Generation | None = None
        self._loading: int | None = None  # the version whose tensors are coming in
        self._loaded: set[str] = set()
        self._stats: dict[str, float] = {}
        self._read: list[tuple[int, ...]] = []  # prompts whose prefixes are not counted yet
        self.stats()

    async def complete(self, request: Request) -> Completion:
        model = self._ready(f"request {request.key!r}")
        check_request(request, model.config.vocab_size)
        loop = asyncio.get_running_loop()
        if loop is not self._loop:  # what waited in a loop that is gone waits no more
            self._loop, self._scheduled, self._queue = loop, False, []
        waiting = Waiting(request, loop.create_future())
        self._queue.append(waiting)
        self._schedule()
        return await waiting.future

    async def score(
        self, ids: Sequence[int], continuations: Sequence[Sequence[int]], *, temperature: float = 1.0
    ) -> list[float]:
        model = self._ready("score")
        if not temperature > 0:
            raise InputError(f"temperature is {temperature}, not above 0", where="score")
        if self._loading is not None:
            raise InputError(f"weights of version {self._loading} are half loaded", where="score")
        for part in (ids, *continuations):
            check_ids(part, model.config.vocab_size, "score")
        return score_continuations(model, ids, continuations, temperature) if continuations else []

    def abort(self, key: str | None = None) -> None:
        for waiting in self._queue:
            if (key is None or waiting.request.key == key) and not waiting.future.done():
                waiting.future.set_result(Completion(ids=(), logprobs=(), finish="abort"))
        self._queue = [waiting for waiting in self._queue if not waiting.future.done()]
        if self._running is not None:
            self._running.abort(key)

    @torch.no_grad()
    def load_weights(
        self, version: int, tensors: Iterable[tuple[str, Tensor]], *, final: bool = True
    ) -> None:
        where = f"weights of version {version}"
        model = self._ready(where, weights=False)
        # Tied weights appear once here, under the name that a saved model has.
        expected = by_file_names(dict(model.named_parameters()) | _persistent_buffers(model))
        try:
            if self._loading not in (None, version):
                raise InputError(f"version {self._loading} was still coming in", where=where)
            self._loading, self.version = version, -1
            for name, tensor in tensors:
                self._load_one(name, tensor, expected, where)
            if final and (missing := sorted(expected.keys() - self._loaded)):
                raise InputError(f"{len(missing)} missing: {', '.join(missing[:8])}", where=where)
        except BaseException as error:
            self._drop_load(error)
            raise
        if final:
            self.version, self._loading, self._loaded = version, None, set()
            if self._loop is not None and not self._loop.is_closed():
                self._schedule()

    def stats(self) -> dict[str, float]:
        self._count_unique()
        taken = self._stats
        names = ("tokens", "prompt_tokens", "unique_prompt_tokens", "seconds", "batches")
        self._stats = dict.fromkeys(names, 0.0)
        return taken

    def _count_unique(self) -> None:
        """Count what was read by its prefixes, and forget it."""
        if self._read:
            self._stats["unique_prompt_tokens"] += unique_tokens(self._read)
            self._read = []

    def close(self) -> None:
        self.abort()
        self._model, self.version = None, -1

    def _ready(self, where: str, *, weights: bool = True) -> PreTrainedModel:
        """The model; InputError where there is none, or it has no weights and none are coming in."""
        if self._model is None:
            raise InputError("the engine is closed", where=where)
        if weights and self.version < 0 and self._loading is None:
            raise InputError(
                "the engine has no weights", where=where, way_out="publish the role's weights to it first"
            )
        return self._model

    def _load_one(self, name: str, tensor: Tensor, expected: dict[str, Tensor], where: str) -> None:
        if name not in expected:
            raise InputError(f"surplus tensor {name}, which the engine's model does not have", where=where)
        if name in self._loaded:
            raise InputError(f"tensor {name} came twice", where=where)
        if tensor.shape != expected[name].shape:
            raise InputError(
                f"tensor {name} has shape {tuple(tensor.shape)}, the engine's {tuple(expected[name].shape)}",
                where=where,
            )
        expected[name].copy_(tensor)
        self._loaded.add(name)

    def _drop_load(self, error: BaseException) -> None:
        """Weights are mixed now: whoever waits for them gets the error."""
        self.version, self._loading, self._loaded = -1, None, set()
        queue, self._queue = self._queue, []
        for waiting in queue:
            if not waiting.future.done():
                waiting.future.set_exception(error)

    def _schedule(self) -> None:
        if self._loop is not None and self._queue and not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._drain, self._loop, SETTLE_TURNS)

    def _drain(self, loop: asyncio.AbstractEventLoop, turns: int) -> None:
        """Run one batch after `turns` turns of the loop, and come back for the next."""
        if turns > 0:
            loop.call_soon(self._drain, loop, turns - 1)
            return
        if rounds(loop).wait(lambda: loop.call_soon(self._drain, loop, SETTLE_TURNS)):
            return
        self._scheduled = False
        self._queue = [waiting for waiting in self._queue if not waiting.future.done()]
        if self._queue and self._loading is None:  # a load that is under way schedules again
            self._run(self._take_batch())
            self._schedule()

    def _take_batch(self) -> list[Waiting]:
        """Cut the queue, sorted by prompt, into batches; take the one with the oldest request."""
        oldest = self._queue[0]
        batch: list[Waiting] = []
        for waiting in sorted(self._queue, key=lambda item: (len(item.request.ids), item.request.ids)):
            if batch and not self._fits([*batch, waiting]):
                if oldest in batch:
                    break
                batch = []
            batch.append(waiting)
        taken = set(batch)
        self._queue = [waiting for waiting in self._queue if waiting not in taken]
        return batch

    def _fits(self, batch: list[Waiting]) -> bool:
        longest = len(batch[-1].request.ids)  # sorted
        tokens = longest + max(waiting.request.params.max_new_tokens for waiting in batch)
        return len(batch) <= self.config.batch and len(batch) * tokens <= self.config.batch_tokens

    def _run(self, batch: list[Waiting]) -> None:
        assert self._model is not None
        start = time.perf_counter()
        self._running = Generation(
            self._model,
            [waiting.request for waiting in batch],
            self.version,
            record=self.config.routing_replay,
        )
        try:
            completions = self._running.run()
        except Exception as error:
            for waiting in batch:
                waiting.future.set_exception(error)
            return
        finally:
            self._running = None
        for waiting, completion in zip(batch, completions, strict=True):
            waiting.future.set_result(completion)
        self._stats["tokens"] += sum(len(completion.ids) for completion in completions)
        self._stats["prompt_tokens"] += sum(len(waiting.request.ids) for waiting in batch)
        self._read += [waiting.request.ids for waiting in batch]
        if len(self._read) > MOST_READ:
            self._count_unique()
        self._stats["seconds"] += time.perf_counter() - start
        self._stats["batches"] += 1


def _persistent_buffers(model: PreTrainedModel) -> dict[str, Tensor]:
    """The buffers that a saved model has."""
    kept = model.state_dict(keep_vars=True).keys()
    return {name: buffer for name, buffer in model.named_buffers() if name in kept}
