"""The embedded engine's queue, weights and errors."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
import torch
from tiny_models import (
    VOCAB,
    complete_all,
    forced_logprobs,
    make_engine,
    plain_model,
    prompts,
    request,
    tiny_config,
)

from genac_megatron.errors import GenacError, InputError
from genac_megatron.recipe.schema import EngineConfig
from genac_megatron.records import Completion
from genac_megatron.serving.embedded import EmbeddedEngine
from genac_megatron.serving.engine import Engine

CONFIG = tiny_config("qwen3")
FP32 = 3e-5  # as in test_embedded_sampling.py


@pytest.fixture
def engine() -> EmbeddedEngine:
    return make_engine(CONFIG, plain_model(CONFIG))


# --- weights -------------------------------------------------------------------------------------


def test_weights_in_two_buckets_with_requests_waiting_in_between(engine: EmbeddedEngine) -> None:
    newer = plain_model(CONFIG, seed=1)
    named = list(newer.named_parameters())

    async def run() -> tuple[Completion, Completion]:
        before = await engine.complete(request((1, 2, 3), 8))
        engine.load_weights(5, named[:4], final=False)
        assert engine.version == -1
        waiting = asyncio.ensure_future(engine.complete(request((1, 2, 3), 8)))
        for _ in range(100):
            await asyncio.sleep(0)
        assert not waiting.done()
        engine.load_weights(5, named[4:])
        return before, await waiting

    before, after = asyncio.run(run())
    assert before.spans == ((0, 8),)
    assert before.version == 0
    assert after.spans == ((5, 8),)
    assert engine.version == after.version == 5
    assert before.ids != after.ids
    assert after.logprobs == pytest.approx(forced_logprobs(newer, (1, 2, 3), after.ids), abs=FP32)


@pytest.mark.parametrize("tied", [True, False])
def test_tied_and_untied_output_layers(tied: bool) -> None:
    config = tiny_config("qwen3", tie_word_embeddings=tied)
    model = plain_model(config)
    names = dict(model.named_parameters())
    assert ("lm_head.weight" in names) is not tied
    engine = make_engine(config)
    for version in range(2):  # the second load must reach both ends of a tied model too
        with torch.no_grad():
            names["model.embed_tokens.weight"].mul_(1.0 + version)
        engine.load_weights(version, names.items())
        (got,) = complete_all(engine, [request((1, 2, 3), 10)])
        assert got.logprobs == pytest.approx(forced_logprobs(model, (1, 2, 3), got.ids), abs=FP32)
    if tied:
        with pytest.raises(InputError, match=r"surplus tensor lm_head\.weight"):
            engine.load_weights(2, [("lm_head.weight", names["model.embed_tokens.weight"])])


def test_weights_are_copied_not_shared(engine: EmbeddedEngine) -> None:
    model = plain_model(CONFIG)
    engine.load_weights(1, model.named_parameters())
    (before,) = complete_all(engine, [request((1, 2, 3))])
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert complete_all(engine, [request((1, 2, 3))]) == [before]


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
    engine: EmbeddedEngine, change: object, message: str
) -> None:
    good = dict(plain_model(CONFIG).named_parameters())
    bad = dict(good)
    change(bad)  # type: ignore[operator]
    with pytest.raises(InputError, match=message):
        engine.load_weights(7, bad.items())
    assert engine.version == -1
    with pytest.raises(InputError, match="no weights"):
        complete_all(engine, [request((1, 2))])
    engine.load_weights(8, good.items())
    assert complete_all(engine, [request((1, 2))])[0].version == 8


def test_a_tensor_that_comes_twice_and_versions_that_mix(engine: EmbeddedEngine) -> None:
    named = list(plain_model(CONFIG).named_parameters())
    engine.load_weights(3, named[:2], final=False)
    with pytest.raises(InputError, match=f"{named[0][0]} came twice"):
        engine.load_weights(3, named[:1], final=False)
    engine.load_weights(3, named[:2], final=False)
    with pytest.raises(InputError, match="version 3 was still coming in"):
        engine.load_weights(4, named[2:])


def test_a_failed_load_reaches_those_who_wait_for_it(engine: EmbeddedEngine) -> None:
    async def run() -> None:
        engine.load_weights(1, [], final=False)
        waiting = asyncio.ensure_future(engine.complete(request((1, 2))))
        await asyncio.sleep(0)
        with pytest.raises(InputError):
            engine.load_weights(1, [("nonsense", torch.zeros(1))])
        with pytest.raises(InputError, match="nonsense"):
            await waiting

    asyncio.run(run())


# --- the queue -----------------------------------------------------------------------------------


def test_batches_respect_both_limits_and_the_oldest_goes_first() -> None:
    model = plain_model(CONFIG)
    asked = [request((9,) * 30, 10), *(request(ids, 10, seed=n) for n, ids in enumerate(prompts(15, 3)))]
    order: list[int] = []

    async def run(engine: EmbeddedEngine) -> None:
        async def one(n: int) -> None:
            await engine.complete(asked[n])
            order.append(n)

        await asyncio.gather(*(one(n) for n in range(len(asked))))

    by_count = make_engine(CONFIG, model, max_batch=4)
    asyncio.run(run(by_count))
    assert by_count.stats()["batches"] == 4
    assert 0 in order[:4]  # the oldest, though it sorts last

    by_tokens = make_engine(CONFIG, model, max_batch_tokens=39)  # the longest needs 40: it runs alone
    complete_all(by_tokens, asked)
    assert by_tokens.stats()["batches"] >= sum(len(r.ids) + 10 for r in asked) / 40


def test_completions_are_consumed_between_batches_and_what_follows_is_batched() -> None:
    """The pipeline's pattern: each first completion asks for more, through several turns of the loop."""
    engine = make_engine(CONFIG, plain_model(CONFIG), max_batch=4)
    events: list[str] = []

    async def later(n: int) -> None:
        await engine.complete(request((n, n), 5))
        events.append("second")

    async def one(n: int) -> None:
        await engine.complete(request((n,), 5))
        events.append("first")
        await asyncio.gather(*(asyncio.ensure_future(later(n)) for _ in range(1)))

    async def run() -> None:
        await asyncio.gather(*(one(n) for n in range(8)))

    asyncio.run(run())
    assert engine.stats()["batches"] == 4
    assert events == ["first"] * 8 + ["second"] * 8


