"""Any OpenAI-compatible chat endpoint, asked over httpx from threads (no torch).

Trace teachers, judges of rubrics and benchmarks share it. A key is read from an environment variable, and
never enters a message.
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import httpx

from genac_megatron.errors import InputError

Messages = Sequence[dict[str, str]]
RETRIED = (408, 409, 425, 429, 500, 502, 503, 504)
FIRST_WAIT_S = 0.5
LONGEST_WAIT_S = 30.0


@dataclass(frozen=True)
class Answer:
    """The first choice of a chat completion. text: None where the model gave none (hidden reasoning)."""

    text: str | None
    finish: str  # "stop", "length", or whatever else the endpoint says
    tokens: int  # of the completion; 0 where the endpoint does not count them


class ChatEndpoint:
    """One model behind an endpoint. `who` and `where` are for messages: "teacher", "task.judge".

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
        where: str = "endpoint",
    ) -> None:
        """Raises InputError where url or model is missing, or the key's variable is not set."""
        self.who, self.where = who, where
        self.url, headers = self._address(url, model, api_key_env)
        self.model, self.concurrency, self.attempts = model, concurrency, attempts
        limits = httpx.Limits(max_connections=concurrency)
        self._client = httpx.Client(headers=headers, timeout=timeout_s, limits=limits)

    def ask(
        self, messages: Messages, max_tokens: int, temperature: float = 1.0, **more: object
    ) -> Answer | None:
        """The answer to one chat; None after `attempts` failures. `more`: further fields of the request.

        Raises InputError where the address, the model or the key is refused.
        """
        body = {
            "model": self.model,
            "messages": list(messages),
            "max_tokens": max_tokens,
            "temperature": temperature,
            **more,
        }
        wait = FIRST_WAIT_S
        for attempt in range(self.attempts):
            response = self._post(body)
            if response is not None and response.is_success:
                return self._answer(response)
            if response is not None and response.status_code not in RETRIED:
                raise InputError(
                    f"the {self.who} refused with status {response.status_code}: {response.text[:200]}",
                    where=self.url,
                    way_out=f"check {self.where}.url, {self.where}.model and the key",
                )
            if attempt + 1 < self.attempts:
                pause = wait * (1 + random.random())  # jitter: refused ones come back apart
                time.sleep(min(_retry_after(response) or pause, LONGEST_WAIT_S))
                wait *= 2
        return None

    def ask_all(
        self, batch: Sequence[Messages], max_tokens: int, temperature: float = 1.0
    ) -> list[Answer | None]:
        """`ask` for each chat, in order, at most `concurrency` open at once; a refusal ends them all."""
        refused = threading.Event()

        def one(messages: Messages) -> Answer | None:
            if refused.is_set():
                return None
            try:
                return self.ask(messages, max_tokens, temperature)
            except InputError:
                refused.set()
                raise

        with ThreadPoolExecutor(self.concurrency, thread_name_prefix=self.who) as pool:
            return list(pool.map(one, batch))

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def _address(
        self, url: str | None, model: str | None, api_key_env: str | None
    ) -> tuple[str, dict[str, str]]:
        if not url or not model:
            raise InputError(
                f"an endpoint {self.who} needs url and model",
                where=self.where,
                way_out=f"set {self.where}.url and {self.where}.model",
            )
        headers = {}
        if api_key_env is not None:
            key = os.environ.get(api_key_env)
            if not key:
                raise InputError(
                    f"the environment variable {api_key_env} is not set",
                    where=f"{self.where}.api_key_env",
                    way_out="export it, or leave api_key_env out",
                )
            headers["Authorization"] = f"Bearer {key}"
        return f"{url.rstrip('/')}/chat/completions", headers

    def _post(self, body: dict[str, Any]) -> httpx.Response | None:
        """The response; None where none came."""
        try:
            return self._client.post(self.url, json=body)
        except httpx.UnsupportedProtocol as error:
            raise InputError(
                f"not an http address: {error}", where=self.url, way_out=f"set {self.where}.url"
            ) from error
        except httpx.TransportError:
            return None

    def _answer(self, response: httpx.Response) -> Answer:
        try:
            body = response.json()
            choice = body["choices"][0]
            content = choice["message"]["content"]
            tokens = int((body.get("usage") or {}).get("completion_tokens") or 0)
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise InputError(
                f"the {self.who}'s answer is not an OpenAI chat completion",
                where=self.url,
                way_out=f"{self.where}.url must be the base, for example http://host:port/v1",
            ) from error
        text = content if isinstance(content, str) else None
        return Answer(text, str(choice.get("finish_reason") or "stop"), tokens)


def _retry_after(response: httpx.Response | None) -> float | None:
    """Seconds that a Retry-After header asks for; None where it is absent or a date."""
    try:
        return max(0.0, float(response.headers["retry-after"])) if response is not None else None
    except (KeyError, ValueError):
        return None
