"""Adapters on SGLang servers: their names by version, what a server is started with, what it loads and drops.

A server cannot load a name twice, so every version has one of its own, "actor@7". Requests name it and end on
it, whatever is loaded meanwhile; new ones take the newest. A version that nobody asks any more is unloaded:
to unload one that still runs would block the next load, which SGLang takes under the same lock.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from genac_megatron.recipe.schema import AdapterConfig
from genac_megatron.recipe.servers import lora_slots, widest

CPU_FFN_MULTIPLE = 32  # a CPU server pads the width of feed-forward layers to it, per rank
FEED_FORWARD = ("gate_proj", "up_proj", "down_proj")


def adapter_name(role: str, version: int) -> str:
    """What servers call a version of a role's adapter."""
    return f"{role}@{version}"


def version_of(role: str, name: str) -> int | None:
    """The version that a name on a server is of this role; None where it is of none."""
    of, at, version = name.rpartition("@")
    return int(version) if at and of == role and version.isdecimal() else None


def lora_arguments(adapters: Sequence[AdapterConfig], *, gpu: bool) -> tuple[str, ...]:
    """SGLang's arguments of a server that holds the base of these roles' adapters; none without adapters.

    Beside each role's versions the base itself may be asked. Adapters of unlike rank or targets share the
    largest. On a GPU the kernels are SGLang's choice.
    """
    if not adapters:
        return ()
    room = widest(adapters)
    ranks = ("--max-lora-rank", str(room.rank))
    slots = ("--max-loras-per-batch", str(lora_slots(adapters)))
    backend = () if gpu else ("--lora-backend", "torch_native")  # the others are written in Triton
    strict = "--lora-strict-loading"  # a projection that the model lacks is an error, and not left out
    return ("--enable-lora", *ranks, *slots, *backend, strict, "--lora-target-modules", *room.targets)


def refusal(adapters: Sequence[AdapterConfig], ffn: int, tp: int, *, gpu: bool) -> str:
    """Why a server of `tp` ranks could not load these adapters; "" where it can.

    A CPU server pads feed-forward layers, and an adapter's tensors not: it would end at the first request.
    """
    inside = {target for adapter in adapters for target in adapter.targets} & set(FEED_FORWARD)
    multiple = CPU_FFN_MULTIPLE * tp
    if gpu or not inside or ffn % multiple == 0:
        return ""
    return (
        f"on a CPU SGLang pads the ffn {ffn} to a multiple of {multiple}, and loads no adapters of "
        f"{', '.join(sorted(inside))} beside it"
    )


@dataclass(frozen=True)
class Changes:
    """What one server has to do for a publication, in this order: names."""

    drop: tuple[str, ...]  # of the name to load, by somebody else
    load: bool
    unload: tuple[str, ...]  # once it is loaded


def changes(
    role: str, version: int, found: Collection[str], trusted: Collection[str], in_use: Collection[int]
) -> Changes:
    """How a server comes to hold `version`, and what it may let go.

    found: the names that it holds. trusted: those that this run has loaded there, complete. in_use: versions
    that some rank's requests still name. The version before stays: requests that begin while ranks learn of
    the new one name it. What is not of this role stays, whatever it is.
    """
    name = adapter_name(role, version)
    held = {known: name for name in found if (known := version_of(role, name)) is not None}
    there = version in held
    known = there and name in trusted
    older = sorted(v for v in held if v != version)
    strangers = [v for v in older if held[v] not in trusted]
    last = max((v for v in older if v < version and held[v] in trusted), default=None)
    kept = {last, *in_use}
    unload = [v for v in older if v in strangers or v not in kept]
    return Changes(
        drop=(name,) if there and not known else (),
        load=not known,
        unload=tuple(held[v] for v in unload),
    )
