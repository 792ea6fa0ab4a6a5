"""Critics as a bank sees them: something that gives a value to each state."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Protocol

from genac_megatron.critic.icc import IccState
from genac_megatron.errors import InputError, on_all_ranks
from genac_megatron.evaluation.bank import Bank, BankState, Valued
from genac_megatron.evaluation.fingerprint import tokenizer_digest
from genac_megatron.recipe.schema import ModelConfig
from genac_megatron.records import Judgement, Sample, State
from genac_megatron.stages.judging import Judge
from genac_megatron.stages.runtime import Run
from genac_megatron.tasks.tokenizer import role_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class ValueOf(Protocol):
    """Any critic: V(s) of each state, in order, the same on every rank. Collective.

    A prompt's states come together, its prompt state first, then each response's in order of cut.
    """

    def __call__(self, states: Sequence[BankState]) -> list[Valued]: ...


class GenerativeValues:
    """A generative critic: one completion for each state, sampled as the recipe's `judging` says."""

    def __init__(self, run: Run, bank: Bank, actor_tokenizer: PreTrainedTokenizerBase) -> None:
        self.run = run
        icc = IccState(bank.manifest["p_bar"], int(bank.manifest["step"]), seed=run.recipe.seed)
        self.judge = Judge(
            engine=run.engines["critic"],
            tokenizer=run.tokenizers["critic"],
            actor_tokenizer=actor_tokenizer,
            config=run.recipe.judging,
            icc=icc,
            stop_ids=run.stop_ids("critic"),
            limit=bank.limit,
            seed=(run.recipe.seed, "bank", "critic"),
            positions=run.critic.shape.max_positions,
            reasoning_tags=run.recipe.roles["critic"].model.reasoning_tags,
        )

    def __call__(self, states: Sequence[BankState]) -> list[Valued]:
        groups = [list(found) for _, found in groupby(states, key=lambda state: state.prompt.id)]
        mine = self.run.share(groups)
        judged = self.run.generating(lambda: asyncio.run(self._all(mine)))
        return [valued for group in self.run.gather(judged) for valued in group]

    async def _all(self, groups: Sequence[Sequence[BankState]]) -> list[list[Valued]]:
        return list(await asyncio.gather(*(self._prompt(group) for group in groups)))

    async def _prompt(self, states: Sequence[BankState]) -> list[Valued]:
        """A response's states nest: its longest is read ahead of the others (stages/judging.py)."""
        for which in sorted({state.response for state in states if state.response is not None}):
            longest = [state.state for state in states if state.response == which][-1]
            ids = self.judge.prompt_ids(longest)
            if not self.judge.has_room(ids):
                raise self._no_room(longest, len(ids))
            await self.judge.engine.warm(ids, longest.rollout.key)
        judgements = await asyncio.gather(*(self.judge.judge(state.state) for state in states))
        return [self._valued(judgement) for judgement in judgements]

    def _no_room(self, state: State, read: int) -> InputError:
        """Here a state without a judgement would pass for one whose score does not parse."""
        return InputError(
            f"the critic's prompt has {read} tokens, and with {self.judge.config.max_new_tokens} new ones it "
            f"does not fit into its model's {self.judge.positions} positions",
            where=f"state {state.rollout.key}@{state.index}",
            way_out="lower judging.max_new_tokens, or use a critic with more positions (max_positions)",
        )

    def _valued(self, judgement: Judgement) -> Valued:
        if judgement.too_long:
            raise self._no_room(judgement.state, len(self.judge.prompt_ids(judgement.state)))
        value = judgement.value
        if self.judge.config.score == "soft" and judgement.soft is not None:
            value = judgement.soft
        return Valued(value, len(judgement.completion.ids), judgement.text)


class ScalarValues:
    """A scalar critic: its head's output before the state's segment, clipped to [0, 1]."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def __call__(self, states: Sequence[BankState]) -> list[Valued]:
        rollouts = {id(s.state.rollout): s.state.rollout for s in states if s.response is not None}
        samples = [
            Sample([*rollout.prompt.ids, *rollout.completion.ids], len(rollout.prompt.ids))
            for rollout in rollouts.values()
        ]
        values = dict(zip(rollouts, self.run.critic.values(samples), strict=True))
        # The prompt's own value stands before the first token of any of its responses.
        first = {rollout.prompt.id: values[key][0] for key, rollout in rollouts.items()}
        found = [
            first[state.prompt.id]
            if state.response is None
            else values[id(state.state.rollout)][state.state.cut]
            for state in states
        ]
        return [Valued(min(max(value, 0.0), 1.0)) for value in found]


def critic_of(run: Run, bank: Bank, actor: ModelConfig) -> ValueOf:
    """The run's critic. `actor`: whose tokenizer the bank's ids are of.

    Raises InputError where it is not the one that the bank was built with.
    """
    tokenizer = run.together(lambda: role_tokenizer("actor", actor))
    scalar = run.critic.shape.value
    read_by = run.together(lambda: _as_read(run, actor)) if scalar else tokenizer
    if tokenizer_digest(read_by) != bank.manifest["plan"]["actor"]["tokenizer"]:
        who = "scalar critic, which reads the actor's token ids," if scalar else "recipe's actor"
        what = f"the {who} has another tokenizer than the actor that the bank is of"
        way_out = "use the recipe that the bank was built with, or a critic with its tokenizer"
        raise on_all_ranks(InputError(what, where=str(bank.folder), way_out=way_out))
    return ScalarValues(run) if scalar else GenerativeValues(run, bank, tokenizer)


def _as_read(run: Run, actor: ModelConfig) -> PreTrainedTokenizerBase:
    """A scalar critic's tokenizer with the actor's chat template variables: it renders no prompt itself."""
    critic = run.recipe.roles["critic"].model
    variables = {
        "chat_template_kwargs": actor.chat_template_kwargs,
        "chat_template": actor.chat_template,
    }
    return role_tokenizer("critic", critic.model_copy(update=variables))
