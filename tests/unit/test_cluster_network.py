"""Which address ranks meet at, and which ports a job has."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from genac_megatron.errors import GenacError, InputError
from genac_megatron.platform.network import (
    FIRST_JOBS,
    LOWEST_PORT,
    PORTS,
    addresses,
    bracketed,
    ephemeral_low,
    fabric_address,
    fast_interfaces,
    free_ports,
    interface_towards,
    is_free,
    job_ports,
    rank_environment,
    spare_ports,
    usable,
)

ROOT = Path(__file__).resolve().parents[2]
NODE = {
    "docker0": ["172.17.0.1"],  # what `hostname -I` may well begin with
    "eth0": ["10.0.0.5", "fe80::1"],
    "ib0": ["10.10.0.5", "fd00:10::5"],
    "ib1": [],
}


def test_a_named_interface_wins_and_a_wrong_name_is_told() -> None:
    assert fabric_address(["ib1", "ib0"], "n2", present=NODE, fast=["ib0"]) == "10.10.0.5"
    with pytest.raises(InputError, match=r"no interface ib7 .*(?s:.*)docker0, eth0, ib0"):
        fabric_address(["ib7"], "n2", present=NODE)


def test_infiniband_before_the_kernels_way() -> None:
    assert fabric_address([], "127.0.0.1", present=NODE, fast=["ib1", "ib0"]) == "10.10.0.5"
    assert fabric_address([], "127.0.0.1", present={"ib0": ["fe80::2"]}, fast=["ib0"]) == "127.0.0.1"
    assert fabric_address([], "", present=NODE, fast=["ib0"]) == "127.0.0.1", "one node needs no fabric"


def test_fast_interfaces_are_told_by_sysfs(tmp_path: Path) -> None:
    for name, kind in (("eth0", "1"), ("ib0", "32"), ("rdma0", "1")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "type").write_text(f"{kind}\n")
    (tmp_path / "rdma0" / "device" / "infiniband").mkdir(parents=True)
    assert fast_interfaces(tmp_path) == ["ib0", "rdma0"]
    assert fast_interfaces(tmp_path / "none") == []


@pytest.mark.parametrize(
    ("address", "can"),
    [("10.0.0.1", True), ("fd00::1", True), ("127.0.0.1", False), ("::1", False), ("fe80::1%eth0", False),
     ("169.254.0.1", False), ("224.0.0.1", False), ("node1", False)],
)  # fmt: skip
def test_usable(address: str, can: bool) -> None:
    assert usable(address) is can


def test_brackets_are_for_urls_of_ipv6() -> None:
    assert [bracketed(a) for a in ("10.0.0.1", "fd00::1", "node1")] == ["10.0.0.1", "[fd00::1]", "node1"]


def test_a_node_that_cannot_be_resolved_is_named() -> None:
    with pytest.raises(InputError, match=r"node no-such-node\.invalid: cannot be reached"):
        fabric_address([], "no-such-node.invalid", present=NODE, fast=[])


def test_the_interface_towards_a_peer() -> None:
    loopback = next(name for name, found in addresses().items() if "127.0.0.1" in found)
    assert interface_towards("127.0.0.1") == loopback
    job = {"SLURM_JOB_ID": "1", "MASTER_ADDR": "127.0.0.1"}
    assert rank_environment(job) == {"GLOO_SOCKET_IFNAME": loopback, "NCCL_SOCKET_IFNAME": loopback}
    assert rank_environment(job | {"GLOO_SOCKET_IFNAME": "ib0"}) == {"NCCL_SOCKET_IFNAME": loopback}
    assert rank_environment({"MASTER_ADDR": "127.0.0.1"}) == {}, "no job of Slurm's"


def test_ports_lie_below_the_ephemeral_range_and_differ_by_job() -> None:
    windows = [job_ports(job, 32_768) for job in range(1000, 1600)]
    assert all(w.start >= LOWEST_PORT and w.stop <= 32_768 and len(w) == PORTS for w in windows)
    assert len({w.start for w in windows}) == 600
    assert job_ports(7, 16_000).stop <= 16_000
    large = [job_ports(job, 32_768, servers=1024) for job in range(40)]
    assert all(len(w) >= 8 + 1024 and w.stop <= 32_768 for w in large), "room for every server"
    tuned = [job_ports(job, 1024) for job in range(200)]
    assert all(w.start >= LOWEST_PORT and w.stop <= 65_536 for w in tuned), "nothing is left below"
    assert len({w.start for w in tuned}) == 200


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_a_port_in_use_is_passed_by(address: str) -> None:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    window = job_ports(4242)
    with socket.socket(family) as server:
        try:
            server.bind((address, window[0]))
            server.listen()
        except OSError:
            pytest.skip(f"{address} cannot be used here")
        assert not is_free(window[0], address)
        assert free_ports(4242, 2, address) == [window[1], window[2]]


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_a_spare_port_is_none_that_the_kernel_gives_out(host: str) -> None:
    """A test suite's other listener once got the port of a server that was still importing."""
    if not is_free(0, host):
        pytest.skip(f"{host} cannot be used here")
    first, second = spare_ports(20, host), spare_ports(20, host)
    assert all(LOWEST_PORT <= port < ephemeral_low() and is_free(port, host) for port in first + second)
    assert len(set(first)) == 20
    assert set(first) != set(second)
    jobs = {port for job in range(1, FIRST_JOBS) for port in job_ports(job)}
    assert not jobs & {*first, *second}, "a new cluster's jobs would find theirs taken"


def test_ports_in_use_and_few_below_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("genac_megatron.platform.network.ephemeral_low", lambda: LOWEST_PORT + 3)
    with socket.create_server(("127.0.0.1", LOWEST_PORT + 1)):
        found = spare_ports(5)
    low = [port for port in found if port < LOWEST_PORT + 3]
    assert sorted(low) == [LOWEST_PORT, LOWEST_PORT + 2]
    assert len(set(found)) == 5


def test_a_window_without_free_ports_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("genac_megatron.platform.network.is_free", lambda port, address="": False)
    with pytest.raises(GenacError, match="only 0 are free"):
        free_ports(1, 2)


MEET = """
import json, os
from genac_megatron.platform.network import rank_environment
from genac_megatron.cluster.preflight import communicate
os.environ.update(rank_environment({**os.environ, "SLURM_JOB_ID": "1"}))
print(json.dumps(communicate()))
"""


def test_ranks_meet_at_an_ipv6_address() -> None:
    """Two of them, as in a job: MASTER_ADDR without brackets, and an all-reduce."""
    if not Path("/proc/net/if_inet6").exists():
        pytest.skip("no IPv6 here")
    port = next(port for port in job_ports(4243) if is_free(port, "::1"))
    given = {"MASTER_ADDR": "::1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", MEET], stdout=subprocess.PIPE, text=True,
            env={**os.environ, **given, "RANK": str(rank), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        )
        for rank in range(2)
    ]  # fmt: skip
    outputs = [rank.communicate(timeout=120)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0]
    found = [json.loads(output.splitlines()[-1]) for output in outputs]
    assert all(report["right"] and report["bus_gbs"] > 0 for report in found)
    assert len(found[0]["clocks"]) == 2
