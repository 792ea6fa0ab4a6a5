"""Adapters on real servers: beside their base, replaced while requests run, and what goes wrong."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from genac_megatron.errors import EXIT_LOST
from genac_megatron.models.registry import shape_of
from genac_megatron.models.sizes import adapter_parameters, parameters
from genac_megatron.recipe.schema import AdapterConfig
from genac_megatron.serving.sglang.adapters import lora_arguments
from genac_megatron.serving.sglang.fleet import Endpoint
from tests.serving.publication.adapter_cases import (
    ADAPTER,
    NEW,
    PROMPTS,
    SCORED,
    adapted,
    both_case,
    disturbed_case,
    forced,
    gap,
    load_case,
    merged,
    moved_case,
    sampled,
    worst,
)
from tests.serving.publication.fleet_cases import START_S, VOCAB, Servers, client_of, restarted

TOLERANCE = 1e-4
ARGUMENTS = lora_arguments([AdapterConfig(**ADAPTER)] * 2, gpu=False)


@pytest.fixture(scope="module")
def beside(servers: Servers) -> list[Endpoint]:
    """Servers of one rank and of two that load adapters."""
    return servers.start(tps=(1, 2), args=ARGUMENTS)


def test_servers_say_what_base_and_adapters_say(pool: Any, beside: list[Endpoint], tmp_path: Path) -> None:
    """Two roles' adapters from every pipeline stage; base, actor and critic decode in one batch."""
    config = adapted({"count": 4, "tp": 2, "pp": 2})
    steps = [("actor", 7), ("critic", 3), ("actor", 8), ("actor", 9)]
    results = pool.run(both_case, config, beside, str(tmp_path), steps)
    assert all(result == results[0] for result in results)
    shape = shape_of(config.model, VOCAB)
    adapter = 4 * adapter_parameters(shape, config.training.adapter, 1, shape.layers)
    base = 4 * parameters(shape)
    assert [figures["bytes"] for figures, _ in results[0]] == [base + adapter, adapter, adapter, adapter]
    held = [names for _, (names, _) in results[0]]
    assert held == [["actor@7"], ["actor@7", "critic@3"], ["actor@7", "actor@8", "critic@3"],
                    ["actor@8", "actor@9", "critic@3"]]  # fmt: skip
    print({key: round(value, 3) for key, value in results[0][-1][0].items()})
    for endpoint in beside:
        for name, seed in ((None, None), ("actor@8", 8), ("actor@9", 9)):
            answers = sampled(endpoint, name)
            difference = worst(config, seed, answers)
            print(endpoint.tp, name, difference)
            assert difference <= TOLERANCE
        assert worst(config, 8, answers) > 0.1  # and no other's

    async def at_once() -> list[Any]:
        sampling = {"temperature": 1.0, "max_new_tokens": NEW, "ignore_eos": True}
        client = client_of(beside[0])
        names = (None, "actor@9", "critic@3")
        return await asyncio.gather(
            *(client.generate(PROMPTS[0], sampling, limit_s=60.0, adapter=name) for name in names)
        )

    for seed, (answer,) in zip((None, 9, 3), asyncio.run(at_once()), strict=True):
        assert gap(merged(config, seed), PROMPTS[0], list(answer.ids), list(answer.logprobs)) <= TOLERANCE


def test_a_base_moves_under_live_adapters(pool: Any, beside: list[Endpoint], tmp_path: Path) -> None:
    """It is given again, once for both roles; either says over it what the trainer says."""
    config = adapted({"count": 4, "tp": 2, "pp": 2})
    results = pool.run(moved_case, config, beside, str(tmp_path))
    assert all(result == results[0] for result in results)
    bytes_, names, versions = results[0]
    shape = shape_of(config.model, VOCAB)
    small = 4 * adapter_parameters(shape, config.training.adapter, 1, shape.layers)
    assert [sent - small for sent in bytes_] == [4 * parameters(shape), 0] * 2
    assert all({"actor@33", "critic@34"} <= set(held) for held in names)
    assert set(versions) == {"1"}
    for endpoint in beside:
        assert worst(config, 31, sampled(endpoint, "actor@33")) <= TOLERANCE
        answers = sampled(endpoint, "critic@34")
        assert worst(config, 31, answers, 32) <= TOLERANCE
        assert worst(config, 32, answers) > 0.1  # beside the base as it was


@pytest.mark.extended  # whole weights, and how adapters are joined, are tested by family elsewhere
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_other_families(pool: Any, servers: Servers, tmp_path: Path, family: str) -> None:
    """Biases, no QK norm, an output layer of its own."""
    model = {"family": family, "tie": False}
    config = adapted({"count": 2, "tp": 2}, **model)
    with servers.fresh(args=ARGUMENTS, **model) as endpoints:
        pool.run(both_case, config, endpoints, str(tmp_path), [("actor", 1), ("actor", 2)])
        for name, seed in ((None, None), ("actor@2", 2)):
            assert worst(config, seed, sampled(endpoints[0], name)) <= TOLERANCE


def test_under_load(pool: Any, beside: list[Endpoint], tmp_path: Path) -> None:
    """No request is lost, and each is of one version from its first token to its last."""
    config, versions = adapted({"count": 2, "tp": 2}), list(range(20, 26))
    done, held, scores = pool.run(load_case, config, beside, str(tmp_path), versions)[0]
    assert len(done) >= 4 * len(versions) // 2
    models = {version: merged(config, version) for version in versions}
    for prompt, ids, logprobs, spans, finish in done:
        ((version, count),) = spans
        assert (finish, count) == ("length", len(ids))
        assert gap(models[version], PROMPTS[prompt], ids, logprobs) <= TOLERANCE
    assert len({spans[0][0] for _, _, _, spans, _ in done}) >= 3
    for version, names in zip(versions, held, strict=True):
        assert f"actor@{version}" in names
        assert len([name for name in names if name.startswith("actor@")]) <= 4
    print(len(done), "requests", held[-1])
    wanted = [sum(forced(models[versions[-1]], PROMPTS[0], tokens)) for tokens in SCORED]
    assert scores == pytest.approx(wanted, abs=TOLERANCE)


@pytest.mark.parametrize("how", ["altered", pytest.param("killed", marks=pytest.mark.extended)])
def test_a_server_lost_amid_a_load_comes_back_with_the_right_version(
    pool: Any, servers: Servers, tmp_path: Path, how: str
) -> None:
    """A server that finds other checksums than ours ends itself: nobody generates with what it was handed."""
    config = adapted({"count": 2, "pp": 2})
    with servers.fresh(args=ARGUMENTS) as endpoints:
        running = servers.running[endpoints[0].name]
        results = pool.run(disturbed_case, config, endpoints, str(tmp_path), running.pid, how)
        for failure in results:
            print(failure)
            assert failure == results[0]
            assert "publication of actor 2, phase send" in failure["error"]
            assert f"server {endpoints[0].name}: " in failure["error"]
            assert (failure["code"], failure["lost"]) == (EXIT_LOST, [endpoints[0].name])
        running.stop()
        running.start()
        running.wait_healthy(START_S)
        pool.run(both_case, config, [restarted(endpoints[0])], str(tmp_path), [("actor", 2)])
        assert worst(config, 2, sampled(endpoints[0], "actor@2")) <= TOLERANCE
        assert client_of(endpoints[0]).adapters() == ["actor@2"]
