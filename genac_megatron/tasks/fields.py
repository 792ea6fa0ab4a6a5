"""What stands under a key of a row: text, messages, tools; read as meant, or refused by place, key, type."""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Iterator, Mapping
from decimal import Decimal
from typing import Any

from genac_megatron.errors import InputError

Message = dict[str, Any]  # role, content, and what else the chat template reads
Messages = tuple[Message, ...]
Tools = tuple[dict[str, Any], ...]  # JSON schemas of functions

MISSING = object()
SMALL = 1e-12  # numbers below are written with an exponent
EXACT = 2**53  # from here on a float does not hold every integer
KEYS = "set task.question_key and task.answer_key to the data's own names (a.b for b inside a)"
HELD_OUT = {
    *("heldout", "held-out", "held_out", "holdout", "hold-out", "hold_out", "test", "testing"),
    *("validation", "valid", "val", "dev", "development", "eval", "evaluation"),
}
TRAINED = {"train", "training"}


def look_up(row: object, key: str) -> Any:
    """The value under a key, or under a path of keys with dots (numbers count in lists); else MISSING.

    Keys may hold dots themselves. Objects and lists may be written as JSON text, as cells of CSV have them.
    """
    if isinstance(row, str) and row.lstrip()[:1] in ("{", "["):
        row = from_json(row)
    if isinstance(row, Mapping):
        if key in row:
            return row[key]
        at = key.rfind(".")
        while at > 0:
            head, rest = key[:at], key[at + 1 :]
            if head in row and (found := look_up(row[head], rest)) is not MISSING:
                return found
            at = key.rfind(".", 0, at)
        return MISSING
    head, dot, rest = key.partition(".")
    if isinstance(row, list) and head.isdecimal() and int(head) < len(row):
        return look_up(row[int(head)], rest) if dot else row[int(head)]
    return MISSING


