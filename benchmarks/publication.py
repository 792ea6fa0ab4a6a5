"""Seconds of each phase of a publication, per transport, against a plain copy of the same bytes.

A model of some 570 MB (bf16, random weights) goes from a trainer of one rank to the embedded engine and to
SGLang servers of one and two ranks on this machine. The plain copy is one `copy_` of as many bytes between
two buffers that exist already. Gathering and sending overlap, on the same memory and cores: the phases and
whole_s are of the fastest such publication. alone_s: sending while nothing is gathered. alone/copy is the
share of a plain copy's speed (goal: at least 0.8 in process and by shared memory). Copy, alone and overlapped
take turns; the best of each counts. alone_cpu_s and copy_cpu_s are processor seconds, those of the server
included, which spins while it is paused: a bound where other processes take turns on the cores. Needs the
serving environment (GENAC_SERVE_PYTHON; `make serve-env` prints it). Run: python -m benchmarks.publication
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks.machine import save, table
from genac_megatron.models.build import build_model  # noqa: F401  (megatron's CPU hook before its first import)
from genac_megatron.models.mapping import load_hf_into, random_weights
from genac_megatron.models.registry import hf_config, shape_of
from genac_megatron.platform.network import spare_ports
from genac_megatron.publication.factory import fleet_publisher
from genac_megatron.publication.publisher import Publisher
from genac_megatron.publication.transport import Parcel, Transport
from genac_megatron.recipe.schema import EngineConfig, PublicationConfig, RoleConfig
from genac_megatron.serving.embedded import EmbeddedEngine
from genac_megatron.serving.sglang.fleet import Endpoint
from genac_megatron.serving.sglang.server import Server, ServerSpec, Zygote, serving_python
from genac_megatron.training.layout import Layout, close_world, init_world
from genac_megatron.training.role import Role

SHAPE = {
    "layers": 16, "hidden": 1024, "ffn": 4096, "heads": 16, "kv_heads": 8, "head_dim": 64, "vocab": 32_000,
}  # fmt: skip
PHASES = ("pause_s", "flush_s", "gather_s", "send_s", "verify_s", "resume_s")
START_S = 300.0
GB = 1e9


def shape_asked(options: argparse.Namespace) -> dict[str, int]:
    wide = {name: SHAPE[name] * options.times for name in ("hidden", "ffn", "heads", "kv_heads")}
    return SHAPE | wide | {"layers": options.layers}


def make_role(options: argparse.Namespace) -> Role:
    """A bf16 role of one rank; its engine's precision is the same, so nothing is converted."""
    config = RoleConfig.model_validate(
        {
            "model": {"family": "qwen3", "shape": shape_asked(options), "tokenizer": "none"},
            "training": {"dtype": "bf16", "distributed_optimizer": False},
            "engine": {"dtype": "bf16"},
        }
    )
    layout = Layout.from_config("actor", config.layout, 1)
    shape = shape_of(config.model, SHAPE["vocab"])
    role = Role("actor", config, shape, layout, layout.groups())
    load_hf_into(role.models, layout, shape, random_weights(shape, 0))
    return role


def timed(act: Callable[[], Any]) -> tuple[float, float]:
    """Seconds by the clock, and of this process on its processors."""
    began, used = time.perf_counter(), time.process_time()
    act()
    return time.perf_counter() - began, time.process_time() - used


class ProcessorTime:
    """Adds up the processor seconds of this process and of a server's while a transport sends."""

    def __init__(self, group: int | None) -> None:
        self.group, self.seconds = group, 0.0

    def now(self) -> float:
        used = time.process_time()
        for process in psutil.process_iter():
            try:
                if self.group is not None and os.getpgid(process.pid) == self.group:
                    used += sum(process.cpu_times()[:2])
            except (psutil.Error, ProcessLookupError):  # it has ended meanwhile
                continue
        return used


def processor_time_of(transport: Transport, group: int | None) -> ProcessorTime:
    """Watch a transport's `send`."""
    measured, send = ProcessorTime(group), transport.send

    def watched(parcel: Parcel) -> None:
        before = measured.now()
        send(parcel)
        measured.seconds += measured.now() - before

    transport.send = watched  # type: ignore[method-assign]
    return measured


