"""From the critic's words to numbers: parse, Brier reward, baseline, what advantages use (no torch)."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from genac_megatron.records import Judgement
from genac_megatron.tasks.answers import after_reasoning
from genac_megatron.tasks.tokenizer import encode_after

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Figures = Sequence[float] | NDArray[np.float64]
LEVELS = 11  # the integers 0..10
_ANSWER = re.compile(r"<answer>\s*([+-]?[0-9]+)\s*</answer>")


def format_answer(score: int) -> str:
    """The answer tag that `parse_score` reads. Raises ValueError outside 0..10."""
    if not 0 <= score < LEVELS:
        raise ValueError(f"a score is an integer from 0 to 10, got {score}")
    return f"<answer>{score}</answer>"


def parse_score(text: str, opened: bool = False) -> float | None:
    """v in {0, 0.1, ..., 1} from the last `<answer>int</answer>`; None where it is absent or not 0..10.

    Reasoning between tags is none of the answer: what stands after it counts, nothing where it is not closed.
    `opened`: the prompt had opened it already.
    """
    said = after_reasoning(text, opened)
    found = [] if said is None else _ANSWER.findall(said)
    if not found:
        return None
    last = found[-1]
    digits = last.lstrip("+-").lstrip("0") or "0"
    if len(digits) > 2 or int(digits) >= LEVELS or (last.startswith("-") and digits != "0"):
        return None
    return int(digits) / 10


def reward(value: float | None, outcome: float) -> float:
    """R_v = 1 - (r - v)^2, the strictly proper Brier score; 0, the worst numeric error's, for no value."""
    return 0.0 if value is None else 1.0 - (outcome - value) ** 2


def soft_score(logprobs: Sequence[float]) -> float:
    """sum_n p(n) n/10 over the eleven answers.

    `logprobs[n]` is the log-prob of answer n *with its closing tag* (sum over its tokens), so that
    "1" and "10" exclude each other; they are normalised over the eleven. Raises ValueError unless
    there are eleven, at least one of them finite and none NaN.
    """
    if len(logprobs) != LEVELS:
        raise ValueError(f"soft_score needs {LEVELS} log-probs, got {len(logprobs)}")
    top = max(logprobs)
    if any(math.isnan(x) for x in logprobs) or math.isinf(top):
        raise ValueError("soft_score needs log-probs that are not NaN and not all -inf")
    weights = [math.exp(x - top) for x in logprobs]
    return sum(n * w for n, w in enumerate(weights)) / (10 * sum(weights))


def answer_candidates(
    tokenizer: PreTrainedTokenizerBase, completion_ids: Sequence[int]
) -> tuple[int, list[tuple[int, ...]]] | None:
    """What to score for `soft_score`: the eleven ways to go on where the last answer's integer stands.

    Returns (n, candidates): keep completion_ids[:n], append candidates[k] (answer k and its closing
    tag, one token or several) and sum the log-probs of the appended ids. The answer that was given is rated
    on the ids that were written, the others as the tokenizer goes on from there; where spaces or leading
    zeros were written, all eleven as `format_answer` writes them. None where no answer stands.
    """
    ids = list(completion_ids)
    text = _decode(tokenizer, ids)
    answers = list(_ANSWER.finditer(text))
    if not answers:
        return None
    answer = answers[-1]
    lead = text[: answer.start(1)]
    keep = next(n for n in range(len(ids), -1, -1) if lead.startswith(_decode(tokenizer, ids[:n])))
    stop = next(n for n in range(keep, len(ids) + 1) if len(_decode(tokenizer, ids[:n])) >= answer.end())
    before = _decode(tokenizer, ids[:keep])
    # The first and the last token of the answer may hold some of what stands around it.
    rest, tail = lead[len(before) :], text[answer.end(1) : len(_decode(tokenizer, ids[:stop]))]
    written = tuple(ids[keep:stop])
    anchor = _anchor(tokenizer, before, f"{rest}{answer[1]}{tail}", written)
    given = parse_score(answer[0])
    plain = given is not None and answer[0] == format_answer(round(given * 10))
    closing = tail if plain else "</answer>"
    candidates = [encode_after(tokenizer, anchor, f"{rest}{n}{closing}") for n in range(LEVELS)]
    if given is not None and plain:
        candidates[round(given * 10)] = written
    return keep, candidates


def deciding(tokenizer: PreTrainedTokenizerBase, completion_ids: Sequence[int]) -> set[int]:
    """Places in completion_ids that say which score an answer gives: those at which another score, written
    alike up to there, would have gone on otherwise. None in a text without an answer.

    The token of the integer, or its tokens; after a "1" of its own also what follows, which is not a "0". An
    answer that is written with spaces or leading zeros counts whole, and so does an earlier one, if there is
    one: it may be a draft of the last.
    """
    found: set[int] = set()
    ids = list(completion_ids)
    while (answer := answer_candidates(tokenizer, ids)) is not None:
        keep, candidates = answer
        written = max((c for c in candidates if tuple(ids[keep : keep + len(c)]) == c), key=len, default=None)
        if written is None:
            found.update(range(keep, _closed(tokenizer, ids, keep)))
        else:
            found.update(
                keep + at
                for at in range(len(written))
                if any(c[:at] == written[:at] and c[at : at + 1] != written[at : at + 1] for c in candidates)
            )
        ids = ids[:keep]
    return found


