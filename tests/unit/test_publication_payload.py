"""Payloads: what another process unpickles is the bucket, whether by handle or by value, and nothing else."""

from __future__ import annotations

import base64
import gc
import io
import json
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from genac_megatron.publication.disk import write_safetensors
from genac_megatron.publication.payload import (
    by_handle,
    on_this_machine,
    shared_buffer,
)
from genac_megatron.serving.sglang.by_value import by_value, metadata
from genac_megatron.serving.sglang.loading import serialized
from genac_megatron.serving.sglang.without_cuda import MAPPED

TENSORS = [("a.weight", (2, 3)), ("b.bias", (4,))]
# What SGLang 0.5.23's unpickler allows, of what these payloads could name.
ALLOWED = {
    "builtins bytearray", "collections OrderedDict", "torch Size", "torch bfloat16", "torch float32",
    "torch._utils _rebuild_tensor_v2", "torch.multiprocessing.reductions rebuild_storage_filename",
    "torch.multiprocessing.reductions rebuild_tensor",
    "torch.multiprocessing.reductions rebuild_typed_storage",
    "torch.storage UntypedStorage", "torch.storage _load_from_bytes", "torch uint8", "torch Tensor",
    "types SimpleNamespace", "copyreg _reconstructor",
}  # fmt: skip
READER = """
import base64, io, json, pickle, sys
import torch, torch.multiprocessing
for line in sys.stdin:
    bucket = pickle.load(io.BytesIO(base64.b64decode(line)))
    flat = bucket["flattened_tensor"]
    print(json.dumps([
        [m.name, list(m.shape), flat[m.start_idx : m.end_idx].view(m.dtype).reshape(m.shape).tolist()]
        for m in bucket["metadata"]
    ]), flush=True)
"""


def test_tensors_of_several_types_come_as_they_are() -> None:
    """Wider ones first: an element must start at a multiple of its size."""
    given = [("half", torch.arange(3, dtype=torch.bfloat16)), ("whole", torch.arange(4.0).view(2, 2).T)]
    found = pickle.loads(base64.b64decode(serialized(given)))
    entries = {entry.name: entry for entry in found["metadata"]}
    assert list(entries) == ["whole", "half"]
    for name, tensor in given:
        entry = entries[name]
        part = found["flattened_tensor"][entry.start_idx : entry.end_idx]
        assert torch.equal(part.view(entry.dtype).reshape(entry.shape), tensor)


