"""Conversations as samples: which turns are learnt, after which prompt, what of tools is shown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from genac_megatron.errors import InputError
from genac_megatron.recipe.schema import SftStage
from genac_megatron.records import Sample
from genac_megatron.stages.sft_chats import chat_samples, used_conversations
from genac_megatron.tasks.conversations import Conversation
from genac_megatron.tasks.tokenizer import load_tokenizer

TINY = load_tokenizer("builtin:tiny")
CALLING = load_tokenizer("builtin:tiny")
CALLING.chat_template = (
    "{% if tools %}<|im_start|>tools\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}call {{ c.function | tojson }}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 2}}}
LONG = (
    {"role": "user", "content": "one?"},
    {"role": "assistant", "content": "1"},
    {"role": "user", "content": "two?"},
    {"role": "assistant", "content": "2 <|im_end|>"},
)


def stage(**keys: Any) -> SftStage:
    return SftStage.model_validate({"kind": "sft", "role": "actor", "data": "jsonl", **keys})


def halves(sample: Sample, tokenizer: Any = TINY) -> tuple[str, str]:
    return tokenizer.decode(sample.tokens[: sample.start]), tokenizer.decode(sample.tokens[sample.start :])


def test_the_last_turn_is_learnt_or_every_turn_after_its_own_prompt() -> None:
    (last,) = chat_samples(TINY, Conversation(LONG), stage())
    every = chat_samples(TINY, Conversation(LONG), stage(turns="all"))
    assert len(every) == 2
    assert every[1].tokens == last.tokens
    prompt, answer = halves(every[0])
    assert prompt == "<|im_start|>user\none?<|im_end|>\n<|im_start|>assistant\n"
    assert answer == "1<|im_end|>"
    assert halves(last)[0].endswith("1<|im_end|>\n<|im_start|>user\ntwo?<|im_end|>\n<|im_start|>assistant\n")
    ends = [n for n, token in enumerate(last.tokens[last.start :]) if token == TINY.eos_token_id]
    assert ends == [last.trained - 1], "a turn end in the text is text"
    assert every[0].source == every[1].source, "turns of a conversation are held out together"


def test_a_system_message_of_the_stage_goes_where_there_is_none() -> None:
    own = ({"role": "system", "content": "mine"}, *LONG[:2])
    assert halves(chat_samples(TINY, Conversation(LONG), stage(system="brief"))[0])[0].startswith(
        "<|im_start|>system\nbrief<|im_end|>\n"
    )
    assert halves(chat_samples(TINY, Conversation(own), stage(system="brief"))[0])[0].startswith(
        "<|im_start|>system\nmine<|im_end|>\n<|im_start|>user"
    )


def test_a_greeting_that_answers_nothing_is_not_learnt() -> None:
    greeting = ({"role": "assistant", "content": "hello"}, *LONG[:2])
    (only,) = chat_samples(TINY, Conversation(greeting), stage(turns="all"))
    assert halves(only)[1] == "1<|im_end|>"


def test_tools_are_shown_and_calls_are_learnt_as_the_template_writes_them() -> None:
    messages = (
        {"role": "user", "content": "1+2?"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "3"},
        {"role": "assistant", "content": "3"},
    )
    first, second = chat_samples(CALLING, Conversation(messages, (TOOL,)), stage(turns="all"))
    prompt, call = halves(first, CALLING)
    assert prompt.startswith("<|im_start|>tools\n[{")
    assert prompt.endswith("1+2?<|im_end|>\n<|im_start|>assistant\n")
    assert call.startswith('call {"name": "add"')
    assert call.endswith("}<|im_end|>")
    assert call.count("<|im_end|>") == 1
    assert halves(second, CALLING)[1] == "3<|im_end|>"
    assert call.removesuffix("<|im_end|>") in halves(second, CALLING)[0]


@pytest.mark.parametrize(
    ("messages", "tools", "tokenizer", "what"),
    [
        (({"role": "user", "content": "x"}, {"role": "assistant", "content": "", "tool_calls": [CALL]}), (),
         TINY, "leaves out .* the call of add"),
        (LONG, (TOOL,), TINY, "leaves out .* the tool add"),
        (({"role": "user", "content": "x"},
          {"role": "assistant", "content": "<|im_end|>", "tool_calls": [CALL]}), (),
         CALLING, "message 2 with tool calls holds the special token"),
    ],
)  # fmt: skip
def test_what_cannot_be_shown_is_named_by_line(messages: Any, tools: Any, tokenizer: Any, what: str) -> None:
    with pytest.raises(InputError, match=rf"data.jsonl:3: .*{what}"):
        chat_samples(tokenizer, Conversation(messages, tools, "data.jsonl:3"), stage())


def test_a_users_file_is_read_whole_unless_the_recipe_says_otherwise(tmp_path: Path) -> None:
    path = tmp_path / "many.jsonl"
    line = json.dumps({"messages": LONG[:2]}) + "\n"
    path.write_text(line * 2500)
    used, count = used_conversations(stage(path=str(path)))
    assert (len(used), count) == (2500, 2500)
    used, count = used_conversations(stage(path=str(path), size=7))
    assert (len(used), count) == (7, 2500)
    assert stage().made == 2000