@contextmanager
def server_of(
    role: Role, zygote: Zygote, folder: Path, tp: int
) -> Iterator[tuple[list[Endpoint], int | None]]:
    (folder / "config.json").write_text(json.dumps(hf_config(role.shape)))
    spec = ServerSpec(f"actor/{tp}", folder, spare_ports(1)[0], tp=tp, max_running=4, max_tokens=1024)
    server = Server(spec, folder / f"server-{tp}.log", zygote=zygote)
    server.start()
    try:
        server.wait_healthy(START_S)
        yield [Endpoint(spec.name, spec.url, spec.key, tp, "cpu")], server.pid
    finally:
        server.stop()


def measure(name: str, publisher: Publisher, repeats: int, group: int | None = None) -> dict[str, Any]:
    """One row: the phases of the publication whose sending was fastest, and sending without gathering."""
    publisher.publish(1)  # makes groups and shared memory, verifies tensor by tensor
    nbytes = int(sum(bucket.numel for bucket in publisher.plan) * publisher.dtype.itemsize)
    source, target = torch.ones(nbytes, dtype=torch.uint8), torch.ones(nbytes, dtype=torch.uint8)
    send = processor_time_of(publisher.transport, group)
    copies, alone, runs = [], [], []
    for _ in range(repeats):
        copies.append(timed(lambda: target.copy_(source)))
        publisher.overlap = False
        send.seconds = 0.0
        alone.append((publisher.publish(2)["send_s"], send.seconds))
        publisher.overlap = True
        runs.append(publisher.publish(2))
    best = min(runs, key=lambda run: run["seconds"])
    publisher.close()
    copy, copy_cpu = (min(column) for column in zip(*copies, strict=True))
    sent, sent_cpu = (min(column) for column in zip(*alone, strict=True))
    return {
        "transport": name,
        **{phase: round(best.get(phase, 0.0), 3) for phase in PHASES},
        "whole_s": round(best["seconds"], 3),
        "alone_s": round(sent, 3),
        "copy_s": round(copy, 3),
        "alone_GB/s": round(nbytes / sent / GB, 2),
        "copy_GB/s": round(nbytes / copy / GB, 2),
        "alone/copy": round(copy / sent, 2),
        "alone_cpu_s": round(sent_cpu, 3),
        "copy_cpu_s": round(copy_cpu, 3),
        "host_peak_MB": round(best["host_peak_bytes"] / 1e6),
    }


def with_transport(role: Role, transport: str, options: argparse.Namespace) -> Role:
    block = PublicationConfig.model_validate({"transport": transport, "bucket_mib": options.bucket_mib})
    role.config = role.config.model_copy(update={"publication": block})
    return role


def rows(options: argparse.Namespace, folder: Path) -> Iterator[dict[str, Any]]:
    role = make_role(options)
    engine = EmbeddedEngine(hf_config(role.shape), EngineConfig(dtype="bf16"))
    bucket_bytes = options.bucket_mib << 20
    if options.in_process:
        yield measure("in process, embedded", Publisher(role, [engine], bucket_bytes), options.repeats)
    engine.close()
    del engine
    zygote = Zygote(serving_python(), folder / "zygote.log")
    try:
        for tp in options.tps:
            with server_of(role, zygote, folder, tp) as (endpoints, group):
                for transport in options.transports:
                    publisher = fleet_publisher(
                        with_transport(role, transport, options), endpoints, folder / "weights"
                    )
                    yield measure(f"{transport}, server tp {tp}", publisher, options.repeats, group)
    finally:
        zygote.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=SHAPE["layers"])
    parser.add_argument("--times", type=int, default=1, help="as wide, so that tensors are larger")
    parser.add_argument("--bucket-mib", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--in-process", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--transports", nargs="*", default=["tensor", "group", "disk"])
    parser.add_argument("--tps", nargs="*", type=int, default=[1, 2], help="ranks of each server")
    options = parser.parse_args()
    torch.set_num_threads(1)
    init_world()
    made: list[dict[str, Any]] = []
    busy = round(os.getloadavg()[0], 1)  # what else the machine was doing
    with tempfile.TemporaryDirectory(prefix="genac-") as folder:
        for row in rows(options, Path(folder)):
            made.append(row)
            print(table([row]), flush=True)
    close_world()
    print(table(made))
    name = "publication" if options.times == 1 else f"publication-times-{options.times}"
    print("written", save(name, vars(options) | {"shape": shape_asked(options), "load": busy}, made).name)


if __name__ == "__main__":
    main()
