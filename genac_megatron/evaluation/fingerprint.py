"""Which tokenizer: a digest that is the same wherever its files lie (of weights: publication/digest.py)."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """The digest of a tokenizer's vocabulary and chat template."""
    parts: list[Any] = [
        sorted(tokenizer.get_vocab().items(), key=lambda pair: pair[1]),
        tokenizer.chat_template,
    ]
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()
