"""Servers for tests, and engines over them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any, TypeVar

from tiny_models import tiny_config
from transformers import PreTrainedModel

from genac_megatron.models.registry import shape_from_hf
from genac_megatron.platform.network import spare_ports
from genac_megatron.recipe.schema import EngineConfig
from genac_megatron.serving.sglang.client import ServerClient
from genac_megatron.serving.sglang.engine import SglangEngine
from genac_megatron.serving.sglang.server import Server, ServerSpec, Zygote

START_S = 120.0
ARCHITECTURES = {"qwen3": "Qwen3ForCausalLM", "llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}
T = TypeVar("T")


def served_config(family: str, **changes: Any) -> dict[str, Any]:
    """A tiny config.json that a server takes too."""
    more = {"architectures": [ARCHITECTURES[family]], "max_position_embeddings": 2048, "rms_norm_eps": 1e-6}
    return tiny_config(family, **more, **changes)


class Farm:
    """Starts servers on random weights, and remembers those that tests share."""

    def __init__(self, python: Path, zygote: Zygote, folder: Path) -> None:
        self.python, self.zygote, self.folder = python, zygote, folder
        self.servers: list[Server] = []
        self._shared: dict[tuple[str, int], Server] = {}

    def spec(self, family: str = "qwen3", tp: int = 1, **changes: Any) -> ServerSpec:
        model = self.folder / family
        model.mkdir(exist_ok=True)
        (model / "config.json").write_text(json.dumps(served_config(family)))
        given = {"port": spare_ports(1)[0], "dtype": "fp32", "max_running": 32, "max_tokens": 16_384}
        return ServerSpec(f"{family}/{len(self.servers)}", model, tp=tp, **(given | changes))

    def start(self, family: str = "qwen3", tp: int = 1, **changes: Any) -> Server:
        """A server of the test's own."""
        spec = self.spec(family, tp, **changes)
        server = Server(spec, self.folder / f"{len(self.servers)}.log", zygote=self.zygote)
        self.servers.append(server)
        server.start()
        server.wait_healthy(START_S)
        return server

    def shared(self, family: str = "qwen3", tp: int = 1) -> Server:
        """A server that other tests use too: leave it running."""
        if (family, tp) not in self._shared:
            self._shared[family, tp] = self.start(family, tp)
        return self._shared[family, tp]

    def close(self) -> None:
        for server in self.servers:
            server.stop()


def client_of(server: Server) -> ServerClient:
    spec = server.spec
    return ServerClient(spec.url, spec.key, name=spec.name, tp=spec.tp)


def engine_over(
    servers: Sequence[Server], model: PreTrainedModel | None = None, family: str = "qwen3", **config: Any
) -> SglangEngine:
    """An engine, with the model's weights as version 0 where one is given."""
    shape = shape_from_hf(served_config(family))
    engine = SglangEngine(
        [client_of(server) for server in servers], EngineConfig(kind="sglang", dtype="fp32", **config), shape
    )
    if model is not None:
        engine.load_weights(0, model.named_parameters())
    return engine


def run(work: Coroutine[Any, Any, T], limit_s: float = 120.0) -> T:
    """In an event loop of its own, with a limit."""

    async def limited() -> T:
        async with asyncio.timeout(limit_s):
            return await work

    return asyncio.run(limited())
