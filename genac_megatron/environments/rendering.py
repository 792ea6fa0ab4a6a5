"""What others say in a conversation, as token ids behind a turn that was sampled: nothing is tokenized again.

The chat template is asked what it writes behind an assistant's turn, with marks where texts stand. What it
writes around them may make special tokens; the texts are encoded as plain ones, so that an observation which
holds `<|im_end|>` ends no turn.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from genac_megatron.environments.base import Message
from genac_megatron.errors import InputError
from genac_megatron.tasks.tokenizer import chat_text, encode_after

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ASKED, SAID, SEEN = "GENACASKEDMARK", "GENACSAIDMARK", "GENACSEENMARK"
THOUGHT = "GENACTHOUGHTMARK"
TEXT = f'\t"{SEEN}\n\u00e9{SAID}"\t'  # by which a template shows what it makes of texts


class Rendered(NamedTuple):
    """Messages as ids that follow a turn, the generation prompt included."""

    ids: tuple[int, ...]
    texts: tuple[str, ...]  # of each message, as shown
    left_out: int  # tokens that were cut out of their middles


def render(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, ended: bool, limit: int
) -> Rendered:
    """What the chat template writes behind a turn and up to the next one.

    ended: the turn ended by itself, with its end token; else the template's own end is written too. limit:
    tokens of each message's text; of a longer one the two ends are shown. Raises InputError where the
    template does not show the messages.
    """
    frame = _frame(tokenizer, str(tokenizer.chat_template), tuple(role for role, _ in messages))
    ids, texts, left_out = list[int](), list[str](), 0
    first = frame[0]
    end = str(tokenizer.eos_token)
    if ended and first.lstrip().startswith(end):
        first = first.lstrip()[len(end) :]
    ids += encode_after(tokenizer, end, first)
    for (role, content), after in zip(messages, frame[1:], strict=True):
        own, cut = shortened(tokenizer, content, limit)
        text = content if not cut else str(tokenizer.decode(own))
        shown = _written(tokenizer, role, text)
        ids += own if shown == text else _plain(tokenizer, shown)
        left_out += cut
        texts.append(text)
        ids += encode_after(tokenizer, "a" if after[:1].isspace() else "\n", after)
    return Rendered(tuple(ids), tuple(texts), left_out)


def shortened(tokenizer: PreTrainedTokenizerBase, text: str, limit: int) -> tuple[tuple[int, ...], int]:
    """(ids of a text as plain text, tokens left out of its middle): `limit`, and a line that says so."""
    ids = _plain(tokenizer, text)
    if len(ids) <= limit:
        return ids, 0
    head, out = limit // 2, len(ids) - limit
    note = _plain(tokenizer, f"\n[{out} tokens left out]\n")
    return (*ids[:head], *note, *ids[len(ids) - limit + head :]), out


def _plain(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    before = "a" if text[:1].isspace() else "\n"
    return encode_after(tokenizer, before, text, split_special_tokens=True)


@lru_cache(maxsize=64)
def _frame(tokenizer: PreTrainedTokenizerBase, template: str, roles: tuple[str, ...]) -> tuple[str, ...]:
    """What the template writes before, between and behind texts of these roles that follow a turn."""
    seen = [{"role": role, "content": f"{SEEN}{n}X"} for n, role in enumerate(roles)]
    asked = [{"role": "user", "content": ASKED}, {"role": "assistant", "content": SAID}]
    whole = chat_text(tokenizer, [*asked, *seen])
    parts, rest = list[str](), whole.partition(SAID)[2]
    for message in seen:
        before, mark, rest = rest.partition(message["content"])
        parts.append(before)
        if not mark or message["content"] in rest:
            raise InputError(
                f"the chat template does not show a message of the role '{message['role']}' once behind the "
                "assistant's turn",
                where=str(tokenizer.name_or_path),
                way_out="use another chat_template, or an environment that answers as another role (user)",
            )
    return (*parts, rest)


def shown_ids(
    tokenizer: PreTrainedTokenizerBase,
    begun: Sequence[Mapping[str, Any]],
    since: Sequence[Message],
    tools: Sequence[Any] = (),
) -> tuple[int, ...]:
    """A whole conversation as the chat template shows it now, the generation prompt included.

    begun: the messages that it began with. since: what was said then, by `assistant` and by others. Special
    tokens that their texts spell are plain text.
    """
    name = "GENACPLAIN"
    while any(name in text for _, text in since) or name in str(begun):
        name += "Q"
    kept: list[str] = []

    def hidden(text: str) -> str:
        kept.append(text)
        return f"{name}{len(kept) - 1}X"

    tokens = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    special = re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or "(?!)")
    messages = [dict(message) for message in begun]
    for role, text in since:
        own = role == "assistant"  # its reasoning is for the template to find
        content = special.sub(lambda found: hidden(found[0]), text) if own else ""
        content = content if own else hidden(_written(tokenizer, role, text))
        messages.append({"role": role, "content": content})
    pieces = re.split(rf"{name}(\d+)X", chat_text(tokenizer, messages, tools))
    ids = list(encode_after(tokenizer, "", pieces[0]))
    for number, after in zip(pieces[1::2], pieces[2::2], strict=True):
        ids += _plain(tokenizer, kept[int(number)])
        ids += encode_after(tokenizer, "a" if after[:1].isspace() else "\n", after)
    return tuple(ids)


def _written(tokenizer: PreTrainedTokenizerBase, role: str, text: str) -> str:
    """A text as the template writes it: some strip it, Llama's makes JSON of a tool's."""
    return _writes(tokenizer, str(tokenizer.chat_template), role)(text)


@lru_cache(maxsize=64)
def _writes(tokenizer: PreTrainedTokenizerBase, template: str, role: str) -> Callable[[str], str]:
    asked = [{"role": "user", "content": ASKED}, {"role": "assistant", "content": SAID}]
    shown = chat_text(tokenizer, [*asked, {"role": role, "content": TEXT}])
    ways: tuple[Callable[[str], str], ...] = (
        str,
        lambda text: json.dumps(text, ensure_ascii=False)[1:-1],
        lambda text: json.dumps(text)[1:-1],
        str.strip,
    )
    return next((way for way in ways if way(TEXT) in shown), str)


@lru_cache(maxsize=64)
def rewrites(tokenizer: PreTrainedTokenizerBase) -> str:
    """How the chat template shows earlier turns otherwise than they were written; "" where it does not.

    Raises InputError where it cannot show a conversation of several turns.
    """
    asked = {"role": "user", "content": ASKED}
    thought = {"role": "assistant", "content": f"<think>\n{THOUGHT}\n</think>\n\n{SAID}"}
    again = {"role": "user", "content": f"{SEEN}0X"}
    shown = chat_text(tokenizer, [asked, thought, again])
    if SAID not in shown:
        raise InputError(
            "the chat template does not show an assistant's earlier turn",
            where=str(tokenizer.name_or_path),
            way_out="use a chat_template that shows conversations of several turns",
        )
    if THOUGHT not in shown:
        return "leaves the reasoning of earlier turns out"
    said = {"role": "assistant", "content": SAID}
    after = _frame(tokenizer, str(tokenizer.chat_template), ("user",))
    grown = f"{chat_text(tokenizer, [asked])}{SAID}{after[0]}{again['content']}{after[1]}"
    return "" if chat_text(tokenizer, [asked, said, again]) == grown else "shows earlier turns otherwise"
