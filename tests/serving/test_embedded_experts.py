"""Which experts the embedded engine says it chose: those of a plain forward over the same tokens."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest
from tiny_experts import CONFIG, MODEL, assert_plain
from tiny_models import complete_all, make_engine, prompts, request, tiny_config

from genac_megatron.errors import GenacError, InputError
from genac_megatron.serving.experts import as_experts, by_file_names, routers


def engine_of(**config: Any) -> Any:
    made = make_engine(CONFIG, **config)
    made.load_weights(0, by_file_names(dict(MODEL.named_parameters())).items())
    return made


@pytest.mark.parametrize("max_batch", [64, 3])
def test_choices_are_those_of_a_plain_forward(max_batch: int) -> None:
    """Prompts of different lengths, equal ones, shared beginnings, rows that end early and are dropped."""
    stem = (5, 17, 40, 2, 33)
    asked = [request(ids, 3 + 5 * (n % 5), seed=n) for n, ids in enumerate(prompts(12, seed=3))]
    asked += [request((*stem, 7, 9), 9, seed=50), request((*stem, 7, 9), 14, seed=51), request(stem, 6)]
    engine = engine_of(routing_replay=True, max_batch=max_batch)
    for one, done in zip(asked, complete_all(engine, asked), strict=True):
        assert done.experts is not None
        assert done.experts.dtype == np.uint8
        assert_plain((*one.ids, *done.ids[:-1]), done.experts)


def test_tokens_are_the_same_with_and_without_recording() -> None:
    asked = [request(ids, 12, seed=n) for n, ids in enumerate(prompts(8, seed=5))]
    silent = complete_all(engine_of(), asked)
    assert silent == complete_all(engine_of(routing_replay=True), asked)
    assert all(done.experts is None for done in silent)


def test_one_new_token_has_the_experts_of_its_prompt() -> None:
    (done,) = complete_all(engine_of(routing_replay=True), [request((1, 2, 3), 1)])
    assert_plain((1, 2, 3), done.experts)


def test_no_hook_is_left_behind() -> None:
    engine = engine_of(routing_replay=True)
    complete_all(engine, [request((1, 2, 3), 4)])
    assert engine._model is not None
    assert not any(router._forward_hooks for router in routers(engine._model))
    assert asyncio.run(engine.score((1, 2), [(3,)]))


def test_a_dense_model_has_no_experts_to_replay() -> None:
    with pytest.raises(InputError, match="no experts to replay"):
        make_engine(tiny_config("qwen3"), routing_replay=True)


def test_choices_that_cannot_be_are_refused() -> None:
    good = np.array([[[0, 3], [2, 1]]], np.int32)
    assert (as_experts(good, 4, "r") == good).all()
    assert as_experts(np.array([[[0, 300]]]), 512, "r").dtype == np.uint16
    with pytest.raises(GenacError, match="experts 0 to 3 of 3"):
        as_experts(good, 3, "r")
    with pytest.raises(GenacError, match="twice in a layer"):
        as_experts(np.zeros((1, 2, 2), np.int32), 4, "r")
