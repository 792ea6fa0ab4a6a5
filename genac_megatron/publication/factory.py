"""A Publisher to a fleet of servers, as the recipe says."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from genac_megatron import platform
from genac_megatron.errors import InputError
from genac_megatron.publication.adapter_fleet import AdapterPublisher
from genac_megatron.publication.disk import Disk
from genac_megatron.publication.fleet import FleetTransport, wire_dtype
from genac_megatron.publication.group import Group
from genac_megatron.publication.payload import on_this_machine
from genac_megatron.publication.publisher import Publisher
from genac_megatron.publication.tensor import DeviceTensors, HostTensors
from genac_megatron.serving.sglang.fleet import Endpoint
from genac_megatron.training.agreement import gathered
from genac_megatron.training.role import Role


def fleet_publisher(
    role: Role,
    endpoints: Sequence[Endpoint],
    folder: Path,
    gpus: Mapping[str, Sequence[int]] | None = None,
    *,
    run_name: str = "run",
) -> Publisher:
    """A Publisher of `role` to the servers at `endpoints`, by the role's `publication` block.

    Every rank makes one, with the same arguments. Collective.

    folder: for the transport "disk" where the recipe names none; run_name sets the run's own apart in one
    that it names. gpus: per server name, the global ranks on whose GPUs it runs, in the order of its ranks;
    None: it has GPUs of its own. Raises InputError where the transport cannot be had, or a tensor does not
    fit in a bucket.

    After servers were restarted: `publisher.transport.set_endpoints(...)`, then
    `publisher.publish(version, only=names)`.
    """
    return _publisher(role, endpoints, _folder(role, folder, run_name), gpus)


def adapter_publisher(
    role: Role,
    endpoints: Sequence[Endpoint],
    folder: Path,
    gpus: Mapping[str, Sequence[int]] | None = None,
    *,
    run_name: str = "run",
    held: dict[Endpoint, str],
    in_use: Callable[[], set[int]],
) -> AdapterPublisher:
    """An AdapterPublisher of `role` (engine.enable_lora), by the arguments of both."""
    base = _publisher(role, endpoints, _folder(role, folder, run_name), gpus, base=True)
    return AdapterPublisher(role, base, endpoints, held, in_use)


def _publisher(
    role: Role,
    endpoints: Sequence[Endpoint],
    folder: Path,
    gpus: Mapping[str, Sequence[int]] | None,
    *,
    base: bool = False,
) -> Publisher:
    config = role.config.publication
    bucket_bytes = None if config.bucket_mib is None else config.bucket_mib << 20
    transport = _transport(role, endpoints, folder, gpus)
    fp8 = role.config.engine.quantization == "fp8"
    dtype = wire_dtype(role)
    return Publisher(role, bucket_bytes=bucket_bytes, transport=transport, dtype=dtype, fp8=fp8, base=base)


def _transport(
    role: Role,
    endpoints: Sequence[Endpoint],
    folder: Path,
    gpus: Mapping[str, Sequence[int]] | None,
) -> FleetTransport:
    config = role.config.publication
    cuda = platform.device().type == "cuda"
    choice = config.transport
    if choice == "auto":
        here = all(on_this_machine(endpoint.url) and not endpoint.spans for endpoint in endpoints)
        near = gpus is not None if cuda else all(gathered(here))
        choice = "tensor" if near else "group"
    if choice == "disk":
        return Disk(role, endpoints, config, folder)
    if choice == "group":
        return Group(role, endpoints, config)
    if not cuda:
        return HostTensors(role, endpoints, config)
    if gpus is None:
        raise InputError(
            "device memory is shared with servers on the trainer's own GPUs only",
            where=f"roles.{role.name}.publication.transport",
            way_out="group, or place the engines on the trainer's GPUs",
        )
    return DeviceTensors(role, endpoints, config, gpus)


def _folder(role: Role, folder: Path, run_name: str) -> Path:
    """Where files go: a folder of the run's and role's own, as it is emptied."""
    named = role.config.publication.folder
    return Path(named) / f"genac-{run_name}-{role.name}" if named else folder
