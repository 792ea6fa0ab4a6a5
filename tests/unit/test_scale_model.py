"""The formulas of benchmarks/scale_model.py: by hand, in their limits, and which way they go."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.scale_model import (
    RECIPES,
    Assumed,
    Measured,
    active_parameters,
    bubble,
    decode_s,
    loss,
    place,
    reduce_s,
    rows_of,
    serve_s,
    step_parts,
    train_flops,
    work_of,
)
from genac_megatron.cluster.placement import server_shares
from genac_megatron.models.sizes import parameters
from genac_megatron.recipe.loader import load_recipe
from genac_megatron.recipe.rules import read_shape

ASSUMED = Assumed()
MEASURED = Measured(known_s=1e-6, own_s=1e-6, waste=0.05, unique=1.0, copy=0.6)
PPO_8B = RECIPES / "ppo-qwen3-8b-2n8g-tp4.yaml"
ENDS = (16, 1024)  # GPUs
MOE = RECIPES / "ppo-qwen3-30b-a3b-5n8g-tp2pp2ep8.yaml"


@pytest.fixture(autouse=True)
def models() -> Iterator[Path]:
    with place() as folder:
        yield folder


def shape(path: Path):
    return read_shape(load_recipe(path).roles["actor"].model)


def test_the_weights_that_a_token_meets() -> None:
    """Qwen3-8B without its embedding of 151,936 x 4,096; Qwen3-30B-A3B meets about 3 B, as its name says."""
    assert active_parameters(shape(PPO_8B)) == parameters(shape(PPO_8B)) - 151_936 * 4096
    assert active_parameters(shape(MOE)) == pytest.approx(3.0e9, rel=0.05)


def test_training_flops_by_hand() -> None:
    """6 P T for short sequences; attention adds 12 L q s/2; recomputation a third."""
    one = shape(PPO_8B)
    short, long = (train_flops(one, 1000.0, s, "off") for s in (0.0, 4096.0))
    assert short == 6 * active_parameters(one) * 1000
    assert long - short == pytest.approx(12 * 36 * 4096 * 2048 * 1000)
    assert train_flops(one, 1000.0, 4096.0, "full") == pytest.approx(long * 4 / 3)


def test_a_pipelines_bubble() -> None:
    assert bubble(1, 1, 4) == 0.0
    assert bubble(4, 1, 12) == pytest.approx(3 / 15)
    assert bubble(4, 2, 12) < bubble(4, 1, 12)
    assert bubble(4, 1, 1e9) == pytest.approx(0.0, abs=1e-8)


def test_the_optimizers_traffic_grows_to_a_limit() -> None:
    """Bytes tend to 6 per weight; what goes on growing is the logarithm of latencies."""
    assert reduce_s(1e9, 1, 35e9, 20e-6) == 0.0
    times = [reduce_s(1e9, dp, 35e9, 0.0) for dp in (2, 8, 64, 4096)]
    assert times == sorted(times)
    assert times[0] == pytest.approx(6e9 / 35e9 / 2)
    assert times[-1] == pytest.approx(6e9 / 35e9, rel=1e-3)
    assert reduce_s(0.0, 1024, 35e9, 20e-6) == pytest.approx(2 * 10 * 20e-6)


def test_decoding_is_bound_by_bandwidth_and_then_by_compute() -> None:
    one, assumed = shape(PPO_8B), replace(ASSUMED, step_overhead=0.0)
    alone = decode_s(one, 1, 1, 0.0, assumed)
    assert alone == pytest.approx(2 * active_parameters(one) / assumed.hbm)
    assert decode_s(one, 4, 1, 0.0, assumed) == pytest.approx(alone / 4)
    assert decode_s(one, 1, 64, 0.0, assumed) == pytest.approx(alone), "64 for the price of one"
    many = 10_000
    assert decode_s(one, 1, many, 0.0, assumed) == pytest.approx(
        2 * active_parameters(one) * many / (assumed.peak * assumed.mfu)
    )
    assert decode_s(one, 1, 64, 2048.0, assumed) > alone, "caches are read too"


def test_few_requests_meet_few_experts() -> None:
    one, assumed = shape(MOE), replace(ASSUMED, step_overhead=0.0)
    whole = 2 * (parameters(one) - one.vocab * one.hidden) / assumed.hbm
    assert decode_s(one, 1, 1, 0.0, assumed) == pytest.approx(2 * active_parameters(one) / assumed.hbm)
    assert decode_s(one, 1, 200, 0.0, assumed) == pytest.approx(whole, rel=1e-2)


def test_servers_share_requests() -> None:
    role, one = load_recipe(PPO_8B).roles["actor"], shape(PPO_8B)
    cache = 65_536.0
    times = [serve_s(one, role, cache, n, 4096.0, 1024.0, 1e6, ASSUMED) for n in (1, 2, 8, 64)]
    assert times == sorted(times, reverse=True)
    assert serve_s(one, role, 2 * cache, 8, 4096.0, 1024.0, 1e6, ASSUMED) < times[2], "more at a time"
    alone = serve_s(one, role, cache, 1e9, 1.0, 1024.0, 0.0, ASSUMED)
    latency = 1024 * decode_s(one, 1, 1, ASSUMED.prompt + 1024, ASSUMED)
    assert alone == pytest.approx(latency, rel=1e-6), "one request is never faster than its tokens"


def test_a_servers_limits_are_the_recipes_keys() -> None:
    """Without them a server takes what its cache holds; the CPU's defaults do not bind one on a GPU."""
    role, one = load_recipe(PPO_8B).roles["actor"], shape(PPO_8B)
    assert (role.engine.max_batch, role.engine.max_batch_tokens) == (None, None)

    def seconds(cache: float = 1e6, **limits: int) -> float:
        engine = role.engine.model_copy(update=limits)
        limited = role.model_copy(update={"engine": engine})
        return serve_s(one, limited, cache, 1.0, 4096.0, 1024.0, 0.0, ASSUMED)

    free, few = seconds(), seconds(max_batch=8)
    alone = 4096 / 8 * 1024 * decode_s(one, 1, 8, ASSUMED.prompt + 1024, ASSUMED)
    assert few == pytest.approx(alone)
    assert free < seconds(max_batch=32) < few
    assert seconds(cache=8 * (256 + 1024)) == pytest.approx(few)
    assert seconds(max_batch=10**6) == pytest.approx(free), "memory binds"
    tokens = load_recipe(PPO_8B, ["roles.actor.engine.max_batch_tokens=10240"])
    share = server_shares(tokens)["actor"]
    assert share.cache / share.token == pytest.approx(10_240), "what a recipe bounds its cache to"


