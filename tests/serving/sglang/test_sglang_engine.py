"""The engine over real servers: tokens, log-probs, versions, aborts, weights."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
import torch
from sglang_servers import Farm, client_of, engine_over, run, served_config
from tiny_models import VOCAB, forced_logprobs, make_engine, plain_model, prompts, request

from genac_megatron.errors import InputError
from genac_megatron.models.registry import shape_from_hf
from genac_megatron.recipe.schema import EngineConfig
from genac_megatron.records import Completion, Request
from genac_megatron.serving.sglang.client import ServerClient, ServerError
from genac_megatron.serving.sglang.engine import SglangEngine
from genac_megatron.serving.sglang.server import Server

FP32 = 1e-4
MODEL = plain_model(served_config("qwen3"))


@pytest.fixture(params=[1, 2], ids=["tp1", "tp2"])
def server(farm: Farm, request: pytest.FixtureRequest) -> Server:
    return farm.shared(tp=request.param)


@pytest.fixture
def engine(server: Server) -> SglangEngine:
    return engine_over([server], MODEL)


@pytest.fixture
def one(farm: Farm) -> SglangEngine:
    """Where the number of ranks makes no difference."""
    return engine_over([farm.shared()], MODEL)


def complete_all(engine: SglangEngine, requests: list[Request]) -> list[Completion]:
    async def work() -> list[Completion]:
        return list(await asyncio.gather(*(engine.complete(one) for one in requests)))

    return run(work())


# --- tokens and log-probs ------------------------------------------------------------------------


@torch.no_grad()
def greedy(ids: tuple[int, ...], new: int, model: torch.nn.Module = MODEL) -> tuple[int, ...]:
    tokens = list(ids)
    for _ in range(new):
        tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tuple(tokens[len(ids) :])


def test_greedy_tokens_and_logprobs_are_those_of_transformers(engine: SglangEngine) -> None:
    for ids in prompts(4, seed=1):
        (got,) = complete_all(engine, [request(ids, 16, temperature=0.0)])
        assert got.ids == greedy(ids, 16)
        assert got.logprobs == pytest.approx(forced_logprobs(MODEL, ids, got.ids), abs=FP32)
        assert got.finish == "length"
        assert got.spans == ((0, 16),)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_sampled_logprobs_are_the_models(engine: SglangEngine, temperature: float) -> None:
    asked = [request(ids, 24, seed=n, temperature=temperature) for n, ids in enumerate(prompts(8, seed=2))]
    got = complete_all(engine, asked)
    assert len({one.ids for one in got}) == 8
    for one, sent in zip(got, asked, strict=True):
        expected = forced_logprobs(MODEL, sent.ids, one.ids, temperature)
        assert one.logprobs == pytest.approx(expected, abs=FP32)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_scores_are_the_embedded_engines(engine: SglangEngine, temperature: float) -> None:
    continuations = [(4,), (5, 6), (5, 7, 8), (5,), (4,)]
    embedded = make_engine(served_config("qwen3"), MODEL)

    async def both() -> tuple[list[float], list[float]]:
        ids = (1, 2, 3)
        return (
            await engine.score(ids, continuations, temperature=temperature),
            await embedded.score(ids, continuations, temperature=temperature),
        )

    ours, theirs = run(both())
    assert ours == pytest.approx(theirs, abs=FP32)
    assert engine.stats()["batches"] == 3  # after (), (5,) and (5, 7)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_families_and_stop_tokens(farm: Farm, family: str) -> None:
    """Token 2 is what a llama's config stops at unless told otherwise."""
    model = plain_model(served_config(family))
    engine = engine_over([farm.shared(family)], model, family)
    ids = (5, 6, 7)
    whole = greedy(ids, 12, model)
    stop = whole[4]
    first = whole.index(stop) + 1
    stopped, free, *tempered = complete_all(
        engine,
        [
            request(ids, 12, temperature=0.0, stop_token_ids=(stop, VOCAB - 1)),
            request(ids, 12, temperature=0.0),
            # Nearly uniform over the vocabulary: 2 is not among 2000 tokens once in some 1e9 runs.
            *(request(ids, 200, temperature=8.0) for _ in range(10)),
        ],
    )
    assert (stopped.ids, stopped.finish) == (whole[:first], "stop")
    assert (free.ids, free.finish) == (whole, "length")
    assert [len(one.ids) for one in tempered] == [200] * 10
    assert any(2 in one.ids for one in tempered)


