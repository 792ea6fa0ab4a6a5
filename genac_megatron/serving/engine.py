"""What every engine offers: completions of token ids, and weights loaded under a version number."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from genac_megatron.errors import InputError
from genac_megatron.records import Completion, Request

if TYPE_CHECKING:
    from torch import Tensor


class Engine(ABC):
    """Generates with a role's weights. Every method is called from the event loop's thread."""

    version: int = -1  # of the weights loaded; -1 while there is no complete set
    inline = False  # it computes in its caller's event loop, a batch at a time

    @abstractmethod
    async def complete(self, request: Request) -> Completion:
        """Sample one completion.

        The tokens depend on the request's ids, params and seed and on the weights, not on what else
        is being generated (but for floating-point rounding). Log-probs are those of
        softmax(logits / temperature), in fp32; of softmax(logits) where the temperature is 0.
        Raises InputError on a malformed request, or where no complete weights were ever loaded.
        """

    @abstractmethod
    async def score(
        self, ids: Sequence[int], continuations: Sequence[Sequence[int]], *, temperature: float = 1.0
    ) -> list[float]:
        """log p(continuation | ids) of each continuation: the chance that it is what `complete` samples.

        The sum over its tokens, each of softmax(logits / temperature), in fp32. Raises InputError as
        `complete` does, and where the temperature is not above 0.
        """

    async def warm(self, ids: Sequence[int], key: str = "") -> None:
        """Read ids ahead of requests that begin with them, where the engine has a cache for that."""
        return

    def deal(self, numbers: Mapping[str, int]) -> None:
        """What requests to come share: each group's number among those of all ranks, from 0 and without gaps.

        An engine of several servers gives each as many groups. A group is what a request's key says before
        its last "@", else before its "#" (serving/sglang/routing.py).
        """
        return

    @abstractmethod
    def abort(self, key: str | None = None) -> None:
        """End the requests with this key, or all: they finish as "abort" with the tokens they have."""

    @abstractmethod
    def load_weights(
        self, version: int, tensors: Iterable[tuple[str, Tensor]], *, final: bool = True
    ) -> None:
        """Copy full tensors, by their Hugging Face names, into the engine.

        One version may come in several calls; it becomes current with the call that has final=True,
        and requests wait in between. A tied output layer is left out, as in a saved model. A name
        that is missing, surplus, repeated or misshapen raises InputError, after which the engine
        holds no usable weights (version -1) until a full set is loaded.
        """

    @abstractmethod
    def stats(self) -> dict[str, float]:
        """Since the last call: tokens (generated), prompt_tokens, unique_prompt_tokens, seconds (generating),
        batches.

        The unique ones are those that a prefix cache does not have: where the engine has one, what it
        computed; else each prefix once that several prompts begin with.
        """

    @abstractmethod
    def close(self) -> None:
        """Abort what is left and release the memory."""


def check_request(request: Request, vocab: int) -> None:
    """Raise InputError where a request cannot be served by a model with `vocab` token ids."""
    where = f"request {request.key!r}" if request.key else "request"
    check_ids(request.ids, vocab, where)
    if request.params.max_new_tokens < 1:
        raise InputError(f"max_new_tokens is {request.params.max_new_tokens}, not at least 1", where=where)
    if request.params.temperature < 0:
        raise InputError(f"temperature is {request.params.temperature}, not at least 0", where=where)
    if request.seed < 0:
        raise InputError(f"seed is {request.seed}, not at least 0", where=where)


def check_ids(ids: Sequence[int], vocab: int, where: str) -> None:
    """Raise InputError where there are no ids, or one is outside the vocabulary."""
    if not ids:
        raise InputError("there are no tokens", where=where)
    if min(ids) < 0 or max(ids) >= vocab:
        raise InputError(
            f"token id {next(token for token in ids if not 0 <= token < vocab)} is outside the model's "
            f"vocabulary of {vocab}",
            where=where,
            way_out="use the tokenizer that belongs to the model",
        )
