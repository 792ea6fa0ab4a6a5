"""A trace teacher behind any OpenAI-compatible chat endpoint (serving/chat.py; no torch)."""

from __future__ import annotations

from collections.abc import Sequence

from genac_megatron.errors import PeerLost
from genac_megatron.recipe.schema import TeacherConfig
from genac_megatron.serving.chat import Answer, ChatEndpoint, Messages, Names, Refusal, Unanswered


def ask_endpoint(
    config: TeacherConfig, batch: Sequence[Messages], max_tokens: int, temperature: float = 1.0
) -> list[str | None]:
    """The endpoint's answer to each chat of `batch`, in order; None where it is refused or attempts failed.

    At most `concurrency` requests are open at once; what is tried again: see ChatEndpoint. Raises
    InputError where url, model, the key or every request is refused, PeerLost where none was answered.
    """
    endpoint = ChatEndpoint(
        config.url,
        config.model,
        api_key_env=config.api_key_env,
        timeout_s=config.timeout_s,
        concurrency=config.concurrency,
        attempts=config.attempts,
        who="teacher",
        names=Names.of("teacher"),
    )
    try:
        answers = endpoint.ask_all(batch, max_tokens, temperature)
    finally:
        endpoint.close()
    refused = [answer for answer in answers if isinstance(answer, Refusal)]
    if answers and len(refused) == len(answers):
        raise endpoint.refused_all(len(refused), refused[-1])
    if answers and not any(isinstance(answer, Answer) for answer in answers):
        causes = [str(answer) for answer in answers if isinstance(answer, Unanswered)]
        also = f"; it refused {len(refused)} of them, the last with {refused[-1]}" if refused else ""
        raise PeerLost(
            f"the teacher answered none of {len(answers)} requests, the last: {causes[-1]}{also}",
            where=endpoint.url,
            way_out="see that the endpoint is up; raise teacher.timeout_s or lower teacher.concurrency",
        )
    return [answer.text if isinstance(answer, Answer) else None for answer in answers]
