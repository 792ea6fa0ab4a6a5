"""`genac evaluate bank build`: a frozen actor's states with Monte-Carlo values (evaluation/bank.py)."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from genac_megatron import __version__
from genac_megatron.critic.states import cut_states
from genac_megatron.errors import InputError, on_all_ranks
from genac_megatron.evaluation.bank import (
    FORMAT,
    RIGHT,
    Bank,
    BankPrompt,
    BankState,
    bank_parts,
    choose_pair,
    from_row,
    no_response,
    read_bank,
    rendered_digest,
    texts_digest,
    to_row,
)
from genac_megatron.evaluation.session import (
    answered_by,
    identity,
    made_from,
    own_code,
    rollout_config,
    stop_if_asked,
    with_role,
)
from genac_megatron.recipe.schema import Recipe, RolloutConfig
from genac_megatron.records import Prompt, Rollout, State
from genac_megatron.stages.heldout import told_step
from genac_megatron.stages.rollouts import Generator, continue_states
from genac_megatron.stages.runtime import Run, mean
from genac_megatron.stages.session import session
from genac_megatron.stages.stopping import StopFlag
from genac_megatron.tasks.tokenizer import prints_date
from genac_megatron.training.agreement import from_first
from genac_megatron.training.layout import World

PROMPTS, LIMIT = 128, 64  # of a bank, where nothing else is said


@dataclass(frozen=True)
class BuildOptions:
    """What a bank is made of."""

    out: Path
    checkpoint: str | None = None  # the actor's; None: the recipe's model
    prompts: int | None = None  # None: PROMPTS, or as many as the other bank has
    continuations: int = 32
    samples: int = 8  # responses to every prompt: they make p_bar
    limit: int | None = None  # responses to a prompt at most, while all are right, or all wrong; None: LIMIT
    max_new_tokens: int | None = None  # None: the last stage's, or the other bank's
    states_from: Path | None = None  # the same states, under this actor
    p_bar_of: Path | None = None  # a bank of the critics' own tasks: harder ones say less of how strong it is
    step: int | None = None  # of training, that critics are told; None: the actor's
    chunk: int = 16  # prompts that a rank works on at a time, and loses where it is killed


def build_bank(recipe: Recipe, world: World, stop: StopFlag, options: BuildOptions, folder: Path) -> None:
    """Build the bank, or go on with one that is unfinished. Collective.

    Raises InputError where the folder holds another bank, or options contradict each other; StopRequested
    where it was asked to stop.
    """
    check_options(options)
    recipe = with_role(recipe, "actor", options.checkpoint)
    with session(recipe, world, stop, "bank", folder) as run:
        run.publish("actor")
        base = None
        if options.states_from is not None:
            base = run.together(partial(read_bank, options.states_from))
        told = None
        if options.p_bar_of is not None:
            told = run.together(partial(read_bank, options.p_bar_of))
        builder = Builder(run, options, base, told)
        builder.build()


def check_options(options: BuildOptions) -> None:
    """Raise InputError where an option would be without effect. The same on every rank."""
    given = {
        "--prompts": options.prompts,
        "--limit": options.limit,
        "--max-new-tokens": options.max_new_tokens,
    }
    without = [name for name, value in given.items() if value is not None]
    if options.states_from is not None and without:
        what = f"{' and '.join(without)} cannot be given with --states-from: that bank says it"
        way_out = f"leave {' and '.join(without)} out"
        raise on_all_ranks(InputError(what, where=str(options.states_from), way_out=way_out))


def for_critics(config: RolloutConfig) -> RolloutConfig:
    """With the outcomes that critics are to predict: a bank is for them."""
    rule = config.truncated_outcome if config.truncated_critic == "same" else config.truncated_critic
    return config.model_copy(update={"truncated_outcome": rule, "truncated_critic": "same"})


class Builder:
    """One rank's part in building a bank."""

    def __init__(self, run: Run, options: BuildOptions, base: Bank | None, told: Bank | None = None) -> None:
        self.run, self.options, self.base, self.told = run, options, base, told
        self.limit = LIMIT if options.limit is None else options.limit
        self.parts = bank_parts(options.out)
        recipe = run.recipe
        rollout = for_critics(rollout_config(recipe, options.max_new_tokens if base is None else base.limit))
        self.generator = Generator.of_actor(run, rollout, (recipe.seed, "bank"), environment=run.environment)
        self.prompts = run.together(lambda: [self._prompt(number) for number in range(self._count())])

    def plan(self) -> dict[str, Any]:
        """The bank's identity. Collective."""
        recipe, config = self.run.recipe, self.generator.config
        return {
            "format": FORMAT,
            "kind": "bank",
            "seed": recipe.seed,
            "actor": identity(self.run, "actor"),
            "task": recipe.task.model_dump(mode="json"),
            "texts": texts_digest(self.prompts),
            **self._rendered(),
            "rollout": {
                "max_new_tokens": config.max_new_tokens,
                "temperature": config.temperature,
                "truncated_outcome": config.truncated_outcome,
            },
            "states": recipe.judging.states.model_dump(mode="json", exclude={"final", "final_weight"}),
            "prompts": len(self.prompts),
            "continuations": self.options.continuations,
            "samples": self.options.samples,
            "limit": self.limit,
            "states_from": None if self.base is None else self.base.manifest["sha256"],
            "p_bar_of": None if self.told is None else self.told.manifest["sha256"],
            "step": self.options.step,
            **answered_by(recipe),
            **own_code(recipe),
        }

    def _rendered(self) -> dict[str, str]:
        """What the prompts are as ids, where that is not the tokenizer's matter alone but the day's too."""
        if not prints_date(self.generator.tokenizer):
            return {}
        return {"rendered": rendered_digest([prompt.ids for prompt in self.prompts])}

    def build(self) -> None:
        """Every piece that is not there yet, then the whole. Collective."""
        run, plan = self.run, self.plan()
        known = set(from_first(lambda: sorted(self.parts.begin(plan))))
        left = [number for number in range(len(self.prompts)) if (number,) not in known]
        if not left and from_first(lambda: self.parts.complete):
            run.progress.note(f"{self.options.out} is complete already")
            return
        size = self.options.chunk * run.world.size
        run.progress.stage("bank", len(self.prompts), len(self.prompts) - len(left))
        for at in range(0, len(left), size):
            mine = run.share(left[at : at + size])
            with run.phase("continue"):
                found = run.generating(partial(self.pieces, mine))
            rows = [to_row(number, piece) for number, piece in zip(mine, found, strict=True)]
            run.together(partial(self.parts.append, rows, run.world.rank))
            done = len(self.prompts) - len(left) + min(at + size, len(left))
            run.progress.step(done, {})
            stop_if_asked(run, f"{done} of {len(self.prompts)} prompts")
        run.together(lambda: self._finish(plan) if run.world.rank == 0 else None)

    def pieces(self, numbers: Sequence[int]) -> list[BankPrompt]:
        """This rank's prompts of a chunk: responses, states, continuations."""
        prompts = [self.prompts[number] for number in numbers]
        sampled = asyncio.run(self._sample(prompts))
        if self.base is None:
            pairs = [self._states(*both) for both in zip(prompts, sampled, strict=True)]
        else:
            pairs = [self._again(number, rolled) for number, rolled in zip(numbers, sampled, strict=True)]
        states = [state.state for pair in pairs for state in pair.states]
        draws = iter(continue_states(self.generator, states, self.options.continuations) if states else [])
        return [
            BankPrompt(
                pair.prompt,
                pair.outcomes,
                pair.skipped,
                pair.responses,
                tuple(BankState(state.state, state.response, tuple(next(draws))) for state in pair.states),
                pair.seed,
            )
            for pair in pairs
        ]

    def _count(self) -> int:
        size = self.run.task.heldout_size
        if self.base is None:
            return min(self.options.prompts or PROMPTS, size)
        if len(self.base.prompts) > size:
            raise InputError(
                f"it has {len(self.base.prompts)} prompts, the recipe's task {size} held-out ones",
                where=str(self.base.folder),
                way_out="use the recipe and task overrides that the bank was built with (task.heldout_size)",
            )
        return len(self.base.prompts)

    def _prompt(self, number: int) -> Prompt:
        """The prompt, by the task: with states of another bank its verifier must know them."""
        prompt = self.run.task.prompt("heldout", number)
        if self.base is not None and self.base.prompts[number].prompt.problem != prompt.problem:
            raise InputError(
                f"its prompt {number} is none of the recipe's task",
                where=str(self.base.folder),
                way_out="use the recipe, seed and task overrides that the bank was built with",
            )
        return prompt

    async def _sample(self, prompts: Sequence[Prompt]) -> list[list[Rollout]]:
        """Responses to each prompt; of a bank's states no more than what p_bar needs."""
        return list(await asyncio.gather(*(self._responses(prompt) for prompt in prompts)))

    async def _responses(self, prompt: Prompt) -> list[Rollout]:
        options = self.options
        found: list[Rollout] = []
        while len(found) < max(self.limit, options.samples):
            until = len(found) + options.samples
            if found:
                until = min(until, self.limit)
            group = await self.generator.group(prompt, range(len(found), until))
            found += group.rollouts
            if self.base is not None or choose_pair(found) is not None:
                break
        return found

    def _states(self, prompt: Prompt, rollouts: Sequence[Rollout]) -> BankPrompt:
        outcomes = tuple(rollout.outcome for rollout in rollouts)
        pair = choose_pair(rollouts)
        if pair is None:
            return BankPrompt(prompt, outcomes, "right" if outcomes[0] >= RIGHT else "wrong")
        first = rollouts[0]
        prompt, seed = first.prompt, None if first.episode is None else first.episode.seed  # as it was begun
        states = [BankState(State(no_response(prompt, seed), 0, 0, 0), None, ())]
        for which, rollout in enumerate(pair):
            cuts = cut_states(rollout, self.generator.tokenizer, self.run.recipe.judging.states)
            states += [BankState(state, which, ()) for state in cuts[1:]]
        return BankPrompt(prompt, outcomes, None, pair, tuple(states), seed)

    def _again(self, number: int, rollouts: Sequence[Rollout]) -> BankPrompt:
        """The states that the other bank has for this prompt, whose reference is the task's."""
        assert self.base is not None
        row = to_row(number, self.base.prompts[number])
        prompt = rollouts[0].prompt
        row["prompt"] |= {"reference": prompt.reference, "ids": list(prompt.ids), "opening": prompt.opening}
        row["prompt"]["privileged"] = dict(prompt.privileged)
        row["outcomes"] = [rollout.outcome for rollout in rollouts]
        return from_row(row, prompt)

    def _finish(self, plan: dict[str, Any]) -> None:
        rows = self.parts.whole(plan, [(number,) for number in range(len(self.prompts))])
        found = [from_row(row) for row in rows]
        first = [mean(one.outcomes[: self.options.samples]) for one in found]
        skipped = {kind: sum(one.skipped == kind for one in found) for kind in ("right", "wrong")}
        states = sum(len(one.states) for one in found)
        if not states:
            raise InputError(
                f"no prompt has both a right and a wrong response ({skipped['right']} only right, "
                f"{skipped['wrong']} only wrong): there is nothing to judge",
                where=str(self.options.out),
                way_out="choose a task or an actor in between, or raise --limit (in a new folder)",
            )
        recipe = self.run.recipe
        manifest = {
            "format": FORMAT,
            "kind": "bank",
            "plan": plan,
            "success_rate": mean(first),
            "p_bar": mean(first) if self.told is None else self.told.manifest["p_bar"],
            "step": told_step(recipe) if self.options.step is None else self.options.step,
            "prompts": len(found),
            "states": states,
            "skipped": skipped,
            "made_from": made_from(recipe, "actor") | {"version": __version__},
        }
        self.parts.finish(rows, manifest)
        self.run.progress.note(
            f"{self.options.out}: {states} states of {len(found) - sum(skipped.values())} prompts "
            f"({skipped['right']} only right and {skipped['wrong']} only wrong left out), "
            f"{plan['continuations']} continuations each, success rate {manifest['success_rate']:.3f}"
        )
