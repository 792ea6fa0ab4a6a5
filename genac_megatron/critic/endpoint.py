"""A trace teacher behind any OpenAI-compatible chat endpoint (serving/chat.py; no torch)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from genac_megatron.errors import PeerLost
from genac_megatron.recipe.schema import TeacherConfig
from genac_megatron.serving.chat import Answer, ChatEndpoint, Messages, Names, Refusal, Reply, Unanswered


class EndpointTeacher:
    """The teacher that a recipe's block names, asked as it wants to be asked."""

    def __init__(self, config: TeacherConfig, max_tokens: int, concurrency: int | None = None) -> None:
        """max_tokens: of an answer, where the block says none. Raises InputError as ChatEndpoint does."""
        self.config, self.max_tokens = config, config.max_tokens or max_tokens
        self.endpoint = ChatEndpoint(
            config.url,
            config.model,
            api_key_env=config.api_key_env,
            timeout_s=config.timeout_s,
            concurrency=concurrency or config.concurrency,
            attempts=config.attempts,
            who="teacher",
            names=Names.of("teacher"),
        )

    def ask(self, messages: Messages) -> Reply:
        """Its answer; as ChatEndpoint.ask."""
        return self.endpoint.ask(messages, **self._how())

    def ask_all(self, batch: Sequence[Messages]) -> list[Reply]:
        """`ask` for each chat, in order; an InputError ends them all."""
        return self.endpoint.ask_all(batch, **self._how())

    def _how(self) -> dict[str, Any]:
        """Models that reason are asked by their own names for things."""
        config = self.config
        reasons = config.reasoning_effort is not None
        name = config.limit_name or ("max_completion_tokens" if reasons else "max_tokens")
        unsaid = None if reasons else 1.0
        how = {
            "max_tokens": self.max_tokens,
            "temperature": unsaid if config.temperature is None else config.temperature,
            "limit_name": name,
        }
        return how | ({"reasoning_effort": config.reasoning_effort} if reasons else {})

    def check(self, answers: Sequence[Reply]) -> None:
        """Raise InputError where each was refused, PeerLost where none was answered."""
        refused = [answer for answer in answers if isinstance(answer, Refusal)]
        if answers and len(refused) == len(answers):
            raise self.endpoint.refused_all(len(refused), refused[-1])
        if answers and not any(isinstance(answer, Answer) for answer in answers):
            causes = [str(answer) for answer in answers if isinstance(answer, Unanswered)]
            also = f"; it refused {len(refused)} of them, the last with {refused[-1]}" if refused else ""
            raise PeerLost(
                f"the teacher answered none of {len(answers)} requests, the last: {causes[-1]}{also}",
                where=self.endpoint.url,
                way_out="see that the endpoint is up; raise teacher.timeout_s or lower teacher.concurrency",
            )

    def close(self) -> None:
        """Close the connections."""
        self.endpoint.close()


def answers_of(config: TeacherConfig, batch: Sequence[Messages], max_tokens: int) -> list[Answer | None]:
    """The endpoint's answer to each chat of `batch`, in order; None where it is refused or attempts failed.

    At most `concurrency` requests are open at once; what is tried again: see ChatEndpoint. Raises
    InputError where url, model, the key or every request is refused, PeerLost where none was answered.
    """
    teacher = EndpointTeacher(config, max_tokens)
    try:
        answers = teacher.ask_all(batch)
    finally:
        teacher.close()
    teacher.check(answers)
    return [answer if isinstance(answer, Answer) else None for answer in answers]


def ask_endpoint(config: TeacherConfig, batch: Sequence[Messages], max_tokens: int) -> list[str | None]:
    """The texts of `answers_of`."""
    return [None if one is None else one.text for one in answers_of(config, batch, max_tokens)]
