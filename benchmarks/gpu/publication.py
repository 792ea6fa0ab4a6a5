"""Publication on one GPU: gathered and sent bytes per second against a plain device-to-device copy.

Rows: the plain copy (`copy_` between two buffers that exist); joining buckets alone (Megatron's parameters to
Hugging Face tensors in one flat buffer); in process, to the embedded engine; by CUDA IPC to a process that
opens the handle and copies the bucket out (benchmarks/gpu/ipc_reader.py); and, where GENAC_SERVE_PYTHON is
set, by CUDA IPC to an SGLang server on the same GPU, verified tensor by tensor at its first publication. A
device-to-device copy reads and writes each byte: bytes/s are of the bytes published, for all rows alike.
Goals: in process and by IPC at least 0.8 of a plain copy. On a CPU, shared memory takes CUDA IPC's place.
Run: python -m benchmarks.gpu.publication
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks.bare import role_config
from benchmarks.gpu.common import need_gpu, parser, report, seconds, verdict
from benchmarks.gpu.training import TINY
from genac_megatron import platform
from genac_megatron.models.mapping import load_hf_into, random_weights
from genac_megatron.models.registry import hf_config, shape_of
from genac_megatron.platform.network import spare_ports
from genac_megatron.publication.factory import fleet_publisher
from genac_megatron.publication.join import Joiner
from genac_megatron.publication.payload import by_handle, shared_buffer
from genac_megatron.publication.publisher import Publisher
from genac_megatron.recipe.schema import EngineConfig, PublicationConfig
from genac_megatron.serving.embedded import EmbeddedEngine
from genac_megatron.serving.sglang.fleet import Endpoint
from genac_megatron.serving.sglang.server import PYTHON_VARIABLE, Server, ServerSpec
from genac_megatron.training.layout import Layout, close_world, init_world
from genac_megatron.training.role import Role

GOAL = 0.8
GB = 1e9
START_S = 600.0
SHAPE: dict[str, Any] = {  # about 1.5 billion parameters
    "layers": 28, "hidden": 1536, "ffn": 8960, "heads": 12, "kv_heads": 2, "vocab": 151_936,
    "tie_embeddings": True, "rope_theta": 1e6,
}  # fmt: skip
# What needs no kernel compiled on first use; the GPU bundle of sglang 0.5.17 has been imported with these.
SERVER_ARGS = (
    *("--attention-backend", "triton", "--sampling-backend", "pytorch"),
    *("--grammar-backend", "none", "--disable-cuda-graph"),
)


def make_role(shape: dict[str, Any], bucket_mib: int, tiny: bool) -> Role:
    config = role_config(
        shape, 4096, dtype="fp32" if tiny else "bf16", distributed_optimizer=False, specs="auto"
    )
    block = PublicationConfig.model_validate({"transport": "tensor", "bucket_mib": bucket_mib})
    config = config.model_copy(update={"publication": block})
    layout = Layout.from_config("actor", config.layout, 1)
    sizes = shape_of(config.model, shape["vocab"])
    role = Role("actor", config, sizes, layout, layout.groups())
    load_hf_into(role.models, layout, sizes, random_weights(sizes, 0, platform.device()))
    return role


def repeated(act: Callable[[], float], times: int) -> float:
    act()
    return statistics.median(act() for _ in range(times))


def plain_copy(nbytes: int, times: int) -> float:
    device = platform.device()
    source = torch.ones(nbytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return repeated(lambda: seconds(lambda: target.copy_(source)), times)


def joined(role: Role, publisher: Publisher, times: int) -> float:
    """Seconds to join every bucket, into a buffer that is there."""
    joiner, largest = Joiner(role), max(bucket.numel for bucket in publisher.plan)
    flat = torch.empty(largest, dtype=publisher.dtype, device=platform.device())

    def once() -> None:
        for bucket in publisher.plan:
            joiner.join(bucket, flat[: bucket.numel])

    return repeated(lambda: seconds(once), times)


def in_process(role: Role, publisher: Publisher, times: int) -> float:
    """Seconds of sending to the embedded engine, without joining."""
    publisher.overlap = False
    versions = iter(range(1, 10_000))
    return repeated(lambda: publisher.publish(next(versions))["send_s"], times)


@contextmanager
def reader() -> Iterator[Callable[[str], tuple[float, int]]]:
    """A process that copies buckets out: payload -> its seconds, and a sum over samples of what it read."""
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.gpu.ipc_reader"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        stdin, stdout = process.stdin, process.stdout

        def read(payload: str) -> tuple[float, int]:
            print(payload, file=stdin, flush=True)
            answer = stdout.readline().split()
            if len(answer) != 2:
                raise SystemExit("the reading process ended")
            return float(answer[0]), int(answer[1])

        yield read
        stdin.close()


def by_ipc(role: Role, publisher: Publisher, times: int) -> float:
    """Seconds from handles to copies in another process, for all buckets, its interpreter's time included."""
    cuda = platform.device().type == "cuda"
    joiner = Joiner(role)
    flats = []
    for bucket in publisher.plan:
        nbytes = bucket.numel * publisher.dtype.itemsize
        raw = torch.empty(nbytes, dtype=torch.uint8, device="cuda") if cuda else shared_buffer(nbytes)
        flat = raw.view(publisher.dtype)
        joiner.join(bucket, flat)
        flats.append((flat, bucket.tensors))
    with reader() as read:

        def once() -> None:
            for flat, tensors in flats:
                payload = by_handle(flat, tensors)
                _, total = read(payload)
                raw = flat.view(torch.uint8)
                wanted = int(raw[:: max(1, raw.numel() // 64)].to(torch.int64).sum())
                if total != wanted:
                    raise SystemExit("the reading process got other bytes")

        return repeated(lambda: seconds(once), times)


def by_server(role: Role, folder: Path, times: int) -> float:
    """Seconds of sending to an SGLang server on this GPU, without joining."""
    cuda = platform.device().type == "cuda"
    (folder / "config.json").write_text(json.dumps(hf_config(role.shape)))
    device = "cuda" if cuda else "cpu"
    spec = ServerSpec("actor/0", folder, spare_ports(1)[0], dtype=role.config.training.dtype, device=device,
                      max_running=4, max_tokens=4096, args=SERVER_ARGS if cuda else ())  # fmt: skip
    server = Server(spec, folder / "server.log")
    server.start()
    try:
        server.wait_healthy(START_S)
        endpoint = Endpoint(spec.name, spec.url, spec.key, 1, device)
        gpus = {spec.name: [0]} if cuda else None
        publisher = fleet_publisher(role, [endpoint], folder / "weights", gpus)
        publisher.overlap = False
        versions = iter(range(1, 10_000))
        try:
            return repeated(lambda: publisher.publish(next(versions))["send_s"], times)
        finally:
            publisher.close()
    finally:
        server.stop()


def measure(options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    role = make_role(TINY if options.tiny else SHAPE, options.bucket_mib, options.tiny)
    dtype = role.config.training.dtype
    engine = EmbeddedEngine(hf_config(role.shape), EngineConfig(dtype=dtype), platform.device())
    publisher = Publisher(role, [engine], options.bucket_mib << 20)
    nbytes = int(sum(bucket.numel for bucket in publisher.plan) * publisher.dtype.itemsize)
    times = options.repeats
    took = {
        "plain copy": plain_copy(nbytes, times),
        "join": joined(role, publisher, times),
        "in process, embedded": in_process(role, publisher, times),
        "IPC, reading process": by_ipc(role, publisher, times),
    }
    publisher.close()
    engine.close()
    if options.server:
        took["IPC, SGLang server"] = by_server(role, folder, times)
    return [
        {
            "way": way,
            "MB": round(nbytes / 1e6, 1),
            "ms": round(1000 * spent, 3),
            "GB/s": round(nbytes / spent / GB, 2),
            "of a copy": round(took["plain copy"] / spent, 2),
        }
        for way, spent in took.items()
    ]


def main(arguments: list[str] | None = None) -> None:
    grammar = parser(__doc__)
    grammar.add_argument("--bucket-mib", type=int, default=512)
    grammar.add_argument("--repeats", type=int, default=10)
    found = PYTHON_VARIABLE in os.environ
    grammar.add_argument("--server", action=argparse.BooleanOptionalAction, help="an SGLang server too")
    options = grammar.parse_args(arguments)
    need_gpu(options.tiny)
    if options.tiny:
        options.repeats, options.bucket_mib = 1, 1
    if options.server is None:
        options.server = found and not options.tiny
    torch.set_num_threads(1)
    init_world()
    with tempfile.TemporaryDirectory(prefix="genac-") as folder:
        rows = measure(options, Path(folder))
    close_world()
    by = {row["way"]: row["of a copy"] for row in rows}
    ways = ("in process, embedded", "IPC, reading process", "IPC, SGLang server")
    report(
        "publication",
        options,
        rows,
        [verdict(f"{way}, of a copy", by.get(way), GOAL, at_least=True) for way in ways],
    )


if __name__ == "__main__":
    main()
