"""Where the critic's SFT traces come from (method: 1-2 k, blind to the outcome).

Four teachers: a task's exact one, the critic's own judgements kept where they agree with Monte Carlo, Monte
Carlo itself, and a chat endpoint. Each gives Samples with loss on the completion only. No torch.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from genac_megatron.critic.endpoint import answers_of
from genac_megatron.critic.icc import IccState
from genac_megatron.critic.prompt import build_prompt_ids, prompt_text
from genac_megatron.critic.score import LEVELS, deciding, format_answer, parse_score
from genac_megatron.critic.states import state_text
from genac_megatron.errors import InputError
from genac_megatron.recipe.schema import JudgingConfig, TeacherConfig
from genac_megatron.records import Judgement, Prompt, Sample, State
from genac_megatron.tasks.answers import REASONING, after_reasoning
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
    seed: int | str = 0

    def prompt_ids(self, state: State) -> tuple[int, ...]:
        """The critic's prompt for `state`."""
        partial = state_text(state, self.actor_tokenizer, self.judging.transcript_tokens)
        return build_prompt_ids(
            self.tokenizer, self.judging, self.icc, state.rollout.prompt, partial, state.cut, self.limit
        )


def to_sample(
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: Sequence[int],
    text: str,
    source: str | Prompt = "",
    where: str = "",
) -> Sample:
    """prompt + written completion + end token; loss from the completion's first token to the end token.

    `source`: the prompt, or what else other samples may share with it; they are held out together. `where`:
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
    if isinstance(source, str):
        return Sample(tokens, start=len(prompt_ids), source=source)
    return Sample(tokens, start=len(prompt_ids), source=source.id, problem=source.digest)


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
        samples += _fitting(state, words, score, shown, writes)
    return samples


def monte_carlo_samples(
    states: Sequence[State],
    values: Sequence[float],
    teacher: Teacher | None,
    context: TraceContext,
) -> list[Sample]:
    """Traces whose score is `values`: the mean outcome of fresh continuations from each state, in [0, 1].

    The reasoning is the exact teacher's, about the actor as it is; without one the score stands alone. A
    trace longer than the critic may write is left out.
    """
    samples = []
    for state, value in zip(states, values, strict=True):
        words = ""
        if teacher is not None:
            rng = random.Random(f"trace/{context.seed}/{state.rollout.key}/{state.index}")
            partial = state_text(state, context.actor_tokenizer)
            words, _ = teacher.trace(state.rollout.prompt, partial, context.icc.p_bar, rng)
        score = math.floor((LEVELS - 1) * value + 0.5)
        samples += _fitting(state, words, score, context, "trace" if words else "score")
    return samples


def _written(words: str, score: int, shown: TraceContext, writes: str) -> str:
    """A trace's text, or the part of it that `writes` asks for."""
    lines = [] if writes == "score" else [words.rstrip()]
    if score and _repeats(shown, writes):
        lines.append(f"p {shown.icc.p_bar:.2f}")
    if writes != "reasoning":
        lines.append(format_answer(score))
    return "\n".join(lines)


def _repeats(shown: TraceContext, writes: str) -> bool:
    """Whether traces say the success rate again before a score, unless that is 0."""
    return writes == "trace" and shown.judging.icc == "on"


def _fitting(state: State, words: str, score: int, shown: TraceContext, writes: str) -> list[Sample]:
    """The trace as a sample; none where it is longer than the critic may write."""
    text, prompt_ids = _written(words, score, shown, writes), shown.prompt_ids(state)
    sample = to_sample(shown.tokenizer, prompt_ids, text, state.rollout.prompt)
    if _repeats(shown, writes):
        sample.otherwise = _written(words, 0 if score else 1, shown, writes)
    return [sample] if sample.trained <= shown.judging.max_new_tokens else []


def unscored(tokenizer: PreTrainedTokenizerBase, sample: Sample) -> Sample:
    """The same trace with no loss on what says which score: `weights` are 0 there, 1 elsewhere.

    So it teaches how to reason and where an answer stands, and nothing of what a state is worth. Numbers in
    the reasoning are learnt as any words. Where only a score that is not 0 has the success rate before it,
    what follows the reasoning tells too: the first token there.
    """
    ids = sample.tokens[sample.start :]
    said = deciding(tokenizer, ids)
    if sample.otherwise:
        other = to_sample(tokenizer, sample.tokens[: sample.start], sample.otherwise).tokens[sample.start :]
        said.add(next(n for n, both in enumerate(zip(ids, other, strict=False)) if both[0] != both[1]))
    weights = [0.0 if place in said else 1.0 for place in range(len(ids))]
    return replace(sample, fields={**sample.fields, "weights": weights})


