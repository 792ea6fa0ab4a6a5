"""A tiny Qwen3-MoE trained with experts over ranks: the same steps and weights as on one rank."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.cases import (
    make_role,
    make_samples,
    published,
    repeats,
    role_config,
    train,
    train_case,
)

EXPERTS = {"experts": 4, "experts_per_token": 2, "expert_ffn": 24, "norm_topk": True}
FAMILY = {"family": "qwen3_moe", "shape": EXPERTS}
# Sums in another order, three steps of Adam: measured at most 3e-6 (figures) and 5e-6 (weights).
TOLERANCE = 2e-5

LAYOUTS: dict[str, dict[str, Any]] = {
    "ep2": {"count": 2, "ep": 2},
    "ep4": {"ep": 4},
    "tp2": {"count": 2, "tp": 2},  # every rank has all experts, and half of the tokens
    "tp2-dp2": {"tp": 2},
    "dp4-ep2": {"ep": 2},
    "tp2-dp2-ep2": {"tp": 2, "ep": 2},
    "tp2-ep4": {"tp": 2, "ep": 4},
    "pp2-ep2": {"pp": 2, "ep": 2},
}
# So that four ranks with two of each expert too accumulate over micro-batches.
SMALL = {"dp4-ep2": 48}


@pytest.fixture(scope="module")
def one_rank(pool: Any) -> Any:
    return pool.run(train_case, role_config(layout={"count": 1}, **FAMILY), 3)[0]


def assert_same(got: Any, wanted: Any, tolerance: float = TOLERANCE) -> None:
    close = {"atol": tolerance, "rtol": tolerance}
    for mine, theirs in zip(got["before"], wanted["before"], strict=True):
        torch.testing.assert_close(torch.tensor(mine), torch.tensor(theirs), **close)
    torch.testing.assert_close(torch.tensor(got["figures"]), torch.tensor(wanted["figures"]), **close)
    assert got["weights"].keys() == wanted["weights"].keys()
    for name, weight in wanted["weights"].items():
        torch.testing.assert_close(got["weights"][name], weight, **close, msg=name)


@pytest.mark.parametrize("name", list(LAYOUTS))
def test_the_layout_of_experts_changes_no_step(name: str, pool: Any, one_rank: Any) -> None:
    training = {"tokens_per_microbatch": SMALL[name]} if name in SMALL else {}
    results = pool.run(train_case, role_config(layout=LAYOUTS[name], training=training, **FAMILY), 3)
    for result in results:
        assert_same(result, one_rank)


def test_the_dispatcher_changes_no_step(pool: Any, one_rank: Any) -> None:
    config = role_config(layout={"ep": 4}, training={"moe_dispatcher": "allgather"}, **FAMILY)
    assert_same(pool.run(train_case, config, 3)[0], one_rank)


def test_balancing_is_the_same_wherever_experts_are(pool: Any, one_rank: Any) -> None:
    """It is a figure of each micro-batch: layouts with the same micro-batches agree, with or without ep."""
    training = {"moe_aux_loss": 0.1}
    alone = pool.run(train_case, role_config(layout={}, training=training, **FAMILY), 3)[0]
    spread = pool.run(train_case, role_config(layout={"ep": 4}, training=training, **FAMILY), 3)[0]
    assert_same(spread, alone)
    router = "model.layers.0.mlp.gate.weight"
    assert (alone["weights"][router] - one_rank["weights"][router]).abs().max() > 1e-3


def save_case(rank: int, folder: str, layout: dict[str, Any]) -> Any:
    from genac_megatron.training.checkpoint import Checkpoints

    role = make_role("actor", role_config(layout=layout, **FAMILY), 4)
    role.begin_stage(None, 10)
    train(role, 1)
    Checkpoints(Path(folder), keep=1, asynchronous=False).save("ppo-00001", {"actor": role}, {})
    return published(role), train(role, 1, 1), role.logprobs(make_samples(5, 3))


def load_case(rank: int, folder: str, layout: dict[str, Any]) -> Any:
    from genac_megatron.training.checkpoint import Checkpoints, load_checkpoint

    role = make_role("actor", role_config(layout=layout, **FAMILY), 4, seed=9)
    role.begin_stage(None, 10)
    newest = Checkpoints(Path(folder), keep=1, asynchronous=False).newest()
    assert newest is not None
    load_checkpoint(newest[0], {"actor": role})
    load_checkpoint(newest[0], {"actor": role}, optimizers=True)
    return published(role), train(role, 1, 1), role.logprobs(make_samples(5, 3))


SAVED = {"tp": 2, "ep": 2}
MOVES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "tp2-ep2 to ep4": (SAVED, {"ep": 4}),
    "tp2-ep2 to pp2-ep2": (SAVED, {"pp": 2, "ep": 2}),
    "tp2-ep2 to one rank": (SAVED, {"count": 1}),
    "one rank to tp2-ep2": ({"count": 1}, SAVED),
    "tp2 to ep2": ({"count": 2, "tp": 2}, {"count": 2, "ep": 2}),
    "dp2 to tp2": ({"count": 2}, {"count": 2, "tp": 2}),
}


@pytest.mark.parametrize("move", repeats(MOVES, "tp2-ep2 to ep4", "tp2-ep2 to one rank", "dp2 to tp2"))
def test_a_checkpoint_of_experts_goes_on_in_another_layout(move: str, pool: Any, tmp_path: Path) -> None:
    """Weights, optimizer states and all: whether experts are over ranks or not."""
    before, after = MOVES[move]
    weights, figures, scores = pool.run(save_case, str(tmp_path), before)[0]
    weights2, figures2, scores2 = pool.run(load_case, str(tmp_path), after)[0]
    assert all(torch.equal(weights[name], weights2[name]) for name in weights)
    close = {"atol": TOLERANCE, "rtol": TOLERANCE}
    torch.testing.assert_close(torch.tensor(figures), torch.tensor(figures2), **close)
    for mine, theirs in zip(scores, scores2, strict=True):
        torch.testing.assert_close(torch.tensor(mine), torch.tensor(theirs), **close)


def engine_case(rank: int, layout: dict[str, Any]) -> Any:
    """Log-probs of some continuations: the trainer's, and the engine's after a publication."""
    from genac_megatron.models.registry import hf_config
    from genac_megatron.publication.publisher import Publisher
    from genac_megatron.recipe.schema import EngineConfig
    from genac_megatron.serving.embedded import EmbeddedEngine

    role = make_role("actor", role_config(layout=layout, **FAMILY), 4)
    engine = EmbeddedEngine(hf_config(role.shape), EngineConfig(dtype="fp32"), "cpu")
    Publisher(role, [engine]).publish(1)
    samples = make_samples(5, 4)  # none has a tie between experts, which rounding would decide
    trainer = [sum(logprobs) for logprobs in role.logprobs(samples)]
    cuts = [len(sample.tokens) - sample.trained for sample in samples]
    scored = [
        asyncio.run(engine.score(sample.tokens[:cut], [sample.tokens[cut:]]))[0]
        for sample, cut in zip(samples, cuts, strict=True)
    ]
    return trainer, scored


def test_the_engine_computes_what_experts_over_ranks_do(pool: Any) -> None:
    for trainer, scored in pool.run(engine_case, {"tp": 2, "ep": 2}):
        torch.testing.assert_close(torch.tensor(trainer), torch.tensor(scored), atol=1e-4, rtol=1e-5)