def bucket(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    flat = shared_buffer(10 * dtype.itemsize).view(dtype)
    return flat.copy_(torch.arange(10))


class Strict(pickle.Unpickler):
    """Notes every global that is looked up."""

    def __init__(self, payload: str) -> None:
        super().__init__(io.BytesIO(base64.b64decode(payload)))
        self.seen: set[str] = set()

    def find_class(self, module: str, name: str) -> object:
        self.seen.add(f"{module} {name}")
        return super().find_class(module, name)


def test_another_process_reads_the_tensors() -> None:
    """A handle is for one reader, so each line has its own; the memory outlives them all."""
    flats = [bucket(dtype) for dtype in (torch.float32, torch.bfloat16)]
    lines = [make(flat, TENSORS) for make in (by_handle, by_value) for flat in flats for _ in range(3)]
    read = subprocess.run(
        [sys.executable, "-c", READER], input="\n".join(lines) + "\n", capture_output=True, text=True,
        timeout=300, check=True,
    )  # fmt: skip
    wanted = [["a.weight", [2, 3], [[0, 1, 2], [3, 4, 5]]], ["b.bias", [4], [6, 7, 8, 9]]]
    assert [json.loads(line) for line in read.stdout.splitlines()] == [wanted] * len(lines)
    assert [flat.tolist() for flat in flats] == [list(range(10))] * 2


KEEPER = """
import sys
from genac_megatron.serving.sglang import without_cuda
without_cuda.keep_mapped()
import base64, io, pickle
for line in sys.stdin:
    flat = pickle.load(io.BytesIO(base64.b64decode(line)))["flattened_tensor"]
    read = flat.view(-1)[0].item(), flat.data_ptr()
    del flat
    with open("/proc/self/maps") as maps:
        print(*read, len({row.split()[5] for row in maps if "/dev/shm/torch_" in row}), flush=True)
"""
SENDER = """
import sys
from genac_megatron.publication.payload import by_handle, shared_buffer
buffers = [shared_buffer(4096) for _ in range(int(sys.argv[1]))]
for buffer in buffers:
    print(by_handle(buffer, [("x", (4096,))]), flush=True)
sys.stdin.read()
"""


def script(text: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", text, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def test_a_server_keeps_the_memory_mapped_that_it_is_sent_weights_in() -> None:
    """As without_cuda.py has it: a file is mapped once, with what is in it now; of few files, then none."""

    def sent(payload: str) -> list[int]:
        print(payload, file=reader.stdin, flush=True)
        assert reader.stdout is not None
        return [int(word) for word in reader.stdout.readline().split()]

    with script(KEEPER) as reader, script(SENDER, str(MAPPED + 3)) as sender:
        flat = shared_buffer(4096)
        seen = [sent(by_handle(flat.fill_(value), [("x", (4096,))])) for value in (1, 2, 3)]
        assert [value for value, _, _ in seen] == [1, 2, 3]
        assert len({address for _, address, _ in seen}) == 1
        assert seen[-1][2] == 1
        assert sender.stdout is not None
        assert [sent(sender.stdout.readline().strip())[2] for _ in range(MAPPED + 3)][-1] == MAPPED
        pattern = f"torch_{sender.pid}_*"
        assert list(Path("/dev/shm").glob(pattern))
        sender.communicate()
        until = time.monotonic() + 20
        while list(Path("/dev/shm").glob(pattern)) and time.monotonic() < until:
            time.sleep(0.05)
        assert sent(by_handle(flat, [("x", (4096,))]))[::2] == [
            3,
            1,
        ]  # a trainer has ended, the reader has not
        assert not list(Path("/dev/shm").glob(pattern))
        reader.communicate()
        assert reader.returncode == 0


def test_a_handle_is_small_and_names_only_what_servers_allow() -> None:
    big = shared_buffer(1 << 22)
    payload = by_handle(big.view(torch.float32), [("w", (1 << 20,))])
    assert len(payload) < 2000
    reader = Strict(payload)
    reader.load()
    assert "torch.multiprocessing.reductions rebuild_storage_filename" in reader.seen
    assert reader.seen <= ALLOWED


def test_values_name_only_what_servers_allow() -> None:
    reader = Strict(by_value(bucket(), TENSORS))
    assert reader.load()["metadata"] == metadata(TENSORS, torch.float32)
    assert reader.seen <= ALLOWED


def test_shared_buffers_have_the_size_asked_for() -> None:
    assert shared_buffer(5).shape == (5,)
    assert shared_buffer(0).shape == (0,)


def test_the_file_of_a_shared_buffer_goes_with_its_last_tensor() -> None:
    before = set(Path("/dev/shm").iterdir())
    view = shared_buffer(4096).view(torch.float32)[3:]
    gc.collect()
    made = set(Path("/dev/shm").iterdir()) - before
    assert len([path for path in made if path.name.startswith(f"torch_{os.getpid()}_")]) == 1
    by_handle(view, [("x", (1021,))])
    del view
    gc.collect()
    assert not [path for path in made if path.exists() and path.name.startswith(f"torch_{os.getpid()}_")]


def test_which_servers_share_this_machines_memory() -> None:
    assert on_this_machine("http://127.0.0.1:30000")
    assert on_this_machine("http://localhost")
    assert on_this_machine("http://[::1]:30000") in (True, False)  # where IPv6 is off it is not
    assert not on_this_machine("http://192.0.2.7:30000")  # reserved for documentation
    assert not on_this_machine("http://no-such-host.invalid:1")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bucket_as_a_safetensors_file(tmp_path: Path, dtype: torch.dtype) -> None:
    from safetensors.torch import load_file

    write_safetensors(tmp_path / "x.safetensors", bucket(dtype), TENSORS)
    read = load_file(tmp_path / "x.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in read.items()} == dict(TENSORS)
    assert torch.equal(read["b.bias"], torch.arange(6, 10).to(dtype))
