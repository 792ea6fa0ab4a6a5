"""Where a response is cut into segments, and the states before them (no torch).

A state is the prefix strictly before its segment's first token, and whether there is a cut is decided by
the tokens before it alone. So neither a state's value nor its place can depend on the segment that it is the
baseline of, and a baseline has no bias, whatever the critic says (tests/unit/test_unbiased_cuts.py sums it
over every response of a small policy).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from genac_megatron.escaping import Transcript, transcript
from genac_megatron.recipe.schema import StatesConfig
from genac_megatron.records import Completion, Episode, Rollout, State

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


OMITTED = "omitted"  # who wrote what stands for parts that are left out of a transcript


def cut_states(rollout: Rollout, tokenizer: PreTrainedTokenizerBase, config: StatesConfig) -> list[State]:
    """The states of a response in order of cut; the prompt state (cut 0) first.

    Segments [cut, end) tile the sampled ids exactly. Cutters: `lines` after a token that holds a line end,
    `fixed` every `fixed_length` tokens, `low_prob` after a token sampled with probability below `low_prob`;
    of a conversation (`_in_turns`) before each turn of the actor's too, and with `turns` there alone.
    Of these places a cut is kept where at least `min_segment` tokens lie between it and the one before, and
    where as many tokens as `marks` asks of its number have been written: at most `max_states` states.

    What comes after a cut is never looked at, the response's length included. So the last segment is as short
    as it happens to be.
    """
    count = len(rollout.completion.ids)
    earliest = marks(config, rollout.limit)
    cuts = [0]
    for cut in _candidates(rollout, tokenizer, config):
        if len(cuts) > len(earliest):
            break
        if cut >= earliest[len(cuts) - 1] and cut - cuts[-1] >= config.min_segment:
            cuts.append(cut)
    ends = [*cuts[1:], count]
    return [State(rollout, index, cut, end) for index, (cut, end) in enumerate(zip(cuts, ends, strict=True))]


def marks(config: StatesConfig, limit: int | None) -> list[int]:
    """How many tokens must have been written before each of the cuts 1 to max_states - 1.

    They grow by one ratio from `min_segment` to `limit`, the tokens that a response may have. How many it
    will have is not known where a cut is decided: with equal ratios a response of a tenth of the limit keeps
    some of its cuts as well, with equal steps it would keep none. Without a limit the first cuts are kept.
    """
    growth = 1.0 if limit is None else max(limit / config.min_segment, 1.0)
    states = config.max_states
    # Down to whole tokens, and not by the last bit of a power.
    return [int(config.min_segment * growth ** (k / states) + 1e-6) for k in range(1, states)]


def state_text(state: State, tokenizer: PreTrainedTokenizerBase, most: int | None = None) -> str:
    """The partial response: the sampled ids before the cut, decoded, special tokens left out.

    A character that the cut leaves half written is left out too. Of a conversation it is the transcript, of
    which each part is escaped already; most: tokens of it, beyond which parts of its middle are left out
    (`shown_parts`).
    """
    if state.rollout.episode is not None:
        return _transcript(state.rollout, state.rollout.episode, state.cut, tokenizer, most)
    return _decoded(tokenizer, state.rollout.completion.ids[: state.cut])


def _decoded(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    text = tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text.rstrip("\ufffd")


def _transcript(
    rollout: Rollout, episode: Episode, cut: int, tokenizer: PreTrainedTokenizerBase, most: int | None
) -> Transcript:
    """A conversation up to a cut; of a whole one with what was answered last, which no turn follows."""
    ids, parts, cut_inside = rollout.completion.ids, list[tuple[str, str, int]](), False
    for turn in episode.turns:
        if turn.begin < cut < turn.end:
            parts.append((turn.who, _decoded(tokenizer, ids[turn.begin : cut]), cut - turn.begin))
            cut_inside = True
        elif turn.end <= cut and (turn.begin < cut or cut == len(ids)):
            parts.append((turn.who, turn.text, turn.end - turn.begin))
    return transcript(shown_parts(parts, most), open_last=cut_inside)


def shown_parts(parts: Sequence[tuple[str, str, int]], most: int | None) -> list[tuple[str, str]]:
    """Of (who, text, tokens) in order, (who, text) of at most so many tokens: the first parts, of a quarter
    of them at most, and the last ones; between them how much was left out. The last part is there whole.
    """
    sizes = [size for *_, size in parts]
    if most is None or sum(sizes) <= most:
        return [(who, text) for who, text, _ in parts]
    head, room = 0, most // 4
    while sizes[head] <= room:
        room -= sizes[head]
        head += 1
    tail, room = len(parts) - 1, most - sum(sizes[:head]) - sizes[-1]
    while tail - 1 >= head and sizes[tail - 1] <= room:
        tail -= 1
        room -= sizes[tail]
    told = f"{tail - head} parts of the conversation, {sum(sizes[head:tail])} tokens"
    omitted = [(OMITTED, told)] if tail > head else []
    return [(who, text) for who, text, _ in parts[:head]] + omitted + [(w, t) for w, t, _ in parts[tail:]]


def trained_indices(count: int, limit: int) -> list[int]:
    """Which of a response's `count` states are trained on: at most `limit`, the first and last always.

    With `limit` 1 it is the prompt state alone. This looks at the whole response, as it may: what is chosen
    is what the critic learns from, and no baseline. No critic biases the actor's gradient at lambda 1. But
    what a critic learns at a state is the mean outcome of the responses that it was chosen in: where some end
    soon after it, it was their last state and always chosen, and they count more than those that go on.
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
    if rollout.completion.sampled:
        return _in_turns(rollout, tokenizer, config)
    ids = rollout.completion.ids
    if config.cutter == "fixed":
        return list(range(config.fixed_length, len(ids), config.fixed_length))
    if config.cutter == "low_prob":
        logprobs = rollout.completion.logprobs
        return [i + 1 for i in range(len(ids) - 1) if math.exp(logprobs[i]) < config.low_prob]
    ends_line = {i: "\n" in str(tokenizer.decode([i])) for i in set(ids)}
    return [i for i, token in enumerate(ids[:-1], 1) if ends_line[token]]


def _in_turns(rollout: Rollout, tokenizer: PreTrainedTokenizerBase, config: StatesConfig) -> list[int]:
    """The same of a conversation: before each turn of the actor's and, by the cutter, inside it.

    What others wrote is never cut: a value is of the state before the actor's turn, with all it was told.
    """
    completion, found = rollout.completion, set[int]()
    for begin, end in completion.ranges:
        first = completion.written_before(begin)
        said = Completion(
            completion.ids[begin:end], completion.logprobs[first : first + end - begin], completion.finish
        )
        found.add(begin)
        if config.cutter != "turns":
            turn = Rollout(rollout.prompt, rollout.sample, said, "")
            found |= {begin + cut for cut in _candidates(turn, tokenizer, config)}
    return sorted(found - {0})
