"""A real SGLang server of a small random model beside the trainer on its GPU: published to, sampled from."""

from __future__ import annotations

import asyncio
import json
import os
import re
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import accuracy
from benchmarks.gpu.minutes.layers import smol
from benchmarks.gpu.minutes.rows import Figures, Step, beside, short
from benchmarks.gpu.publication import SERVER_ARGS
from genac_megatron.algorithms.losses import make_sft_loss
from genac_megatron.models.blockwise import served_config
from genac_megatron.models.registry import hf_config
from genac_megatron.platform.network import spare_ports
from genac_megatron.publication.adapter_fleet import AdapterPublisher
from genac_megatron.publication.factory import adapter_publisher, fleet_publisher
from genac_megatron.publication.publisher import Publisher
from genac_megatron.recipe.estimate import BYTES, served_bytes, slot_bytes
from genac_megatron.recipe.memory import SERVER_GIB
from genac_megatron.recipe.share import CONTEXT_GIB, GIB
from genac_megatron.records import Request, Sample, SamplingParams
from genac_megatron.serving.sglang.adapters import lora_arguments
from genac_megatron.serving.sglang.boot import group_members
from genac_megatron.serving.sglang.client import ServerClient
from genac_megatron.serving.sglang.engine import SglangEngine
from genac_megatron.serving.sglang.fleet import Endpoint
from genac_megatron.serving.sglang.server import Server, ServerSpec
from genac_megatron.stages.parity import engine_sample, parity_figures
from genac_megatron.training.layout import init_world
from genac_megatron.training.role import Role
from tests.gpu import gpu_cases as cases

PUBLICATIONS = 20
# Sides that are whole blocks of 128, which FP8 servers need.
BLOCKS: dict[str, Any] = {
    "layers": 8, "hidden": 1024, "ffn": 2816, "heads": 8, "kv_heads": 2, "head_dim": 128, "vocab": 32_768,
}  # fmt: skip


ADAPTER: dict[str, Any] = {"rank": 16, "alpha": 32.0}


