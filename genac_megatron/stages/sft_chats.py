"""Conversations as samples for supervised fine-tuning: one for each turn of the assistant that is learnt.

A turn is learnt after exactly the prompt that an engine would see before it. So earlier turns stand in it as
the chat template shows them there (Qwen3's without their thinking), and what is learnt is written in full.
"""

from __future__ import annotations

import hashlib
import json
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from genac_megatron.critic.traces import to_sample
from genac_megatron.errors import InputError
from genac_megatron.recipe.schema import SftStage
from genac_megatron.records import Sample
from genac_megatron.tasks.conversations import Conversation, read_conversations
from genac_megatron.tasks.fields import with_system
from genac_megatron.tasks.tokenizer import chat_ids, chat_text, reply_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MARK = "GENACTURNMARK"


def used_conversations(stage: SftStage) -> tuple[list[Conversation], int]:
    """(the conversations that the stage trains on, how many its file has). Raises InputError."""
    if stage.path is None:
        raise InputError(
            "data: jsonl needs a path",
            where=f"stage {stage.name}",
            way_out='path: a file of lines {"messages": [...]}',
        )
    found = read_conversations(Path(stage.path).expanduser())
    return found[: stage.size], len(found)


def chat_samples(tokenizer: PreTrainedTokenizerBase, chat: Conversation, stage: SftStage) -> list[Sample]:
    """A sample for each turn of the assistant that the stage learns; samples of one opening share a source.

    Raises InputError with the conversation's place, where the chat template refuses it.
    """
    messages = with_system(chat.messages, stage.system)
    places = [n for n, message in enumerate(messages) if message["role"] == "assistant" and n > 0]
    learnt = places if stage.turns == "all" else places[-1:]
    opening = json.dumps(messages[: learnt[0]], default=str)
    source = hashlib.sha256(opening.encode()).hexdigest()[:16]
    samples = []
    for place in learnt:
        before = chat_ids(tokenizer, messages[:place], chat.tools, where=chat.where)
        if messages[place].get("tool_calls"):
            samples.append(_calling(tokenizer, chat, messages, place, before, source))
        else:
            samples.append(to_sample(tokenizer, before, messages[place]["content"], source, chat.where))
    return samples


def _calling(
    tokenizer: PreTrainedTokenizerBase,
    chat: Conversation,
    messages: tuple[dict[str, object], ...],
    place: int,
    before: tuple[int, ...],
    source: str,
) -> Sample:
    """The sample of a turn with tool calls, as the chat template writes them."""
    said = json.dumps(messages[place], ensure_ascii=False)
    special = next((token for token in tokenizer.all_special_tokens if token in said), None)
    if special is not None:
        raise InputError(
            f"message {place + 1} with tool calls holds the special token {special}",
            where=chat.where,
            way_out="take it out of the message's text",
        )
    prompt = chat_text(tokenizer, messages[:place], chat.tools, where=chat.where)
    whole = chat_text(tokenizer, messages[: place + 1], chat.tools, where=chat.where, generation=False)
    end = _turn_end(tokenizer)
    if not whole.startswith(prompt) or not whole.endswith(end):
        raise InputError(
            f"the chat template writes message {place + 1}, with tool calls, otherwise than behind its "
            "generation prompt, so what a model should write is not known",
            where=chat.where,
            way_out="use another chat template, or put the calls into the message's content as text",
        )
    text = whole[len(prompt) : len(whole) - len(end)]
    ids = reply_ids(tokenizer, before, text)  # its white space is the template's
    end_id = to_sample(tokenizer, before, "", source).tokens[-1]  # it knows how a turn ends
    return Sample([*before, *ids, end_id], start=len(before), source=source)


@lru_cache(maxsize=8)
def _turn_end(tokenizer: PreTrainedTokenizerBase) -> str:
    """What the chat template writes behind an assistant's last message."""
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": _MARK}]
    return chat_text(tokenizer, messages, generation=False).rpartition(_MARK)[2]
