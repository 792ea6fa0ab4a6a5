"""How far a critic's values of a conversation's states are from the exact ones, by turn.

Exact is the task's teacher's value, of a player who knows what the actor was shown and succeeds as often
as the actor does (`p_bar`). No Monte-Carlo noise is in it.
"""

from __future__ import annotations

from collections.abc import Sequence

from genac_megatron.critic.states import state_text
from genac_megatron.records import Judgement, State
from genac_megatron.stages.rollouts import Group
from genac_megatron.stages.runtime import Run, mean


def turns_before(state: State) -> int:
    """Turns of the actor's that a state stands behind."""
    return sum(end <= state.cut for _, end in state.rollout.completion.ranges if state.cut)


def exact_errors(run: Run, mine: Sequence[Group]) -> dict[str, float]:
    """The mean squared error over all ranks' judged states, the best constant's, and the error by turn.

    {} where there is no environment, or none that the task's exact teacher knows. mine: this rank's groups.
    Collective.
    """
    teacher, icc = run.task.teacher, run.icc
    if run.environment is None or teacher is None or icc is None or run.environment.config.kind != "task":
        return {}
    tokenizer = run.tokenizers["actor"]
    judged: dict[int, Judgement] = {id(j): j for g in mine for js in g.judgements for j in js}

    def of(judgement: Judgement) -> tuple[int, float, float]:
        state = judgement.state
        partial = state_text(state, tokenizer)
        return turns_before(state), judgement.used, teacher.value(state.rollout.prompt, partial, icc.p_bar)

    return error_figures(run.gather(run.together(lambda: [of(one) for one in judged.values()])))


def error_figures(rows: Sequence[tuple[int, float, float]]) -> dict[str, float]:
    """Of (turns before, value, exact value)."""
    if not rows:
        return {}
    centre = mean([exact for *_, exact in rows])
    figures = {
        "exact_mse": mean([(value - exact) ** 2 for _, value, exact in rows]),
        "exact_mse_constant": mean([(exact - centre) ** 2 for *_, exact in rows]),
    }
    for turn in sorted({before for before, *_ in rows}):
        own = [(value - exact) ** 2 for before, value, exact in rows if before == turn]
        figures[f"exact_mse/turn_{turn + 1}"] = mean(own)
    return figures