class Served:
    """A role, its server and what publishes to it. lora: the server loads the role's adapters."""

    def __init__(self, step: Step, quantization: str, folder: Path, *, lora: bool = False) -> None:
        self.tiny, self.quantization, self.folder, self.lora = step.tiny, quantization, folder, lora
        self.log = step.logs / f"{step.name}.server.log"
        torch.set_num_threads(1)
        init_world()
        self.role = self._role()
        self.role.begin_stage(None, PUBLICATIONS + 10)
        (folder / "config.json").write_text(
            json.dumps(served_config(hf_config(self.role.shape), quantization))
        )
        device = "cpu" if step.tiny else "cuda"
        args = () if step.tiny else (*SERVER_ARGS, "--mm-feature-transport", "cpu")  # text: no GPU for images
        self.adapters = [self.role.config.training.adapter] if self.role.config.training.adapter else []
        args = (*args, *lora_arguments(self.adapters, gpu=not step.tiny))
        self.spec = ServerSpec(
            "actor/0", folder, spare_ports(1)[0], dtype=self.role.config.training.dtype, device=device,
            mem_fraction=0.3, max_running=64, max_tokens=4096 if step.tiny else 65_536, args=args,
        )  # fmt: skip
        self.server = Server(self.spec, self.log)

    def _role(self) -> Role:
        plain = self.quantization == "off"
        dtype = "fp32" if self.tiny else "bf16"
        # SGLang's checksums of a CPU's weights came with 0.5.23.
        publication = {"verify": "version"} if self.tiny else {}
        role = cases.make_role(
            "llama" if plain else "qwen3",
            dtype=dtype,
            specs="auto",
            sizes=smol(self.tiny) if plain else BLOCKS,
            engine={
                "kind": "sglang",
                "quantization": self.quantization,
                "dtype": dtype,
                "enable_lora": self.lora,
            },
            **({"adapter": ADAPTER} if self.lora else {}),
        )
        config = role.config
        block = config.publication.model_copy(update=publication)
        role.config = config.model_copy(update={"publication": block})
        return role

    def start(self) -> Figures:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            self.free_before, self.reserved_before = (
                torch.cuda.mem_get_info()[0],
                torch.cuda.memory_reserved(),
            )
        self.server.start()
        return {"healthy_s": round(self.server.wait_healthy(900.0 if self.tiny else 170.0), 1)}

    def publish(self) -> Figures:
        """Three times; the first is verified tensor by tensor."""
        endpoint = Endpoint(self.spec.name, self.spec.url, self.spec.key, 1, self.spec.device)
        gpus = None if self.tiny else {self.spec.name: [0]}
        client = ServerClient(self.spec.url, self.spec.key, name=self.spec.name)
        adapter = self.role.name if self.lora else None
        self.engine = SglangEngine([client], self.role.config.engine, self.role.shape, adapter=adapter)
        to: Any = (self.role, [endpoint], self.folder / "weights", gpus)
        self.publisher: Publisher | AdapterPublisher = (
            adapter_publisher(*to, held={}, in_use=self.engine.in_use) if self.lora else fleet_publisher(*to)
        )
        base = self.publisher.base if isinstance(self.publisher, AdapterPublisher) else self.publisher
        found: Figures = {"transport": type(base.transport).__name__}
        for version in (1, 2, 3):
            found[f"v{version}"] = self._sent(version)
        self.engine.version = 3
        return found

    def _sent(self, version: int) -> Figures:
        figures = self.publisher.publish(version)
        rate = figures["bytes"] / figures["send_s"] / 1e9
        return {key: short(value) for key, value in figures.items()} | {"send_gb_s": short(rate)}

    def sample(self) -> Figures:
        """Tokens by the server, their log-probs by the trainer."""
        count, new = (4, 8) if self.tiny else (64, 128)

        async def ask() -> list[Sample]:
            made = accuracy.make_samples(count, 3, self.role.shape.vocab)
            prompts = [tuple(sample.tokens[:16]) for sample in made]
            asked = [
                Request(ids, SamplingParams(new, 1.0), seed=n, key=f"{n}") for n, ids in enumerate(prompts)
            ]
            done = await asyncio.gather(*(self.engine.complete(request) for request in asked))
            return [engine_sample(ids, completion) for ids, completion in zip(prompts, done, strict=True)]

        began = time.time()
        samples = asyncio.run(ask())
        rate = count * new / (time.time() - began)
        found = parity_figures("actor", samples, self.role.logprobs(samples))
        return {key: short(value) for key, value in found.items()} | {
            "tokens": count * new,
            "tokens_s": round(rate),
        }

    def held(self) -> Figures:
        """GiB that the server holds beside weights and KV cache: what the model says, and what it is."""
        client = ServerClient(self.spec.url, self.spec.key, name=self.spec.name)
        tokens = int(client.info()["max_total_num_tokens"])
        client.close()
        role, shape = self.role, self.role.shape
        cache = 2 * tokens * shape.layers * shape.kv_size * BYTES[role.config.engine.dtype]
        weights = served_bytes(role.config, shape) + slot_bytes(self.adapters, shape, role.config.engine)
        whole = self._server_bytes()
        found = {"server_gib": beside(SERVER_GIB, (whole - cache - weights) / GIB)}
        said = re.search(r"Load weight begin\. avail mem=([0-9.]+) GB", self.log.read_text(errors="replace"))
        if said is not None and not self.tiny:
            found["context_gib"] = beside(CONTEXT_GIB, self.free_before / GIB - float(said[1]))
        return {**found, "whole_gib": short(whole / GIB), "cache_gib": short(cache / GIB),
                "weights_gib": short(weights / GIB)}  # fmt: skip

    def _server_bytes(self) -> float:
        """On the GPU, all that is neither ours nor was there before; without one, resident memory."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            return self.free_before + self.reserved_before - torch.cuda.mem_get_info()[0] \
                - torch.cuda.memory_reserved()  # fmt: skip
        assert self.server.pid is not None
        files = [Path(f"/proc/{pid}/statm") for pid in group_members(self.server.pid)]
        return sum(float(file.read_text().split()[1]) for file in files) * os.sysconf("SC_PAGE_SIZE")

    def train(self) -> list[float]:
        vocab = self.role.shape.vocab
        batches = [accuracy.make_samples(24, seed, vocab) for seed in range(3)]
        return [self.role.train_step(batch, make_sft_loss()).stats["loss"] for batch in batches]

    def train_and_publish(self) -> Figures:
        losses = self.train()
        sent = self._sent(4)
        self.engine.version = 4
        return {"losses": [round(loss, 4) for loss in losses], **sent}

    def flat(self) -> Figures:
        """Memory over publications, each after a training step: nothing may grow with them."""
        count = 4 if self.tiny else PUBLICATIONS
        used, files = [], []
        for version in range(5, 5 + count):
            self.train()
            self.publisher.publish(version)
            self.engine.version = version
            used.append(_used_gib())
            files.append(len(list(Path("/proc/self/fd").iterdir())))
        # The first publications fill caches; what an allocator takes later is a few blocks.
        grown = used[-1] - used[len(used) // 4]
        if grown > 0.25 or files[-1] > files[len(files) // 4] + 2:
            raise RuntimeError(f"memory in use {used} GiB, open files {files}: they grow")
        return {"publications": count, "grown_gib": short(grown), "used_gib": used, "open_files": files}

    def close(self) -> None:
        if hasattr(self, "publisher"):
            self.publisher.close()
        self.server.stop()


def _used_gib() -> float:
    """In use on the GPU by everybody, the server's included; without one, this process's resident memory."""
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        return round((total - free) / 2**30, 3)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return round(pages * 4096 / 2**30, 3)


@contextmanager
def served(step: Step, quantization: str, *, lora: bool = False) -> Iterator[Served]:
    with tempfile.TemporaryDirectory(prefix="genac-") as folder:
        found = Served(step, quantization, Path(folder), lora=lora)
        try:
            yield found
        finally:
            found.close()


def run(step: Step, quantization: str = "off", *, lora: bool = False) -> bool:
    """One after the other, and no further after a failure: each needs what came before it."""
    with served(step, quantization, lora=lora) as found:
        acts = (
            ("start", found.start),
            ("publish", found.publish),
            ("parity", found.sample),
            ("parity, warm", found.sample),
            ("train, publish", found.train_and_publish),
            ("parity after training", found.sample),
            ("memory flat", found.flat),
            ("memory beside weights and cache", found.held),
        )
        well = step.chain([(f"{'lora' if lora else quantization}: {what}", act) for what, act in acts])
        if not well and found.log.exists():
            print("\n".join(found.log.read_text(errors="replace").splitlines()[-80:]))
    return well


def run_fp8(step: Step) -> bool:
    """The same with weights in blocks of FP8 (`engine.quantization`)."""
    if step.tiny:
        step.say("fp8", ok=True, left_out="SGLang serves FP8 on GPUs alone")
        return True
    return run(step, "fp8")


def run_lora(step: Step) -> bool:
    """The same with adapters that the server loads beside the base (`engine.enable_lora`)."""
    return run(step, lora=True)
