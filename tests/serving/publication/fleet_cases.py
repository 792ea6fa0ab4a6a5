"""Real SGLang servers for the publication tests, what ranks run against them, and what they must say."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from genac_megatron.models.registry import hf_config, shape_of
from genac_megatron.platform.network import spare_ports
from genac_megatron.serving.sglang.boot import group_members
from genac_megatron.serving.sglang.client import Generated, ServerClient
from genac_megatron.serving.sglang.fleet import Endpoint
from genac_megatron.serving.sglang.server import Server, ServerSpec, Zygote
from tests.distributed.cases import make_role, role_config

VOCAB = 67  # of role_config's models
BUCKET = 40_000  # bytes: several buckets per pipeline stage
START_S = 180.0  # on a busy machine
PROMPTS = [[3, 1, 4, 1, 5], [9, 2, 6], [5, 3, 5, 8, 9, 7, 9]]
NEW = 8


class Servers:
    """Servers of tiny models, on random weights until something is published to them."""

    def __init__(self, zygote: Zygote, folder: Path) -> None:
        self.zygote, self.folder = zygote, folder
        self.running: dict[str, Server] = {}

    def start(
        self,
        *,
        family: str = "qwen3",
        tie: bool = True,
        tps: tuple[int, ...] = (1,),
        args: tuple[str, ...] = (),
        **shape_of_it: Any,
    ) -> list[Endpoint]:
        """One new server for each of the tensor-parallel sizes, all at once."""
        count = len(self.running)
        model = self.folder / f"{family}-{tie}"
        model.mkdir(parents=True, exist_ok=True)
        shape = shape_of(role_config(family=family, tie=tie, shape=shape_of_it).model, VOCAB)
        (model / "config.json").write_text(json.dumps(hf_config(shape)))
        made = []
        for index, (port, tp) in enumerate(zip(spare_ports(len(tps)), tps, strict=True)):
            spec = ServerSpec(
                *(f"tiny/{count + index}", model, port),
                dtype="fp32",
                tp=tp,
                max_running=16,
                max_tokens=8192,
                args=args,
            )
            server = Server(spec, self.folder / f"server-{count + index}.log", zygote=self.zygote)
            server.start()
            self.running[spec.name] = server
            made.append(server)
        for server in made:
            server.wait_healthy(START_S)
        return [Endpoint(s.spec.name, s.spec.url, s.spec.key, s.spec.tp, s.spec.device) for s in made]

    @contextmanager
    def fresh(self, **options: Any) -> Iterator[list[Endpoint]]:
        """Servers that the test may do away with."""
        endpoints = self.start(**options)
        try:
            yield endpoints
        finally:
            self.stop(endpoints)

    def stop(self, endpoints: list[Endpoint]) -> None:
        for endpoint in endpoints:
            self.running[endpoint.name].stop()

    def close(self) -> None:
        for server in self.running.values():
            server.stop()


def config_of(layout: dict[str, Any] | None = None, **overrides: Any) -> Any:
    """A tiny fp32 role with an fp32 engine; `publication` takes that block's keys."""
    publication = overrides.pop("publication", {})
    made = role_config(layout=layout or {"count": 1}, **overrides)
    engine = made.engine.model_copy(update={"kind": "sglang", "dtype": "fp32"})
    block = type(made.publication).model_validate(publication)
    return made.model_copy(update={"engine": engine, "publication": block})


# --- on the ranks -------------------------------------------------------------------------------------


def small_buckets(publisher: Any, bucket: int | None = BUCKET) -> Any:
    """The publisher with buckets of a size that tiny models fill; the recipe counts in MiB."""
    from genac_megatron.publication.plan import make_plan

    role = publisher.role
    publisher.plan = make_plan(role.shape, role.layout, publisher.dtype.itemsize, bucket)
    return publisher