def test_the_same_program_gives_the_same_completions() -> None:
    asked = [request(ids, 9, seed=n) for n, ids in enumerate(prompts(20, 4))]
    runs = [complete_all(make_engine(CONFIG, plain_model(CONFIG), max_batch=8), asked) for _ in range(2)]
    assert runs[0] == runs[1]


def test_abort_of_queued_requests(engine: EmbeddedEngine) -> None:
    async def run() -> list[Completion]:
        tasks = [asyncio.ensure_future(engine.complete(request((1, 2), key=key))) for key in "aab"]
        await asyncio.sleep(0)
        engine.abort("a")
        return list(await asyncio.gather(*tasks))

    first, second, kept = asyncio.run(run())
    assert first == second == Completion((), (), "abort")
    assert kept.finish == "length"
    assert engine.stats()["tokens"] == 12


@pytest.mark.parametrize("key", ["b", None])
def test_abort_of_running_requests_keeps_what_they_have(engine: EmbeddedEngine, key: str | None) -> None:
    asked = [request((1, 2, n), 12, seed=n, key=name) for n, name in enumerate("abc")]
    whole = complete_all(engine, asked)
    steps = 0

    def at_fifth_token(*_: object) -> None:
        nonlocal steps
        steps += 1
        if steps == 5:
            engine.abort(key)

    assert engine._model is not None
    handle = engine._model.lm_head.register_forward_hook(at_fifth_token)
    cut = complete_all(engine, asked)
    handle.remove()
    for full, got in zip(whole, cut, strict=True):
        aborted = key is None or got is cut[1]
        assert got.finish == ("abort" if aborted else "length")
        assert got.ids == full.ids[: 5 if aborted else 12]


def test_a_cancelled_request_is_not_run(engine: EmbeddedEngine) -> None:
    async def run() -> Completion:
        gone = asyncio.ensure_future(engine.complete(request((1, 2), 50)))
        kept = asyncio.ensure_future(engine.complete(request((1, 2), 5)))
        await asyncio.sleep(0)
        gone.cancel()
        return await kept

    assert asyncio.run(run()).finish == "length"
    assert engine.stats()["tokens"] == 5


def test_a_loop_that_ended_early_does_not_block_the_next(engine: EmbeddedEngine) -> None:
    async def leave() -> None:
        task = asyncio.ensure_future(engine.complete(request((1, 2))))
        await asyncio.sleep(0)
        assert not task.done()

    asyncio.run(leave())
    (got,) = complete_all(engine, [request((3, 4), 6)])
    assert len(got.ids) == 6
    assert engine.stats()["tokens"] == 6


