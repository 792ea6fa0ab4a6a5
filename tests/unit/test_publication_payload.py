"""Payloads: what another process unpickles is the bucket, whether by handle or by value, and nothing else."""

from __future__ import annotations

import base64
import io
import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from genac_megatron.publication.disk import write_safetensors
from genac_megatron.publication.payload import (
    by_handle,
    by_value,
    metadata,
    on_this_machine,
    shared_buffer,
)
from genac_megatron.serving.sglang.loading import serialized

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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [by_handle, by_value])
def test_another_process_reads_the_tensors(make: object, dtype: torch.dtype) -> None:
    """A handle is for one reader, so each line has its own; the memory outlives them all."""
    flat = bucket(dtype)
    lines = "\n".join(make(flat, TENSORS) for _ in range(3)) + "\n"  # type: ignore[operator]
    read = subprocess.run(
        [sys.executable, "-c", READER], input=lines, capture_output=True, text=True, timeout=60, check=True
    )
    wanted = [["a.weight", [2, 3], [[0, 1, 2], [3, 4, 5]]], ["b.bias", [4], [6, 7, 8, 9]]]
    assert [json.loads(line) for line in read.stdout.splitlines()] == [wanted] * 3
    assert flat.tolist() == list(range(10))


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
