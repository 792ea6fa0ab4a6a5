"""From every training layout, by every transport, servers of one and two ranks say what the weights say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from genac_megatron.models.registry import shape_of
from genac_megatron.models.sizes import parameters
from genac_megatron.serving.sglang.fleet import Endpoint
from tests.serving.publication.fleet_cases import (
    VOCAB,
    Servers,
    client_of,
    config_of,
    gap,
    greedy,
    publish_case,
    reference,
)

LAYOUTS: dict[str, dict[str, Any]] = {
    "tp1": {"count": 1},
    "tp2": {"count": 2, "tp": 2},
    "pp2": {"count": 2, "pp": 2},
    "tp2-pp2": {"count": 4, "tp": 2, "pp": 2},
    "dp2": {"first_rank": 1, "count": 2},
}
CASES = [(layout, transport) for transport in ("tensor", "group", "disk") for layout in LAYOUTS]
EXPERTS = {"experts": 4, "experts_per_token": 2, "expert_ffn": 24, "norm_topk": True}
PHASES = ("drain_s", "pause_s", "flush_s", "gather_s", "send_s", "verify_s", "resume_s")


@pytest.mark.parametrize(("layout", "transport"), CASES)
def test_servers_say_what_the_weights_say(
    pool: Any, endpoints: list[Endpoint], tmp_path: Path, layout: str, transport: str
) -> None:
    seed = 100 + CASES.index((layout, transport))  # other weights each time
    config = config_of(LAYOUTS[layout], publication={"transport": transport, "control_s": 30.0})
    results = pool.run(publish_case, config, endpoints, str(tmp_path / "weights"), seed, seed)
    wanted = reference(config, seed)
    for endpoint in endpoints:
        answers = greedy(endpoint)
        difference = gap(answers, wanted)
        print(layout, transport, "tp", endpoint.tp, "GAP", difference)
        assert difference <= 1e-4
        assert {answer.spans for answer in answers} == {((str(seed), len(wanted[0][0])),)}
    figures = results[0]
    print({key: round(value, 3) for key, value in figures.items()})
    assert all(result == figures for result in results)
    assert figures["buckets"] >= 3
    shape = shape_of(config.model, VOCAB)
    assert figures["bytes"] == 4 * parameters(shape)
    assert set(PHASES) <= figures.keys()
    assert not (tmp_path / "weights").exists()


@pytest.mark.parametrize(("family", "ffn"), [("llama", 64), ("qwen2", 40)])
def test_other_families_and_an_untied_head(
    pool: Any, servers: Servers, tmp_path: Path, family: str, ffn: int
) -> None:
    """Biases, no QK norm, an output layer of its own, a width that a CPU server pads: all checksums agree."""
    config = config_of({"count": 4, "tp": 2, "pp": 2}, family=family, tie=False, shape={"ffn": ffn})
    with servers.fresh(family=family, tie=False, tps=(1, 2), ffn=ffn) as endpoints:
        pool.run(publish_case, config, endpoints, str(tmp_path), 5, 1)
        wanted = reference(config, 5)
        for endpoint in endpoints:
            assert gap(greedy(endpoint), wanted) <= 1e-4
            assert client_of(endpoint).version() == "1"


@pytest.mark.parametrize(
    "layout", [{"count": 4, "ep": 4}, {"count": 4, "tp": 2, "pp": 2}], ids=["ep4", "tp2-pp2"]
)
def test_experts(pool: Any, servers: Servers, tmp_path: Path, layout: dict[str, Any]) -> None:
    """A server keeps a layer's experts in two tensors, cut by its ranks: their checksums agree too.

    The plan's buckets are smaller than a layer's experts, so these come in several.
    """
    limits = {"control_s": 30.0}
    config = config_of(layout, family="qwen3_moe", tie=False, shape=EXPERTS, publication=limits)
    with servers.fresh(family="qwen3_moe", tie=False, tps=(1, 2), **EXPERTS) as endpoints:
        results = pool.run(publish_case, config, endpoints, str(tmp_path), 6, 1)
        assert results[0]["buckets"] > config.model.shape.layers
        wanted = reference(config, 6)
        for endpoint in endpoints:
            assert gap(greedy(endpoint), wanted) <= 1e-4
            assert client_of(endpoint).version() == "1"


def refused_case(rank: int, config: Any, endpoints: list[Endpoint], folder: str) -> str:
    from genac_megatron.errors import PeerLost

    try:
        publish_case(rank, config, endpoints, folder, 6, 1)
    except PeerLost as error:
        return str(error)
    return ""


def test_an_output_layer_that_the_server_does_not_tie_is_noticed(
    pool: Any, servers: Servers, tmp_path: Path
) -> None:
    """SGLang's Qwen3-MoE keeps a random output layer of its own where config.json says that it is tied."""
    config = config_of({"count": 1}, family="qwen3_moe", shape=EXPERTS)
    with servers.fresh(family="qwen3_moe", **EXPERTS) as endpoints:
        told = pool.run(refused_case, config, endpoints, str(tmp_path))[0]
    assert "holds weights that no publication brings: lm_head.weight" in told
