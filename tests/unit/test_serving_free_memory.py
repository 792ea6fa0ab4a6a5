"""A server's memory at its start: a fake nvidia-smi says what is free, servers are fakes that take it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from genac_megatron.errors import GenacError, InputError
from genac_megatron.recipe.schema import EngineConfig
from genac_megatron.recipe.share import CONTEXT_GIB, GIB, Share
from genac_megatron.serving.sglang import fleet as module
from genac_megatron.serving.sglang.fleet import Fleet
from genac_megatron.serving.sglang.free_memory import free_bytes, parse
from genac_megatron.serving.sglang.gpus import VARIABLE
from genac_megatron.serving.sglang.server import ServerSpec

A, B = "GPU-8932f937-d72c-4106-c12f-20bd9faed9f6", "GPU-1d9f2c11-0b3e-43f5-9b7c-2f4cf2d1a001"
SHARE = Share("actor", weights=15 * GIB, cache=10 * GIB, least=0.5 * GIB, token=1e5, runtime=3 * GIB)


@pytest.fixture
def smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Puts a fake nvidia-smi on PATH that answers with a text."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder), prepend=":")

    def answer(text: str, code: int = 0) -> None:
        path = folder / "nvidia-smi"
        path.write_text(f"#!/bin/sh\ncat <<'END'\n{text}END\nexit {code}\n")
        path.chmod(0o700)

    return answer


def test_rows_of_nvidia_smi() -> None:
    found = parse(f"0, {A}, 80994\n1, {B}, 1024\n\n")
    assert found["0"] == found[A.removeprefix("GPU-")] == 80_994 * 2**20
    assert found["1"] == 1024 * 2**20


def test_a_gpu_is_known_by_its_uuid_before_its_number(smi: Callable[..., None]) -> None:
    """CUDA's order need not be nvidia-smi's."""
    smi(f"0, {A}, 1000\n1, {B}, 2000\n")
    mib = 2.0**20
    assert free_bytes(["0", "1"], {}) == [1000 * mib, 2000 * mib]
    assert free_bytes(["0"], {"0": B.removeprefix("GPU-")}) == [2000 * mib]
    assert free_bytes([A, B[:12]], {}) == [1000 * mib, 2000 * mib]


@pytest.mark.parametrize(
    ("text", "code"), [("No devices were found\n", 0), ("0, x, [N/A]\n", 0), ("", 9), ("1, x, 5\n", 0)]
)
def test_an_nvidia_smi_that_does_not_tell_is_named(smi: Callable[..., None], text: str, code: int) -> None:
    smi(text, code)
    with pytest.raises(GenacError, match="nvidia-smi does not tell how much memory is free on 0"):
        free_bytes(["0"], {})


class FakeGpus:
    """Bytes free on the job's GPUs, by number; a fake server takes its own when it is healthy."""

    def __init__(self, free: dict[str, float]) -> None:
        self.free = free
        self.log: list[str] = []


class FakeServer:
    def __init__(self, spec: ServerSpec, log: Path, **_: Any) -> None:
        self.spec, self.log, self.gpus = spec, log, FakeServer.on
        self.holds: dict[str, float] = {}

    on: FakeGpus
    pid = 1

    def start(self) -> None:
        names = self.spec.env[VARIABLE].split(",")
        free = min(self.gpus.free[name] for name in names) - CONTEXT_GIB * GIB
        self.holds = dict.fromkeys(names, self.spec.mem_fraction * free + 3 * GIB)
        self.gpus.log.append(f"start {self.spec.name} {self.spec.mem_fraction * free / GIB:.1f}")

    def wait_healthy(self, limit_s: float) -> float:
        for name, size in self.holds.items():
            self.gpus.free[name] -= size
        self.gpus.log.append(f"healthy {self.spec.name}")
        return 0.0

    def stop(self) -> None:
        for name, size in self.holds.items():
            self.gpus.free[name] += size
        self.holds = {}

    def alive(self) -> bool:
        return True


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> FakeGpus:
    made = FakeServer.on = FakeGpus({"0": 79 * GIB, "1": 79 * GIB})
    monkeypatch.setenv(VARIABLE, "0,1")
    monkeypatch.setattr(module, "Server", FakeServer)
    monkeypatch.setattr(module, "FREE_S", 0.0)
    monkeypatch.setattr(module, "free_bytes", lambda names, uuids: [made.free[name] for name in names])
    return made


def made_fleet(folder: Path, role: str = "actor", beside: Sequence[Fleet] = (), **given: Any) -> Fleet:
    config = EngineConfig.model_validate({"kind": "sglang"} | given)
    where = {"model_type": "llama"}, folder / role, folder, "cuda"
    return Fleet(role, config, *where, share=SHARE, neighbours=beside)


def test_a_server_gets_its_share_whatever_is_free(tmp_path: Path, gpus: FakeGpus) -> None:
    """25 GiB for weights and cache, at the first start and when it comes back beside the trainer."""
    fleet = made_fleet(tmp_path, engines=2)
    fleet.start()
    assert [endpoint.name for endpoint in fleet.ready()] == ["actor/0", "actor/1"]
    gpus.free["1"] -= 40 * GIB  # the roles that are built then
    fleet.restart(["actor/1"], ["actor/1"])
    started = [line for line in gpus.log if line.startswith("start")]
    assert started == ["start actor/0 25.0", "start actor/1 25.0", "start actor/1 25.0"]
    assert fleet._servers[1].spec.mem_fraction > 2 * fleet._servers[0].spec.mem_fraction
    assert gpus.free["1"] == pytest.approx(79 * GIB - 40 * GIB - 28 * GIB, rel=1e-2)


def test_servers_of_one_gpu_start_one_after_another(tmp_path: Path, gpus: FakeGpus) -> None:
    """What one takes while another makes its cache would be lost to that one."""
    actor = made_fleet(tmp_path, gpus=[0])
    critic = made_fleet(tmp_path, "critic", [actor], gpus=[0])
    apart = made_fleet(tmp_path, "other", [actor, critic], gpus=[1])
    for fleet in (actor, critic, apart):
        fleet.start()
    assert gpus.log == ["start actor/0 25.0", "healthy actor/0", "start critic/0 25.0", "start other/0 25.0"]
    for fleet in (actor, critic, apart):
        fleet.ready()
    assert gpus.log.count("healthy critic/0") == 1


def test_where_nothing_is_left_the_start_is_refused(tmp_path: Path, gpus: FakeGpus) -> None:
    gpus.free["0"] = 18 * GIB
    fleet = made_fleet(tmp_path)
    with pytest.raises(InputError, match=r"18\.0 GiB of its GPU are free"):
        fleet.start()
    assert gpus.log == []