def make_publisher(config: Any, endpoints: list[Endpoint], folder: str, seed: int) -> Any:
    """Collective: a publisher of a role with seeded random weights."""
    import torch.distributed as dist

    from genac_megatron.publication.factory import fleet_publisher

    role = make_role("actor", config, dist.get_world_size(), seed)
    return small_buckets(fleet_publisher(role, endpoints, Path(folder)))


def publish_case(
    rank: int, config: Any, endpoints: list[Endpoint], folder: str, seed: int, version: int
) -> dict[str, float]:
    """Seeded random weights to the servers; the publication's figures."""
    publisher = make_publisher(config, endpoints, folder, seed)
    try:
        figures: dict[str, float] = publisher.publish(version)
        return figures
    finally:
        publisher.close()


# --- what servers must say ----------------------------------------------------------------------------


def client_of(endpoint: Endpoint) -> ServerClient:
    return ServerClient(endpoint.url, endpoint.key, name=endpoint.name)


def members(group: int) -> list[psutil.Process]:
    """The processes of a server: its process id is its group."""
    return [psutil.Process(pid) for pid in group_members(group)]


def greedy(endpoint: Endpoint) -> list[Generated]:
    """NEW greedy tokens after each prompt, in one request."""
    sampling = {"temperature": 0.0, "max_new_tokens": NEW, "ignore_eos": True}
    return asyncio.run(client_of(endpoint).generate(PROMPTS, sampling, limit_s=60.0))


def reference(config: Any, seed: int) -> list[tuple[list[int], list[float]]]:
    """Greedy tokens and their log-probs by transformers on the same weights, one forward per token."""
    import torch

    model = plain_model(config, seed)
    answers = []
    for prompt in PROMPTS:
        ids, logprobs = list(prompt), []
        for _ in range(NEW):
            with torch.no_grad():
                logp_V = torch.log_softmax(model(torch.tensor([ids])).logits[0, -1].float(), dim=-1)
            ids.append(int(logp_V.argmax()))
            logprobs.append(float(logp_V.max()))
        answers.append((ids[len(prompt) :], logprobs))
    return answers


def forced(config: Any, seed: int, prompt: list[int], response: list[int]) -> list[float]:
    """log p of each response token given all before it, by transformers in one forward."""
    import torch

    with torch.no_grad():
        logits = plain_model(config, seed)(torch.tensor([[*prompt, *response]])).logits[0].float()
    logp_TV = torch.log_softmax(logits, dim=-1)[len(prompt) - 1 : -1]
    picked: list[float] = logp_TV.gather(1, torch.tensor(response)[:, None])[:, 0].tolist()
    return picked


def plain_model(config: Any, seed: int) -> Any:
    """A transformers model with the seeded random weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from genac_megatron.models.mapping import random_weights
    from genac_megatron.models.sizes import hf_names
    from genac_megatron.serving.experts import by_file_names

    shape = shape_of(config.model, VOCAB)
    fields = hf_config(shape)
    made = AutoConfig.for_model(fields.pop("model_type"), **fields)
    model = AutoModelForCausalLM.from_config(made, dtype=torch.float32, attn_implementation="eager").eval()
    get = random_weights(shape, seed)
    weights = {name: get(name) for name in hf_names(shape)}
    if shape.tie:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    held = by_file_names(model.state_dict())
    assert held.keys() == weights.keys()
    for name, tensor in held.items():
        tensor.copy_(weights[name])
    return model


def gap(answers: list[Generated], wanted: list[tuple[list[int], list[float]]]) -> float:
    """Largest difference of log-probs; infinite where a token differs."""
    if [list(a.ids) for a in answers] != [ids for ids, _ in wanted]:
        return float("inf")
    return max(
        abs(x - y)
        for a, (_, logprobs) in zip(answers, wanted, strict=True)
        for x, y in zip(a.logprobs, logprobs, strict=True)
    )


def restarted(endpoint: Endpoint) -> Endpoint:
    """The endpoint as the fleet names it after a restart."""
    return dataclasses.replace(endpoint, instance=endpoint.instance + 1)
