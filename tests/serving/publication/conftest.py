"""Ranks and servers that the publication tests share. They end with these: idle ones cost CPU time."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from genac_megatron.serving.sglang.fleet import Endpoint
from tests.distributed.pool import Pool
from tests.serving.publication.fleet_cases import Servers
from tests.serving.zygote import AskingZygote


@pytest.fixture(scope="package")
def pool() -> Iterator[Pool]:
    """Four gloo ranks of one world, on the CPU."""
    ranks = Pool()
    yield ranks
    ranks.close()


@pytest.fixture(scope="package")
def servers(zygote: AskingZygote, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    """What starts SGLang servers. Needs the serving environment ($GENAC_SERVE_PYTHON)."""
    made = Servers(zygote, tmp_path_factory.mktemp("servers"))
    yield made
    made.close()


@pytest.fixture(scope="package")
def endpoints(servers: Servers) -> list[Endpoint]:
    """One server of one rank and one of two, the same tiny model, for all tests here."""
    return servers.start(tps=(1, 2))
