"""Where the critic's SFT traces come from, and their balance (method: 1-2 k, blind to the outcome).

Three sources: a task's exact teacher, the critic's own judgements kept where they agree with Monte
Carlo, and a chat endpoint. Each gives Samples with loss on the completion only. No torch.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from genac_megatron.critic.endpoint import ask_endpoint
from genac_megatron.critic.icc import IccState
from genac_megatron.critic.prompt import build_prompt_ids, prompt_text
from genac_megatron.critic.score import format_answer, parse_score
from genac_megatron.critic.states import state_text
from genac_megatron.errors import InputError
from genac_megatron.recipe.schema import JudgingConfig, TeacherConfig
from genac_megatron.records import Judgement, Sample, State
from genac_megatron.tasks.tokenizer import reply_ids, reply_lead, without_opened

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from genac_megatron.tasks.base import Teacher

_ANSWER_END = "</answer>"
_ROUNDING = 1e-9  # 0.6 - 0.45 must count as within 0.15


@dataclass(frozen=True)
class TraceContext:
    """What turns a state into a critic prompt: tokenizers, wording, conditioning, token limit, seed."""

    tokenizer: PreTrainedTokenizerBase  # the critic's
    actor_tokenizer: PreTrainedTokenizerBase
    judging: JudgingConfig
    icc: IccState
    limit: int  # response tokens the actor may use
    seed: int = 0

    def prompt_ids(self, state: State) -> tuple[int, ...]:
        """The critic's prompt for `state`."""
        partial = state_text(state, self.actor_tokenizer)
        return build_prompt_ids(
            self.tokenizer, self.judging, self.icc, state.rollout.prompt, partial, state.cut, self.limit
        )


def balance(states: Sequence[State], size: int, seed: int = 0) -> list[State]:
    """At most `size` states, balanced by outcome (below, from 0.5) and position, in shuffled order.

    Positions: the prompt state, the first and the second half of the response. The six strata are
    drawn from in turn; one that runs out leaves its share to the others. Of a prompt's identical
    prompt states one is kept per outcome class.
    """
    rng = random.Random(f"balance/{seed}")
    strata: dict[tuple[bool, int], list[State]] = defaultdict(list)
    seen: set[tuple[str, bool]] = set()
    for state in rng.sample(list(states), len(states)):
        right = state.rollout.outcome >= 0.5
        if state.cut == 0:
            if (state.rollout.prompt.id, right) in seen:
                continue
            seen.add((state.rollout.prompt.id, right))
        strata[right, _position(state)].append(state)
    # Taken in turn, so that each prefix of `chosen` is as even as the strata allow.
    piles = [strata[key] for key in sorted(strata)]
    longest = max((len(pile) for pile in piles), default=0)
    chosen = [pile[turn] for turn in range(longest) for pile in piles if turn < len(pile)][:size]
    rng.shuffle(chosen)
    return chosen


def to_sample(
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: Sequence[int],
    text: str,
    source: str = "",
    where: str = "",
) -> Sample:
    """prompt + written completion + end token; loss from the completion's first token to the end token.

    `source`: what other samples may share with it, such as the prompt; they are held out together. `where`:
    the text's place, for messages.

    Special tokens in `text` are read as plain text, and it begins as the chat template's replies do. What
    the prompt's end has opened already, such as `<think>`, is not doubled. Raises InputError for a tokenizer
    without an end, and as `without_opened`.
    """
    end = tokenizer.eos_token_id
    if not isinstance(end, int):
        raise InputError(
            "the tokenizer names no eos_token",
            where=str(tokenizer.name_or_path),
            way_out="add it to tokenizer_config.json",
        )
    text = without_opened(tokenizer, prompt_ids, text, where)
    lead = "" if text[:1].isspace() else reply_lead(tokenizer)
    tokens = [*prompt_ids, *reply_ids(tokenizer, prompt_ids, lead + text, split_special_tokens=True), end]
    return Sample(tokens, start=len(prompt_ids), source=source)


LATER_STEPS = 100  # steps that a made-up actor may be said to be at