def bears_out(value: float, monte_carlo: float, config: TeacherConfig) -> bool:
    """Whether a value agrees with the mean outcome of `config.continuations` fresh continuations.

    |value - mean| <= tolerance_floor + tolerance_errors * sqrt(p (1 - p) / continuations), where p is the
    mean, or the value itself where that error is the larger: of a state that is worth 0.1 eight continuations
    out of eight fail two times in five, and by the mean alone their error would be 0. A fixed tolerance keeps
    right judgements of sure states more often than of open ones, and so teaches extremes.
    """
    spread = max(p * (1.0 - p) for p in (value, monte_carlo))
    error = math.sqrt(max(spread, 0.0) / config.continuations)
    return abs(value - monte_carlo) <= config.tolerance_floor + config.tolerance_errors * error + _ROUNDING


def accept(
    judgements: Sequence[Sequence[Judgement]], monte_carlo: Sequence[float], config: TeacherConfig
) -> list[Judgement | None]:
    """Per state the critic's own judgement that is worth imitating, None where there is none.

    Of those that parse and ended by themselves it is the nearest to the state's value that `bears_out`.
    `monte_carlo[i]` is the mean outcome of fresh continuations from state i.
    """
    kept: list[Judgement | None] = []
    for several, value in zip(judgements, monte_carlo, strict=True):
        best: tuple[float, Judgement] | None = None
        for judgement in several:
            if judgement.value is None or judgement.completion.finish != "stop":
                continue
            away = abs(judgement.value - value)
            if bears_out(judgement.value, value, config) and (best is None or away < best[0]):
                best = away, judgement
        kept.append(None if best is None else best[1])
    return kept


def own_samples(judgements: Sequence[Judgement]) -> list[Sample]:
    """Accepted judgements as training sequences, on exactly the ids that were sampled."""
    return [
        Sample(
            tokens=[*judgement.prompt_ids, *judgement.completion.ids],
            start=len(judgement.prompt_ids),
            source=judgement.state.rollout.prompt.id,
            problem=judgement.state.rollout.prompt.digest,
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
    partial = state_text(state, context.actor_tokenizer, judging.transcript_tokens)
    parts = prompt_text(judging, context.icc, state.rollout.prompt, partial, state.cut, context.limit)
    return [{"role": "user", "content": "".join(parts)}]


def endpoint_samples(states: Sequence[State], config: TeacherConfig, context: TraceContext) -> list[Sample]:
    """Traces of a chat endpoint; answers that don't parse or are too long for the critic are left out.

    Raises what `answers_of` raises.
    """
    batch = [endpoint_messages(state, context) for state in states]
    answers = answers_of(config, batch, context.judging.max_new_tokens)
    samples = []
    for state, answer in zip(states, answers, strict=True):
        text = None if answer is None else learnt_text(answer.text, answer.reasoning, config.learn_reasoning)
        if text is None:
            continue
        sample = to_sample(context.tokenizer, context.prompt_ids(state), text, state.rollout.prompt)
        if sample.trained <= context.judging.max_new_tokens:
            samples.append(sample)
    return samples


def learnt_text(text: str | None, reasoning: str = "", learn_reasoning: bool = False) -> str | None:
    """What is learnt of somebody's answer, up to the end of its last answer tag; None where none parses.

    Reasoning between tags, or told apart from the text, is left out, or learnt before it in <think> tags.
    """
    said = None if text is None or parse_score(text) is None else after_reasoning(text)
    if text is None or said is None or _ANSWER_END not in said:
        return None
    if learn_reasoning and not reasoning and said != text:
        reasoning = REASONING.sub("", text[: len(text) - len(said)])
    words = said[: said.rindex(_ANSWER_END) + len(_ANSWER_END)].strip()
    return (
        f"<think>\n{reasoning.strip()}\n</think>\n\n{words}"
        if learn_reasoning and reasoning.strip()
        else words
    )
