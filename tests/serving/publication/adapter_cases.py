"""What ranks do with adapters and servers (test_adapters.py), and what is right."""

from __future__ import annotations

import asyncio
import hashlib
import os
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from genac_megatron.models.registry import shape_of
from genac_megatron.records import Completion, Request, SamplingParams
from genac_megatron.serving.sglang.client import Generated
from genac_megatron.serving.sglang.fleet import Endpoint
from tests.distributed.cases import make_role
from tests.serving.publication.fleet_cases import VOCAB, client_of, config_of, plain_model

SEED = 5  # of the base
ADAPTER = {"rank": 4, "alpha": 8.0}
LIMITS = {"control_s": 30.0, "send_s": 30.0}
NEW = 5
SCORED = [[7, 2], [7, 5], [4]]  # continuations of the first prompt
PROMPTS = [[3, 1, 4, 1, 5], [9, 2, 6], [5, 3, 5, 8, 9, 7, 9], [2, 7, 1, 8]]


def adapted(layout: dict[str, Any] | None = None, **model: Any) -> Any:
    """A tiny role that is an adapter, whose servers load it."""
    config = config_of(layout, training={"adapter": ADAPTER}, publication=LIMITS, **model)
    engine = config.engine.model_copy(update={"enable_lora": True})
    return config.model_copy(update={"engine": engine})


def part(name: str, seed: int, size: tuple[int, ...]) -> torch.Tensor:
    """A tensor of an adapter, whole, by its name and seed.

    Of 0.15: with 0.3 rounding alone moves a log-prob in thousands by 1e-4 (W + s B A against W x + s B A x in
    fp32); with this by 4e-6, and another version's still differ by 1.
    """
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    return torch.randn(*size, generator=generator) * 0.15


def fill(role: Any, seed: int) -> None:
    """Give a role's adapter the values that `merged` has, in every layout."""
    for one in (p for model in role.models for p in model.adapters.parts):
        tp, at = (one.group.size(), one.group.rank())
        column = one.place.column
        pieces = zip(one.place.projections, one.A.data.split(one.rank), one.B, strict=True)
        for name, a, b in pieces:
            rows, columns = b.size(0) * (tp if column else 1), a.size(1) * (1 if column else tp)
            whole_a, whole_b = (
                part(f"{name}.A", seed, (one.rank, columns)),
                part(f"{name}.B", seed, (rows, one.rank)),
            )
            a.copy_(whole_a if column else whole_a.chunk(tp, dim=1)[at])
            b.data.copy_(whole_b.chunk(tp)[at] if column else whole_b)


def merged(config: Any, *seeds: int | None) -> Any:
    """transformers' model with the adapters of some seeds in its weights; None: the base."""
    model = plain_model(config, SEED)
    scale, rank = config.training.adapter.scale, config.training.adapter.rank
    for seed in (one for one in seeds if one is not None):
        for name, module in model.named_modules():
            if name.rpartition(".")[2] in config.training.adapter.targets:
                rows, columns = module.weight.shape
                a, b = part(f"{name}.A", seed, (rank, columns)), part(f"{name}.B", seed, (rows, rank))
                module.weight.data += scale * b @ a
    return model


@torch.no_grad()
def forced(model: Any, prompt: list[int], ids: list[int]) -> list[float]:
    """log p of each token given all before it."""
    logits = model(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1]
    found: list[float] = logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0].tolist()
    return found


def gap(model: Any, prompt: list[int], ids: list[int], logprobs: list[float]) -> float:
    """Largest difference of sampled tokens' log-probs from a model's."""
    return max(abs(a - b) for a, b in zip(forced(model, prompt, ids), logprobs, strict=True))


def sampled(endpoint: Endpoint, adapter: str | None, new: int = NEW) -> list[Generated]:
    sampling = {"temperature": 1.0, "max_new_tokens": new, "ignore_eos": True}
    asked = client_of(endpoint).generate(PROMPTS, sampling, limit_s=120.0, adapter=adapter)
    return asyncio.run(asked)


def worst(config: Any, seed: int | None, answers: list[Generated], *more: int) -> float:
    model = merged(config, seed, *more)
    return max(gap(model, p, list(a.ids), list(a.logprobs)) for p, a in zip(PROMPTS, answers, strict=True))


# --- on the ranks ---------------------------------------------------------------------------------------


def make_publisher(
    name: str, config: Any, endpoints: list[Endpoint], folder: str, held: dict[Any, str], in_use: Any = set
) -> Any:
    """Collective: what brings a role's adapters to the servers."""
    import torch.distributed as dist

    from genac_megatron.publication.factory import adapter_publisher

    role = make_role(name, config, dist.get_world_size(), SEED)
    return adapter_publisher(role, endpoints, Path(folder) / name, held=held, in_use=in_use)


def both_case(rank: int, config: Any, endpoints: list[Endpoint], folder: str, steps: Any) -> Any:
    """Publications of (role, version and seed): the figures and what servers hold after each."""
    held: dict[Any, str] = {}
    publishers = {
        name: make_publisher(name, config, endpoints, folder, held)
        for name in dict.fromkeys(name for name, _ in steps)
    }
    found = []
    for name, version in steps:
        fill(publishers[name].role, version)
        figures = publishers[name].publish(version)
        found.append([figures, [sorted(client_of(endpoint).adapters()) for endpoint in endpoints]])
    assert rank > 0 or all(client_of(endpoint).healthy(60.0) for endpoint in endpoints)  # and all its ranks
    for publisher in publishers.values():
        publisher.close()
    return found


