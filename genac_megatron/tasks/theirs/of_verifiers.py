"""Environments of verifiers (main.py): of its class `Environment` with rows, which 0.2 and 0.3 have.

The package's own loop runs a conversation (`Environment.run_rollout`: its setup, stop conditions, clean-up,
rubric), with a client whose model is the actor: it waits until somebody gives it the next turn.
"""

from __future__ import annotations

import asyncio
import hashlib
import importlib.metadata
import importlib.util
import logging
import time
from collections.abc import Iterable, Mapping
from typing import Any

from __main__ import Refused  # main.py

MODEL = "actor"


class Loaded:
    """An environment with its rows."""

    def __init__(self, environment: Any) -> None:
        self.environment, self.loop = environment, asyncio.new_event_loop()
        self.types = importlib.import_module("verifiers.types")
        self.client = _client_of(self.types)
        self.failed = Failed()
        self._rows = {"train": environment.build_dataset(), "heldout": environment.build_eval_dataset()}

    def rows(self) -> dict[str, Any]:
        """What each row begins with, and the most turns there are (None: no limit, or several ones)."""
        found: dict[str, Any] = {}
        for split, rows in self._rows.items():
            found[split] = [self._row(split, number) for number in range(len(rows or ()))]
        turns = getattr(self.environment, "max_turns", -1)
        found["turns"] = turns if turns > 0 else None
        return {**found, "version": importlib.metadata.version("verifiers")}

    def _row(self, split: str, number: int) -> dict[str, Any]:
        row = self._rows[split][number]
        prompt = row.get("prompt")
        if not isinstance(prompt, list):
            raise Refused(
                f"row {number} ({split}) has a prompt that is a {type(prompt).__name__}, not chat messages"
            )
        info = row.get("info")
        tools = info.get("tool_defs") if isinstance(info, Mapping) else None
        return {
            "messages": [_plain(message) for message in prompt],
            "tools": [_schema(tool) for tool in tools or self.environment.tool_defs or ()],
            "answer": str(row.get("answer") or ""),
            "row": {"split": split, "number": number, "holds": _digest(row)},
            "same": _digest({key: value for key, value in row.items() if key != "example_id"}),
        }

    def begin(self, row: dict[str, Any]) -> Episode:
        held = self._rows[row["split"]][row["number"]]
        if _digest(held) != row["holds"]:
            raise Refused(
                f"has other rows each time it is loaded (row {row['number']})",
                "have it draw them by a seed of its own",
            )
        return Episode(self, dict(held))


