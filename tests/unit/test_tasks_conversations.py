"""Conversations: what is read, and that every fault names its file and line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from genac_megatron.errors import EXIT_INPUT, InputError
from genac_megatron.tasks.conversations import read_conversations

TURNS = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]


def line(messages: Any, **more: Any) -> str:
    return json.dumps({"messages": messages, **more}, ensure_ascii=False)


def test_conversations_are_read_in_order(tmp_path: Path) -> None:
    system = {"role": "system", "content": "be brief"}
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join([line(TURNS), "", line([system, *TURNS], source="x"), ""]), encoding="utf-8")
    assert [chat.messages for chat in read_conversations(path)] == [tuple(TURNS), (system, *TURNS)]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "prompter", "content": "hi"}, TURNS[1]]},
        {"messages": [{"role": "User", "content": "hi"}, {"role": "Assistant", "content": "ho"}]},
        {"messages": [{"role": "human", "content": "hi"}, {"role": "gpt", "content": "ho"}]},
        {"conversations": [{"role": "user", "value": "hi"}, {"role": "assistant", "value": "ho"}]},
        {"conversations": [{"from": "human", "value": "hi", "weight": None}, {"from": "gpt", "value": "ho"}]},
        {"prompt": "hi", "prompt_id": "0", "messages": TURNS},
    ],
)
def test_roles_by_their_other_names(tmp_path: Path, row: dict[str, Any]) -> None:
    """As in OpenAssistant's, ShareGPT's and UltraChat's rows."""
    (tmp_path / "data.jsonl").write_text(json.dumps(row))
    [chat] = read_conversations(tmp_path / "data.jsonl")
    assert [(m["role"], m["content"]) for m in chat.messages] == [("user", "hi"), ("assistant", "ho")]


@pytest.mark.parametrize("key", ["system", "system_prompt"])
def test_a_rows_own_system_message(tmp_path: Path, key: str) -> None:
    """OpenHermes's is called system_prompt, and is mostly null."""
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(line(TURNS, **{key: system}) for system in ("be brief", None)))
    system = {"role": "system", "content": "be brief"}
    assert [chat.messages for chat in read_conversations(path)] == [(system, *TURNS), tuple(TURNS)]


@pytest.mark.parametrize(
    "row",
    [
        {"chosen": "\n\nHuman: a?\n\nAssistant: b", "rejected": "\n\nHuman: a?\n\nAssistant: c"},
        {"instruction": "a?", "input": "", "output": "b"},
        {"prompt": "a?", "completion": "b"},
        {"id": "0", "data": ["a?", "b"]},
    ],
)
def test_rows_of_other_kinds_are_refused_by_what_they_have(tmp_path: Path, row: dict[str, Any]) -> None:
    (tmp_path / "data.jsonl").write_text(json.dumps(row))
    with pytest.raises(InputError, match=rf"data.jsonl:1: .*there is: {', '.join(row)}\)") as caught:
        read_conversations(tmp_path / "data.jsonl")
    assert caught.value.way_out


@pytest.mark.parametrize("content", ["Grüße\u2028zweite Zeile", "a\u0085b", "tab\\t ok", "\x1c"])
def test_a_line_ends_where_json_lines_end(tmp_path: Path, content: str) -> None:
    """U+2028 and the like may stand in a JSON string; they end no line of the file."""
    turns = [TURNS[0], {"role": "assistant", "content": content}]
    path = tmp_path / "data.jsonl"
    path.write_text(line(TURNS) + "\n" + line(turns) + "\r\n", encoding="utf-8")
    assert [chat.messages for chat in read_conversations(path)] == [tuple(TURNS), tuple(turns)]


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ('{"messages": [', "not JSON"),
        ("[]", "a list, not an object"),
        ('{"prompt": "x"}', "no list of at least two messages"),
        (line(TURNS[1:]), "no list of at least two messages"),
        (line("hello"), "no list of at least two messages"),
        (line([TURNS[0], {"role": "assistant"}]), "a message lacks its role or content"),
        (line([TURNS[0], {"role": "assistant", "content": 7}]), "a message lacks its role or content"),
        (line(["hi", TURNS[1]]), "a message lacks its role or content"),
        (line([TURNS[0], {"role": "assistant", "content": None}]), "message 2: a message lacks"),
        (line([{"role": "user", "content": [{"type": "image_url"}]}, TURNS[1]]), "text alone is read"),
        (
            '{"messages": [{"role": "user", "content": "\\ud83d"}, {"role": "assistant"}]}',
            "message 1: no Uni",
        ),
        (line(TURNS, tools=[{"name": ""}]), "'tools' is no list of functions"),
        (line(TURNS, tools="[{"), "'tools' is text, and no JSON"),
        ("[" * 100_000, "nested too deeply"),
        (line([*TURNS, TURNS[0]]), "the last message is not the assistant's"),
    ],
)
def test_a_fault_names_file_and_line(tmp_path: Path, bad: str, words: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(f"{line(TURNS)}\n\n{bad}\n{line(TURNS)}\n", encoding="utf-8")
    with pytest.raises(InputError) as caught:
        read_conversations(path)
    assert str(caught.value).startswith(f"{path}:3: ")
    assert words in str(caught.value)
    shown = '"function": {"name"' if "'tools'" in words else '{"messages":'
    assert shown in str(caught.value), "the way out shows the form"
    assert caught.value.exit_code == EXIT_INPUT == 2


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere\.jsonl: cannot be read"):
        read_conversations(tmp_path / "nowhere.jsonl")
    binary = tmp_path / "binary.jsonl"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match=r"binary\.jsonl: cannot be read: it is in UTF-16"):
        read_conversations(binary)


