"""What an engine must hold after a publication, tensor by tensor: names, cuts and checksums of its ranks.

SGLang fuses query, key and value (a rank's heads of each, one above the other) and gate and up; it cuts
columns of what reads a cut activation, pads the vocabulary to a multiple of 64 with zero rows, and repeats
key-value heads where there are fewer than ranks. Its `weights_checker` hashes each rank's parameters: sha256
of the bytes on a CPU, a hash of 32-bit words on a GPU. Both are here, so nothing of SGLang is imported.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from genac_megatron.models.families.base import Shape
from genac_megatron.publication.plan import Bucket, Item

Sums = dict[str, str]  # an engine rank's parameter -> 16 hex digits
VOCAB_MULTIPLE = 64


def expected_sums(bucket: Bucket, flat: Tensor, shape: Shape, tp: int, rank: int, kind: str) -> Sums:
    """Checksums of the parameters that engine rank `rank` of `tp` makes of a bucket.

    flat: [bucket.numel] in the engine's dtype. kind: "cpu" or "cuda", the engine's device.
    """
    hash_of = sha256_words if kind == "cpu" else gpu_words
    return {
        name: hash_of(tensor)
        for item, tensors in _split(bucket, flat)
        for name, tensor in [engine_parameter(item, tensors, shape, tp, rank)]
    }


def _split(bucket: Bucket, flat: Tensor) -> Iterator[tuple[Item, list[Tensor]]]:
    at = 0
    for item in bucket.items:
        tensors = []
        for _, size in item.hf:
            count = torch.Size(size).numel()
            tensors.append(flat[at : at + count].view(size))
            at += count
        yield item, tensors


def engine_parameter(
    item: Item, tensors: Sequence[Tensor], shape: Shape, tp: int, rank: int
) -> tuple[str, Tensor]:
    """Name and content of the parameter that engine rank `rank` of `tp` makes of an item's tensors."""
    name = item.hf[0][0]
    rule = item.rule
    if rule.fuse == "qkv":
        copies = max(1, tp // shape.kv_heads)  # ranks that share a key-value head
        parts = [_rows(x, tp // n, rank // n) for x, n in zip(tensors, (1, copies, copies), strict=True)]
        return name.replace("q_proj", "qkv_proj"), torch.cat(parts)
    if rule.fuse == "gate_up":
        return name.replace("gate_proj", "gate_up_proj"), torch.cat([_rows(x, tp, rank) for x in tensors])
    whole = tensors[0]
    if rule.padded:
        rows = _padded(shape.vocab, VOCAB_MULTIPLE)
        if rows % tp:
            rows = _padded(shape.vocab, VOCAB_MULTIPLE * tp)
        each = rows // tp
        mine = whole[rank * each : (rank + 1) * each]
        return name, nn.functional.pad(mine, (0, 0, 0, each - mine.size(0)))
    if rule.tp_axis is None:
        return name, whole
    return name, whole.chunk(tp, dim=rule.tp_axis)[rank]


def _padded(rows: int, multiple: int) -> int:
    return -(-rows // multiple) * multiple


def _rows(tensor: Tensor, parts: int, index: int) -> Tensor:
    return tensor.view(parts, -1, *tensor.shape[1:])[index]


def sha256_words(tensor: Tensor) -> str:
    """The hash that SGLang takes of a tensor in host memory: 8 bytes of sha256 over its bytes."""
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
    return hashlib.sha256(data).hexdigest()[:16]


def differences(expected: Mapping[str, str], held: Mapping[str, str]) -> list[str]:
    """Names whose checksums differ, or that the engine lacks, in the order of `expected`."""
    return [name for name, value in expected.items() if held.get(name) != value]


# --- the hash of 32-bit words --------------------------------------------------------------------

_MASK = 0xFFFFFFFF
_TILE = 8192  # words hashed to one partial
_TILES_AT_ONCE = 512  # bounds the int64 temporaries to some 32 MiB each
_SEED = 0x243F6A88


def _rotate(x: Tensor, by: int) -> Tensor:
    return ((x << by) | (x >> (32 - by))) & _MASK


def _mix(x: Tensor) -> Tensor:
    """murmur3's finaliser on 32-bit words held in int64."""
    x = x ^ (x >> 16)
    x = (x * 0x85EBCA6B) & _MASK
    x = x ^ (x >> 13)
    x = (x * 0xC2B2AE35) & _MASK
    return x ^ (x >> 16)


def gpu_words(tensor: Tensor) -> str:
    """The hash that SGLang 0.5.23 takes of a tensor in device memory, in plain torch. Not run on a GPU."""
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    data = nn.functional.pad(data, (0, -data.numel() % 4))
    words = data.view(torch.int32)
    if not words.numel():
        return f"{0:016x}"
    size = torch.tensor(words.numel() * 4 & _MASK, device=data.device)
    seeds = _SEED, ((_SEED * 0x9E3779B1) ^ 0xDEADBEEF) & _MASK
    total = 0
    for start in range(0, words.numel(), _TILE * _TILES_AT_ONCE):
        part = words[start : start + _TILE * _TILES_AT_ONCE].long() & _MASK
        at = (torch.arange(part.numel(), device=part.device) + start) & _MASK
        places = (
            ((at * 0x27D4EB2D + seeds[0]) & _MASK) ^ _rotate(at, 15),
            ((at * 0x165667B1 + seeds[1]) & _MASK) ^ _rotate(at, 13),
        )
        halves = []
        for place in places:
            hashed = _mix(part ^ place)
            tiles = nn.functional.pad(hashed, (0, -hashed.numel() % _TILE)).view(-1, _TILE).sum(1) & _MASK
            halves.append(_mix(tiles ^ size))
        total += sum((high << 32) | low for high, low in zip(*(x.tolist() for x in halves), strict=True))
    return f"{_splitmix(total):016x}"


def _splitmix(x: int) -> int:
    """splitmix64's finaliser."""
    mask = (1 << 64) - 1
    x &= mask
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    return x ^ (x >> 31)
