"""Any OpenAI-compatible chat endpoint, asked over httpx from threads (no torch).

Trace teachers, judges of rubrics and benchmarks share it. A key is read from an environment variable, and
never enters a message.
"""

from __future__ import annotations

import os
import random
import re
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import httpx

from genac_megatron.errors import InputError
from genac_megatron.serving.transport import no_reply

Messages = Sequence[dict[str, str]]
RETRIED = (408, 409, 425, 429, 500, 502, 503, 504)
ENDING = (401, 403, 404)  # the key or the address: the next request would meet the same
_NO_MODEL = re.compile(
    r"model\b.{0,120}\bnot (exist|found)|model_not_found|invalid_model|unknown model", re.I
)
FIRST_WAIT_S = 0.5
LONGEST_WAIT_S = 30.0
CONNECT_S = 30.0
SHOWN = 200  # characters of what an endpoint says


@dataclass(frozen=True)
class Answer:
    """The first choice of a chat completion. text: None where the model gave none (hidden reasoning)."""

    text: str | None
    finish: str  # "stop", "length", or whatever else the endpoint says
    tokens: int  # of the completion, hidden ones among them; 0 where the endpoint does not count them
    reasoning: str = ""  # what it says of its reasoning apart from the text
    read: int = 0  # tokens of the chat


@dataclass(frozen=True)
class Refusal:
    """What the endpoint says to one request that it will never answer: a content filter, too long a chat."""

    status: int
    said: str

    def __str__(self) -> str:
        return f"status {self.status}: {self.said}"


@dataclass(frozen=True)
class Unanswered:
    """Why the last of a request's attempts had no answer; another time it may have one."""

    cause: str

    def __str__(self) -> str:
        return self.cause


@dataclass(frozen=True)
class Names:
    """What the user calls an endpoint and its settings."""

    block: str
    url: str
    model: str
    api_key_env: str

    @classmethod
    def of(cls, block: str) -> Names:
        """Those of a recipe's block, for example task.judge."""
        return cls(block, f"{block}.url", f"{block}.model", f"{block}.api_key_env")


Reply = Answer | Refusal | Unanswered