class Failed(logging.Handler):
    """What rubrics could not do: the package notes it, and goes on with a reward of 0."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.words: list[str] = []
        logging.getLogger("verifiers").addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        if ".rubrics." in record.name:
            self.words.append(record.getMessage())

    def taken(self) -> list[str]:
        words, self.words = self.words, []
        return words


class Episode:
    """One conversation: the package's rollout, up to where it waits for the actor's turn."""

    def __init__(self, loaded: Loaded, row: dict[str, Any]) -> None:
        self._loaded, self._row = loaded, row
        self._asked: asyncio.Queue[Any] = asyncio.Queue()
        self._said: asyncio.Queue[Any] = asyncio.Queue()
        self._shown: list[Any] = []  # all messages so far, the actor's among them
        self._run: asyncio.Task[Any] = loaded.loop.create_task(self._rollout())
        loaded.failed.taken()
        if (ended := self._wait()) is not None:
            raise Refused(f"ended a conversation before its first turn ({ended})")

    async def _rollout(self) -> Any:
        client = self._loaded.client(self._asked, self._said)
        return await self._loaded.environment.run_rollout(self._row, client, MODEL, {})

    def _wait(self) -> Any:
        """What the rollout has come to, once it is over; None: it waits for a turn."""
        loop = self._loaded.loop

        async def first() -> Any:
            asked = loop.create_task(self._asked.get())
            await asyncio.wait({asked, self._run}, return_when=asyncio.FIRST_COMPLETED)
            if asked.done():
                return asked.result()
            asked.cancel()
            return None

        prompt = loop.run_until_complete(first())
        if prompt is None:
            return self._run.result()
        self._new = self._since(prompt)
        return None

    def _since(self, prompt: list[Any]) -> list[Any]:
        """The messages behind those that were there. Raises Refused where these are others now."""
        before, now = [_plain(one) for one in self._shown], [_plain(one) for one in prompt]
        if now[: len(before)] != before:
            raise Refused("shows earlier messages otherwise later on, and here a conversation only grows")
        self._shown = list(prompt)
        return now[len(before) :]

    def step(self, request: dict[str, Any]) -> dict[str, Any]:
        calls = [self._loaded.types.ToolCall(**call) for call in request["calls"]] or None
        turn = self._loaded.types.AssistantMessage(content=request["content"], tool_calls=calls)
        self._shown.append(turn)
        self._said.put_nowait(turn)
        over = self._wait()
        if words := self._loaded.failed.taken():
            raise RuntimeError(f"its rubric failed: {words[0]}")
        if over is None:
            return {"observation": self._new}
        return self._end(over)

    def _end(self, over: Any) -> dict[str, Any]:
        if over.get("error"):
            raise RuntimeError(f"it gave up: {over['error']}")
        messages = [_plain(message) for message in over["completion"] or ()]
        own = [n for n, message in enumerate(messages) if message["role"] == "assistant"]
        shown = messages[own[-1] + 1 :] if own else []
        parts = {name: value for name, value in (over["metrics"] or {}).items() if value is not None}
        return {"observation": shown, "done": True, "reward": over["reward"], "parts": parts}

    def close(self) -> None:
        """Let the environment clean up after itself."""
        if not self._run.done():
            self._run.cancel()
            self._loaded.loop.run_until_complete(asyncio.wait({self._run}))


def _client_of(types: Any) -> Any:
    """The class of a client whose answers are given from outside."""
    client: Any = importlib.import_module("verifiers.clients.client").Client

    class Actor(client):  # type: ignore[misc]
        # Parts of the package's own `get_response`, which this one's stands for
        setup_client = to_native_tool = to_native_prompt = get_native_response = None
        raise_from_native_response = from_native_response = None

        def __init__(self, asked: asyncio.Queue[Any], said: asyncio.Queue[Any]) -> None:
            super().__init__(None)
            self._asked, self._said = asked, said

        async def get_response(self, prompt: Any, model: str, *_: Any, **__: Any) -> Any:
            self._asked.put_nowait(list(prompt))
            turn = await self._said.get()
            finish = "tool_calls" if turn.tool_calls else "stop"
            message = types.ResponseMessage(
                content=turn.content, tool_calls=turn.tool_calls, finish_reason=finish, is_truncated=False
            )
            now = int(time.time())
            return types.Response(id=MODEL, created=now, model=model, usage=None, message=message)

        async def close(self) -> None: ...

    return Actor


def load(request: dict[str, Any]) -> Loaded:
    """The environment. Raises Refused."""
    try:
        import verifiers as vf
    except ModuleNotFoundError as error:
        if error.name != "verifiers":
            raise
        raise Refused("verifiers is not installed there") from None
    name, args = request["id"], request["args"]
    try:
        base: Any = vf.Environment
    except AttributeError:
        version = importlib.metadata.version("verifiers")
        raise Refused(f"verifiers {version} has another design", "install verifiers>=0.2,<0.4") from None
    own = getattr(vf, name, None) if name.isidentifier() else None
    if isinstance(own, type) and issubclass(own, base):
        made = own(**args)
    else:
        module = name.replace("-", "_").split("/")[-1]
        if not module.isidentifier() or importlib.util.find_spec(module) is None:
            raise Refused(
                f"there is no environment {name!r}: no module {module!r} there",
                "install its package under that interpreter, name its folder in task.path, or name a class "
                "of verifiers (ReasoningGymEnv)",
            )
        try:
            made = vf.load_environment(name, **args)
        except (RuntimeError, ValueError) as error:
            raise error.__cause__ or error from None  # which is what it raised
    for one in (made, *getattr(made, "envs", ())):
        if one.requires_group_rollouts:
            raise Refused(
                "its rubric judges the responses of a group together, and conversations here are judged one "
                "by one",
                "give it a rubric whose functions see one response",
            )
    return Loaded(made)


def _plain(message: Any) -> dict[str, Any]:
    """A message as its role and text. Raises Refused where it has images or sound."""
    read = message.get if isinstance(message, Mapping) else lambda key: getattr(message, key, None)
    role, content = read("role"), read("content")
    if isinstance(content, Iterable) and not isinstance(content, str):
        content = "".join(map(_text, content))
    return {"role": role, "content": content or ""}


def _text(part: Any) -> str:
    read = part.get if isinstance(part, Mapping) else lambda key: getattr(part, key, None)
    if read("type") != "text":
        raise Refused(f"shows a part of the type {read('type')!r}, and the actor reads text alone")
    return str(read("text"))


def _schema(tool: Any) -> dict[str, Any]:
    read = tool.get if isinstance(tool, Mapping) else lambda key: getattr(tool, key, None)
    function = {"name": read("name"), "description": read("description"), "parameters": read("parameters")}
    return {"type": "function", "function": function}


def _digest(row: Mapping[str, Any]) -> str:
    return hashlib.sha256(repr(sorted(row.items())).encode("utf-8", "replace")).hexdigest()[:16]