def test_tools_calls_and_parts_are_kept_for_the_template(tmp_path: Path) -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    tool = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "1+"}, {"type": "text", "text": "1?"}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "2", "tool_call_id": "x"},
        {"role": "assistant", "content": "2", "tool_calls": []},
    ]
    path = tmp_path / "data.jsonl"
    path.write_text("\ufeff" + line(messages, tools=[tool]) + "\n" + line(messages, tools=json.dumps([tool])))
    first, second = read_conversations(path)
    assert first.tools == second.tools == (tool,)
    assert second.where == f"{path}:2"
    assert first.messages == (
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "2", "tool_call_id": "x"},
        {"role": "assistant", "content": "2"},
    )


def test_an_empty_file_is_no_data(tmp_path: Path) -> None:
    path = tmp_path / "empty.jsonl"
    path.write_text("\n \n")
    with pytest.raises(InputError, match=r"empty\.jsonl: no conversation in it"):
        read_conversations(path)


def test_sharegpts_form_is_read_alike(tmp_path: Path) -> None:
    said = {"from": "gpt", "value": "ho"}
    call = {"from": "function_call", "value": json.dumps({"name": "add", "arguments": {"a": 2}})}
    rows = [
        {"conversations": [{"from": "human", "value": "hi"}, said], "system": "brief"},
        {"conversations": json.dumps(TURNS)},
        {
            "conversations": [
                {"from": "human", "value": "hi"},
                call,
                {"from": "observation", "value": "2"},
                said,
            ]
        },
    ]
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    first, second, third = (chat.messages for chat in read_conversations(path))
    assert first == ({"role": "system", "content": "brief"}, *TURNS)
    assert second == tuple(TURNS)
    assert [message["role"] for message in third] == ["user", "assistant", "tool", "assistant"]
    assert third[1]["tool_calls"] == [
        {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}
    ]


@pytest.mark.parametrize(
    ("turns", "words"),
    [
        ([{"from": "narrator", "value": "x"}, {"from": "gpt", "value": "y"}], "message 1 is from 'narrator'"),
        (
            [{"from": "human", "value": "x"}, {"from": "function_call", "value": "add"}],
            "no call of a function",
        ),
        ([{"from": "human", "value": 3}, {"from": "gpt", "value": "y"}], "message 1: a message lacks"),
        ([{"from": "gpt", "value": "y"}, {"from": "human", "value": "x"}], "not the assistant's"),
    ],
)
def test_sharegpts_faults_are_named(tmp_path: Path, turns: Any, words: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"conversations": turns}))
    with pytest.raises(InputError, match=words) as caught:
        read_conversations(path)
    assert f"{path}:1" in str(caught.value)
    assert caught.value.way_out


def test_rows_of_another_form_say_what_is_there(tmp_path: Path) -> None:
    path = tmp_path / "alpaca.jsonl"
    path.write_text(json.dumps({"instruction": "hi", "input": "", "output": "ho"}))
    with pytest.raises(InputError, match="there is: instruction, input, output"):
        read_conversations(path)