def from_json(text: str) -> Any:
    """What a text says as JSON; None where it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def read_field(row: object, key: str, where: str, way_out: str = KEYS) -> str:
    """The text under `key` of a row: a number counts as text, and a list of one as what it holds.

    Integers that became floats (3.0) are integers again. Raises InputError naming `where`, key and type for
    what has no one meaning: null, booleans, NaN, times, several values, text that is no Unicode.
    """
    value = look_up(row, key)
    if value is MISSING:
        what = f"no text under {key!r} (there is: {_names(row)})"
        raise InputError(what, where=where, way_out=way_out)
    try:
        return text_of(value)
    except ValueError as error:
        hint = "" if not isinstance(value, Mapping) else f" (there is: {_names(value, f'{key}.')})"
        raise InputError(
            f"no text under {key!r}: it is {error}{hint}",
            where=where,
            way_out=f"write it as the text that is meant, or {way_out}",
        ) from None


def text_of(value: Any) -> str:
    """A value as the text that is meant. Raises ValueError that says what it is instead."""
    if isinstance(value, str):
        return _unicode(value.strip())
    if value is None:
        raise ValueError("null")
    if isinstance(value, bool):
        raise ValueError(f"{str(value).lower()}, a boolean, which says not how a response writes it")
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        return _number(value)
    if isinstance(value, Decimal):
        return _decimal(value)
    if isinstance(value, datetime.date) and not isinstance(value, datetime.datetime):
        return value.isoformat()
    if isinstance(value, list | tuple):
        if len(value) == 1:
            return text_of(value[0])
        raise ValueError(f"a list of {len(value)}, which says not whether one or all of them are asked for")
    if isinstance(value, Mapping):
        raise ValueError("an object")
    shown = f" {value}" if isinstance(value, datetime.datetime | datetime.time) else ""
    raise ValueError(f"a {type(value).__name__}{shown}, which could be written in several ways")


def _unicode(text: str) -> str:
    if not text:
        raise ValueError("empty")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        found = ord(text[error.start])
        raise ValueError(f"no Unicode text: half of a surrogate pair, \\u{found:04x}, stands alone") from None
    return text


def _number(value: float) -> str:
    if not math.isfinite(value):
        raise ValueError(f"{value}, which is no number")
    if not value.is_integer():
        return format(Decimal(repr(value)), "f") if abs(value) > SMALL else repr(value)
    if abs(value) >= EXACT:
        raise ValueError(f"{value!r}, a float that may have lost digits of an integer")
    return str(int(value))


def _decimal(value: Decimal) -> str:
    if not value.is_finite():
        raise ValueError(f"{value}, which is no number")
    whole = value.to_integral_value()
    return str(int(whole)) if whole == value else format(value.normalize(), "f")


def _names(row: object, before: str = "") -> str:
    if not isinstance(row, Mapping):
        return type(row).__name__
    return ", ".join(_paths(row, before)) or "nothing"


def _paths(row: Mapping[Any, Any], before: str) -> Iterator[str]:
    for key, value in row.items():
        if isinstance(value, Mapping) and value:
            yield from _paths(value, f"{before}{key}.")
        else:
            yield f"{before}{key}"


def is_heldout(row: object, key: str | None, where: str, *, strict: bool = True) -> bool:
    """Whether a row's own split, under `key`, is held out. None, or a row without one: it is trained on.

    Raises InputError, where `strict`, for a name that is neither of training nor of held-out data.
    """
    value = MISSING if key is None else look_up(row, key)
    if value is MISSING or value is None or value == "" or value != value:  # pandas' NaN
        return False
    name = value.strip().lower() if isinstance(value, str) else None
    if name in HELD_OUT or name in TRAINED or not strict:
        return name in HELD_OUT
    raise InputError(
        f"{key!r} is {value!r}: neither train nor one of {', '.join(sorted(HELD_OUT))}",
        where=where,
        way_out="rename it, or set task.split_key: null where it says something else",
    )


# --- chats ---------------------------------------------------------------------------------------

CALLING = "function_call"
SPEAKERS = {  # of ShareGPT's messages: whose role each has
    **dict.fromkeys(("human", "user", "prompter"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "model", "bot", CALLING), "assistant"),
    **dict.fromkeys(("observation", "tool", "function_response"), "tool"),
    "system": "system",
}
# A message's role by its other names. What is not here (tool, observation) is the chat template's to know.
ROLES = {name: role for name, role in SPEAKERS.items() if role in ("user", "assistant") and name != CALLING}
ROLES |= {name: name for name in ("system", "developer", "tool")}


def read_messages(value: Any, where: str, way_out: str) -> Messages:
    """Chat messages: each with a role, and text as its content (or parts of type text, which are joined).

    An assistant's message with tool_calls needs no content. What else a message has is kept for the chat
    template. ShareGPT's messages ({"from": "human", "value": "..."}) are read alike. Raises InputError naming
    `where`.
    """
    if not isinstance(value, list | tuple) or not value:
        raise InputError("no list of messages", where=where, way_out=way_out)
    given = [_from_sharegpt(each, number, where) for number, each in enumerate(value, 1)]
    return tuple(_message(each, number, where, way_out) for number, each in enumerate(given, 1))


def _from_sharegpt(given: Any, number: int, where: str) -> Any:
    """ShareGPT's message as one with role and content; others as they are, but for a role's other names."""
    if isinstance(given, Mapping) and isinstance(given.get("role"), str):
        role = ROLES.get(given["role"].strip().lower(), given["role"])
        message = {**given, "role": role}
        if "content" not in given and "value" in given:
            message["content"] = message.pop("value")
        return message
    if not isinstance(given, Mapping) or not {"from", "value"} <= given.keys():
        return given
    speaker = given["from"].strip().lower() if isinstance(given["from"], str) else None
    if speaker not in SPEAKERS:
        raise InputError(
            f"message {number} is from {given['from']!r}",
            where=where,
            way_out=f"ShareGPT's speakers are {', '.join(SPEAKERS)}",
        )
    message = {"role": SPEAKERS[speaker], "content": given["value"]}
    if speaker != CALLING:
        return message
    calls = from_json(given["value"]) if isinstance(given["value"], str) else given["value"]
    calls = calls if isinstance(calls, list) else [calls]
    if not all(isinstance(call, Mapping) and isinstance(call.get("name"), str) for call in calls):
        way_out = f'{CALLING}\'s value is {{"name": ..., "arguments": ...}} as JSON text'
        raise InputError(f"message {number} is no call of a function", where=where, way_out=way_out)
    return message | {
        "content": "",
        "tool_calls": [{"type": "function", "function": dict(call)} for call in calls],
    }


def _message(given: Any, number: int, where: str, way_out: str) -> Message:
    def wrong(what: str) -> InputError:
        return InputError(f"message {number}: {what}", where=where, way_out=way_out)

    if not isinstance(given, Mapping) or not isinstance(given.get("role"), str) or not given["role"]:
        raise wrong("a message lacks its role or content")
    message = {str(key): value for key, value in given.items() if value is not None}
    if isinstance(message.get("tool_calls"), list) and not message["tool_calls"]:
        del message["tool_calls"]
    content = message.get("content")
    if isinstance(content, list):
        kinds = [part.get("type") if isinstance(part, Mapping) else None for part in content]
        if any(
            kind != "text" or not isinstance(part.get("text"), str)
            for kind, part in zip(kinds, content, strict=True)
        ):
            raise wrong(f"its content has parts of type {kinds}, and text alone is read")
        message["content"] = content = "".join(part["text"] for part in content)
    if content is None and message["role"] == "assistant" and "tool_calls" in message:
        message["content"] = content = ""
    if not isinstance(content, str):
        raise wrong("a message lacks its role or content")
    try:
        json.dumps(message, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise wrong("no Unicode text: half of a surrogate pair stands alone") from None
    except (TypeError, ValueError) as error:
        raise wrong(f"it holds what no chat template reads: {error}") from None
    return message


def read_tools(row: object, key: str, where: str) -> Tools:
    """A row's tools: a list of JSON schemas of functions, or that list as JSON text; () where it has none.

    Raises InputError naming `where`.
    """
    value = look_up(row, key)
    if value is MISSING or value is None or value in ("", [], {}) or value != value:  # pandas' NaN
        return ()
    form = f'{key} is a list of {{"type": "function", "function": {{"name": ..., "parameters": ...}}}}'
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{key!r} is text, and no JSON: {error}", where=where, way_out=form) from error
    tools = [value] if isinstance(value, Mapping) else [] if value is None else value
    if isinstance(tools, list):
        tools = [from_json(tool) if isinstance(tool, str) else tool for tool in tools]
    if not isinstance(tools, list) or not all(isinstance(t, Mapping) and tool_name(t) for t in tools):
        raise InputError(f"{key!r} is no list of functions", where=where, way_out=form)
    try:
        json.dumps(tools, ensure_ascii=False).encode("utf-8")
    except (UnicodeEncodeError, TypeError, ValueError) as error:
        what = f"{key!r} holds what no chat template shows: {type(error).__name__}"
        raise InputError(what, where=where, way_out=form) from None
    return tuple(dict(tool) for tool in tools)


def tool_name(tool: Mapping[str, Any]) -> str:
    """The name of a tool's function; "" where it has none."""
    function = tool.get("function", tool)
    name = function.get("name") if isinstance(function, Mapping) else None
    return name if isinstance(name, str) else ""


def with_system(messages: Messages, system: str) -> Messages:
    """The messages after a system message, unless they have one of their own."""
    if not system or messages[0]["role"] in ("system", "developer"):
        return messages
    return ({"role": "system", "content": system}, *messages)


def shown_text(messages: Messages) -> str:
    """A conversation as plain text, as a critic or a judge is shown it: of one message, its content."""
    if len(messages) == 1:
        return str(messages[0]["content"])
    return "\n\n".join(f"{message['role']}: {_said(message)}" for message in messages)


def _said(message: Message) -> str:
    calls = message.get("tool_calls")
    said = [message["content"]] if message["content"] or not calls else []
    return "\n".join([*said, *(json.dumps(call, ensure_ascii=False) for call in calls or [])])
