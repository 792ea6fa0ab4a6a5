"""Text of others in a prompt: nothing in it can be taken for a tag or a special token, and not too long."""

from __future__ import annotations

import re
from collections.abc import Iterable

_PART = re.compile(r"^<([a-z]+)>\n", re.MULTILINE)  # the head of a transcript's part
_TAG_OPENING = re.compile(r"<(?=[A-Za-z_/!?|\uff5c])")


def escape(text: str, tokens: Iterable[str] = ()) -> str:
    """Break what reads as a tag or a special token by a space after its first character.

    Covers `<` before a letter or one of `_ / ! ? |` (so `x < 3` and `<<48/2=24>>` stay), and those
    of `tokens`, the tokenizer's added ones, that are not plain words. `<answer>` becomes `< answer>`.
    """
    return break_tokens(_TAG_OPENING.sub("< ", text), tokens)


def break_tokens(text: str, tokens: Iterable[str]) -> str:
    """Break what reads as one of `tokens`, as `escape` does."""
    found = [t for t in tokens if len(t.strip()) > 1 and not t.isalnum() and t in text]
    for token in sorted(found, key=len, reverse=True):
        text = text.replace(token, f"{token[0]} {token[1:]}")
    return text


class Transcript(str):
    """A conversation as it is shown to who judges it: its parts, each under a tag of who wrote it.

    What is in a part is escaped, so none of them can begin another one.
    """


def transcript(parts: Iterable[tuple[str, str]], *, open_last: bool = False) -> Transcript:
    """Of (who wrote it, text) in order. open_last: the last one is not at its end.

    The transcript of a conversation's beginning is a beginning of the whole one's.
    """
    text = "".join(f"<{who}>\n{escape(said)}\n" for who, said in parts)
    return Transcript(text[:-1] if open_last else text)


def read_transcript(text: str) -> list[tuple[str, str]]:
    """The parts of what `transcript` wrote, as they are shown there."""
    pieces = _PART.split(text)
    return [(who, said.removesuffix("\n")) for who, said in zip(pieces[1::2], pieces[2::2], strict=True)]


def cut_middle(text: str, limit: int) -> str:
    """At most `limit` characters of a text, from its two ends, and a line that says how many are left out."""
    if len(text) <= limit:
        return text
    head = limit // 2
    return f"{text[:head]}\n[{len(text) - limit} characters left out]\n{text[len(text) - limit + head :]}"
