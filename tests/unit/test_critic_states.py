"""Segmentation: tiling, lengths, thinning, the three cutters, and the text of states."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genac_megatron.critic.states import cut_states, spread, state_text, trained_indices, trained_responses
from genac_megatron.recipe.schema import StatesConfig
from genac_megatron.records import Completion, Prompt, Rollout
from genac_megatron.tasks.tokenizer import load_tokenizer

TINY = load_tokenizer("builtin:tiny")
PROMPT = Prompt("train/0", (), "problem", None)
configs = st.builds(
    StatesConfig,
    cutter=st.sampled_from(["lines", "fixed", "low_prob"]),
    max_states=st.integers(1, 9),
    min_segment=st.integers(1, 12),
    fixed_length=st.integers(1, 20),
    low_prob=st.floats(0, 1),
)


def rollout(ids: list[int], logprobs: list[float] | None = None, limit: int | None = None) -> Rollout:
    completion = Completion(tuple(ids), tuple(logprobs or [-0.1] * len(ids)), "stop")
    return Rollout(PROMPT, 0, completion, str(TINY.decode(ids, skip_special_tokens=True)), limit=limit)


def encode(text: str) -> list[int]:
    return list(TINY.encode(text, add_special_tokens=False))


tokens = st.lists(
    st.tuples(st.integers(0, len(TINY) - 1) | st.just(encode("\n")[0]), st.floats(-8, 0)), max_size=80
)


@settings(max_examples=300)
@given(tokens, configs, st.none() | st.integers(80, 200))
def test_segments_tile_the_response(
    pairs: list[tuple[int, float]], config: StatesConfig, limit: int | None
) -> None:
    made = rollout([p[0] for p in pairs], [p[1] for p in pairs], limit)
    states = cut_states(made, TINY, config)
    assert states[0].cut == 0
    assert states[-1].end == len(pairs)
    assert [s.index for s in states] == list(range(len(states)))
    assert all(a.end == b.cut for a, b in itertools.pairwise(states))
    assert len(states) <= config.max_states
    assert all(s.end - s.cut >= config.min_segment for s in states[:-1])
    assert states[-1].end > states[-1].cut or not pairs
    for state in states[1:]:
        ids, logprobs = made.completion.ids, made.completion.logprobs
        if config.cutter == "lines":
            assert "\n" in TINY.decode([ids[state.cut - 1]])
        elif config.cutter == "fixed":
            assert state.cut % config.fixed_length == 0
        else:
            assert math.exp(logprobs[state.cut - 1]) < config.low_prob


def test_lines_cut_after_the_token_with_the_line_end() -> None:
    ids = [*encode("first line\nsecond line\n\nthird"), TINY.eos_token_id]
    states = cut_states(rollout(ids), TINY, StatesConfig(min_segment=2))
    texts = [state_text(s, TINY) for s in states]
    assert texts[0] == ""
    assert texts[1] == "first line\n"
    assert texts[2].startswith("first line\nsecond line\n")
    assert [TINY.decode(ids[: s.cut]) for s in states] == texts
    long = cut_states(rollout(ids), TINY, StatesConfig(min_segment=len(ids)))
    assert [(s.cut, s.end) for s in long] == [(0, len(ids))]


def test_every_cut_is_found_where_nothing_forbids_it() -> None:
    ids = encode("a\nb\nc\nd\ne")
    states = cut_states(rollout(ids), TINY, StatesConfig(min_segment=1, max_states=99))
    assert [state_text(s, TINY) for s in states] == ["", "a\n", "a\nb\n", "a\nb\nc\n", "a\nb\nc\nd\n"]
    fixed = cut_states(
        rollout(list(range(10))), TINY, StatesConfig(cutter="fixed", fixed_length=4, min_segment=1)
    )
    assert [(s.cut, s.end) for s in fixed] == [(0, 4), (4, 8), (8, 10)]
    low = StatesConfig(cutter="low_prob", low_prob=0.2, min_segment=2)
    unsure = cut_states(rollout(list(range(9)), [-3, -3, -0.1, -3, -0.1, -0.1, -3, -0.1, -3]), TINY, low)
    assert [s.cut for s in unsure] == [0, 2, 4, 7]  # after the token that nobody expected


@pytest.mark.parametrize(
    ("most", "limit", "lines", "wanted"),
    [
        (6, 64, 2, [0, 15, 23]),  # the quickstart: no cut of its responses is lost
        (6, 64, 5, [0, 15, 23, 31, 39, 47]),
        (2, 64, 2, [0, 23]),
        (2, 64, 5, [0, 23]),
        (4, 128, 1, [0, 22]),  # what is left is the end token: that is not known there
        (4, 128, 2, [0, 23]),
        (4, 128, 9, [0, 23, 39, 71]),
    ],
)
def test_few_states_lie_apart_in_long_responses_and_are_there_in_short_ones(
    most: int, limit: int, lines: int, wanted: list[int]
) -> None:
    """Of a response whose lines have 8 tokens, after a first one of 7."""
    text = "start : a b c d\n" + "1 ab : a b c d\n" * lines + "answer : a b c d\n"
    made = rollout([*encode(text), TINY.eos_token_id], limit=limit)
    assert [s.cut for s in cut_states(made, TINY, StatesConfig(max_states=most, min_segment=8))] == wanted


def test_an_empty_response_has_its_prompt_state() -> None:
    assert [(s.cut, s.end) for s in cut_states(rollout([]), TINY, StatesConfig())] == [(0, 0)]


@given(st.integers(0, 60), st.integers(0, 12))
def test_trained_states_are_evenly_spread(count: int, limit: int) -> None:
    kept = spread(count, limit)
    assert len(kept) == min(count, limit)
    assert kept == sorted(set(kept))
    assert set(kept) <= set(range(count))
    if kept and count > limit:
        gaps = [b - a for a, b in zip([-1, *kept], [*kept, count], strict=True)]
        assert max(gaps) - min(gaps) <= 1


@given(st.integers(1, 40), st.integers(1, 10))
def test_trained_states_hold_the_first_and_the_last(count: int, limit: int) -> None:
    kept = trained_indices(count, limit)
    assert len(kept) == min(count, limit)
    assert kept == sorted(set(kept))
    assert kept[0] == 0
    if limit > 1:
        assert kept[-1] == count - 1


@given(st.integers(1, 200), st.floats(0.01, 1.0))
def test_trained_responses_are_a_share_evenly_spread(count: int, share: float) -> None:
    kept = trained_responses(count, share)
    assert len(kept) == max(1, round(count * share))
    assert kept == sorted(set(kept))
    assert kept[0] >= 0
    assert kept[-1] == count - 1
    gaps = {b - a for a, b in itertools.pairwise(kept)}
    assert len(gaps) < 3
    assert max(gaps, default=0) - min(gaps, default=0) <= 1
    assert trained_responses(count, 1.0) == list(range(count))


def test_state_text_leaves_out_half_characters_and_special_tokens() -> None:
    ids = encode("né")
    assert len(ids) >= 3  # the accent takes two byte tokens
    made = rollout([*ids, TINY.eos_token_id])
    states = cut_states(made, TINY, StatesConfig(cutter="fixed", fixed_length=1, min_segment=1, max_states=9))
    assert [state_text(s, TINY) for s in states] == ["", "n", "n", "né"]
    made.completion = Completion((*ids, TINY.eos_token_id, *ids), (0.0,) * (2 * len(ids) + 1), "stop")
    states[-1].cut = 2 * len(ids) + 1
    assert state_text(states[-1], TINY) == "néné"


@pytest.mark.parametrize("cutter", ["lines", "fixed", "low_prob"])
def test_state_texts_nest(cutter: str) -> None:
    ids = encode("one two\nthree four\nfive\n" * 4)
    config = StatesConfig.model_validate({"cutter": cutter, "min_segment": 3, "fixed_length": 7})
    states = cut_states(rollout(ids, [-3.0] * len(ids)), TINY, config)
    texts = [state_text(s, TINY) for s in states]
    assert len(texts) > 3
    assert all(b.startswith(a) for a, b in itertools.pairwise(texts))
