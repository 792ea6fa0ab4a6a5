"""What a scalar critic is taught of a batch: outcomes, the exact teacher's values, or Monte-Carlo ones.

The last two are for studies: who fails with them cannot, who fails with outcomes alone may lack data.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from genac_megatron.algorithms.baselines.easyppo import spread_weights
from genac_megatron.algorithms.baselines.pact import moved_targets
from genac_megatron.algorithms.baselines.sp3o import trained_places
from genac_megatron.critic.states import cut_states, state_text
from genac_megatron.errors import InputError, on_all_ranks
from genac_megatron.recipe.algorithms import RegressionConfig
from genac_megatron.recipe.schema import RolloutConfig
from genac_megatron.records import Completion, Rollout, State, sample_of
from genac_megatron.stages.batch import Batch, generator_for
from genac_megatron.stages.dealt import placed
from genac_megatron.stages.rollouts import continue_states
from genac_megatron.stages.runtime import Run, mean
from genac_megatron.stages.values import Lesson, places_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from genac_megatron.tasks.base import Teacher


def lesson_of(
    run: Run,
    rollout: RolloutConfig,
    batch: Batch,
    learnt: list[Tensor],
    config: RegressionConfig,
    seed: tuple[object, ...],
) -> Lesson:
    """What the critic is taught of a batch, where, and with which weights. Collective.

    learnt: per response [T], the targets made of outcomes. seed: of continuations.
    """
    scales = None
    if config.by_spread:
        rows = [[r.target for r in group.rollouts] for group in batch.groups]
        weights = spread_weights(torch.tensor(rows or [[0.0]])[: len(rows)], batch.ranks.totals).tolist()
        scales = [w for w, row in zip(weights, rows, strict=True) for _ in row]
    if config.target == "monte_carlo":
        drawn, cuts = monte_carlo_values(run, rollout, batch, config, seed)
        return Lesson(drawn, cuts, scales=scales)
    places = places_of(run, batch.rollouts, config)
    targets = exact_values(run, batch.rollouts, places) if config.target == "exact" else learnt
    return Lesson(targets, places, scales=scales)


def exact_values(
    run: Run, rollouts: Sequence[Rollout], places: Sequence[Sequence[int]] | None
) -> list[Tensor]:
    """Per rollout [T], the exact teacher's value of each prefix, or of those at `places` alone (else 0).

    Collective: each rank asks it about its own. Raises InputError where the task has none.
    """
    teacher, icc = run.task.teacher, run.icc
    if teacher is None or icc is None:
        what = f"the task '{run.recipe.task.kind}' has no exact teacher that could say what a value is"
        raise on_all_ranks(InputError(what, where="value.target", way_out="set it to outcome or monte_carlo"))
    asked = [(one, None if places is None else places[i]) for i, one in enumerate(rollouts)]
    tokenizer = run.tokenizers["actor"]
    mine = run.together(lambda: [_taught(teacher, one, at, tokenizer, icc.p_bar) for one, at in asked])
    return [torch.tensor(values) for values in mine]


def _taught(
    teacher: Teacher,
    rollout: Rollout,
    places: Sequence[int] | None,
    tokenizer: PreTrainedTokenizerBase,
    p_bar: float,
) -> list[float]:
    cuts = [cut for begin, end in rollout.completion.ranges for cut in range(begin, end)]
    values, known = [0.0] * len(cuts), dict[str, float]()
    for place in range(len(cuts)) if places is None else places:
        partial = state_text(State(rollout, 0, cuts[place], len(rollout.completion.ids)), tokenizer)
        if partial not in known:
            known[partial] = teacher.value(rollout.prompt, partial, p_bar)
        values[place] = known[partial]
    return values


def monte_carlo_values(
    run: Run, rollout: RolloutConfig, batch: Batch, config: RegressionConfig, seed: tuple[object, ...]
) -> tuple[list[Tensor], list[list[int]]]:
    """Per response [T], the mean outcome of fresh continuations at its cuts, and which tokens these are.

    The actor as its engines have it continues, as it is rolled out. A group's prompt state has one estimate.
    With config.at the cuts nearest to them alone. Collective.
    """
    tokenizer, states = run.tokenizers["actor"], run.recipe.judging.states
    wanted: dict[tuple[int, int], State] = {}  # by the response, or by the group where the cut is 0
    found: list[dict[int, tuple[int, int]]] = []
    for number, group in enumerate(batch.groups):
        for one in group.rollouts:
            keys = {}
            for place, state in states_at(one.completion, cut_states(one, tokenizer, states), config).items():
                keys[place] = len(found) if state.cut else -1 - number, state.cut
                wanted.setdefault(keys[place], state)
            found.append(keys)
    generator = generator_for(run, rollout, (*seed, "monte carlo"), judged=False)
    mine, late = list(wanted.values()), run.task.late
    drawn = run.generating(lambda: continue_states(generator, mine, config.continuations))
    run.spend("rollout", "actor")
    run.count({"verify/late": float(run.task.late - late)})
    known = dict(zip(wanted, map(mean, drawn), strict=True))
    targets = []
    for one, keys in zip(batch.rollouts, found, strict=True):
        values = torch.zeros(one.completion.written)
        for place, key in keys.items():
            values[place] = known[key]
        targets.append(values)
    return targets, [list(keys) for keys in found]


def states_at(completion: Completion, states: Sequence[State], config: RegressionConfig) -> dict[int, State]:
    """States by the sampled token before which each stands, of several the last, as it has seen most; with
    config.at the nearest to these.
    """
    length = completion.written
    found = {completion.written_before(state.cut): state for state in states}
    found = {place: state for place, state in found.items() if place < length}  # behind all there is no token
    places = trained_places(length, config.at, list(found)) if config.at else list(found)
    return {place: found[place] for place in places}


def towards_the_moved(run: Run, batch: Batch, lesson: Lesson, cap: float, temperature: float) -> Lesson:
    """The lesson for the policy that the actor has become (PACT), after its updates. Collective.

    One more pass of the actor, over all responses. temperature: of the rollouts, as of their log-probs.
    """
    made = [sample_of(rollout.prompt.ids, rollout.completion) for rollout in batch.rollouts]
    samples = batch.dealt(placed(made, batch.numbers[0]))
    counted = run.count_sequences("moved", samples)
    with run.phase("moved"):
        found = run.actor.logprobs(samples, temperature=temperature, counted=counted)
        now = [torch.tensor(logp) for logp in found]
    behaviour = [torch.tensor(rollout.completion.logprobs) for rollout in batch.rollouts]
    targets, kept = moved_targets(lesson.targets, now, behaviour, cap)
    return replace(lesson, targets=targets, kept=kept)
