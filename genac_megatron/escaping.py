"""Text of others in a prompt: nothing in it can be taken for a tag or a special token."""

from __future__ import annotations

import re
from collections.abc import Iterable

_TAG_OPENING = re.compile(r"<(?=[A-Za-z_/!?|\uff5c])")


def escape(text: str, tokens: Iterable[str] = ()) -> str:
    """Break what reads as a tag or a special token by a space after its first character.

    Covers `<` before a letter or one of `_ / ! ? |` (so `x < 3` and `<<48/2=24>>` stay), and those
    of `tokens`, the tokenizer's added ones, that are not plain words. `<answer>` becomes `< answer>`.
    """
    text = _TAG_OPENING.sub("< ", text)
    found = [t for t in tokens if len(t.strip()) > 1 and not t.isalnum() and t in text]
    for token in sorted(found, key=len, reverse=True):
        text = text.replace(token, f"{token[0]} {token[1:]}")
    return text
