"""One batch of requests through transformers' `generate`: exact, seeded, independent of its company.

The decoding loop, the model and the cache's bookkeeping are the library's. What is added plugs into
its extension points: a logits processor that samples each row by inverse CDF, a stopping criterion
per row, cache layers with room to grow, and an attention function that repeats no keys.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.cache_utils import DynamicLayer
from transformers.masking_utils import sdpa_mask

from genac_megatron.errors import GenacError
from genac_megatron.records import Completion, Finish, Request
from genac_megatron.serving.experts import RecordingCache, as_experts

if TYPE_CHECKING:
    from genac_megatron.records import Experts

CPU_ATTENTION = "genac_grouped_sdpa"
PREFILL_TOKENS = 1024  # read at once on CPU: activations of small models stay in the processor's cache
COMPACT_BELOW = 0.75  # share of rows still running below which the finished ones are dropped
COMPACT_ROWS = 8  # fewer rows than this cost the same each


def grouped_sdpa(
    _module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **_kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention for query [b, h, q, d] and key, value [b, kv_heads, k, d] -> [b, q, h, d].

    The library's "sdpa" copies keys and values once per query head where there is a mask; torch's CPU
    kernel needs no such copies. Where one token is decoded, the query heads of a key head act as its rows.
    """
    batch, heads, length, width = query.shape
    if length == 1:
        query = query.reshape(batch, key.shape[1], -1, width)
    output = torch.nn.functional.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=attention_mask,
        dropout_p=dropout,
        scale=scaling,
        is_causal=attention_mask is None and length > 1,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return output.reshape(batch, heads, length, width).transpose(1, 2).contiguous(), None


AttentionInterface.register(CPU_ATTENTION, grouped_sdpa)
AttentionMaskInterface.register(CPU_ATTENTION, sdpa_mask)


