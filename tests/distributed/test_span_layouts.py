"""Samples of several trained spans train as those whose other tokens have a loss weight of 0, however cut."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from tests.distributed.cases import make_role, published, role_config
from tests.distributed.test_tree_layouts import LOSS, NORM, WEIGHT, ids, loss_of

LAYOUTS: dict[str, dict[str, Any]] = {
    "trees": {"count": 1},
    "tp2-sp": {"count": 2, "tp": 2},
    "pp2-vpp2": {"count": 2, "pp": 2, "vpp": 2},
    "cp2": {"count": 2, "cp": 2},
}


def batch(seed: int, *, spans: bool) -> list[Any]:
    """Conversations of two groups; without spans everything behind the prompt is trained, at weights of 0
    where others wrote.
    """
    from genac_megatron.records import Sample

    rng, samples = random.Random(seed), []
    for _ in range(2):
        prompt = ids(rng, 20)
        for _ in range(4):
            tokens, own = list(prompt), list[tuple[int, int]]()
            for _ in range(rng.randint(1, 3)):
                own.append((len(tokens), len(tokens) + rng.randint(1, 5)))
                tokens += ids(rng, own[-1][1] - own[-1][0] + rng.randint(1, 6))
            samples.append(Sample(tokens, own[0][0], spans=tuple(own)))
    total = sum(sample.trained for sample in samples)
    for sample in samples:
        own_places = {t for begin, end in sample.spans for t in range(begin, end)}
        kept = [t in own_places for t in range(sample.start, len(sample.tokens))]
        fields = {
            "weights": [mine / total for mine in kept],
            "advantages": [rng.gauss(0, 1) for _ in kept],
            "behaviour": [-4.0 + rng.gauss(0, 0.3) for _ in kept],
        }
        if spans:
            fields = {k: [x for x, mine in zip(v, kept, strict=True) if mine] for k, v in fields.items()}
        else:
            sample.spans = ()
        sample.fields = fields
    return samples


def case(rank: int, config: Any, spans: bool) -> Any:
    """Log-probs of sampled tokens before, figures of two steps, and weights after them."""
    role = make_role("actor", config, torch.distributed.get_world_size())
    role.begin_stage(None, 10)
    before = role.logprobs(batch(5, spans=spans), temperature=0.8)
    if not spans:
        before = [
            [values[t - sample.start] for begin, end in sample.spans for t in range(begin, end)]
            for values, sample in zip(before, batch(5, spans=True), strict=True)
        ]
    figures = []
    for step in range(2):
        made = batch(100 + step, spans=spans)
        result = role.train_step(made, loss_of("actor"), temperature=0.8, with_entropy=True)
        assert [len(one) for one in result.logprobs] == [sample.trained for sample in made]
        figures.append({k: v for k, v in result.stats.items() if k != "computed_tokens"})
    return {"before": before, "figures": figures, "weights": published(role)}


def config_of(layout: dict[str, Any], *, trees: bool) -> Any:
    return role_config(layout=layout, training={"tokens_per_microbatch": 160, "share_prefixes": trees})


@pytest.fixture(scope="module")
def whole(pool: Any) -> Any:
    """One rank, flat packs, one span to a sample."""
    return pool.run(case, config_of({"count": 1}, trees=False), False)[0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_spans_train_like_weights_of_zero(pool: Any, whole: Any, layout: str) -> None:
    for got in pool.run(case, config_of(LAYOUTS[layout], trees=layout != "cp2"), True):
        for mine, theirs in zip(got["before"], whole["before"], strict=True):
            assert mine == pytest.approx(theirs, rel=LOSS, abs=LOSS)
        for mine, theirs in zip(got["figures"], whole["figures"], strict=True):
            assert mine.keys() == theirs.keys()
            for key, value in theirs.items():
                assert mine[key] == pytest.approx(value, rel=NORM if key == "grad_norm" else 0, abs=LOSS), key
        for name, tensor in whole["weights"].items():
            torch.testing.assert_close(got["weights"][name], tensor, atol=WEIGHT, rtol=0, msg=name)
