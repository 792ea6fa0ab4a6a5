"""Rollouts that are kept for people in rollouts.jsonl: the conversation, what the critic was asked and said,
and figures of every token. Of held-out evaluations and, now and then, of what is trained on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from genac_megatron.observe.runinfo import ROLLOUTS
from genac_megatron.recipe.schema import StageConfig
from genac_megatron.records import ACTOR, Judgement, Rollout
from genac_megatron.tasks.reasoning import Tags, written

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from genac_megatron.stages.batch import Batch
    from genac_megatron.stages.rollouts import Group
    from genac_megatron.stages.runtime import Run

MOST_TOKENS = 4096  # of a response: later ones have no figures of their own
MOST_BYTES = 256 << 20  # of rollouts.jsonl: no batch's rollouts are added beyond it
MOST_REFERENCE = 2000  # characters
WINDOW = 32  # tokens before one that its text may depend on


def keep_batch(run: Run, stage: StageConfig, batch: Batch, step: int) -> None:
    """Keep a few rollouts of a trained batch, at the steps that the recipe says. Collective."""
    config = run.recipe.observe
    if not config.rollouts_every or (step - 1) % config.rollouts_every:
        return
    room = run.gather([run.log is None or _has_room(run)])[0]
    if not room:
        if "rollouts" not in run.told:
            run.told.add("rollouts")
            run.progress.note(f"{ROLLOUTS} has {MOST_BYTES >> 20} MiB: no more rollouts of batches are kept")
        return
    batch = batch.first(config.shown_rollouts)
    rows = [shown_of(run, stage, group, step, trained=True) for group in batch.groups]
    if batch.places is not None:
        placed = [one for part in run.gather([list(zip(batch.places, rows, strict=True))]) for one in part]
        rows = [row for _, row in sorted(placed, key=lambda one: one[0])]
    for row in rows:
        run.append(ROLLOUTS, row)


def keep(run: Run, stage: StageConfig, groups: Sequence[Group], step: int) -> None:
    """Keep the first response of the first groups, the same on every rank. Collective."""
    for group in groups[: run.recipe.observe.shown_rollouts]:
        run.append(ROLLOUTS, shown_of(run, stage, group, step))


def shown_of(
    run: Run, stage: StageConfig, group: Group, step: int, *, trained: bool = False
) -> dict[str, Any]:
    """A group's first response."""
    judgements = group.judgements[0] if group.judgements else []
    return shown_rollout(run, stage.name, step, group.rollouts[0], judgements, trained=trained)


def _has_room(run: Run) -> bool:
    assert run.log is not None
    path = run.log.folder.path / ROLLOUTS
    return not path.exists() or path.stat().st_size < MOST_BYTES


def shown_rollout(
    run: Run,
    stage: str,
    step: int,
    rollout: Rollout,
    judgements: Sequence[Judgement],
    *,
    trained: bool = False,
) -> dict[str, Any]:
    """A rollout with its states, the critic's words and scores. trained: the actor or the critic learnt from
    it; else it is held out.
    """
    tokenizer, tags = run.tokenizers["actor"], run.task.reasoning_tags
    ids = rollout.completion.ids
    text, begins, ends, places = _text(tokenizer, tags, rollout)
    prompts = critic_prompts(run.tokenizers.get("critic"), judgements)
    found = {
        "stage": stage,
        "step": step,
        "of": "training" if trained else "heldout",
        "version": rollout.completion.version,
        "prompt": rollout.prompt.id,
        "problem": rollout.prompt.problem,
        "messages": list(rollout.prompt.messages),
        "response": text,
        "outcome": rollout.outcome,
        "truncated": rollout.truncated,
        "length": len(ids),
        "states": [
            {
                "cut": j.state.cut,
                "cut_text": places[j.state.cut],
                "text": j.text,
                "value": j.value,
                "used": j.used,
                **({"unasked": _unasked(j)} if j.skipped else {}),
                **({"prompt": prompt} if prompt is not None else {}),
            }
            for j, prompt in zip(judgements, prompts.pop("rest"), strict=True)
        ],
        "tokens": _figures(rollout, begins, ends),
        **prompts,
    }
    if isinstance(rollout.prompt.reference, str | int | float):
        found["reference"] = str(rollout.prompt.reference)[:MOST_REFERENCE]
    if rollout.episode is not None:
        found |= {"ended": rollout.episode.ended, "turns": rollout.episode.taken}
    if rollout.parts:
        found["parts"] = dict(rollout.parts)
    if rollout.critic_outcome is not None:
        found["critic_outcome"] = rollout.critic_outcome
    return found