def test_a_failure_reaches_every_caller_and_the_engine_goes_on(engine: EmbeddedEngine) -> None:
    broken = plain_model(CONFIG)
    with torch.no_grad():
        broken.model.norm.weight.fill_(float("nan"))
    engine.load_weights(1, broken.named_parameters())

    async def run() -> list[object]:
        tasks = [engine.complete(request((n,))) for n in range(3)]
        return list(await asyncio.gather(*tasks, return_exceptions=True))

    assert all(isinstance(outcome, GenacError) for outcome in asyncio.run(run()))
    engine.load_weights(2, plain_model(CONFIG).named_parameters())
    assert complete_all(engine, [request((1,))])[0].finish == "length"


def test_stats_count_since_the_last_call(engine: EmbeddedEngine) -> None:
    complete_all(engine, [request((1, 2, 3), 7), request((4, 5), 5)])
    stats = engine.stats()
    seconds = stats.pop("seconds")
    assert stats == {"tokens": 12, "prompt_tokens": 5, "unique_prompt_tokens": 5, "batches": 1}
    assert 0 < seconds < 60
    assert set(engine.stats().values()) == {0}
    complete_all(
        engine, [request((1, 2, 3), 1), request((1, 2), 1), request((1, 2, 4, 5), 1), request((1, 2), 1)]
    )
    stats = engine.stats()
    assert (stats["prompt_tokens"], stats["unique_prompt_tokens"]) == (11, 5)
    complete_all(engine, [request((1, 2), 1)])
    assert engine.stats()["unique_prompt_tokens"] == 2, "what was read before has been counted"


# --- construction and bad input ------------------------------------------------------------------


def test_construction_leaves_torchs_random_state() -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    built: Engine = make_engine(CONFIG)
    assert torch.equal(torch.rand(4), expected)
    assert built.version == -1


def test_a_folder_and_its_contents_make_the_same_model(tmp_path: Path) -> None:
    rope = {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    }
    config = tiny_config("llama", rope_parameters=rope, rms_norm_eps=1e-3)
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    model = plain_model(config)
    from_folder = EmbeddedEngine(tmp_path, EngineConfig(dtype="fp32"))
    from_folder.load_weights(0, model.named_parameters())
    asked = [request(range(40), 8)]
    (got,) = complete_all(from_folder, asked)
    assert complete_all(make_engine(config, model), asked) == [got]
    assert got.logprobs == pytest.approx(forced_logprobs(model, range(40), got.ids), abs=FP32)


@pytest.mark.parametrize("config", [{"hidden_size": 8}, {"model_type": "no-such-family"}, "no/such/folder"])
def test_a_config_that_makes_no_model(config: object) -> None:
    with pytest.raises(InputError, match="no causal language model"):
        EmbeddedEngine(config, EngineConfig())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (request(()), "no tokens"),
        (request((1, VOCAB)), f"token id {VOCAB} is outside"),
        (request((-1,)), "token id -1 is outside"),
        (request((1,), 0), "max_new_tokens is 0"),
        (request((1,), temperature=-0.1), "temperature is -0.1"),
        (request((1,), seed=-4), "seed is -4"),
    ],
)
def test_bad_requests(engine: EmbeddedEngine, bad: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        complete_all(engine, [bad])  # type: ignore[list-item]


def test_score_through_the_engine(engine: EmbeddedEngine) -> None:
    scores = asyncio.run(engine.score((1, 2, 3), [(4, 5), (6,)]))
    model = plain_model(CONFIG)
    expected = [sum(forced_logprobs(model, (1, 2, 3), ids)) for ids in ((4, 5), (6,))]
    assert scores == pytest.approx(expected, abs=FP32)
    (colder,) = asyncio.run(engine.score((1, 2, 3), [(4, 5)], temperature=0.5))
    assert colder == pytest.approx(sum(forced_logprobs(model, (1, 2, 3), (4, 5), 0.5)), abs=FP32)
    with pytest.raises(InputError, match="no tokens"):
        asyncio.run(engine.score((1,), [()]))
    with pytest.raises(InputError, match="temperature is 0"):
        asyncio.run(engine.score((1,), [(2,)], temperature=0.0))


def test_a_closed_engine_says_so(engine: EmbeddedEngine) -> None:
    engine.close()
    engine.close()
    with pytest.raises(InputError, match="closed"):
        complete_all(engine, [request((1,))])
    with pytest.raises(InputError, match="closed"):
        engine.load_weights(1, [])