def exact_samples(
    states: Sequence[State],
    teacher: Teacher,
    context: TraceContext,
    p_bar_range: tuple[float, float] | None = None,
    writes: Literal["trace", "score", "reasoning"] = "trace",
) -> list[Sample]:
    """Traces of a task's exact teacher, its scores alone, or its reasoning alone.

    Each state has its own seeded rng: order and ranks don't matter.
    With `p_bar_range` each trace is about an actor of another strength, drawn from the range, at any step:
    so the critic learns how a value depends on the conditioning before the actor moves. A critic that is
    not shown it (judging.icc off or shuffled) learns of the actor as it is. A trace whose score rests on
    the success rate says it again just before: a copied number is learnt far sooner than one read from afar.
    A trace longer than the critic may write is left out.
    """
    samples = []
    for state in states:
        rng = random.Random(f"trace/{context.seed}/{state.rollout.key}/{state.index}")
        partial = state_text(state, context.actor_tokenizer)
        shown = context
        if p_bar_range is not None and context.judging.icc == "on":
            p_bar = round(rng.uniform(*p_bar_range), 2)
            shown = replace(context, icc=replace(context.icc, p_bar=p_bar, step=rng.randrange(LATER_STEPS)))
        words, score = teacher.trace(state.rollout.prompt, partial, shown.icc.p_bar, rng)
        lines = [] if writes == "score" else [words.rstrip()]
        if writes == "trace" and score and context.judging.icc == "on":
            lines.append(f"p {shown.icc.p_bar:.2f}")
        if writes != "reasoning":
            lines.append(format_answer(score))
        text = "\n".join(lines)
        sample = to_sample(context.tokenizer, shown.prompt_ids(state), text, state.rollout.prompt.id)
        if sample.trained <= context.judging.max_new_tokens:
            samples.append(sample)
    return samples


def accept(
    judgements: Sequence[Judgement], monte_carlo: Sequence[float], tolerance: float
) -> list[Judgement]:
    """The critic's own judgements worth imitating: ended by itself, parsed, |v - mc| <= tolerance.

    `monte_carlo[i]` is the mean outcome of fresh continuations from judgement i's state.
    """
    return [
        judgement
        for judgement, mc in zip(judgements, monte_carlo, strict=True)
        if judgement.value is not None
        and judgement.completion.finish == "stop"
        and abs(judgement.value - mc) <= tolerance + _ROUNDING
    ]


def own_samples(judgements: Sequence[Judgement]) -> list[Sample]:
    """Accepted judgements as training sequences, on exactly the ids that were sampled."""
    return [
        Sample(
            tokens=[*judgement.prompt_ids, *judgement.completion.ids],
            start=len(judgement.prompt_ids),
            source=judgement.state.rollout.prompt.id,
        )
        for judgement in judgements
    ]


def endpoint_messages(state: State, context: TraceContext) -> list[dict[str, str]]:
    """The chat shown to an endpoint teacher: the critic's prompt, without outcome or reference.

    `brief` suits models trained on it and says too little to a stranger, so it becomes `standard`.
    """
    judging = context.judging
    if judging.template == "brief":
        judging = judging.model_copy(update={"template": "standard"})
    partial = state_text(state, context.actor_tokenizer)
    parts = prompt_text(judging, context.icc, state.rollout.prompt, partial, state.cut, context.limit)
    return [{"role": "user", "content": "".join(parts)}]


def endpoint_samples(states: Sequence[State], config: TeacherConfig, context: TraceContext) -> list[Sample]:
    """Traces of a chat endpoint; answers that don't parse or are too long for the critic are left out.

    What follows the last answer tag is cut off. Raises what `ask_endpoint` raises.
    """
    batch = [endpoint_messages(state, context) for state in states]
    answers = ask_endpoint(config, batch, context.judging.max_new_tokens)
    samples = []
    for state, answer in zip(states, answers, strict=True):
        if answer is None or parse_score(answer) is None:
            continue
        text = answer[: answer.rindex(_ANSWER_END) + len(_ANSWER_END)].strip()
        sample = to_sample(context.tokenizer, context.prompt_ids(state), text, state.rollout.prompt.id)
        if sample.trained <= context.judging.max_new_tokens:
            samples.append(sample)
    return samples


def _position(state: State) -> int:
    if state.cut == 0:
        return 0
    return 1 if 2 * state.cut < len(state.rollout.completion.ids) else 2
