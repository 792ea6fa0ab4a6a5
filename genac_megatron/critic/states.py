"""Where a response is cut into segments, and the states before them (no torch).

A state is the prefix strictly before its segment's first token, so its value cannot depend on the
segment it is the baseline of.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from genac_megatron.recipe.schema import StatesConfig
from genac_megatron.records import Rollout, State

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def cut_states(rollout: Rollout, tokenizer: PreTrainedTokenizerBase, config: StatesConfig) -> list[State]:
    """The states of a response in order of cut; the prompt state (cut 0) first.

    Segments [cut, end) tile the sampled ids exactly. Every segment has at least `min_segment` tokens,
    unless the whole response is shorter; at most `max_states` states are kept, evenly thinned over
    the cuts. Cutters: `lines` after a token that holds a line end, `fixed` every `fixed_length`
    tokens, `low_prob` before a token sampled with probability below `low_prob`.

    The prompt of a state depends on nothing after its cut. *Which* cuts are kept depends on the
    response's length, as even thinning must.
    """
    count = len(rollout.completion.ids)
    cuts = [0]
    for cut in _candidates(rollout, tokenizer, config):
        if cut - cuts[-1] >= config.min_segment and count - cut >= config.min_segment:
            cuts.append(cut)
    inner = cuts[1:]
    kept = [0, *(inner[i] for i in spread(len(inner), config.max_states - 1))]
    ends = [*kept[1:], count]
    return [State(rollout, index, cut, end) for index, (cut, end) in enumerate(zip(kept, ends, strict=True))]


def state_text(state: State, tokenizer: PreTrainedTokenizerBase) -> str:
    """The partial response: the sampled ids before the cut, decoded, special tokens left out.

    A character that the cut leaves half written is left out too.
    """
    ids = list(state.rollout.completion.ids[: state.cut])
    text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text.rstrip("\ufffd")


def trained_indices(count: int, limit: int) -> list[int]:
    """Which of a response's `count` states are trained on: at most `limit`, the first and last always.

    With `limit` 1 it is the prompt state alone.
    """
    if count <= limit:
        return list(range(count))
    if limit <= 1:
        return [0]
    return [0, *(1 + i for i in spread(count - 2, limit - 2)), count - 1]


def trained_responses(count: int, share: float) -> list[int]:
    """Which of a batch's `count` responses the critic is trained on: `share` of them, one at least, evenly
    spread, so that every group of several gives its part.

    The choice is by place alone: responses of a group differ only by their seeds.
    """
    limit = max(1, round(count * share))
    return [i for i in range(count) if (i + 1) * limit // count > i * limit // count]


def spread(count: int, limit: int) -> list[int]:
    """At most `limit` of range(count), evenly spaced and away from the ends."""
    if count <= limit:
        return list(range(count))
    return [(i + 1) * (count + 1) // (limit + 1) - 1 for i in range(limit)]


def _candidates(rollout: Rollout, tokenizer: PreTrainedTokenizerBase, config: StatesConfig) -> list[int]:
    """Every place in (0, number of tokens) where the cutter would cut, in order."""
    ids = rollout.completion.ids
    if config.cutter == "fixed":
        return list(range(config.fixed_length, len(ids), config.fixed_length))
    if config.cutter == "low_prob":
        logprobs = rollout.completion.logprobs
        return [i for i in range(1, len(ids)) if math.exp(logprobs[i]) < config.low_prob]
    ends_line = {i: "\n" in str(tokenizer.decode([i])) for i in set(ids)}
    return [i + 1 for i in range(len(ids) - 1) if ends_line[ids[i]]]