def _text(
    tokenizer: PreTrainedTokenizerBase, tags: Tags | None, rollout: Rollout
) -> tuple[str, list[int] | None, list[int], list[int]]:
    """What is shown of a response; where each sampled token begins in it, where that is not where the one
    before has ended; where each ends; where each cut stands, [T + 1].

    Of a conversation it is all that was said, each part under a tag of who said it.
    """
    ids, episode = rollout.completion.ids, rollout.episode
    if episode is None:
        ends = token_ends(tokenizer, ids, tags, rollout.text)
        return rollout.text, None, ends, [0, *ends]
    text, begins, ends, places = "", list[int](), list[int](), [0] * (len(ids) + 1)
    for turn in episode.turns:
        places[turn.begin : turn.end] = [len(text)] * (turn.end - turn.begin)
        head = f"<{turn.who}>\n"
        if turn.who == ACTOR:
            base = len(text) + len(head)
            own = [base + end for end in token_ends(tokenizer, ids[turn.begin : turn.end], tags, turn.text)]
            begins += [base, *own][: len(own)]
            ends += own
            places[turn.begin + 1 : turn.end] = own[:-1]
        text += f"{head}{turn.text}\n"
    places[-1] = len(text)
    return text, begins, ends, places


def _unasked(judgement: Judgement) -> str:
    """Why the critic was not asked about a state."""
    if judgement.certain is not None:
        return "the others' outcomes were all alike"
    return "no room in the critic's model" if judgement.too_long else "the budget of critic tokens was spent"


def _figures(rollout: Rollout, begins: Sequence[int] | None, ends: Sequence[int]) -> dict[str, list[float]]:
    """Of the first MOST_TOKENS tokens: where each one's text ends in the response, its log-prob as sampled
    and, where they are known, its advantage and its value by a scalar critic.
    """
    figures = {"logprobs": rollout.completion.logprobs, "advantages": rollout.advantages}
    figures["values"] = rollout.values
    known = {name: values for name, values in figures.items() if values is not None}
    return {
        **({} if begins is None else {"begins": list(begins[:MOST_TOKENS])}),
        "ends": list(ends[:MOST_TOKENS]),
        **{name: [_short(x) for x in values[:MOST_TOKENS]] for name, values in known.items()},
    }


def _short(figure: float) -> float:
    """Four digits: what a person reads."""
    return float(f"{figure:.4g}")


def token_ends(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], tags: Tags | None, text: str
) -> list[int]:
    """Where each token's text ends in `text`, which is what `ids` decode to. [T], never decreasing.

    A character of several tokens belongs to the first one.
    """
    ends, at = [], 0
    for k in range(len(ids)):
        window = ids[max(0, k - WINDOW) : k]
        at += len(written(tokenizer, [*window, ids[k]], tags)) - len(written(tokenizer, window, tags))
        ends.append(at)
    if ends and at != len(text):  # a tokenizer whose text depends on more
        ends = [len(written(tokenizer, ids[: k + 1], tags)) for k in range(len(ids))]
    least = len(text)
    for k in range(len(ends) - 1, -1, -1):
        least = ends[k] = max(0, min(least, ends[k]))
    return ends


def critic_prompts(
    tokenizer: PreTrainedTokenizerBase | None, judgements: Sequence[Judgement]
) -> dict[str, Any]:
    """What the critic was asked, as text with its special tokens. `judge_prompt`: of the longest state;
    `rest`: per state, how many characters it has in common with that, and what follows; None of one that was
    not asked.
    """
    texts = [
        str(tokenizer.decode(list(j.prompt_ids), skip_special_tokens=False))
        if tokenizer is not None and j.prompt_ids
        else None
        for j in judgements
    ]
    longest = max((text for text in texts if text is not None), key=len, default=None)
    if longest is None:
        return {"rest": [None] * len(texts)}
    shared = [None if text is None else _in_common(longest, text) for text in texts]
    rest = [None if n is None else [n, str(text)[n:]] for n, text in zip(shared, texts, strict=True)]
    return {"judge_prompt": longest, "rest": rest}


def _in_common(one: str, other: str) -> int:
    """Characters that two texts begin with alike."""
    most = min(len(one), len(other))
    return next((at for at in range(most) if one[at] != other[at]), most)
