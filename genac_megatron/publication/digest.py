"""Which weights: a digest that is the same in every layout and wherever files lie."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable

import torch
import torch.distributed as dist

from genac_megatron.models.families.base import VALUE_HEAD
from genac_megatron.platform.fp8 import forget
from genac_megatron.publication.adapters import AdapterJoiner
from genac_megatron.publication.publisher import Publisher
from genac_megatron.publication.transport import Named
from genac_megatron.training.agreement import agree, from_first, gathered
from genac_megatron.training.role import Role


class WeightDigest:
    """A sink of a publication that hashes every tensor by its Hugging Face name, on rank 0."""

    def __init__(self) -> None:
        self._found: dict[str, str] = {}

    @property
    def reads(self) -> bool:
        """Nothing goes to other ranks."""
        return dist.get_rank() == 0

    @torch.no_grad()
    def load_weights(self, version: int, tensors: Iterable[Named], *, final: bool = True) -> None:
        """Take a bucket in."""
        for name, tensor in tensors:
            digest = hashlib.blake2b(f"{tensor.dtype} {tuple(tensor.shape)}".encode(), digest_size=16)
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
            self._found[name] = digest.hexdigest()

    def hexdigest(self, without: Collection[str] = ()) -> str:
        """Of all tensors but those named, whatever the order they came in."""
        found = {name: digest for name, digest in self._found.items() if name not in without}
        text = "\n".join(f"{name} {digest}" for name, digest in sorted(found.items()))
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def weights_digest(role: Role) -> str:
    """The digest of a role's weights, on rank 0; of other ranks it means nothing. Collective.

    An adapter's are merged with its base.
    """
    sink = WeightDigest()
    Publisher(role, [sink]).publish(0)
    return sink.hexdigest()


def know_base(role: Role) -> None:
    """Tell an adapter, on every rank, the digest of the model that it stands beside. Collective.

    A scalar head is no part of it. Of one that is kept in FP8 it is that of the weights which were loaded, as
    a folder of them has it.
    """
    sink = WeightDigest()
    Publisher(role, [sink], base=True).publish(0)
    head = {name for rule in VALUE_HEAD for name in rule.hf}
    role.base, role.base_and_head = from_first(lambda: (sink.hexdigest(without=head), sink.hexdigest()))
    forget(parameter for model in role.models for parameter in model.parameters())


def moved_by(role: Role) -> str:
    """What a base is called once a role's adapter is merged into it: by what it was called and the adapter's
    tensors, so that the base itself is not read. On every rank. Collective.
    """
    joiner = AdapterJoiner(role)
    joiner.connect()
    agree(joiner.reserve)
    flat = joiner.join()
    found = ""
    if flat is not None:
        digest = hashlib.blake2b((role.memory.moved or role.base).encode(), digest_size=16)
        digest.update(flat.cpu().view(torch.uint8).numpy().data)
        found = digest.hexdigest()
    return next(filter(None, gathered(found)))
