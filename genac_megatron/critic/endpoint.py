"""A trace teacher behind any OpenAI-compatible chat endpoint (serving/chat.py; no torch)."""

from __future__ import annotations

from collections.abc import Sequence

from genac_megatron.errors import PeerLost
from genac_megatron.recipe.schema import TeacherConfig
from genac_megatron.serving.chat import ChatEndpoint, Messages


def ask_endpoint(
    config: TeacherConfig, batch: Sequence[Messages], max_tokens: int, temperature: float = 1.0
) -> list[str | None]:
    """The endpoint's answer to each chat of `batch`, in order; None where all attempts at it failed.

    At most `concurrency` requests are open at once; what is tried again: see ChatEndpoint. Raises
    InputError where url, model or the key is missing or refused, PeerLost where every request failed.
    """
    endpoint = ChatEndpoint(
        config.url,
        config.model,
        api_key_env=config.api_key_env,
        timeout_s=config.timeout_s,
        concurrency=config.concurrency,
        attempts=config.attempts,
        who="teacher",
        where="teacher",
    )
    try:
        answers = endpoint.ask_all(batch, max_tokens, temperature)
    finally:
        endpoint.close()
    if answers and all(answer is None for answer in answers):
        raise PeerLost(
            f"the teacher answered none of {len(answers)} requests",
            where=endpoint.url,
            way_out="see that the endpoint is up; raise teacher.timeout_s or lower teacher.concurrency",
        )
    return [None if answer is None else answer.text for answer in answers]
