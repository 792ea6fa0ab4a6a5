"""Packs of trees train like flat packs, in every layout: log-probs, losses, gradient norms, weights."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch

from tests.distributed.cases import make_role, published, role_config
from tests.distributed.test_moe import EXPERTS, FAMILY

# fp32. On one rank what differs is the order of sums: relative to the largest of what is compared.
CLOSE = 1e-6
# Between layouts too, as tests/distributed/test_role.py has them.
LOSS, NORM, WEIGHT = 1e-5, 1e-5, 2e-5
VOCAB = 67

LAYOUTS: dict[str, dict[str, Any]] = {
    "dp2": {"count": 2},
    "tp2": {"count": 2, "tp": 2, "sequence_parallel": False},
    "tp2-sp": {"count": 2, "tp": 2},
    "pp2": {"count": 2, "pp": 2},
    "pp2-vpp2": {"count": 2, "pp": 2, "vpp": 2},
    "tp2-pp2": {"tp": 2, "pp": 2},
    "tp2-dp2": {"tp": 2},
}
KINDS = ("actor", "critic", "value", "sft")


def ids(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(VOCAB) for _ in range(count)]


def group(rng: random.Random) -> list[Any]:
    """Five responses to a prompt: two begin alike, two are the same, one is the beginning of another."""
    from genac_megatron.records import Sample

    prompt = ids(rng, rng.randint(20, 30))
    responses = [ids(rng, rng.randint(4, 16)) for _ in range(3)]
    responses += [[*responses[0][:3], *ids(rng, 5)], responses[1], responses[2][:3]]
    return [Sample([*prompt, *response], len(prompt)) for response in responses]


def states(rng: random.Random) -> list[Any]:
    """Judgements of three nested states of a response, and two of one of them."""
    from genac_megatron.records import Sample

    trunk = ids(rng, rng.randint(40, 50))
    cuts = [18, 27, 36, 36]
    return [Sample([*trunk[:cut], *ids(rng, rng.randint(6, 12))], cut + 2) for cut in cuts]


def batch(kind: str, seed: int, experts: bool = False) -> list[Any]:
    """Trees of a kind and some samples by themselves, in a random order."""
    from genac_megatron.records import Sample

    rng = random.Random(seed)
    make = states if kind in ("critic", "sft") else group
    samples = [sample for _ in range(3) for sample in make(rng)]
    samples += [Sample(ids(rng, rng.randint(6, 30)), rng.randint(1, 4)) for _ in range(2)]
    rng.shuffle(samples)
    total = sum(sample.trained for sample in samples)
    for sample in samples:
        n = sample.trained
        sample.fields = {"weights": [1 / total] * n}
        if kind == "value":
            sample.fields |= {"targets": [float(rng.random() < 0.5)] * n, "old": [0.1] * n}
        elif kind != "sft":
            sample.fields["advantages"] = [rng.gauss(0, 1) for _ in range(n)]
            sample.fields["behaviour"] = [-4.0 + rng.gauss(0, 0.3) for _ in range(n)]
    if experts:
        add_experts(samples, seed)
    return samples


def add_experts(samples: list[Any], seed: int) -> None:
    """Each token's experts are a function of what is before it, as an engine's are; of two samples they are
    the engine's of another time."""
    for number, sample in enumerate(samples):
        chosen = []
        for t in range(len(sample.tokens) - 1):
            seed_of = hash((seed, number if number < 2 else -1, *sample.tokens[: t + 1]))
            rng = random.Random(seed_of)
            chosen.append([rng.sample(range(EXPERTS["experts"]), 2) for _ in range(4)])
        sample.experts = np.array(chosen, np.uint8)


def loss_of(kind: str) -> Any:
    from genac_megatron.algorithms import losses
    from genac_megatron.recipe.algorithms import CriticLossConfig
    from genac_megatron.recipe.schema import LossConfig

    return {
        "actor": lambda: losses.make_ppo_loss(LossConfig(entropy_coef=0.01)),
        "critic": lambda: losses.make_reinforce_loss(CriticLossConfig(entropy_coef=0.01)),
        "value": lambda: losses.make_value_loss(0.5),
        "sft": losses.make_sft_loss,
    }[kind]()


def config_of(kind: str, trees: bool, layout: dict[str, Any], **training: Any) -> Any:
    moe = training.pop("moe", False)
    config = role_config(
        layout=layout,
        training={"tokens_per_microbatch": 160, **training, "share_prefixes": trees},
        **(FAMILY if moe else {}),
    )
    if kind == "value":
        config = config.model_copy(update={"model": config.model.model_copy(update={"head": "value"})})
    return config


