"""What an engine must hold after a publication, tensor by tensor: names, cuts and checksums of its ranks.

SGLang fuses query, key and value (a rank's heads of each, one above the other) and gate and up; it cuts
columns of what reads a cut activation, pads the vocabulary to a multiple of 64 with zero rows, repeats
key-value heads where there are fewer than ranks, and stacks a layer's experts. Its `weights_checker` hashes
each rank's parameters: sha256 of the bytes on a CPU, a hash of 32-bit words on a GPU. Both are here, so
nothing of SGLang is imported.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from genac_megatron.models.families.base import Shape
from genac_megatron.publication.plan import Bucket, Item
from genac_megatron.serving.sglang.adapters import CPU_FFN_MULTIPLE

Sums = dict[str, str]  # an engine rank's parameter -> 16 hex digits
VOCAB_MULTIPLE = 64


class RankSums:
    """Checksums of the parameters that engine rank `rank` of `tp` makes of the buckets, as they come.

    kind: "cpu" or "cuda", the engine's device. A layer's experts are one parameter, hashed expert by expert.
    """

    def __init__(self, shape: Shape, tp: int, rank: int, kind: str) -> None:
        self.shape, self.tp, self.rank, self.kind = shape, tp, rank, kind
        self.sums: Sums = {}
        self._begun: dict[str, tuple[Hash, int]] = {}  # of experts: the hash so far, and how many are in it

    def add(self, bucket: Bucket, flat: Tensor) -> None:
        """flat: [bucket.numel] in the engine's dtype."""
        for item, tensors in _split(bucket, flat):
            name, tensor = engine_parameter(item, tensors, self.shape, self.tp, self.rank, self.kind)
            if item.rule.expert is None:
                self.sums[name] = self._hash(tensor.nbytes, tensor).hexdigest()
            else:
                self._add_expert(name, tensor, item.rule.expert)

    def _add_expert(self, name: str, tensor: Tensor, expert: int) -> None:
        count = self.shape.experts or 0
        if name not in self._begun:
            self._begun[name] = self._hash(tensor.nbytes * count), 0
        hashed, seen = self._begun.pop(name)
        assert expert == seen, f"{name}: expert {expert} after {seen} of them"  # the plan goes by their index
        hashed.update(tensor)
        if seen + 1 == count:
            self.sums[name] = hashed.hexdigest()
        else:
            self._begun[name] = hashed, seen + 1

    def _hash(self, nbytes: int, tensor: Tensor | None = None) -> Hash:
        made = HostHash() if self.kind == "cpu" else DeviceHash(nbytes)
        if tensor is not None:
            made.update(tensor)
        return made


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
    item: Item, tensors: Sequence[Tensor], shape: Shape, tp: int, rank: int, kind: str
) -> tuple[str, Tensor]:
    """Name and content of the parameter that engine rank `rank` of `tp` makes of an item's tensors.

    Of an expert: its part of the parameter of all.
    """
    name = item.hf[0][0]
    rule = item.rule
    if kind == "cpu" and ".mlp." in name and ".gate." not in name:  # the router apart
        axis = 0 if rule.fuse == "gate_up" else 1
        tensors = [_with_zeros(x, axis, CPU_FFN_MULTIPLE * tp) for x in tensors]
    if rule.expert is not None:  # SGLang cuts experts, which Megatron's tensor parallelism does not
        experts = name.partition(".experts.")[0] + ".experts."
        if rule.fuse == "gate_up":
            return experts + "w13_weight", torch.cat([_rows(x, tp, rank) for x in tensors])
        return experts + "w2_weight", tensors[0].chunk(tp, dim=1)[rank]
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


def _with_zeros(tensor: Tensor, axis: int, multiple: int) -> Tensor:
    """[.., n, ..] with n padded to a multiple."""
    missing = -tensor.size(axis) % multiple
    return nn.functional.pad(tensor, (0, 0, 0, missing) if axis == 0 else (0, missing))


def _padded(rows: int, multiple: int) -> int:
    return -(-rows // multiple) * multiple


def _rows(tensor: Tensor, parts: int, index: int) -> Tensor:
    return tensor.view(parts, -1, *tensor.shape[1:])[index]


class Hash(Protocol):
    """Of a tensor that may come in parts."""

    def update(self, part: Tensor) -> None: ...

    def hexdigest(self) -> str: ...


class HostHash:
    """The hash that SGLang takes of a tensor in host memory: 8 bytes of sha256 over its bytes."""

    def __init__(self) -> None:
        self._sha256 = hashlib.sha256()

    def update(self, part: Tensor) -> None:
        self._sha256.update(_bytes(part).cpu().numpy().data)

    def hexdigest(self) -> str:
        return self._sha256.hexdigest()[:16]


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def differences(expected: Mapping[str, str], held: Mapping[str, str]) -> list[str]:
    """Names whose checksums differ, or that the engine lacks, in the order of `expected`."""
    return [name for name, value in expected.items() if held.get(name) != value]


def unpublished(expected: Mapping[str, str], held: Mapping[str, str]) -> list[str]:
    """Weights that the engine has and nobody brings: they are random, such as an output layer of its own."""
    return [name for name in held if name not in expected and name.endswith((".weight", ".bias", "_weight"))]


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


class DeviceHash:
    """The hash that SGLang 0.5.23 takes of a tensor in device memory, in plain torch. Not run on a GPU.

    nbytes: of the whole tensor.
    """

    def __init__(self, nbytes: int) -> None:
        self._size = -(-nbytes // 4) * 4 & _MASK
        self._at = 0  # words hashed
        self._total = 0
        self._rest: Tensor | None = None  # bytes that fill no tile yet

    def update(self, part: Tensor) -> None:
        data = _bytes(part)
        if self._rest is not None and self._rest.numel():
            data = torch.cat([self._rest, data])
        whole = data.numel() // (4 * _TILE) * (4 * _TILE)
        self._add(data[:whole])
        self._rest = data[whole:].clone()

    def hexdigest(self) -> str:
        if self._rest is not None:
            self._add(nn.functional.pad(self._rest, (0, -self._rest.numel() % 4)))
            self._rest = None
        return f"{_splitmix(self._total) if self._at else 0:016x}"

    def _add(self, data: Tensor) -> None:
        words = data.view(torch.int32)
        size = torch.tensor(self._size, device=data.device)
        seeds = _SEED, ((_SEED * 0x9E3779B1) ^ 0xDEADBEEF) & _MASK
        for start in range(0, words.numel(), _TILE * _TILES_AT_ONCE):
            part = words[start : start + _TILE * _TILES_AT_ONCE].long() & _MASK
            at = (torch.arange(part.numel(), device=part.device) + (self._at + start)) & _MASK
            places = (
                ((at * 0x27D4EB2D + seeds[0]) & _MASK) ^ _rotate(at, 15),
                ((at * 0x165667B1 + seeds[1]) & _MASK) ^ _rotate(at, 13),
            )
            halves = []
            for place in places:
                hashed = _mix(part ^ place)
                tiles = nn.functional.pad(hashed, (0, -hashed.numel() % _TILE)).view(-1, _TILE).sum(1) & _MASK
                halves.append(_mix(tiles ^ size))
            pairs = zip(*(half.tolist() for half in halves), strict=True)
            self._total += sum((high << 32) | low for high, low in pairs)
        self._at += words.numel()


def _splitmix(x: int) -> int:
    """splitmix64's finaliser."""
    mask = (1 << 64) - 1
    x &= mask
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    return x ^ (x >> 31)