def moved_case(rank: int, config: Any, endpoints: list[Endpoint], folder: str) -> Any:
    """Both roles on one base: their versions 31 and 32; the actor's adapter merged into it; 33 and 34.

    The figures, and what servers call their base and adapters in the end.
    """
    import torch.distributed as dist

    from genac_megatron.publication.digest import moved_by
    from genac_megatron.publication.factory import adapter_publisher
    from genac_megatron.training.layout import Layout
    from genac_megatron.training.merging import merge
    from genac_megatron.training.role import Role

    held: dict[Any, str] = {}
    first = make_publisher("actor", config, endpoints, folder, held)
    layout = Layout.from_config("critic", config.layout, dist.get_world_size())
    critic = Role("critic", config, first.role.shape, layout, layout.groups(), beside=first.role)
    second = adapter_publisher(critic, endpoints, Path(folder) / "critic", held=held, in_use=set)
    fill(first.role, 31)
    fill(critic, 32)
    found = [first.publish(31), second.publish(32)]
    merge(first.role, moved_by(first.role))
    found += [first.publish(33), second.publish(34)]
    names = [sorted(client_of(endpoint).adapters()) for endpoint in endpoints]
    versions = [client_of(endpoint).version(limit_s=30.0) for endpoint in endpoints]
    for publisher in (first, second):
        publisher.close()
    return [figures["bytes"] for figures in found], names, versions


def load_case(rank: int, config: Any, endpoints: list[Endpoint], folder: str, versions: list[int]) -> Any:
    """Version after version while the first rank's engine is asked without a break.

    Its completions, after each publication the names that the servers hold, and the scores of SCORED then.
    """
    import torch.distributed as dist

    from genac_megatron.serving.sglang.engine import SglangEngine

    engine = SglangEngine(
        [client_of(e) for e in endpoints], config.engine, shape_of(config.model, VOCAB), adapter="actor"
    )
    publisher = make_publisher("actor", config, endpoints, folder, {}, engine.in_use)
    done: list[tuple[int, Completion]] = []
    asking, ended = threading.Event(), Counter[int]()  # requests by worker

    async def ask(worker: int) -> None:
        number = 0
        while asking.is_set():
            prompt = (worker + number) % len(PROMPTS)
            request = Request(
                tuple(PROMPTS[prompt]), SamplingParams(10 + 5 * worker), number, f"{worker}-{number}"
            )
            done.append((prompt, await engine.complete(request)))
            number += 1
            ended[worker] = number

    async def all_of_them() -> None:
        await asyncio.gather(*(ask(worker) for worker in range(4)))

    thread = threading.Thread(target=lambda: asyncio.run(all_of_them()))
    held = []
    for version in versions:
        fill(publisher.role, version)
        publisher.publish(version)
        engine.version = version
        if rank == 0 and not thread.is_alive():
            asking.set()
            thread.start()
        if rank == 0:
            # so that the next requests of all are of this version, however slow the machine
            before = dict(ended)
            limit = time.monotonic() + 120.0
            while any(ended[worker] <= before.get(worker, 0) for worker in range(4)):
                assert time.monotonic() < limit, f"requests do not end: {ended}"
                time.sleep(0.02)
        held.append(client_of(endpoints[0]).adapters())
        dist.barrier()
    asking.clear()
    if rank == 0:
        thread.join(120.0)
        assert not thread.is_alive()
    scores = asyncio.run(scored(engine)) if rank == 0 else []
    publisher.close()
    return [(prompt, list(c.ids), list(c.logprobs), c.spans, c.finish) for prompt, c in done], held, scores


async def scored(engine: Any) -> list[float]:
    await engine.warm(PROMPTS[0])
    found: list[float] = await engine.score(PROMPTS[0], SCORED)
    return found


def disturbed_case(
    rank: int, config: Any, endpoints: list[Endpoint], folder: str, group: int, how: str
) -> dict[str, Any]:
    """Version 1; then version 2, whose bytes are altered on the way, or whose server is killed."""
    from genac_megatron.errors import GenacError

    publisher = make_publisher("actor", config, endpoints, folder, {})
    fill(publisher.role, 1)
    publisher.publish(1)
    by_memory: Callable[[str, torch.Tensor], Any] = publisher.by_memory

    def disturbed(name: str, flat: torch.Tensor) -> Any:
        if how == "killed":
            os.killpg(group, 9)
            return by_memory(name, flat)
        altered = flat.clone()
        altered[3] += 1.0
        return by_memory(name, altered)

    publisher.by_memory = disturbed
    fill(publisher.role, 2)
    try:
        # Checksums are due again, as after `verify_every` publications.
        publisher._since.clear()
        publisher.publish(2)
    except GenacError as error:
        return {"error": str(error), "code": error.exit_code, "lost": publisher.lost}
    finally:
        publisher.close()
    raise AssertionError("the publication succeeded")