def case(rank: int, kind: str, config: Any, experts: bool = False) -> Any:
    """Old log-probs, three steps, and weights; and what share of the tokens was computed."""
    role = make_role("actor", config, torch.distributed.get_world_size())
    role.begin_stage(None, 10)
    options: dict[str, Any] = {} if kind == "value" else {"temperature": 0.8}
    counts: list[float] = []
    samples = batch(kind, 5, experts)
    before = role.logprobs(samples, **options, counted=counts.append)
    told: list[list[float]] = [[] for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather_object(told, counts)
    (computed,) = (count for own in told for count in own)  # by one rank, of all
    figures, shares = [], [computed / sum(len(sample.tokens) - 1 for sample in samples)]
    entropy = {} if kind == "value" else {"with_entropy": True}
    for step in range(3):
        result = role.train_step(batch(kind, 100 + step, experts), loss_of(kind), **options, **entropy)
        figures.append({k: v for k, v in result.stats.items() if k not in ("computed_tokens", "updated")})
        shares.append(result.stats["computed_tokens"] / result.stats["tokens"])
    return {"before": before, "figures": figures, "shares": shares, "weights": published(role)}


@pytest.fixture(scope="module")
def flat(pool: Any) -> dict[str, Any]:
    """One rank, flat packs."""
    return {kind: pool.run(case, kind, config_of(kind, False, {"count": 1}))[0] for kind in KINDS}


def check(got: Any, wanted: Any, *, close: float, loss: float, norm: float, weight: float) -> None:
    assert wanted["shares"] == [1.0] * 4, "of a forward pass and three steps"
    assert all(0.3 < share < 0.9 for share in got["shares"]), got["shares"]
    assert len(got["before"]) == len(wanted["before"])
    for mine, theirs in zip(got["before"], wanted["before"], strict=True):
        assert mine == pytest.approx(theirs, rel=close, abs=close)
    for mine, theirs in zip(got["figures"], wanted["figures"], strict=True):
        assert mine.keys() == theirs.keys()
        for key, value in theirs.items():
            assert mine[key] == pytest.approx(value, rel=norm if key == "grad_norm" else 0, abs=loss), key
    assert got["weights"].keys() == wanted["weights"].keys()
    for name, tensor in wanted["weights"].items():
        torch.testing.assert_close(got["weights"][name], tensor, atol=weight, rtol=0, msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_trees_train_like_flat_packs(pool: Any, flat: Any, kind: str) -> None:
    got = pool.run(case, kind, config_of(kind, True, {"count": 1}))[0]
    check(got, flat[kind], close=2 * CLOSE, loss=2 * CLOSE, norm=2 * CLOSE, weight=WEIGHT)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["actor", "critic"])
def test_trees_train_like_flat_packs_in_every_layout(pool: Any, flat: Any, kind: str, layout: str) -> None:
    for got in pool.run(case, kind, config_of(kind, True, LAYOUTS[layout])):
        check(got, flat[kind], close=LOSS, loss=LOSS, norm=NORM, weight=WEIGHT)


@pytest.mark.parametrize("layout", ["tp2-sp", "pp2-vpp2"])
@pytest.mark.parametrize("kind", ["value", "sft"])
def test_values_and_traces_too(pool: Any, flat: Any, kind: str, layout: str) -> None:
    for got in pool.run(case, kind, config_of(kind, True, LAYOUTS[layout])):
        check(got, flat[kind], close=LOSS, loss=LOSS, norm=NORM, weight=WEIGHT)


@pytest.mark.parametrize("how", ["flex", "merged"])
@pytest.mark.parametrize("layout", ["one", "tp2-sp"])
def test_the_ways_of_a_gpu_train_like_flat_packs(pool: Any, flat: Any, how: str, layout: str) -> None:
    """FlexAttention, and merged calls, behind the layer's own attention: here of torch's layers, on a CPU."""
    config = config_of("critic", True, LAYOUTS.get(layout, {"count": 1}), tree_attention=how)
    check(
        pool.run(case, "critic", config)[0], flat["critic"], close=LOSS, loss=LOSS, norm=NORM, weight=WEIGHT
    )


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputed_trees_train_like_flat_packs(pool: Any, flat: Any, recompute: str) -> None:
    got = pool.run(case, "critic", config_of("critic", True, LAYOUTS["tp2-sp"], recompute=recompute))[0]
    check(got, flat["critic"], close=LOSS, loss=LOSS, norm=NORM, weight=WEIGHT)


@pytest.mark.parametrize("layout", ["tp2-sp", "pp2", "ep2"])
def test_experts_are_replayed_in_trees(pool: Any, layout: str) -> None:
    """Two samples of each batch went to other experts: their tokens are computed apart."""
    wanted = pool.run(case, "actor", config_of("actor", False, {"count": 1}, moe=True), True)[0]
    cut = LAYOUTS.get(layout, {"count": 2, "ep": 2})
    got = pool.run(case, "actor", config_of("actor", True, cut, moe=True), True)[0]
    check(got, wanted, close=2 * LOSS, loss=2 * LOSS, norm=2 * NORM, weight=2 * WEIGHT)


def balanced(rank: int) -> float:
    layout = {"count": 1}
    config = config_of("actor", True, layout, moe=True, moe_aux_loss=0.01)
    role = make_role("actor", config, torch.distributed.get_world_size())
    role.begin_stage(None, 10)
    stats = role.train_step(batch("actor", 100), loss_of("actor"), with_entropy=True).stats
    share: float = stats["computed_tokens"] / stats["tokens"]
    return share


def test_a_load_balancing_loss_keeps_packs_flat(pool: Any) -> None:
    """It counts tokens by expert, so a shared token would count once."""
    assert pool.run(balanced)[0] == 1.0
