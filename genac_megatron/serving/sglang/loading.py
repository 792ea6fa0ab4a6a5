"""Weights to servers by value, in the body of a request: for engines without a transport of their own."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch
from torch import Tensor

from genac_megatron.errors import InputError
from genac_megatron.models.blockwise import in_blocks, scale_name
from genac_megatron.models.quantize import quantize
from genac_megatron.serving.sglang.by_value import by_value
from genac_megatron.serving.sglang.client import ServerClient, ServerError

BUCKET_BYTES = 512 * 2**20
Named = tuple[str, Tensor]


class Loader:
    """Loads full sets of tensors into all of a role's servers, in several calls if need be.

    sizes: name -> size of every tensor of a set. They are checked here, as a server would take any name and
    never miss one, and ends where a size is wrong. fp8: the servers hold projections in blocks of FP8.
    """

    def __init__(
        self, clients: Sequence[ServerClient], sizes: Mapping[str, Sequence[int]], *, fp8: bool = False
    ) -> None:
        self.fp8 = fp8
        self.clients, self.sizes = list(clients), {name: tuple(size) for name, size in sizes.items()}
        self._version: int | None = None  # that is coming in
        self._loaded: set[str] = set()

    @property
    def loading(self) -> bool:
        """Whether a version came in part: requests wait for the rest of it."""
        return self._version is not None

    def load(self, version: int, tensors: Iterable[Named], *, final: bool) -> None:
        """See Engine.load_weights. Requests wait from the first call of a version to the final one."""
        where = f"weights of version {version}"
        try:
            if self._version is None:
                self._open(version)
            elif self._version != version:
                raise InputError(f"version {self._version} was still coming in", where=where)
            checked = self._checked(tensors, where)
            for bucket in _buckets(_quantized(checked) if self.fp8 else checked):
                self._everywhere(partial(_send, serialized(bucket)))
            if final:
                if missing := sorted(self.sizes.keys() - self._loaded):
                    raise InputError(f"{len(missing)} missing: {', '.join(missing[:8])}", where=where)
                self._close(version)
        except BaseException:
            self._abandon()
            raise

    def _checked(self, tensors: Iterable[Named], where: str) -> Iterator[Named]:
        for name, tensor in tensors:
            if name not in self.sizes:
                raise InputError(
                    f"surplus tensor {name}, which the engine's model does not have", where=where
                )
            if name in self._loaded:
                raise InputError(f"tensor {name} came twice", where=where)
            if tuple(tensor.shape) != self.sizes[name]:
                raise InputError(
                    f"tensor {name} has shape {tuple(tensor.shape)}, the engine's {self.sizes[name]}",
                    where=where,
                )
            self._loaded.add(name)
            yield name, tensor

    def _open(self, version: int) -> None:
        def begin(client: ServerClient) -> None:
            client.pause("retract")
            client.flush_cache()
            client.begin_update()

        self._everywhere(begin)
        self._version, self._loaded = version, set()

    def _close(self, version: int) -> None:
        def end(client: ServerClient) -> None:
            client.set_version(version)
            client.end_update()
            client.resume()

        self._everywhere(end)
        self._version, self._loaded = None, set()

    def _abandon(self) -> None:
        """Weights are mixed now: end what waits for them, and leave no server paused."""
        self._version, self._loaded = None, set()
        for client in self.clients:
            for step in (client.abort_all, client.end_update, client.resume):
                with contextlib.suppress(ServerError):  # it is lost, or was not that far
                    step()

    def _everywhere(self, call: Callable[[ServerClient], None]) -> None:
        """`call` on every server at once. Raises the first failure, once all have ended."""
        with ThreadPoolExecutor(len(self.clients), "load-weights") as pool:
            for done in [pool.submit(call, client) for client in self.clients]:
                done.result()


def serialized(tensors: Sequence[Named]) -> str:
    """A flat bucket as `/update_weights_from_tensor` takes it (load_format "flattened_bucket"), by value.

    Wider types come first, as each tensor must start at a multiple of its item size.
    """
    ordered = sorted(tensors, key=lambda named: -named[1].element_size())
    pieces = [tensor.detach().to("cpu").contiguous().view(-1).view(torch.uint8) for _, tensor in ordered]
    sizes = [(name, tuple(tensor.shape)) for name, tensor in ordered]
    return by_value(torch.cat(pieces), sizes, [tensor.dtype for _, tensor in ordered])


def _quantized(tensors: Iterable[Named]) -> Iterator[Named]:
    for name, tensor in tensors:
        if in_blocks(name):
            weight, scales = quantize(tensor)
            yield scale_name(name), scales
            yield name, weight
        else:
            yield name, tensor


def _send(blob: str, client: ServerClient) -> None:
    client.update_from_tensor([blob] * client.tp, load_format="flattened_bucket")


def _buckets(tensors: Iterable[Named]) -> Iterator[list[Named]]:
    """In order, each at most BUCKET_BYTES, or one tensor."""
    bucket: list[Named] = []
    held = 0
    for name, tensor in tensors:
        if bucket and held + tensor.nbytes > BUCKET_BYTES:
            yield bucket
            bucket, held = [], 0
        bucket.append((name, tensor))
        held += tensor.nbytes
    if bucket:
        yield bucket
