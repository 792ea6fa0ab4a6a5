"""What others say in a conversation, as token ids behind a turn that was sampled: nothing is tokenized again.

The chat template is asked what it writes behind an assistant's turn, with marks where texts stand. What it
writes around them may make special tokens; the texts are encoded as plain ones, so that an observation which
holds `<|im_end|>` ends no turn.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from genac_megatron.environments.base import Message
from genac_megatron.errors import InputError
from genac_megatron.tasks.tokenizer import chat_text, encode_after

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ASKED, SAID, SEEN = "GENACASKEDMARK", "GENACSAIDMARK", "GENACSEENMARK"
THOUGHT = "GENACTHOUGHTMARK"
PLAIN = ("a", "\n")  # what a text may follow without a token that holds some of both


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
    for (_, content), after in zip(messages, frame[1:], strict=True):
        own, cut = shortened(tokenizer, content, limit)
        ids += own
        left_out += cut
        texts.append(content if not cut else str(tokenizer.decode(own)))
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
