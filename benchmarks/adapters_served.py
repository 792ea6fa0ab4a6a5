"""Adapters that a server decodes with in one batch, against two servers of whole models: for adapters.py.

Real SGLang servers on this machine, of the same roles that were trained. Asked for the same number of tokens
each time: of the base, of one adapter and of two in one batch of one server, and of two whole models' servers
at once, in turns. A publication is the second of each role to the servers: the first is verified tensor by
tensor and brings the base.
"""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from genac_megatron.models.registry import hf_config
from genac_megatron.platform.network import spare_ports
from genac_megatron.publication.factory import adapter_publisher, fleet_publisher
from genac_megatron.serving.sglang.adapters import adapter_name, lora_arguments
from genac_megatron.serving.sglang.boot import group_members
from genac_megatron.serving.sglang.client import ServerClient
from genac_megatron.serving.sglang.fleet import Endpoint
from genac_megatron.serving.sglang.server import Server, ServerSpec, Zygote
from genac_megatron.training.role import Role

START_S = 600.0
PROMPT = 32  # tokens
LAST = 3  # version of the publications


@contextmanager
def servers_of(role: Role, count: int, args: Sequence[str], zygote: Zygote, folder: Path) -> Iterator[Any]:
    """Servers of the role's model, which hold random weights."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(hf_config(role.shape)))
    made = []
    try:
        for index, port in enumerate(spare_ports(count)):
            spec = ServerSpec(
                *(f"{folder.name}/{index}", folder, port),
                dtype="fp32",
                max_running=32,
                max_tokens=8192,
                args=tuple(args),
            )
            made.append(Server(spec, folder / f"{index}.log", zygote=zygote))
            made[-1].start()
        for server in made:
            server.wait_healthy(START_S)
        yield made
    finally:
        for server in made:
            server.stop()


def endpoint_of(server: Server) -> Endpoint:
    spec = server.spec
    return Endpoint(spec.name, spec.url, spec.key, 1, "cpu")


def processor_s(servers: Sequence[Server]) -> float:
    """Of this process and of servers so far."""
    pids = [os.getpid(), *(pid for server in servers for pid in group_members(server.pid or 0))]
    return sum(sum(psutil.Process(pid).cpu_times()[:2]) for pid in pids)


def published(publishers: Sequence[Any], servers: Sequence[Server]) -> dict[str, Any]:
    """Seconds of both roles' publications, by the clock and of processors."""
    for publisher in publishers:
        publisher.publish(LAST - 1)
    before = processor_s(servers)
    figures = [publisher.publish(LAST) for publisher in publishers]
    found = {
        "published MB": round(sum(each["bytes"] for each in figures) / 1e6, 3),
        "publication s": round(sum(each["seconds"] for each in figures), 3),
        "publication CPU s": round(processor_s(servers) - before, 3),
    }
    for publisher in publishers:
        publisher.close()
    return found


def asked(servers: Sequence[tuple[Server, str | None]], requests: int, new: int) -> tuple[float, float]:
    """Seconds, and of processors, of `requests` samples of `new` tokens, dealt over (server, adapter)."""
    each = requests // len(servers)
    prompts = [[5 + (7 * row + 3 * at) % 200 for at in range(PROMPT)] for row in range(each)]
    sampling = {"temperature": 1.0, "max_new_tokens": new, "ignore_eos": True}

    async def all_of_them() -> None:
        clients = [(ServerClient(s.spec.url, s.spec.key, name=s.spec.name), name) for s, name in servers]
        await asyncio.gather(
            *(client.generate(prompts, sampling, limit_s=600.0, adapter=name) for client, name in clients)
        )

    whose = list({id(server): server for server, _ in servers}.values())
    for server in whose:
        ServerClient(server.spec.url, server.spec.key, name=server.spec.name).flush_cache()
    before, began = processor_s(whose), time.perf_counter()
    asyncio.run(all_of_them())
    return time.perf_counter() - began, processor_s(whose) - before


def served(
    pairs: dict[str, list[Role]], zygote: Zygote, folder: Path, *, requests: int, new: int, turns: int
) -> tuple[dict[str, dict[str, Any]], list[dict[str, Any]]]:
    """By way of training, what a publication takes; and rows of what is asked.

    pairs: of whole models, and of adapters.
    """
    (whole, roles), (adapted, pair) = pairs.items()
    adapters = [role.config.training.adapter for role in pair]
    args = lora_arguments([adapter for adapter in adapters if adapter is not None], gpu=False)
    with (
        servers_of(roles[0], 2, (), zygote, folder / "whole") as two,
        servers_of(pair[0], 1, args, zygote, folder / "beside") as one,
    ):
        held: dict[Endpoint, str] = {}
        to = [
            fleet_publisher(role, [endpoint_of(server)], folder / role.name)
            for role, server in zip(roles, two, strict=True)
        ]
        beside = [
            adapter_publisher(
                *(role, [endpoint_of(one[0])], folder / f"{role.name} beside"), held=held, in_use=set
            )
            for role in pair
        ]
        figures = {whole: published(to, two), adapted: published(beside, one)}
        names = [adapter_name(role.name, LAST) for role in pair]
        ways: dict[str, list[tuple[Server, str | None]]] = {
            "base": [(one[0], None)],
            "one adapter": [(one[0], names[0])],
            "two adapters in one batch": [(one[0], name) for name in names],
            "two whole models, a server each": [(server, None) for server in two],
        }
        return figures, list(
            in_turns(ways, lambda way: asked(ways[way], requests, new), turns, requests * new)
        )


def in_turns(
    ways: dict[str, Any], act: Callable[[str], tuple[float, float]], turns: int, tokens: int
) -> Iterator[dict[str, Any]]:
    """A row for each way: the median of its turns, after a first that is not counted."""
    found: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    for turn in range(turns + 1):
        for way in ways:
            taken = act(way)
            if turn:
                found[way].append(taken)
    for way, taken in found.items():
        clock, used = (statistics.median(column) for column in zip(*taken, strict=True))
        yield {
            "asked": way,
            "tokens": tokens,
            "tokens/s": round(tokens / clock, 1),
            "CPU ms a token": round(1000 * used / tokens, 2),
        }