def test_the_work_of_a_step_by_hand() -> None:
    """64 prompts x 8 responses, at most 8 states each of which the prompt's is shared, 4 trained."""
    work = work_of(load_recipe(PPO_8B), 1.0, ASSUMED)
    assert (work.responses, work.response, work.judgement) == (512, 1024, 512)
    assert work.judged == 64 + 512 * 7
    assert work.trained["actor"] == (512 * 1280, 1280)
    assert work.trained["critic"][0] == 2048 * (256 + 512 + 512)
    assert work.sampled == 512 * 1024 + work.judged * 512
    double = work_of(load_recipe(PPO_8B), 2.0, ASSUMED)
    assert (double.responses, double.tokens) == (2 * work.responses, 2 * work.tokens)


def test_sft_neither_rolls_out_nor_publishes() -> None:
    parts, work = step_parts(load_recipe(RECIPES / "sft-qwen3-8b-1n8g-tp4.yaml"), 1.0, 1.0, ASSUMED, MEASURED)
    assert set(parts) == {"train", "optimizer", "experts", "skew"}
    assert set(work.trained) == {"actor"}


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*-*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_has_a_prediction_up_to_1024(path: Path) -> None:
    rows = rows_of(path, "grows", "scaled", ASSUMED, MEASURED, (128, 1024))
    assert [row["gpus"] for row in rows] == [128, 1024]
    for row in rows:
        parts = [row[key] for key in row if key not in ("gpus", "step_s", "tokens/s/gpu", "gib")]
        assert all(math.isfinite(part) and part >= 0 for part in parts)
        assert row["step_s"] == pytest.approx(sum(parts))
    need = [row["gib"] for row in rows]
    assert need == sorted(need, reverse=True), "more ranks never hold more"


@pytest.mark.parametrize("batch", ["grows", "fixed"])
def test_the_largest_loss_is_named(batch: str) -> None:
    """What every rank knows of all samples costs most where these are more; where it is free, another."""
    dear, free = (replace(MEASURED, known_s=known_s) for known_s in (1e-4, 0.0))
    lost, cause = loss(rows_of(PPO_8B, batch, "scaled", ASSUMED, dear, ENDS))
    assert 0.0 < lost < 1.0
    assert (cause == "batch") == (batch == "grows")
    better, other = loss(rows_of(PPO_8B, batch, "scaled", ASSUMED, free, ENDS))
    assert better < lost
    assert other != "batch"


def test_a_batch_costs_a_rank_its_own_tokens_and_a_little_of_everybodys() -> None:
    """512 responses and 2,048 trained states are known to all; of their tokens a rank of 16 has its part."""
    parts, work = step_parts(load_recipe(PPO_8B), 1.0, 1.0, ASSUMED, MEASURED)
    assert work.samples == 512 + 2048
    assert parts["batch"] == pytest.approx(1e-6 * work.samples + 1e-6 * work.sampled / 16)


def test_little_is_lost_to_1024_gpus_by_what_was_measured() -> None:
    """The goal: at most a tenth, where the batch and the servers grow."""
    lost, _ = loss(rows_of(PPO_8B, "grows", "scaled", ASSUMED, Measured.read(), ENDS))
    assert lost <= 0.10


def test_servers_of_one_node_do_not_do_for_many() -> None:
    scaled, first = (
        rows_of(PPO_8B, "grows", serving, ASSUMED, MEASURED, (16, 1024))
        for serving in ("scaled", "first-node")
    )
    # Optimizers are cut over more ranks, so caches get larger too.
    assert 0.6 * scaled[0]["rollout"] < scaled[-1]["rollout"] <= scaled[0]["rollout"]
    assert first[-1]["rollout"] > 60 * scaled[-1]["rollout"]  # 64 times the requests on the same servers
    assert loss(first)[1] == "rollout"


def test_the_measured_pieces_are_read() -> None:
    measured = Measured.read()
    assert 0 < measured.known_s < 1e-5
    assert 0 < measured.own_s < 1e-5
    assert 0 < measured.copy <= 1
