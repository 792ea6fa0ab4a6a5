"""A baseline has no bias however a response is cut: every response of a small policy, with its probability.

With the value V(prefix) of a state as baseline of its segment's tokens, the mean over responses of
sum_t grad log pi(y_t) V(state of t) must be 0 for any V. It is where each value, and the place that it
stands at, is decided by the tokens before it.
"""

from __future__ import annotations

import functools
import itertools
import math
import random
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genac_megatron.critic.states import cut_states, marks
from genac_megatron.recipe.schema import StatesConfig
from genac_megatron.records import Completion, Prompt, Rollout

LIMIT = 8
END = 2  # the policy's end token; 1 is a line end, 0 a word
PROMPT = Prompt("train/0", (), "p", None)


class Words:
    """As much of a tokenizer as cutting reads."""

    def decode(self, ids: list[int]) -> str:
        return "".join(("x", "\n", "")[token] for token in ids)


def chances(prefix: tuple[int, ...], often: bool) -> np.ndarray:
    """The policy: of each token after a prefix; `often`: line ends are the rule."""
    logits = np.log([0.25, 0.62, 0.13] if often else [0.55, 0.30, 0.15])
    logits[0] += 0.7 * math.sin(1 + sum(prefix) + 2 * len(prefix))
    logits[2] += 0.3 * (len(prefix) % 3)
    return np.exp(logits) / np.exp(logits).sum()


def everything(often: bool) -> Iterator[tuple[Rollout, float, np.ndarray]]:
    """Every response up to LIMIT, its probability, and d log pi / d logits before each token and at the end,
    [T + 1, 3]."""

    def grow(
        prefix: tuple[int, ...], logprobs: tuple[float, ...], scores: tuple[np.ndarray, ...]
    ) -> Iterator[tuple[Rollout, float, np.ndarray]]:
        if prefix and (prefix[-1] == END or len(prefix) == LIMIT):
            done = Completion(prefix, logprobs, "stop" if prefix[-1] == END else "length")
            yield Rollout(PROMPT, 0, done, "", limit=LIMIT), math.exp(sum(logprobs)), np.array(scores)
            return
        p = chances(prefix, often)
        for token in range(3):
            score = scores[-1] + np.eye(3)[token] - p
            yield from grow((*prefix, token), (*logprobs, math.log(p[token])), (*scores, score))

    return grow((), (), (np.zeros(3),))


RESPONSES = {often: list(everything(often)) for often in (False, True)}


@functools.cache
def critics(prefix: tuple[int, ...]) -> np.ndarray:
    """[2, 1]: the value by what was done so far, and one that has nothing in common with another state's."""
    return np.array([[min(1.0, 0.15 + 0.25 * prefix.count(1))], [random.Random(f"critic/{prefix}").random()]])


CUTTERS = {
    "lines": {"cutter": "lines"},
    "fixed-2": {"cutter": "fixed", "fixed_length": 2},
    "low-0.2": {"cutter": "low_prob", "low_prob": 0.2},
    "low-0.4": {"cutter": "low_prob", "low_prob": 0.4},
}


@pytest.mark.parametrize("often", [False, True])
@pytest.mark.parametrize("cutter", CUTTERS)
def test_no_cut_biases_the_gradient(cutter: str, often: bool) -> None:
    """Every cutter, number of states and shortest segment, to rounding; a gradient there is."""
    assert sum(p for _, p, _ in RESPONSES[often]) == pytest.approx(1.0)
    gradient = sum(p * float(r.completion.ids.count(1) >= 2) * to[-1] for r, p, to in RESPONSES[often])
    assert np.linalg.norm(gradient) > 0.05
    for most, shortest in itertools.product((1, 2, 3, 99), (1, 2, 3)):
        config = StatesConfig.model_validate({**CUTTERS[cutter], "max_states": most, "min_segment": shortest})
        bias, largest = np.zeros((2, 3)), 0
        for rollout, chance, scores in RESPONSES[often]:
            states = cut_states(rollout, Words(), config)  # type: ignore[arg-type]
            largest = max(largest, len(states))
            for state in states:
                values = critics(rollout.completion.ids[: state.cut])
                bias += chance * values * (scores[state.end] - scores[state.cut])
        assert largest == most if most < 3 else largest > 1, (most, shortest)
        assert np.abs(bias).max() < 1e-12, (most, shortest, bias)


configs = st.builds(
    StatesConfig,
    cutter=st.sampled_from(["lines", "fixed", "low_prob"]),
    max_states=st.integers(1, 9),
    min_segment=st.integers(1, 6),
    fixed_length=st.integers(1, 7),
    low_prob=st.floats(0, 1),
)
tokens = st.lists(st.tuples(st.integers(0, 2), st.floats(-4, 0)), max_size=40)


@settings(max_examples=300)
@given(tokens, tokens, tokens, configs, st.none() | st.integers(1, 80))
def test_what_follows_moves_no_cut(
    first: list[tuple[int, float]],
    one: list[tuple[int, float]],
    other: list[tuple[int, float]],
    config: StatesConfig,
    limit: int | None,
) -> None:
    found = []
    for rest in (one, other):
        ids, logprobs = zip(*first, *rest, strict=True) if first + rest else ((), ())
        made = Rollout(PROMPT, 0, Completion(ids, logprobs, "stop"), "", limit=limit)
        cuts = [state.cut for state in cut_states(made, Words(), config)]  # type: ignore[arg-type]
        # A cut at the very end of the shorter one has no segment there.
        found.append([cut for cut in cuts if cut < len(first)])
    assert found[0] == found[1]


@given(configs, st.integers(1, 5000))
def test_marks_grow_by_one_ratio_up_to_the_limit(config: StatesConfig, limit: int) -> None:
    found = marks(config, limit)
    assert len(found) == config.max_states - 1
    assert found == sorted(found)
    assert all(config.min_segment <= mark <= max(limit, config.min_segment) for mark in found)
    growth = max(limit / config.min_segment, 1.0)
    for k, mark in enumerate(found, 1):  # the n-th power of mark k is the k-th of the growth, in whole tokens
        below, above = (((mark + more) / config.min_segment) ** config.max_states for more in (0, 1))
        assert below * (1 - 1e-4) <= growth**k <= above


def test_marks_of_the_recipes() -> None:
    assert marks(StatesConfig(max_states=6, min_segment=8), 64) == [11, 16, 22, 32, 45]
    assert marks(StatesConfig(max_states=2, min_segment=8), 64) == [22]
    assert marks(StatesConfig(max_states=8, min_segment=32), 2048) == [53, 90, 152, 256, 430, 724, 1217]
    assert marks(StatesConfig(max_states=1), 64) == []
    assert marks(StatesConfig(max_states=4), None) == [8, 8, 8]  # no limit known: the first ones
