"""Conversations for supervised fine-tuning: one {"messages": [...]} object a line."""

from __future__ import annotations

import json
from pathlib import Path

from genac_megatron.errors import InputError

Messages = tuple[dict[str, str], ...]
FORM = 'each line is {"messages": [{"role": "user", "content": "..."}, ...]}'


def read_conversations(path: Path) -> list[Messages]:
    """The file's conversations; each ends with the assistant's message.

    Raises InputError naming file and line, or where there is none.
    """
    try:
        # Not splitlines(), which also cuts at U+2028 and others that a JSON string may hold.
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot be read: {error}", where=str(path)) from error
    found = [_conversation(line, f"{path}:{n}") for n, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise InputError("no conversation in it", where=str(path), way_out=FORM)
    return found


def _conversation(line: str, where: str) -> Messages:
    try:
        data = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"not JSON: {error}", where=where, way_out=FORM) from error
    messages = data.get("messages") if isinstance(data, dict) else None
    if not isinstance(messages, list) or len(messages) < 2:
        raise InputError("no list of at least two messages", where=where, way_out=FORM)
    for message in messages:
        if not isinstance(message, dict) or not all(
            isinstance(message.get(k), str) for k in ("role", "content")
        ):
            raise InputError("a message lacks its role or content", where=where, way_out=FORM)
    if messages[-1]["role"] != "assistant":
        raise InputError("the last message is not the assistant's", where=where, way_out=FORM)
    return tuple({"role": m["role"], "content": m["content"]} for m in messages)