def test_many_in_flight_come_back_once_each(engine: SglangEngine) -> None:
    asked = [request((*ids, n), 8 + n % 9, key=f"p{n % 8}#{n}") for n, ids in enumerate(prompts(64, seed=3))]
    got = complete_all(engine, asked)
    for one, sent in zip(got, asked, strict=True):
        assert len(one.ids) == sent.params.max_new_tokens
        assert one.logprobs == pytest.approx(forced_logprobs(MODEL, sent.ids, one.ids), abs=FP32)
    stats = engine.stats()
    assert stats["tokens"] == sum(one.params.max_new_tokens for one in asked)
    assert stats["prompt_tokens"] == sum(len(one.ids) for one in asked)
    assert stats["batches"] == 64
    assert 0 < stats["seconds"] < 60


def test_the_cache_serves_a_prefix_that_came_before(one: SglangEngine) -> None:
    ids = tuple(prompts(1, seed=9, shortest=200, longest=200)[0])
    complete_all(one, [request(ids, 1)])
    one.stats()
    complete_all(one, [request((*ids, n), 1) for n in range(8)])
    stats = one.stats()
    assert stats["cached_tokens"] >= 0.99 * stats["prompt_tokens"] - 8
    assert stats["unique_prompt_tokens"] == stats["prompt_tokens"] - stats["cached_tokens"]


def test_prompts_are_read_ahead_beside_requests_that_generate(farm: Farm) -> None:
    """In a batch with others SGLang draws a token for such a prompt too, which nobody asked for."""
    engine = engine_over([farm.shared()], MODEL)
    asked = [tuple(ids) for ids in prompts(96, seed=12, shortest=40, longest=60)]

    async def one(ids: tuple[int, ...], new: int) -> int:
        (sample,) = await engine.clients[0].generate(ids, {"max_new_tokens": new}, limit_s=60.0)
        return len(sample.ids) - new

    async def work() -> list[int]:
        return await asyncio.gather(*(one(ids, 4 * (number % 2)) for number, ids in enumerate(asked)))

    assert run(work()) == [0] * len(asked)


def test_an_engine_serves_one_event_loop_after_another(one: SglangEngine) -> None:
    for _ in range(2):
        (got,) = complete_all(one, [request((1, 2, 3), 5, temperature=0.0)])
        assert got.ids == greedy((1, 2, 3), 5)


# --- aborts and refusals -------------------------------------------------------------------------


@pytest.mark.parametrize(
    # Two ranks: that one ends and others go on is the same; that all end is tried.
    ("server", "key"),
    [
        pytest.param(1, "b", id="tp1-b"),
        pytest.param(1, None, id="tp1-all"),
        pytest.param(2, "b", id="tp2-b", marks=pytest.mark.extended),
        pytest.param(2, None, id="tp2-all"),
    ],
    indirect=["server"],
)
def test_aborted_requests_keep_what_they_have(engine: SglangEngine, key: str | None) -> None:
    async def work() -> list[Completion]:
        asked = [request((1, 2, n), 500, seed=n, key=name) for n, name in enumerate("abc")]
        tasks = [asyncio.ensure_future(engine.complete(one)) for one in asked]
        while engine.clients[0].running() < 3:
            await asyncio.sleep(0.02)
        engine.abort(key)
        engine.abort(key)
        return list(await asyncio.gather(*tasks))

    for name, got in zip("abc", run(work()), strict=True):
        aborted = key is None or name == key
        assert got.finish == ("abort" if aborted else "length")
        assert len(got.ids) < 500 if aborted else len(got.ids) == 500
        assert len(got.logprobs) == len(got.ids) == sum(count for _, count in got.spans)


def test_requests_beyond_the_limit_wait_and_can_be_aborted_there(farm: Farm) -> None:
    engine = engine_over([farm.shared()], MODEL, max_in_flight=2)

    async def work() -> list[Completion]:
        tasks = [asyncio.ensure_future(engine.complete(request((1, n), 400, key=str(n)))) for n in range(6)]
        seen = 0
        while seen < 2:
            seen = engine.clients[0].running()
            await asyncio.sleep(0.01)
        assert seen == 2
        for key in "2345":
            engine.abort(key)
        return list(await asyncio.gather(*tasks))

    got = run(work())
    assert [len(one.ids) for one in got] == [400, 400, 0, 0, 0, 0]
    assert got[2:] == [Completion((), (), "abort")] * 4


