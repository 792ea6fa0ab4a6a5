"""The recipe's `environment` block: what answers the actor's turns. Imports no torch."""

from __future__ import annotations

from typing import Literal

from genac_megatron.recipe.block import Block, Fraction, Positive, PositiveFloat


class EnvironmentConfig(Block):
    """What answers the actor's turns, so that responses are conversations (docs/environments.md).

    rollout.max_new_tokens is of the whole conversation then, what it answers included.
    """

    # task: the task's own, of those that are played; python: a class, or a function of the transcript; tools:
    # the task's questions, with tools that the actor may call until it answers
    kind: Literal["task", "python", "tools"]
    python: str | None = None  # path/to/file.py:Name, or package.module:Name
    tools: list[Literal["calculator", "python"]] = []  # that the actor may call
    sandbox_s: PositiveFloat = 5.0  # for a turn's programs of the tool python, together; then they are ended
    sandbox_mib: Positive = 512  # of such a program's memory
    turns: Positive = 8  # of the actor, at most
    turn_tokens: Positive | None = None  # of one turn, at most; None: as many as the conversation has left
    observation_tokens: Positive = 256  # of each message that is shown; longer ones lose their middle
    # What a turn stands behind where the chat template shows earlier turns otherwise than they were written
    # (it leaves reasoning out, say). sampled: everything as it was sampled, a conversation is one sequence;
    # template: what the template shows then, each turn is a sequence of its own
    history: Literal["sampled", "template"] = "sampled"
    step_s: PositiveFloat = 10.0  # for one answer; then its process is ended, and the conversation failed
    processes: Positive = 1  # per rank
    concurrency: Positive = 64  # conversations at a time, per rank
    success: str = ""  # what counts as success, in a sentence that the critic is shown; "": the task's
    failed_outcome: Fraction = 0.0  # of conversations that it failed in; they are counted