class RoomyLayer(DynamicLayer):
    """A cache layer that writes in place into [b, kv_heads, capacity, d] rather than concatenating."""

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity
        self._rooms: list[Tensor] = []  # of keys and of values

    def update(
        self, key_states: Tensor, value_states: Tensor, *_args: Any, **_kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append [b, kv_heads, n, d] keys and values; returns all of them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._rooms = [
                new.new_empty(*new.shape[:2], self.capacity, new.shape[3])
                for new in (key_states, value_states)
            ]
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        for room, new in zip(self._rooms, (key_states, value_states), strict=True):
            room[:, :, start:end] = new
        self.keys, self.values = (room[:, :, :end] for room in self._rooms)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep, in this order, the rows `indices` [n] of the batch; a row may be named more than once."""
        if length := self.get_seq_length():
            self._rooms = [room.index_select(0, indices) for room in self._rooms]
            self.keys, self.values = (room[:, :, :length] for room in self._rooms)


def make_cache(model: PreTrainedModel, capacity: int, *, record: bool = False) -> DynamicCache:
    """An empty cache whose full-attention layers hold `capacity` positions; other kinds stay as they are.

    record: it can keep which experts its positions were sent to.
    """
    config = model.config
    cache = RecordingCache(capacity, config=config) if record else DynamicCache(config=config)
    cache.layers = [RoomyLayer(capacity) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


class Sampler(LogitsProcessor):
    """Chooses each row's next token and leaves only that one for the greedy search that follows.

    Inverse CDF with one uniform per row and step, drawn ahead from the request's seed, so that a row's
    tokens do not depend on the others. Keeps tokens [b, n] and fp32 log-probs [b, n] of all steps.
    """

    def __init__(self, requests: Sequence[Request], device: torch.device) -> None:
        steps = max(request.params.max_new_tokens for request in requests)
        stops = max(len(request.params.stop_token_ids) for request in requests)
        uniforms = np.zeros((len(requests), steps))
        stop_ids = np.full((len(requests), stops), -1)
        for row, request in enumerate(requests):
            # Not torch's generator: it uses 32 bits of its seed.
            length = request.params.max_new_tokens
            uniforms[row, :length] = np.random.Generator(np.random.PCG64(request.seed)).random(length)
            stop_ids[row, : len(request.params.stop_token_ids)] = request.params.stop_token_ids
        temperatures = torch.tensor([request.params.temperature for request in requests])
        self.greedy = (temperatures == 0)[:, None].to(device)
        self.any_greedy = bool(self.greedy.any())
        self.temperatures = temperatures.where(temperatures > 0, 1.0)[:, None].to(device)
        self.uniforms = torch.from_numpy(uniforms).to(device)
        self.stop_ids = torch.from_numpy(stop_ids).to(device)
        self.limits = torch.tensor([request.params.max_new_tokens for request in requests]).to(device)
        self.tokens = torch.zeros(len(requests), steps, dtype=torch.long, device=device)
        self.logprobs = torch.zeros(len(requests), steps, device=device)
        self.step = 0

    def __call__(self, _input_ids: Tensor, scores: Tensor) -> Tensor:
        """scores [b, vocab], fp32 logits -> 0 at the chosen token and -inf elsewhere."""
        logprobs = torch.log_softmax(scores / self.temperatures, dim=-1)
        chosen = inverse_cdf(logprobs, self.uniforms[:, self.step, None])
        if self.any_greedy:
            chosen = torch.where(self.greedy, scores.argmax(-1, keepdim=True), chosen)
        self.tokens[:, self.step] = chosen[:, 0]
        self.logprobs[:, self.step] = logprobs.gather(1, chosen)[:, 0]
        self.step += 1
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen, 0.0)

    def at_end(self) -> Tensor:
        """Rows [b] whose latest token is a stop token of theirs, or the last they asked for."""
        return (self.tokens[:, self.step - 1, None] == self.stop_ids).any(1) | (self.step >= self.limits)

    def keep(self, rows: Tensor) -> None:
        """Drop all rows but `rows` [n]."""
        for name in ("greedy", "temperatures", "uniforms", "stop_ids", "limits", "tokens", "logprobs"):
            setattr(self, name, getattr(self, name)[rows])


def inverse_cdf(logprobs: Tensor, uniforms: Tensor) -> Tensor:
    """Sample from log-probs [b, vocab] with uniforms [b, 1] in [0, 1), fp64 -> token ids [b, 1].

    The first token whose cumulative probability exceeds u times the total: summed in fp64, so that a
    large vocabulary's tail keeps its share; never a token of probability 0. NaN gives some token id.
    """
    cumulative = logprobs.double().exp().cumsum(-1)
    total = cumulative[:, -1:]
    target = torch.minimum(uniforms * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, target, right=True).clamp(max=logprobs.shape[-1] - 1)


class RowsDone(StoppingCriteria):
    """Ends rows one by one, and the call of `generate` once it is worth dropping those that have ended."""

    def __init__(self, sampler: Sampler, rows: int) -> None:
        self.sampler = sampler
        self.lengths = torch.zeros(rows, dtype=torch.long, device=sampler.tokens.device)  # 0: still running
        self.aborted = torch.zeros_like(self.lengths, dtype=torch.bool)

    def __call__(self, _input_ids: Tensor, _scores: Any, **_kwargs: Any) -> Tensor:
        """Rows [b] that are done; all of them where the call must end."""
        ended = self.sampler.at_end() | self.aborted
        self.lengths.masked_fill_(ended & (self.lengths == 0), self.sampler.step)
        done = self.lengths > 0
        rows = len(done)
        running = rows - int(done.sum())
        if rows > COMPACT_ROWS and running <= COMPACT_BELOW * rows:
            return torch.ones_like(done)
        return done

    def keep(self, rows: Tensor) -> None:
        """Drop all rows but `rows` [n]."""
        self.lengths, self.aborted = self.lengths[rows], self.aborted[rows]


class Generation:
    """One batch of requests on its way through a model. `run` does it; `abort` may end rows early."""

    def __init__(
        self, model: PreTrainedModel, requests: Sequence[Request], version: int, *, record: bool = False
    ) -> None:
        """record: completions carry the experts that their tokens were sent to."""
        self.model, self.requests, self.version = model, list(requests), version
        self.device = model.device
        self.rows = list(range(len(self.requests)))  # those in the tensors
        self.width = max(len(request.ids) for request in self.requests)  # of the prompts, laid out
        self.read_at: list[Tensor] = []  # per request: where its prompt's tokens lie
        capacity = self.width + max(request.params.max_new_tokens for request in self.requests)
        self.cache = make_cache(model, capacity, record=record)
        self.sampler = Sampler(self.requests, self.device)
        self.criterion = RowsDone(self.sampler, len(self.requests))

    def abort(self, key: str | None) -> None:
        """End the rows with this key, or all, after the token that is being sampled."""
        for place, row in enumerate(self.rows):
            if key is None or self.requests[row].key == key:
                self.criterion.aborted[place] = True

    @torch.inference_mode()
    def run(self) -> list[Completion]:
        """The requests' completions, in their order."""
        recorded = isinstance(self.cache, RecordingCache)
        with self.cache.recording(self.model) if recorded else contextlib.nullcontext():
            return self._run()

    def _run(self) -> list[Completion]:
        ids, mask = self._prefill()
        self.read_at = [row.nonzero()[:, 0] for row in mask]
        completions: dict[int, Completion] = {}
        while self.rows:
            ids = self.model.generate(
                input_ids=ids,
                attention_mask=mask,
                past_key_values=self.cache,
                generation_config=GenerationConfig(
                    do_sample=False,
                    use_cache=True,
                    pad_token_id=0,
                    max_new_tokens=int(self.sampler.limits.max()) - self.sampler.step,
                ),
                logits_processor=LogitsProcessorList([self.sampler]),
                stopping_criteria=StoppingCriteriaList([self.criterion]),
            )
            completions.update(self._harvest())
            running = (self.criterion.lengths == 0).nonzero()[:, 0]
            self.rows = [self.rows[place] for place in running.tolist()]
            if self.rows:
                new = ids.shape[1] - mask.shape[1]
                ids, mask = ids[running], torch.nn.functional.pad(mask[running], (0, new), value=1)
                self.cache.batch_select_indices(running)
                self.sampler.keep(running)
                self.criterion.keep(running)
        return [completions[row] for row in range(len(self.requests))]

    def _harvest(self) -> dict[int, Completion]:
        """Completions of the rows that have ended, by row."""
        tokens, logprobs = self.sampler.tokens.tolist(), self.sampler.logprobs.tolist()
        found = {}
        for place, length in enumerate(self.criterion.lengths.tolist()):
            if length == 0:
                continue
            params = self.requests[self.rows[place]].params
            if not all(map(math.isfinite, logprobs[place][:length])):
                raise GenacError(
                    f"the model's log-probs are not finite (weights of version {self.version})",
                    where=f"request {self.requests[self.rows[place]].key!r}",
                    way_out="the weights have diverged: resume from an earlier checkpoint, lower the lr",
                )
            finish: Finish = "abort"
            if tokens[place][length - 1] in params.stop_token_ids:
                finish = "stop"
            elif length == params.max_new_tokens:
                finish = "length"
            found[self.rows[place]] = Completion(
                ids=tuple(tokens[place][:length]),
                logprobs=tuple(logprobs[place][:length]),
                finish=finish,
                spans=((self.version, length),),
                experts=self._experts(place, length),
            )
        return found

    def _experts(self, place: int, length: int) -> Experts | None:
        """Which experts the row at `place` went to, its prompt and all but the last of `length` tokens."""
        if not isinstance(self.cache, RecordingCache):
            return None
        row = self.rows[place]
        new = torch.arange(self.width, self.width + length - 1, device=self.device)
        chosen = self.cache.chosen(place, torch.cat([self.read_at[row], new]))
        return as_experts(chosen, self.model.config.num_experts, f"request {self.requests[row].key!r}")

    def _prefill(self) -> tuple[Tensor, Tensor]:
        """Ids and mask [b, w]; the cache is filled but for the last position, each shared prefix read once.

        Rows are laid out as the prefix that all share, padding, and the rest; equal prompts are one row
        until they are read.
        """
        prompts = [request.ids for request in self.requests]
        distinct = {ids: place for place, ids in enumerate(dict.fromkeys(prompts))}
        shared = min(shared_length(list(distinct)), min(map(len, distinct)) - 1)
        width, cache = self.width, self.cache
        ids = torch.zeros(len(distinct), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for prompt, place in distinct.items():
            rest = width - (len(prompt) - shared)
            ids[place, :shared], ids[place, rest:] = torch.tensor(prompt).tensor_split([shared])
            mask[place, :shared], mask[place, rest:] = 1, 1
        ids, mask = ids.to(self.device), mask.to(self.device)
        if shared:
            read(self.model, ids[:1, :shared], mask[:1, :shared], cache)
            cache.batch_select_indices(torch.zeros(len(distinct), dtype=torch.long, device=self.device))
        read(self.model, ids[:, :-1], mask[:, :-1], cache)
        rows = torch.tensor([distinct[prompt] for prompt in prompts], device=self.device)
        if len(distinct) < len(prompts):
            cache.batch_select_indices(rows)
        return ids[rows], mask[rows]


def shared_length(prompts: Sequence[tuple[int, ...]]) -> int:
    """Number of ids that all prompts begin with."""
    first, last = min(prompts), max(prompts)  # in lexicographic order these two differ earliest
    differ = (place for place, (a, b) in enumerate(zip(first, last, strict=False)) if a != b)
    return next(differ, min(len(first), len(last)))


def unique_tokens(prompts: Iterable[tuple[int, ...]]) -> int:
    """Ids of all prompts with what several begin with counted once: nodes of their prefix tree."""
    count, before = 0, tuple[int, ...]()
    for ids in sorted(prompts):  # each shares most with its neighbour
        count += len(ids) - shared_length([before, ids])
        before = ids
    return count


def read(model: PreTrainedModel, ids: Tensor, mask: Tensor, cache: DynamicCache) -> None:
    """Extend the cache over ids and mask [b, w], from where it ends."""
    width = ids.shape[1]
    chunk = max(1, PREFILL_TOKENS // len(ids)) if ids.device.type == "cpu" else width
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    for start in range(cache.get_seq_length(), width, chunk):
        end = min(start + chunk, width)
        model.base_model(
            input_ids=ids[:, start:end],
            attention_mask=mask[:, :end],
            position_ids=positions[:, start:end],
            past_key_values=cache,
            use_cache=True,
        )


@torch.inference_mode()
def score_continuations(
    model: PreTrainedModel,
    ids: Sequence[int],
    continuations: Sequence[Sequence[int]],
    temperature: float = 1.0,
) -> list[float]:
    """log p(continuation | ids) of each: the fp32 sum over its tokens of softmax(logits / temperature)."""
    lengths = torch.tensor([len(continuation) for continuation in continuations])
    longest = int(lengths.max())
    targets = torch.zeros(len(continuations), longest, dtype=torch.long)
    for row, continuation in enumerate(continuations):
        targets[row, : len(continuation)] = torch.tensor(continuation)
    targets = targets.to(model.device)
    prefix = torch.tensor([ids], device=model.device)
    cache = make_cache(model, len(ids) + longest)
    read(model, prefix[:, :-1], torch.ones_like(prefix[:, :-1]), cache)
    cache.batch_select_indices(torch.zeros(len(targets), dtype=torch.long, device=model.device))
    inputs = torch.cat([prefix[:, -1:].expand(len(targets), 1), targets[:, :-1]], dim=1)
    # What pads a short continuation comes after it, so that nothing that counts attends to it.
    logits = model(input_ids=inputs, past_key_values=cache, use_cache=True).logits.float()
    logprobs = torch.log_softmax(logits / temperature, dim=-1).gather(2, targets[:, :, None])[:, :, 0]
    within = torch.arange(longest)[None, :] < lengths[:, None]
    return logprobs.where(within.to(model.device), 0.0).sum(1).tolist()
