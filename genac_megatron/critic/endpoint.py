"""A trace teacher behind any OpenAI-compatible chat endpoint, asked over httpx (no torch)."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Sequence
from typing import Any

import httpx

from genac_megatron.errors import InputError, PeerLost
from genac_megatron.recipe.schema import TeacherConfig

Messages = Sequence[dict[str, str]]
_RETRIED = (408, 409, 425, 429, 500, 502, 503, 504)
_FIRST_WAIT_S = 0.5
_LONGEST_WAIT_S = 30.0


def ask_endpoint(
    config: TeacherConfig, batch: Sequence[Messages], max_tokens: int, temperature: float = 1.0
) -> list[str | None]:
    """The endpoint's answer to each chat of `batch`, in order; None where all attempts at it failed.

    At most `concurrency` requests are open at once. Timeouts, broken connections, 408/409/425/429 and
    5xx are tried again, up to `attempts` in all, with doubling waits (or what Retry-After asks).
    Raises InputError where url, model or the key is missing or refused, PeerLost where every request
    failed.
    """
    url, headers = _address(config)
    if not batch:
        return []

    async def ask_all() -> list[str | None]:
        limits = httpx.Limits(max_connections=config.concurrency)
        gate = asyncio.Semaphore(config.concurrency)
        async with httpx.AsyncClient(headers=headers, timeout=config.timeout_s, limits=limits) as client:

            async def one(messages: Messages) -> str | None:
                body = {
                    "model": config.model,
                    "messages": list(messages),
                    "max_tokens": max_tokens,
                    "temperature": temperature,
                }
                async with gate:
                    return await _ask(client, url, body, config.attempts)

            # A TaskGroup would wrap the InputError of a refused key in an ExceptionGroup.
            tasks = [asyncio.ensure_future(one(messages)) for messages in batch]
            try:
                return list(await asyncio.gather(*tasks))
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    answers = asyncio.run(ask_all())
    if all(answer is None for answer in answers):
        raise PeerLost(
            f"the teacher answered none of {len(answers)} requests",
            where=url,
            way_out="see that the endpoint is up; raise teacher.timeout_s or lower teacher.concurrency",
        )
    return answers


def _address(config: TeacherConfig) -> tuple[str, dict[str, str]]:
    if not config.url or not config.model:
        raise InputError(
            "an endpoint teacher needs url and model",
            where="teacher",
            way_out="set teacher.url and teacher.model",
        )
    headers = {}
    if config.api_key_env is not None:
        key = os.environ.get(config.api_key_env)
        if not key:
            raise InputError(
                f"the environment variable {config.api_key_env} is not set",
                where="teacher.api_key_env",
                way_out="export it, or leave api_key_env out",
            )
        headers["Authorization"] = f"Bearer {key}"
    return f"{config.url.rstrip('/')}/chat/completions", headers


async def _ask(client: httpx.AsyncClient, url: str, body: dict[str, Any], attempts: int) -> str | None:
    """One chat; None after `attempts` failures. The key never enters a message."""
    wait = _FIRST_WAIT_S
    for attempt in range(attempts):
        pause = wait * (1 + random.random())  # jitter, so that refused requests do not return together
        try:
            response = await client.post(url, json=body)
        except httpx.UnsupportedProtocol as error:
            raise InputError(f"not an http address: {error}", where=url, way_out="set teacher.url") from error
        except httpx.TransportError:
            response = None
        if response is not None and response.is_success:
            return _content(response, url)
        if response is not None and response.status_code not in _RETRIED:
            raise InputError(
                f"the teacher refused with status {response.status_code}: {response.text[:200]}",
                where=url,
                way_out="check teacher.url, teacher.model and the key",
            )
        if attempt + 1 < attempts:
            await asyncio.sleep(min(_retry_after(response) or pause, _LONGEST_WAIT_S))
            wait *= 2
    return None


def _retry_after(response: httpx.Response | None) -> float | None:
    """Seconds that a Retry-After header asks for; None where it is absent or a date."""
    try:
        return max(0.0, float(response.headers["retry-after"])) if response is not None else None
    except (KeyError, ValueError):
        return None


def _content(response: httpx.Response, url: str) -> str | None:
    """The first choice's text; None where the model gave none (all its tokens went to hidden reasoning)."""
    try:
        content = response.json()["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError) as error:
        raise InputError(
            "the teacher's answer is not an OpenAI chat completion",
            where=url,
            way_out="teacher.url must be the base, for example http://host:port/v1",
        ) from error
    return content if isinstance(content, str) else None
