"""Which experts real servers say they chose, prompts from the prefix cache included."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sglang_servers import START_S, Farm, run
from tiny_experts import CONFIG, MODEL, assert_plain
from tiny_models import prompts, request

from genac_megatron.errors import InputError
from genac_megatron.models.registry import shape_from_hf
from genac_megatron.recipe.schema import EngineConfig
from genac_megatron.serving.experts import by_file_names
from genac_megatron.serving.sglang.client import ServerClient
from genac_megatron.serving.sglang.engine import SglangEngine
from genac_megatron.serving.sglang.fleet import Fleet


def engine_of(fleet: Fleet, config: EngineConfig) -> SglangEngine:
    """The fleet's engine, with MODEL's weights as version 0."""
    clients = [ServerClient(e.url, e.key, name=e.name, tp=e.tp) for e in fleet.endpoints()]
    engine = SglangEngine(clients, config, shape_from_hf(CONFIG))
    engine.load_weights(0, by_file_names(dict(MODEL.named_parameters())).items())
    return engine


def fleet_of(farm: Farm, folder: Path, **config: Any) -> tuple[Fleet, EngineConfig]:
    given = {"kind": "sglang", "dtype": "fp32", "start_timeout_s": START_S, "max_batch_tokens": 8192}
    made = EngineConfig(**{**given, **config})
    fleet = Fleet("actor", made, CONFIG, folder / "model", folder, "cpu")
    fleet.start(farm.python, farm.zygote)
    fleet.ready()
    return fleet, made


@pytest.fixture(scope="module", params=[1, 2], ids=["tp1", "tp2"])
def engine(farm: Farm, tmp_path_factory: Any, request: pytest.FixtureRequest) -> Iterator[SglangEngine]:
    folder = tmp_path_factory.mktemp("experts") / "fleet"
    fleet, config = fleet_of(farm, folder, routing_replay=True, tp=request.param)
    yield engine_of(fleet, config)
    fleet.close()


def test_choices_are_those_of_a_plain_forward(engine: SglangEngine) -> None:
    """Many at once; some stop at once, some share what is in the cache already, stop tokens end some."""
    asked = [request(ids, 2 + 7 * (n % 3), seed=n) for n, ids in enumerate(prompts(10, seed=3))]
    stops = tuple(range(40))
    asked += [request((5, 17, 40, 2, 33, n), 20, seed=n, stop_token_ids=stops) for n in range(6)]

    async def work() -> Any:
        await engine.warm((5, 17, 40, 2, 33))
        return await asyncio.gather(*(engine.complete(one) for one in asked))

    done = run(work())
    assert any(completion.finish == "stop" for completion in done)
    for one, completion in zip(asked, done, strict=True):
        assert completion.experts is not None
        assert_plain((*one.ids, *completion.ids[:-1]), completion.experts)
    assert engine.stats()["cached_tokens"] > 0


def test_choices_are_of_the_weights_that_chose(engine: SglangEngine) -> None:
    """The same prompt after an update: nothing of what was noted before comes back."""
    (ids,) = prompts(1, seed=9, shortest=12)
    before = run(engine.complete(request(ids, 8, temperature=0.0)))
    turned = {
        name: tensor.flip(0) if name.endswith("mlp.gate.weight") else tensor
        for name, tensor in by_file_names(dict(MODEL.named_parameters())).items()
    }
    engine.load_weights(1, turned.items())
    engine.clients[0].flush_cache()
    after = run(engine.complete(request(ids, 1, temperature=0.0)))
    assert before.experts is not None
    assert after.experts is not None
    # Of the first layer the hidden states are the same: expert e is now called 7 - e.
    first = before.experts[: len(ids), 0].astype(int), after.experts[:, 0].astype(int)
    assert (first[0].sum(-1) == 14 - first[1].sum(-1)).all()


def test_a_server_that_was_not_started_for_it_is_named(farm: Farm, tmp_path: Path) -> None:
    fleet, config = fleet_of(farm, tmp_path / "fleet")
    try:
        engine = engine_of(fleet, config.model_copy(update={"routing_replay": True}))
        with pytest.raises(InputError, match="no routed experts"):
            run(engine.complete(request((1, 2, 3), 2)))
    finally:
        fleet.close()
