"""A model's reasoning, told apart from its answer by tags: those of known families, or a recipe's own."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import groupby
from typing import TYPE_CHECKING

from genac_megatron.tasks.answers import REASONING, opens_reasoning

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Tags = tuple[str, str]  # what opens and what closes reasoning
KNOWN: Tags = ("<think>", "</think>")
PROMPT_END = 16  # tokens of a prompt's end in which a template may open the reasoning


def usual(text: str, tags: Tags | None) -> str:
    """The text with a recipe's own tags written as known ones."""
    if tags is None or tags == KNOWN:
        return text
    # The longer one first: the one may hold the other.
    for tag, known in sorted(zip(tags, KNOWN, strict=True), key=lambda both: -len(both[0])):
        text = text.replace(tag, known)
    return text


def opened_reasoning(
    tokenizer: PreTrainedTokenizerBase, prompt_ids: Sequence[int], tags: Tags | None = None
) -> bool:
    """Whether the chat template has opened the reasoning that a response then only closes."""
    return opens_reasoning(usual(str(tokenizer.decode(list(prompt_ids[-PROMPT_END:]))), tags))


def written(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], tags: Tags | None = None) -> str:
    """What a model wrote: ids decoded, special tokens left out but for those that tell reasoning apart."""
    kept = _special_tags(tokenizer, tags)
    if kept.isdisjoint(ids):
        return str(tokenizer.decode(list(ids), skip_special_tokens=True))
    runs = [(shown, list(run)) for shown, run in groupby(ids, key=kept.__contains__)]
    return "".join(str(tokenizer.decode(run, skip_special_tokens=not shown)) for shown, run in runs)


@lru_cache(maxsize=16)
def _special_tags(tokenizer: PreTrainedTokenizerBase, tags: Tags | None) -> frozenset[int]:
    """Special tokens that open or close reasoning, as [THINK]: left out, nothing would tell."""
    special = {i: token.content for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return frozenset(i for i, text in special.items() if REASONING.fullmatch(usual(text, tags)))
