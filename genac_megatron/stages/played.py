"""Demonstrations of conversations: the exact teacher plays the actor's part in the recipe's environment."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from genac_megatron.environments import Environments
from genac_megatron.errors import InputError
from genac_megatron.recipe.schema import RolloutConfig
from genac_megatron.records import Completion, Finish, Prompt, Rollout, Sample, sample_of
from genac_megatron.stages.conversations import Conversation, opened
from genac_megatron.stages.seeds import seed_for
from genac_megatron.tasks.base import Task, Teacher
from genac_megatron.tasks.tokenizer import completion_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Player:
    """The teacher in the actor's place."""

    tokenizer: PreTrainedTokenizerBase
    task: Task
    config: RolloutConfig
    seed: tuple[object, ...]
    teacher: Teacher
    tag: str = ""

    def outside(self) -> AbstractAsyncContextManager[None]:
        """Nothing else is made meanwhile."""
        return nullcontext()

    async def play(self, environment: Environments, prompt: Prompt, number: int) -> Rollout:
        """A conversation, by its number among those of the stage."""
        prompt = await opened(environment, self.tokenizer, prompt, self.seed)
        rng = random.Random(seed_for(*self.seed, "demonstration", number))

        async def speak(talk: Conversation, most: int) -> Completion:
            ids = completion_ids(self.tokenizer, self.teacher.turn(prompt, talk.transcript, rng))
            kept = ids[:most]
            finish: Finish = "stop" if kept == ids else "length"
            return Completion(kept, (0.0,) * len(kept), finish, ((0, len(kept)),))

        return await Conversation(self, environment, prompt, number).play(speak)


def played_samples(
    player: Player, environment: Environments, prompts: Sequence[tuple[int, Prompt]], where: str
) -> list[Sample]:
    """Conversations by (number, prompt), with loss on the teacher's turns.

    Raises InputError, at `where`, where the environment failed in one.
    """

    async def everything() -> list[Rollout]:
        made = (player.play(environment, prompt, number) for number, prompt in prompts)
        return list(await asyncio.gather(*made))

    samples = []
    for rollout in asyncio.run(everything()):
        assert rollout.episode is not None
        if rollout.episode.ended == "failed":
            raise InputError(
                f"the environment {rollout.episode.failure}, in a demonstration to {rollout.prompt.id}",
                where=where,
                way_out="see that it answers every turn of the teacher's, or give data: jsonl with a path",
            )
        prompt = rollout.prompt
        sample = sample_of(prompt.ids, rollout.completion)
        samples.append(replace(sample, source=prompt.id, problem=prompt.digest))
    return samples