def _closed(tokenizer: PreTrainedTokenizerBase, ids: list[int], keep: int) -> int:
    """How many of `ids` it takes for the answer that begins at `keep` to be closed."""
    count = len(_ANSWER.findall(_decode(tokenizer, ids)))
    return next(
        n for n in range(keep, len(ids) + 1) if len(_ANSWER.findall(_decode(tokenizer, ids[:n]))) == count
    )


def _anchor(tokenizer: PreTrainedTokenizerBase, before: str, form: str, written: tuple[int, ...]) -> str:
    """As much of the text before an answer as it takes to have the answer's ids, where they were written so.

    A tokenizer that begins every text with a space (Llama 2's) encodes an answer by itself otherwise.
    """
    ends = ["", *(before[-n:] for n in (1, 4, 16) if n < len(before)), before]
    return next((end for end in ends if encode_after(tokenizer, end, form) == written), before[-1:])


def leave_one_out(
    rewards: Sequence[float],
    outcomes: Sequence[float],
    keys: Sequence[Hashable] | None = None,
    everyone: tuple[Figures, Figures] | None = None,
) -> list[float]:
    """The baseline b of each entry: mean reward of the batch's *other* entries with the same outcome.

    Outcomes count as the same when they round to the same tenth, so that partial credit forms groups
    too. `keys` name the critic completion of each entry; entries of one completion (a prompt state
    shared by its group) are left out together, since b must not depend on what it is subtracted
    from. An entry without others gets its own reward as baseline: it then carries weight 0.
    All lists have one figure per (state, outcome) of the *global* batch, or of a rank's part of it: then
    `everyone` has (rewards, outcomes) of all ranks, and a completion's entries are of one rank.
    """
    names: Sequence[Hashable] = range(len(rewards)) if keys is None else keys
    if not len(rewards) == len(outcomes) == len(names):
        raise ValueError("rewards, outcomes and keys must be equally long")
    own: dict[Hashable, list[float]] = defaultdict(list)
    every, theirs = (np.asarray(figures, np.float64) for figures in everyone or (rewards, outcomes))
    levels = np.rint(theirs * 10).astype(np.int64)  # as `_level`
    totals = {int(level): every[levels == level].tolist() for level in np.unique(levels)}
    for value, outcome, name in zip(rewards, outcomes, names, strict=True):
        own[_level(outcome), name].append(value)
    sums = {level: math.fsum(values) for level, values in totals.items()}
    baselines = []
    for value, outcome, name in zip(rewards, outcomes, names, strict=True):
        level = _level(outcome)
        mine = own[level, name]
        others = len(totals[level]) - len(mine)
        baselines.append((sums[level] - math.fsum(mine)) / others if others else value)
    return baselines


def reinforce_weights(
    rewards: Sequence[float],
    outcomes: Sequence[float],
    keys: Sequence[Hashable],
    baseline: Literal["leave_one_out", "none"] = "leave_one_out",
    ratios: Sequence[float] | None = None,
    everyone: tuple[Figures, Figures] | None = None,
) -> dict[Hashable, float]:
    """w = R_v - b per critic completion, the mean over its entries where it was judged on several.

    A prompt state is scored once for its whole group and so meets several outcomes. No division by a
    deviation. Without a baseline w = R_v. ratios:
    importance weights of the entries, by which R_v - b counts. everyone: as for `leave_one_out`.
    """
    baselines = (
        leave_one_out(rewards, outcomes, keys, everyone)
        if baseline == "leave_one_out"
        else [0.0] * len(rewards)
    )
    parts: dict[Hashable, list[float]] = defaultdict(list)
    counts = [1.0] * len(rewards) if ratios is None else ratios
    for value, base, key, count in zip(rewards, baselines, keys, counts, strict=True):
        parts[key].append(count * (value - base))
    return {key: math.fsum(values) / len(values) for key, values in parts.items()}


def fill_used(
    judgements: Sequence[Judgement], p_bar: float, score: Literal["sampled", "soft"] = "sampled"
) -> list[float]:
    """Set and return `used` for the judgements of one response, in order of their states.

    The parsed value (or the soft one, where asked for and there), or the outcome that was certain; where
    nothing parses, the previous state's, and p_bar before the first: 0 would hand the segment before it a
    bogus malus and its own a bogus bonus.
    """
    last = p_bar
    for judgement in judgements:
        value = judgement.value if judgement.certain is None else judgement.certain
        if score == "soft" and judgement.soft is not None:
            value = judgement.soft
        last = last if value is None else value
        judgement.used = last
    return [judgement.used for judgement in judgements]


def _level(outcome: float) -> int:
    return round(outcome * 10)


def _decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    text = tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text
