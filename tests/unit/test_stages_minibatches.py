"""Minibatches: each epoch visits every sample once, and every part's loss weights sum to 1."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from genac_megatron.algorithms.losses import token_weights
from genac_megatron.recipe.schema import PpoStage
from genac_megatron.records import Sample
from genac_megatron.stages.minibatches import minibatches, updates


def make_samples(count: int, seed: int, aggregate: str) -> list[Sample]:
    rng = random.Random(seed)
    lengths = [rng.randint(1, 12) for _ in range(count)]
    weights = token_weights(lengths, aggregate).tolist()
    return [
        Sample(
            [1000 + i, *range(n)],
            1,
            {"weights": [w] * n, "advantages": [rng.gauss(0, 1)] * n, "old": [-1.0] * n},
        )
        for i, (n, w) in enumerate(zip(lengths, weights, strict=True))
    ]


@given(
    st.integers(1, 20),
    st.integers(1, 6),
    st.integers(1, 3),
    st.integers(0, 99),
    st.sampled_from(["token", "sequence"]),
)
def test_parts_are_a_partition_with_weights_of_their_own(
    count: int, parts: int, epochs: int, seed: int, aggregate: str
) -> None:
    samples = make_samples(count, seed, aggregate)
    made = minibatches(samples, parts, epochs, seed)
    assert len(made) == epochs * min(parts, count)
    assert all(made)
    by_name = {sample.tokens[0]: sample for sample in samples}
    each = len(made) // epochs
    for epoch in range(epochs):
        seen = Counter(s.tokens[0] for part in made[epoch * each : (epoch + 1) * each] for s in part)
        assert seen == Counter(by_name.keys())
    for part in made:
        assert len(part) - count // min(parts, count) in (0, 1)  # as even as can be
        # Weights are float32 to begin with: 2^-24 of each.
        assert sum(sum(s.fields["weights"]) for s in part) == pytest.approx(1.0, abs=1e-6)
        factors = []
        for sample in part:
            source = by_name[sample.tokens[0]]
            assert (sample.tokens, sample.start) == (source.tokens, source.start)
            for name in ("advantages", "old"):
                assert sample.fields[name] == source.fields[name]
            pairs = zip(sample.fields["weights"], source.fields["weights"], strict=True)
            factors += [mine / theirs for mine, theirs in pairs]
        assert factors == pytest.approx([factors[0]] * len(factors)), "weights keep their ratios"


def test_the_order_is_the_seeds() -> None:
    samples = make_samples(12, 0, "token")
    orders = [
        [[s.tokens[0] for s in part] for part in minibatches(samples, 3, 2, seed)] for seed in (1, 1, 2)
    ]
    assert orders[0] == orders[1] != orders[2]
    assert orders[0][:3] != orders[0][3:], "epochs are shuffled anew"


def test_the_samples_themselves_stay_as_they_are() -> None:
    samples = make_samples(5, 0, "token")
    before = [dict(sample.fields) for sample in samples]
    minibatches(samples, 2, 1, 0)
    assert [sample.fields for sample in samples] == before


def test_constant_weights_are_scaled_by_the_number_of_samples_alone() -> None:
    samples = make_samples(10, 3, "token")
    for sample in samples:
        sample.fields["weights"] = [1 / (10 * 12)] * sample.trained  # Dr.GRPO, a limit of 12 tokens
    for part in minibatches(samples, 2, 1, 0, constant=True):
        assert {w for s in part for w in s.fields["weights"]} <= {1 / (10 * 12) * 2}


def test_likelihood_weights_keep_their_sum_where_a_part_has_right_responses() -> None:
    samples = make_samples(9, 4, "token")
    right = sum(s.trained for s in samples[:4])
    for i, sample in enumerate(samples):
        sample.fields["nll_weights"] = [1 / right if i < 4 else 0.0] * sample.trained
    for part in minibatches(samples, 3, 1, 1):
        total = sum(sum(s.fields["nll_weights"]) for s in part)
        assert total == pytest.approx(1.0) or total == 0.0


@pytest.mark.parametrize(
    ("prompts", "samples", "parts", "epochs"), [(2, 2, 8, 1), (2, 2, 3, 2), (4, 4, 4, 3)]
)
def test_a_stage_counts_the_updates_that_its_batches_give(
    prompts: int, samples: int, parts: int, epochs: int
) -> None:
    """What its learning-rate schedule ends after."""
    stage = PpoStage.model_validate(
        {
            "kind": "ppo",
            "minibatches": parts,
            "epochs": epochs,
            "rollout": {"prompts": prompts, "samples": samples},
        }
    )
    made = minibatches(make_samples(prompts * samples, 0, "token"), parts, epochs, 0)
    assert updates(stage) == len(made)
