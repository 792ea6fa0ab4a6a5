"""SFT samples in REINFORCE's steps: their share, their weights, and the loss that has them."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from genac_megatron.algorithms.losses import make_reinforce_loss
from genac_megatron.algorithms.replay import with_replay
from genac_megatron.recipe.algorithms import CriticLossConfig
from genac_megatron.records import Sample
from genac_megatron.stages.ranks import ALONE
from genac_megatron.stages.replay import Replay, replay_samples


def pool(count: int = 40) -> list[Sample]:
    rng = random.Random(0)
    samples = []
    for n in range(count):
        length = rng.randint(4, 12)
        weights = [1.0] * length
        weights[-2] = 0.0
        fields = {"weights": weights} if n % 2 else {}
        samples.append(
            Sample([n] * (length + 3), 3, fields, source=str(n), part="long" if n % 2 else "short")
        )
    return samples


@given(st.integers(1, 400), st.floats(0.05, 0.6), st.integers(0, 9))
def test_a_replay_has_its_share_of_the_loss_tokens(tokens: int, share: float, seed: int) -> None:
    chosen = replay_samples(pool(), tokens, share, seed)
    carrying = sum(weight > 0 for sample in chosen for weight in sample.fields["nll_weights"])
    wanted = tokens * share / (1 - share)
    everything = sum(len(s.tokens) - s.start - (1 if s.fields else 0) for s in pool())
    assert min(wanted, everything) <= carrying < wanted + 12
    assert sum(sum(s.fields["nll_weights"]) for s in chosen) == pytest.approx(1.0)
    assert chosen == replay_samples(pool(), tokens, share, seed), "a resumed step has the same"
    for sample in chosen:
        assert set(sample.fields) == {"weights", "advantages", "behaviour", "nll_weights"}
        assert not any(map(any, (sample.fields[name] for name in ("weights", "advantages", "behaviour"))))
        assert (sample.fields["nll_weights"][-2] == 0.0) == (sample.part == "long"), "masked as it was"


def test_steps_draw_apart() -> None:
    drawn = [tuple(s.source for s in replay_samples(pool(), 60, 0.3, seed)) for seed in range(6)]
    assert len(set(drawn)) > 1


@given(st.lists(st.tuples(st.floats(-6, -0.01), st.floats(0, 1)), min_size=2, max_size=8), st.floats(0.01, 2))
def test_the_loss_gains_the_replays_cross_entropy(rows: list[tuple[float, float]], weight: float) -> None:
    logp = torch.tensor([row[0] for row in rows], dtype=torch.float64, requires_grad=True)
    half = len(rows) // 2
    zeros, ones = torch.zeros(len(rows), dtype=torch.float64), torch.ones(len(rows), dtype=torch.float64)
    own = torch.tensor([1.0 if n < half else 0.0 for n in range(len(rows))], dtype=torch.float64)
    nll = torch.tensor([0.0 if n < half else row[1] for n, row in enumerate(rows)], dtype=torch.float64)
    fields = {"weights": own, "advantages": 0.5 * own, "behaviour": logp.detach() * own, "nll_weights": nll}
    inner = make_reinforce_loss(CriticLossConfig())
    plain, stats = inner(logp, ones, fields)
    loss, more = with_replay(inner, weight)(logp, ones, fields)
    by_hand = -sum(float(w) * row[0] for w, row in zip(nll, rows, strict=True))
    assert float((loss - plain).detach()) == pytest.approx(weight * by_hand, abs=1e-9)
    assert float(more["replay_nll"]) == pytest.approx(by_hand, abs=1e-9)
    assert {name: float(more[name]) for name in stats} == {
        name: float(value) for name, value in stats.items()
    }
    loss.backward()
    assert logp.grad is not None
    assert torch.allclose(logp.grad[half:], -weight * nll[half:]), (
        "REINFORCE says nothing of what is replayed"
    )
    assert torch.allclose(logp.grad[:half], (-0.5 * own + zeros)[:half]), "nor the replay of REINFORCE's"


def test_figures_are_apart_by_source() -> None:
    replay = Replay.__new__(Replay)  # its figures need nothing of a run
    chosen = replay_samples(pool(), 400, 0.3, 0)
    logprobs = [[-2.0 if s.part == "long" else -1.0] * s.trained for s in chosen]
    figures = replay.figures(chosen, logprobs, ALONE)
    assert figures["replay/nll_long"] == 2.0
    assert figures["replay/nll_short"] == 1.0
    counted = figures["replay/tokens_long"] + figures["replay/tokens_short"]
    assert counted == sum(w > 0 for s in chosen for w in s.fields["nll_weights"])
