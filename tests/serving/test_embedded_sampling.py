"""What the embedded engine samples, against plain transformers."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import (
    complete_all,
    forced_logprobs,
    make_engine,
    plain_model,
    prompts,
    request,
    tiny_config,
)
from transformers import GenerationConfig

from genac_megatron.errors import GenacError
from genac_megatron.records import Request, SamplingParams
from genac_megatron.serving import generation
from genac_megatron.serving.generation import inverse_cdf, shared_length, unique_tokens

FAMILIES = ("llama", "qwen2", "qwen3")
# fp32 has 6e-8 relative error per operation; logits here reach 8 and pass through a few hundred additions
# in another order (cache, padding, grouped heads). Measured: 4e-6.
FP32 = 3e-5


def mixed_prompts() -> list[tuple[int, ...]]:
    """Lengths from 1 on, repeated prompts, and nested ones."""
    some = prompts(6)
    return [(5,), *some, some[0], some[0], (*some[1], 3, 4), (*some[1], 3, 4, 5, 6)]


def varied(count: int, **params: object) -> list[Request]:
    """Requests with different prompts, seeds and limits."""
    return [
        request(ids, 3 + 7 * n % 23, seed=n, key=str(n), **params) for n, ids in enumerate(prompts(count, 1))
    ]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("prefix", [(), tuple(range(30))], ids=["apart", "shared-prefix"])
def test_greedy_equals_plain_generate(family: str, prefix: tuple[int, ...]) -> None:
    config = tiny_config(family)
    model = plain_model(config)
    asked = [(*prefix, *ids) for ids in mixed_prompts()]
    got = complete_all(make_engine(config, model), [request(ids, 15, temperature=0.0) for ids in asked])
    for ids, completion in zip(asked, got, strict=True):
        plain = model.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            generation_config=GenerationConfig(do_sample=False, max_new_tokens=15, pad_token_id=0),
        )
        assert list(completion.ids) == plain[0, len(ids) :].tolist()
        assert completion.finish == "length"
        # Greedy log-probs are those of the plain distribution.
        assert completion.logprobs == pytest.approx(forced_logprobs(model, ids, completion.ids), abs=FP32)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs_equal_a_teacher_forced_forward(family: str, temperature: float) -> None:
    config = tiny_config(family)
    model = plain_model(config)
    requests = varied(40, temperature=temperature)
    for asked, got in zip(requests, complete_all(make_engine(config, model), requests), strict=True):
        expected = forced_logprobs(model, asked.ids, got.ids, temperature)
        assert got.logprobs == pytest.approx(expected, abs=FP32)


def test_a_request_gives_the_same_tokens_alone_and_in_company() -> None:
    config = tiny_config("qwen3")
    engine = make_engine(config, plain_model(config))
    requests = [*varied(30), *varied(6, temperature=0.0), *(request((7, 8), 20, seed=n) for n in range(4))]
    together = complete_all(engine, requests)
    # A uniform within rounding (1e-6) of a boundary would differ: about 1 in 1e5 tokens; 500 are compared.
    for asked, got in zip(requests, together, strict=True):
        (alone,) = complete_all(engine, [asked])
        assert alone.ids == got.ids
        assert alone.logprobs == pytest.approx(got.logprobs, abs=FP32)


def test_dropping_finished_rows_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config("llama")
    engine = make_engine(config, plain_model(config))
    requests = varied(40)
    calls = 0
    plain_generate = type(engine._model).generate

    def counted(*args: object, **kwargs: object) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return plain_generate(*args, **kwargs)

    monkeypatch.setattr(type(engine._model), "generate", counted)
    with_drops = complete_all(engine, requests)
    assert calls > 2
    monkeypatch.setattr(generation, "COMPACT_BELOW", 0.0)
    calls = 0
    without = complete_all(engine, requests)
    assert calls == 1
    assert [c.ids for c in with_drops] == [c.ids for c in without]


def test_reading_prompts_in_pieces_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config("qwen3")
    engine = make_engine(config, plain_model(config))
    requests = varied(12)
    whole = complete_all(engine, requests)
    monkeypatch.setattr(generation, "PREFILL_TOKENS", 24)  # two positions of twelve rows
    assert [c.ids for c in complete_all(engine, requests)] == [c.ids for c in whole]


def test_seeds() -> None:
    config = tiny_config("llama")
    engine = make_engine(config, plain_model(config))
    # 2**32 + 1 and 1 are the same to a generator that drops the upper bits.
    seeds = [0, 1, 2, 2**32 + 1, 2**62 + 1]
    first = complete_all(engine, [request((1, 2, 3), 16, seed=seed) for seed in seeds])
    again = complete_all(engine, [request((1, 2, 3), 16, seed=seed) for seed in seeds])
    assert first == again
    assert len({completion.ids for completion in first}) == len(seeds)


def test_stop_tokens_and_limits_are_each_requests_own() -> None:
    config = tiny_config("qwen3")
    engine = make_engine(config, plain_model(config))
    free = complete_all(engine, [request(ids, 20, seed=n) for n, ids in enumerate(prompts(12, 2))])
    requests, expected = [], []
    for n, (ids, completion) in enumerate(zip(prompts(12, 2), free, strict=True)):
        stops = () if n % 3 == 0 else (completion.ids[n], 90 + n % 5)
        limit = 4 + n
        requests.append(request(ids, limit, seed=n, stop_token_ids=stops))
        ends = [place + 1 for place, token in enumerate(completion.ids[:limit]) if token in stops]
        expected.append((completion.ids[: ends[0] if ends else limit], "stop" if ends else "length"))
    got = complete_all(engine, requests)
    assert [(c.ids, c.finish) for c in got] == expected
    assert {finish for _, finish in expected} == {"stop", "length"}
    assert all(len(c.logprobs) == len(c.ids) and c.spans == ((0, len(c.ids)),) for c in got)


def test_pairs_of_tokens_follow_the_models_distribution() -> None:
    config = tiny_config("llama", vocab_size=8, initializer_range=0.15)
    model = plain_model(config)
    count, temperature = 8192, 1.3
    engine = make_engine(config, model, max_batch=4096)
    asked = [request((1, 5, 2), 2, seed=seed, temperature=temperature) for seed in range(count)]
    got = complete_all(engine, asked)
    statistic = 0.0
    for pair in ((a, b) for a in range(8) for b in range(8)):
        expected = count * math.exp(sum(forced_logprobs(model, (1, 5, 2), pair, temperature)))
        assert expected > 5  # the chi-square approximation holds
        statistic += (sum(c.ids == pair for c in got) - expected) ** 2 / expected
    # The 99.9 % quantile of chi-square with 63 degrees of freedom; the seeds are fixed, so is the outcome.
    assert statistic < 103.4


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.one_of(st.just(0.0), st.floats(1e-6, 1.0)), min_size=1, max_size=12).filter(any),
    st.floats(0.0, 1.0, exclude_max=True),
)
def test_inverse_cdf(weights: list[float], uniform: float) -> None:
    probs = torch.tensor([weights], dtype=torch.float64)
    probs /= probs.sum()
    logprobs = probs.log().float()
    token = int(inverse_cdf(logprobs, torch.tensor([[uniform]], dtype=torch.float64)))
    assert weights[token] > 0
    below = float(logprobs.double().exp()[0, :token].sum())
    upto = below + float(logprobs.double().exp()[0, token])
    # log and exp in fp32 are exact to 1e-6 of each probability; the sampler normalises, this check does not.
    assert below - 1e-5 <= uniform <= upto + 1e-5


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6).map(tuple), min_size=1, max_size=5))
def test_shared_length(some: list[tuple[int, ...]]) -> None:
    length = shared_length(some)
    assert len({ids[:length] for ids in some}) == 1
    assert min(map(len, some)) == length or len({ids[: length + 1] for ids in some}) > 1


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6).map(tuple), max_size=6))
def test_unique_tokens_are_the_prefixes_that_differ(some: list[tuple[int, ...]]) -> None:
    assert unique_tokens(some) == len({ids[: n + 1] for ids in some for n in range(len(ids))})


def test_weights_that_are_not_finite_are_named() -> None:
    config = tiny_config("llama")
    model = plain_model(config)
    with torch.no_grad():
        model.lm_head.weight[3] = float("nan")
    with pytest.raises(GenacError, match="not finite"):
        complete_all(make_engine(config, model), [request((1, 2), key="bad")])


def test_bf16_engine_is_near_its_own_weights_in_fp32() -> None:
    config = tiny_config("qwen3", initializer_range=0.1)
    model = plain_model(config, dtype=torch.bfloat16)
    engine = make_engine(config, model, dtype="bf16")
    requests = varied(20)
    exact = model.float()
    for asked, got in zip(requests, complete_all(engine, requests), strict=True):
        expected = forced_logprobs(exact, asked.ids, got.ids)
        # bf16 keeps 8 bits: logits up to 2 carry errors of 2 / 256, a few times over. Measured: 0.02.
        assert got.logprobs == pytest.approx(expected, abs=0.06)


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_scores_of_continuations(temperature: float) -> None:
    config = tiny_config("qwen3")
    model = plain_model(config)
    candidates = [(4,), (5, 6), (5, 7, 8), (90, 2)]
    scores = generation.score_continuations(model, (1, 2, 3, 4), candidates, temperature)
    expected = [sum(forced_logprobs(model, (1, 2, 3, 4), c, temperature)) for c in candidates]
    assert scores == pytest.approx(expected, abs=FP32)


def test_one_batch_mixes_temperatures() -> None:
    config = tiny_config("llama")
    model = plain_model(config)
    temperatures = [0.0, 0.5, 1.0, 2.0]
    asked = [Request((3, 1, 4), SamplingParams(10, temperature), 9) for temperature in temperatures]
    got = complete_all(make_engine(config, model), asked)
    for temperature, completion in zip(temperatures, got, strict=True):
        expected = forced_logprobs(model, (3, 1, 4), completion.ids, temperature or 1.0)
        assert completion.logprobs == pytest.approx(expected, abs=FP32)
    assert len({completion.ids for completion in got}) == 4
