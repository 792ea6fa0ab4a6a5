"""A server that spans two nodes: its parts meet, get the weights, and are replaced together.

Two nodes are one machine here, each with a fleet of its own, as two nodes' first ranks have.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch.distributed as dist

from genac_megatron.errors import PeerLost
from genac_megatron.models.registry import hf_config, shape_of
from genac_megatron.recipe.schema import EngineConfig
from genac_megatron.recipe.share import GIB, Share
from genac_megatron.serving.sglang.fleet import Endpoint, Fleet
from genac_megatron.serving.sglang.server import Server
from tests.distributed.cases import role_config
from tests.serving.publication.fleet_cases import (
    START_S,
    VOCAB,
    config_of,
    gap,
    greedy,
    publish_case,
    reference,
)
from tests.serving.zygote import AskingZygote

ENGINE = EngineConfig(
    kind="sglang",
    dtype="fp32",
    tp=2,
    nnodes=2,
    nodes=[0, 1],
    max_batch=16,
    max_batch_tokens=8192,
    start_timeout_s=START_S,
)


def fleet_on(node: int, store: dist.Store, folder: Path, share: Share | None = None) -> Fleet:
    hf = hf_config(shape_of(role_config().model, VOCAB))
    return Fleet(
        *("actor", ENGINE, hf, folder / "model", folder, "cpu"), node=node, share=share, meeting=store
    )


@pytest.fixture
def nodes(zygote: AskingZygote, tmp_path: Path) -> Iterator[list[Fleet]]:
    store = dist.HashStore()
    made = [fleet_on(node, store, tmp_path) for node in (0, 1)]
    try:
        for fleet in made:
            fleet.start(zygote=zygote)
        yield made
    finally:
        for fleet in made:
            fleet.close()


def at_once(nodes: list[Fleet], name: str, *arguments: object) -> list[object]:
    """What both nodes' first ranks do at the same time."""
    with ThreadPoolExecutor(len(nodes)) as pool:
        return list(pool.map(lambda fleet: getattr(fleet, name)(*arguments), nodes))


def test_a_server_over_two_nodes_is_published_to_and_replaced_whole(
    pool: object, nodes: list[Fleet], tmp_path: Path
) -> None:
    endpoints: list[Endpoint] = nodes[0].ready()
    assert nodes[1].ready() == []
    (endpoint,) = endpoints
    assert (endpoint.name, endpoint.tp, endpoint.node, endpoint.nnodes) == ("actor/0", 2, 0, 2)
    config = config_of({"count": 2}, publication={"control_s": 30.0})
    figures = pool.run(publish_case, config, endpoints, str(tmp_path / "w"), 21, 1, timeout=200.0)  # type: ignore[attr-defined]
    assert figures[0]["verify_s"] > 0, "each rank's tensors were compared"
    assert gap(greedy(endpoint), reference(config, 21)) <= 1e-4
    assert at_once(nodes, "lost") == [[], []]

    part = nodes[1]._servers[0]
    assert part.spec.node_rank == 1
    assert part.pid is not None
    os.killpg(part.pid, signal.SIGKILL)
    until = time.monotonic() + 20.0
    while part.alive() and time.monotonic() < until:
        time.sleep(0.1)
    assert nodes[1].lost() == ["actor/0"]
    at_once(nodes, "restart", ["actor/0"], ["actor/0"])
    (again,) = nodes[0].endpoints()
    assert again.instance == endpoint.instance + 1
    pool.run(publish_case, config, [again], str(tmp_path / "w"), 22, 2, timeout=200.0)  # type: ignore[attr-defined]
    assert gap(greedy(again), reference(config, 22)) <= 1e-4


def test_all_parts_size_their_cache_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two nodes with unlike memory free: SGLang's ranks schedule alike only with as many cache tokens.

    No server is started, and what GPUs have free is told.
    """
    monkeypatch.setattr(Server, "start", lambda self: None)
    store, share = dist.HashStore(), Share("actor", 40 * GIB, 60 * GIB, GIB, 1e5, 5 * GIB)
    specs = []
    for node, free in ((0, 130 * GIB), (1, 128 * GIB)):
        fleet = fleet_on(node, store, tmp_path, share)
        fleet._gpus = {0: []}
        monkeypatch.setattr(fleet, "_free", lambda *_, free=free: free)
        fleet.start()
        specs.append(fleet._servers[0].spec)
    assert [spec.mem_fraction for spec in specs] == [share.fraction(130 * GIB)] * 2
    assert specs[0].meeting == specs[1].meeting


def test_a_part_whose_first_one_says_nothing_gives_up(tmp_path: Path) -> None:
    fleet = fleet_on(1, dist.HashStore(), tmp_path)
    fleet.config = ENGINE.model_copy(update={"start_timeout_s": 0.2})
    with pytest.raises(PeerLost, match=r"first part, on node 0, said nothing within 0 s") as raised:
        fleet.start()
    assert "actor/0, part 1" in raised.value.where
