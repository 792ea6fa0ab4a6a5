"""Conversations for supervised fine-tuning: one {"messages": [...]} object a line, perhaps with "tools".

ShareGPT's form, {"conversations": [{"from": "human", "value": "..."}, ...], "system": "..."}, is read alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from genac_megatron.errors import InputError
from genac_megatron.tasks.fields import Messages, Tools, from_json, read_messages, read_tools, with_system
from genac_megatron.tasks.rows import Row, read_rows

FORM = 'each line is {"messages": [{"role": "user", "content": "..."}, ...]}'
MESSAGES_KEYS, SYSTEM_KEYS, TOOLS_KEY = ("messages", "conversations"), ("system", "system_prompt"), "tools"


@dataclass(frozen=True)
class Conversation:
    """Chat messages that end with the assistant's, and the tools that its template shows."""

    messages: Messages
    tools: Tools = ()
    where: str = ""  # file:line


def read_conversations(path: Path) -> list[Conversation]:
    """The file's conversations; each ends with the assistant's message.

    Raises InputError naming file and line, or where there is none.
    """
    found = [_conversation(row, where) for where, row in read_rows(path, FORM)]
    if not found:
        raise InputError("no conversation in it", where=str(path), way_out=FORM)
    return found


def _conversation(row: Row, where: str) -> Conversation:
    given = next((row[key] for key in MESSAGES_KEYS if row.get(key) is not None), None)
    if isinstance(given, str):  # as cells of CSV have it
        given = from_json(given)
    if not isinstance(given, list) or len(given) < 2:
        there = "" if given is not None else f" (there is: {', '.join(row) or 'nothing'})"
        raise InputError(f"no list of at least two messages{there}", where=where, way_out=FORM)
    messages = read_messages(given, where, FORM)
    for key in SYSTEM_KEYS:
        if isinstance(system := row.get(key), str):
            messages = with_system(messages, system.strip())
    if messages[-1]["role"] != "assistant":
        raise InputError("the last message is not the assistant's", where=where, way_out=FORM)
    return Conversation(messages, read_tools(row, TOOLS_KEY, where), where)