def test_what_a_server_refuses_is_said(one: SglangEngine) -> None:
    with pytest.raises(InputError, match=r"longer than the model's context length"):
        complete_all(one, [request((1,) * 2100, 8)])
    with pytest.raises(InputError, match=f"token id {VOCAB} is outside"):  # it would end the server
        complete_all(one, [request((VOCAB,), 8)])
    with pytest.raises(InputError, match="temperature is 0"):
        run(one.score((1,), [(2,)], temperature=0))
    one.close()
    with pytest.raises(InputError, match="closed"):
        complete_all(one, [request((1,), 8)])


# --- weights -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    # Two ranks: publication/test_modes.py
    "server",
    [pytest.param(1, id="tp1"), pytest.param(2, id="tp2", marks=pytest.mark.extended)],
    indirect=True,
)
def test_versions_of_tokens_over_an_update_in_mid_generation(engine: SglangEngine) -> None:
    count = 1500  # long enough that an idle machine is still at it when the servers' loads are next told
    newer = plain_model(served_config("qwen3"), seed=1)

    async def work() -> Completion:
        task = asyncio.ensure_future(engine.complete(request((1, 2, 3), count, temperature=0.0)))
        while engine.clients[0].running() < 1:
            assert not task.done(), "it ended before it was seen to run"
            await asyncio.sleep(0.02)
        await asyncio.sleep(0.2)
        named = list(newer.named_parameters())
        await asyncio.to_thread(engine.load_weights, 7, named[:5], final=False)
        await asyncio.to_thread(engine.load_weights, 7, named[5:])
        return await task

    got = run(work(), 600.0)
    (old, before), (new, after) = got.spans
    assert (old, new, before + after) == (0, 7, count)
    assert before > 0
    assert got.version == 0
    older = forced_logprobs(MODEL, (1, 2, 3), got.ids[:before])
    later = forced_logprobs(newer, (1, 2, 3, *got.ids[:before]), got.ids[before:])
    assert got.logprobs == pytest.approx([*older, *later], abs=FP32)
    assert complete_all(engine, [request((1, 2), 4)])[0].spans == ((7, 4),)


NORM = "model.layers.1.self_attn.q_norm.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda named: named.pop(NORM), f"1 missing: {NORM}"),
        (lambda named: named.update({"model.extra": torch.zeros(1)}), "surplus tensor model.extra"),
        (
            lambda named: named.update({NORM: torch.zeros(9)}),
            rf"tensor {NORM} has shape \(9,\), the engine's \(8,\)",
        ),
    ],
)
def test_wrong_weights_are_named_and_leave_no_weights(
    one: SglangEngine, change: Callable[[dict[str, torch.Tensor]], object], message: str
) -> None:
    good = dict(MODEL.named_parameters())
    bad = dict(good)
    change(bad)
    with pytest.raises(InputError, match=message):
        one.load_weights(7, bad.items())
    assert one.version == -1
    with pytest.raises(InputError, match="no weights"):
        complete_all(one, [request((1, 2))])
    one.load_weights(8, good.items())
    assert complete_all(one, [request((1, 2))])[0].version == 8


def test_ranks_hold_the_same_checksums_after_the_same_weights(server: Server) -> None:
    newer = plain_model(served_config("qwen3"), seed=1)
    sums = []
    for model in (MODEL, newer, MODEL):
        engine_over([server], model)
        sums.append(client_of(server).checksums())
    assert sums[0] == sums[2] != sums[1]
    assert len(sums[0]) == server.spec.tp


# --- control -------------------------------------------------------------------------------------


def test_control_calls(server: Server) -> None:
    client = client_of(server)
    assert client.info()["version"].startswith("0.")
    assert client.healthy()
    client.set_version(41)
    assert client.version() == "41"
    assert client.begin_update()
    with pytest.raises(ServerError, match="already open") as caught:
        client.begin_update()
    assert not caught.value.retryable
    assert client.end_update()
    client.pause("in_place")
    client.resume()
    client.release_memory()
    client.resume_memory()
    client.flush_cache()
    assert client.running() == 0


def test_a_wrong_key_is_refused(farm: Farm) -> None:
    server = farm.shared()
    client = ServerClient(server.spec.url, "wrong", name="stranger")
    with pytest.raises(ServerError, match="401") as caught:
        client.flush_cache()
    assert not caught.value.retryable
    engine = SglangEngine([client], EngineConfig(kind="sglang"), shape_from_hf(served_config("qwen3")))
    engine.version = 0
    with pytest.raises(InputError, match="401"):
        complete_all(engine, [request((1, 2), 3)])