class ChatEndpoint:
    """One model behind an endpoint. For messages: `who` it is, "teacher", and what its settings are called.

    Timeouts, broken connections, 408/409/425/429 and 5xx are tried again, up to `attempts` in all, with
    doubling waits (or what Retry-After asks). Methods may be called from several threads.
    """

    def __init__(
        self,
        url: str | None,
        model: str | None,
        *,
        api_key_env: str | None = None,
        timeout_s: float = 120.0,
        concurrency: int = 8,
        attempts: int = 4,
        who: str = "endpoint",
        names: Names | None = None,
    ) -> None:
        """Raises InputError where url or model is missing or wrong, or the key's variable is not set."""
        self.who, self.names = who, names or Names.of(who)
        self.base = url or ""
        self.url, headers = self._address(url, model, api_key_env)
        self.model, self.concurrency, self.attempts = model, concurrency, attempts
        self.timeout_s, self.connect_s = timeout_s, min(CONNECT_S, timeout_s)
        try:
            self._client = httpx.Client(
                headers=headers,
                timeout=httpx.Timeout(timeout_s, connect=self.connect_s),
                limits=httpx.Limits(max_connections=concurrency),
            )
        except (ImportError, ValueError) as error:  # of a proxy that it cannot use
            raise InputError(
                f"the environment's proxy cannot be used: {error}",
                where="HTTP_PROXY, HTTPS_PROXY, ALL_PROXY",
                way_out="unset it, or name the endpoint's host in NO_PROXY",
            ) from error

    def ask(
        self,
        messages: Messages,
        max_tokens: int,
        temperature: float | None = 1.0,
        *,
        limit_name: str = "max_tokens",
        **more: object,
    ) -> Reply:
        """The answer to one chat; Unanswered after `attempts` failures.

        temperature: None: not sent. limit_name: what the endpoint calls max_tokens. more: other fields of the
        request.

        Refusal: the endpoint will not answer this chat (4xx), others it may. Raises InputError where the
        address, the model or the key is refused.
        """
        body = {
            "model": self.model,
            "messages": list(messages),
            limit_name: max_tokens,
            **({} if temperature is None else {"temperature": temperature}),
            **more,
        }
        wait, failed = FIRST_WAIT_S, Unanswered("it was not asked")
        for attempt in range(self.attempts):
            response = self._post(body)
            if isinstance(response, Unanswered):
                failed = response
            elif response.is_success:
                return self._answer(response)
            elif response.status_code not in RETRIED:
                return self._refusal(response)
            else:
                failed = Unanswered(f"status {response.status_code}: {response.text[:SHOWN]}")
            if attempt + 1 < self.attempts:
                pause = wait * (1 + random.random())  # jitter: refused ones come back apart
                time.sleep(min(_retry_after(response) or pause, LONGEST_WAIT_S))
                wait *= 2
        return failed

    def ask_all(
        self,
        batch: Sequence[Messages],
        max_tokens: int,
        temperature: float | None = 1.0,
        *,
        limit_name: str = "max_tokens",
        **more: object,
    ) -> list[Reply]:
        """`ask` for each chat, in order, at most `concurrency` open at once; an InputError ends them all."""
        ended = threading.Event()

        def one(messages: Messages) -> Reply:
            if ended.is_set():
                return Unanswered("it was not asked")
            try:
                return self.ask(messages, max_tokens, temperature, limit_name=limit_name, **more)
            except InputError:
                ended.set()
                raise

        with ThreadPoolExecutor(self.concurrency, thread_name_prefix=self.who) as pool:
            return list(pool.map(one, batch))

    def refused_all(self, count: int, last: Refusal) -> InputError:
        """What to raise where each of `count` requests was refused: then it is not the requests' fault."""
        return InputError(
            f"the {self.who} refused each of {count} requests, the last with {last}",
            where=self.url,
            way_out=f"it says why; check {self.names.url} and {self.names.model}",
        )

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def _address(
        self, url: str | None, model: str | None, api_key_env: str | None
    ) -> tuple[str, dict[str, str]]:
        names = self.names
        if not url or not model:
            raise InputError(
                f"an endpoint {self.who} needs url and model",
                where=names.block,
                way_out=f"set {names.url} and {names.model}",
            )
        check_address(url, names.url)
        headers = {}
        if api_key_env is not None:
            headers["Authorization"] = f"Bearer {read_key(api_key_env, names.api_key_env)}"
        return f"{url.rstrip('/')}/chat/completions", headers

    def _post(self, body: dict[str, Any]) -> httpx.Response | Unanswered:
        """The response, or why none came."""
        try:
            return self._client.post(self.url, json=body)
        except httpx.RequestError as error:
            return Unanswered(no_reply(error, self.timeout_s, self.connect_s))

    def _refusal(self, response: httpx.Response) -> Refusal:
        """That this request is refused. Raises InputError where others would be too."""
        refusal = Refusal(response.status_code, response.text[:SHOWN])
        if response.is_client_error and refusal.status not in ENDING and not _NO_MODEL.search(refusal.said):
            return refusal
        raise InputError(
            f"the {self.who} refused with {refusal}",
            where=self.url,
            way_out=f"check {self.names.url}, {self.names.model} and the key",
        )

    def _answer(self, response: httpx.Response) -> Answer:
        try:
            body = response.json()
            choice = body["choices"][0]
            message, usage = choice["message"], body.get("usage") or {}
            content = message["content"]
            reasoning = message.get("reasoning_content") or message.get("reasoning")
            tokens, read = (int(usage.get(f"{what}_tokens") or 0) for what in ("completion", "prompt"))
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise InputError(
                f"the {self.who}'s answer is not an OpenAI chat completion",
                where=self.url,
                way_out=f"{self.names.url} must be the base, for example http://host:port/v1",
            ) from error
        text = content if isinstance(content, str) else None
        told = reasoning if isinstance(reasoning, str) else ""
        return Answer(text, str(choice.get("finish_reason") or "stop"), tokens, told, read)


def read_key(variable: str, setting: str) -> str:
    """The key in an environment variable. Raises InputError, naming the setting, where there is none."""
    key = os.environ.get(variable, "").strip()
    if not key:
        raise InputError(
            f"the environment variable {variable} is not set",
            where=setting,
            way_out=f"export it, or leave {setting} out",
        )
    if not (key.isascii() and key.isprintable()):
        raise InputError(
            f"the environment variable {variable} holds characters that no HTTP header can",
            where=setting,
            way_out="export the key alone, in one line",
        )
    return key


def check_address(url: str, name: str) -> None:
    """Raise InputError, naming the setting, where nothing could be asked at `url`."""
    try:
        parsed = httpx.URL(url)
        reason = (
            "" if parsed.scheme in ("http", "https") and parsed.host else "no http:// or https:// and host"
        )
    except (httpx.InvalidURL, UnicodeError) as error:
        reason = str(error)
    if reason:
        raise InputError(
            f"not an http address: {reason}",
            where=url,
            way_out=f"set {name} to the base, for example http://127.0.0.1:30000/v1",
        )


def _retry_after(response: httpx.Response | Unanswered) -> float | None:
    """Seconds that a Retry-After header asks for; None where it is absent or a date."""
    if isinstance(response, Unanswered):
        return None
    try:
        return max(0.0, float(response.headers["retry-after"]))
    except (KeyError, ValueError):
        return None
