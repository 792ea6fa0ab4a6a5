"""Where ranks meet: an address on the fabric, ports that belong to the job. No torch."""

from __future__ import annotations

import contextlib
import ipaddress
import itertools
import random
import socket
from collections.abc import Iterable, Mapping
from pathlib import Path

import psutil

from genac_megatron.errors import GenacError, InputError

PORTS = 32  # a job's window; a multiple of it where there are many servers
LOWEST_PORT, HIGHEST_PORT = 10_000, 65_535
FIRST_JOBS = 64  # of a new cluster, as in tests: other servers take ports of their windows last
EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")
NET = Path("/sys/class/net")
INFINIBAND = "32"  # linux/if_arp.h: ARPHRD_INFINIBAND
RUN, PREFLIGHT, ENGINES = 0, 1, 8  # in the window: the run's and the preflight's meeting places, servers


def bracketed(address: str) -> str:
    """An address as a URL wants it: an IPv6 one in brackets. (MASTER_ADDR wants it without.)"""
    return f"[{address}]" if ":" in address else address


def family(address: str) -> socket.AddressFamily:
    """The kind of socket that an address needs."""
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def usable(address: str) -> bool:
    """Whether other machines may reach an address: loopback, link-local and multicast are not."""
    with contextlib.suppress(ValueError):
        parsed = ipaddress.ip_address(address.split("%")[0])
        return not (parsed.is_loopback or parsed.is_link_local or parsed.is_multicast)
    return False


def addresses() -> dict[str, list[str]]:
    """Each interface that is up, and its IP addresses, IPv4 first."""
    up = {name for name, stats in psutil.net_if_stats().items() if stats.isup}
    found: dict[str, list[str]] = {}
    for name, entries in psutil.net_if_addrs().items():
        if name in up:
            pairs = [(e.family, e.address.split("%")[0]) for e in entries]
            ordered = [a for f, a in pairs if f == socket.AF_INET]
            found[name] = ordered + [a for f, a in pairs if f == socket.AF_INET6]
    return found


def fast_interfaces(net: Path = NET) -> list[str]:
    """Interfaces over InfiniBand, then those of a network card with RDMA (RoCE)."""
    if not net.is_dir():
        return []
    infiniband, rdma = [], []
    for folder in sorted(net.iterdir()):
        kind = folder / "type"
        if kind.exists() and kind.read_text().strip() == INFINIBAND:
            infiniband.append(folder.name)
        elif (folder / "device" / "infiniband").is_dir():
            rdma.append(folder.name)
    return infiniband + rdma


def source_address(peer: str) -> str:
    """The address of this machine from which the kernel would reach `peer`. Nothing is sent.

    Raises InputError where the name cannot be resolved or there is no way to it.
    """
    try:
        family, kind, _, _, target = socket.getaddrinfo(peer, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(target)
            return str(probe.getsockname()[0]).split("%")[0]
    except OSError as error:
        raise InputError(
            f"cannot be reached: {error.strerror or error}",
            where=f"node {peer}",
            way_out="name the fabric's interface by GENAC_FABRIC in slurm/settings.sh",
        ) from None


def fabric_address(
    named: Iterable[str] = (),
    peer: str = "",
    *,
    present: Mapping[str, list[str]] | None = None,
    fast: Iterable[str] | None = None,
) -> str:
    """This node's address on the fabric.

    named: interfaces to take, first match; else InfiniBand or RDMA interfaces; else the address that the
    kernel uses towards `peer`, another node of the job; a job of one node meets on loopback.
    Raises InputError where a named interface is not here or has no address.
    """
    here = addresses() if present is None else present
    named = list(named)
    for name in named:
        if here.get(name):
            return here[name][0]
    if named:
        raise InputError(
            f"no interface {' or '.join(named)} with an address is up",
            where="GENAC_FABRIC",
            way_out=f"this node has {', '.join(sorted(name for name, found in here.items() if found))}",
        )
    if not peer:
        return "127.0.0.1"
    for name in fast_interfaces() if fast is None else fast:
        for address in here.get(name, []):
            if usable(address):
                return address
    return source_address(peer)


def interface_towards(peer: str) -> str:
    """The interface that the kernel uses towards `peer`; "" where it cannot be told."""
    with contextlib.suppress(InputError):
        source = source_address(peer)
        return next((name for name, found in addresses().items() if source in found), "")
    return ""


def rank_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Which interface gloo and NCCL's bootstrap use on this node: the one towards MASTER_ADDR.

    Without it gloo takes whatever the host's name resolves to, which may be another network or loopback.
    """
    if "SLURM_JOB_ID" not in environ or "MASTER_ADDR" not in environ:
        return {}
    name = interface_towards(environ["MASTER_ADDR"])
    wanted = {"GLOO_SOCKET_IFNAME": name, "NCCL_SOCKET_IFNAME": name} if name else {}
    return {key: value for key, value in wanted.items() if key not in environ}


def ephemeral_low() -> int:
    """The lowest port that the kernel gives out by itself."""
    try:
        return int(EPHEMERAL.read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return 32_768


def job_ports(job: int, low: int | None = None, servers: int = 0) -> range:
    """The ports of a job: a window chosen by its number, below the ephemeral range, with room for `servers`.

    Where that range leaves no such room (nodes tuned to 1024 to 65535), a window in it all the same: one in
    use is passed by (`free_ports`).
    """
    top = ephemeral_low() if low is None else low
    size = max(PORTS, -(-(ENGINES + servers) // PORTS) * PORTS)
    windows = (top - LOWEST_PORT) // size
    if windows < 1:
        windows = (HIGHEST_PORT - LOWEST_PORT) // size
    start = LOWEST_PORT + job % windows * size
    return range(start, start + size)


def is_free(port: int, address: str = "") -> bool:
    """Whether a server could listen on a port here."""
    try:
        with socket.socket(family(address), socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((address, port))
            return True
    except OSError:
        return False


def spare_ports(count: int, host: str = "127.0.0.1") -> list[int]:
    """Ports that are free now, all different, drawn below those that the kernel gives out by itself.

    A server listens a minute after its port was chosen, when its imports are done: one of the kernel's may by
    then be some connection's. Where there are none below, they are the kernel's all the same.
    """
    top, jobs = max(LOWEST_PORT, ephemeral_low()), LOWEST_PORT + FIRST_JOBS * PORTS
    chance = random.SystemRandom()  # a seeded one gives two processes the same
    parts = (range(min(jobs, top), top), range(LOWEST_PORT, min(jobs, top)))
    drawn = [port for part in parts for port in chance.sample(part, len(part))]
    found = list(itertools.islice((port for port in drawn if is_free(port, host)), count))
    with contextlib.ExitStack() as stack:
        for _ in range(count - len(found)):
            probe = stack.enter_context(socket.socket(family(host)))
            probe.bind((host, 0))
            found.append(int(probe.getsockname()[1]))
    return found


def free_ports(job: int, count: int, address: str = "", *, servers: int = 0) -> list[int]:
    """The first `count` free ports of those before the servers'. Raises GenacError where there are fewer."""
    window = job_ports(job, servers=servers)
    found = [port for port in window[:ENGINES] if is_free(port, address)][:count]
    if len(found) < count:
        raise GenacError(
            f"of ports {window.start} to {window[ENGINES - 1]} only {len(found)} are free",
            where=f"job {job} on {socket.gethostname()}",
            way_out="see who listens there (ss -ltnp); a new job has other ports",
        )
    return found
