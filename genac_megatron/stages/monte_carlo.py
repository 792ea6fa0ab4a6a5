"""Values by Monte Carlo as a critic's teacher: as targets, and as what its own judgements must agree with."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from genac_megatron.critic import traces
from genac_megatron.critic.balance import by_value, collect
from genac_megatron.records import Judgement, Sample, State
from genac_megatron.stages.batch import generator_for
from genac_megatron.stages.heldout import judge_for
from genac_megatron.stages.parity import measure_judgements
from genac_megatron.stages.rollouts import continue_states
from genac_megatron.stages.runtime import Run, mean

if TYPE_CHECKING:
    from genac_megatron.stages.sft_orders import Order


def monte_carlo_values(run: Run, order: Order, mine: Sequence[State], turn: int = 0) -> list[float]:
    """The mean outcome of fresh continuations from each of this rank's states, by the actor as it is, sampled
    as the order's rollouts are. Collective.
    """
    seed = (*order.seed, "monte carlo", turn)
    generator = generator_for(run, order.rollout, seed, judged=False, task=order.task)
    outcomes = run.generating(lambda: continue_states(generator, mine, order.teacher.continuations))
    run.spend("rollout", "actor")
    return [mean(drawn) for drawn in outcomes]


def own_traces(run: Run, order: Order, draw: Callable[[int], list[State]]) -> list[Sample]:
    """The critic's own judgements where they agree with Monte-Carlo values (rejection). Collective.

    They are drawn in rounds until there are as many as wanted, and those that are kept are even over the
    values as far as they can be: most judgements of a strong actor's states are of sure ones.
    """
    turns = iter(range(order.teacher.rounds))

    def judge(states: list[State]) -> list[tuple[Sample, float] | None]:
        turn = next(turns)
        mine = run.share(states)
        values = monte_carlo_values(run, order, mine, turn)
        judgements = judged(run, order, mine, turn)
        run.note(measure_judgements(run, (one for several in judgements for one in several)))
        kept = traces.accept(judgements, values, order.teacher)
        found: list[tuple[Sample, float] | None] = [
            None if one is None else (traces.own_samples([one])[0], value)
            for one, value in zip(kept, values, strict=True)
        ]
        return run.gather(found)

    kept, asked = collect(order.size, order.teacher.rounds, draw, judge)
    values = [value for _, value in kept]
    chosen = by_value([sample for sample, _ in kept], values, order.size, run.recipe.seed)
    run.progress.note(
        f"[{order.label}] of {asked} states {len(kept)} have a judgement that Monte Carlo bears out"
    )
    if len(chosen) < order.size and kept:
        run.progress.note(
            f"[{order.label}] warning: {len(chosen)} traces instead of {order.size}, after "
            f"{order.teacher.rounds} rounds (teacher.rounds, teacher.judgements)"
        )
    return chosen


def judged(run: Run, order: Order, mine: Sequence[State], turn: int) -> list[list[Judgement]]:
    """`teacher.judgements` of the critic's about each of this rank's states. Collective."""
    judges = [
        judge_for(run, order.rollout.max_new_tokens, (*order.seed, "own", turn, number))
        for number in range(order.teacher.judgements)
    ]

    async def all_of(state: State) -> list[Judgement]:
        return list(await asyncio.gather(*(judge.judge(state) for judge in judges)))

    async def every() -> list[list[Judgement]]:
        return list(await asyncio.gather(*(all_of(state) for state in mine)))

    found = run.generating(lambda: asyncio.run(every()))
    run.spend("judge", "critic")
    return found
