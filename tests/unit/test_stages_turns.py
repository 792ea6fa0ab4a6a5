"""Whose turn it is on shared GPUs: order, by fake roles and a fake fleet that count what they hold.

No GPU is here: what is released and taken is real in tests/distributed (roles) and on a GPU alone (servers).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

from genac_megatron.errors import GenacError, PeerLost, on_all_ranks
from genac_megatron.recipe.schema import EngineConfig
from genac_megatron.serving.sglang.client import ServerClient
from genac_megatron.serving.sglang.fleet import Endpoint
from genac_megatron.stages.progression import Progression
from genac_megatron.stages.servers import Servers
from genac_megatron.stages.serving import Serving
from genac_megatron.stages.turns import Turns

NAMES = ("actor", "critic")


@pytest.fixture(scope="module", autouse=True)
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    if dist.is_initialized():  # another test's world of one
        yield
        return
    store = tmp_path_factory.mktemp("world") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Gpu:
    """What is on a GPU: it never holds a role at work and a KV cache at once."""

    def __init__(self) -> None:
        self.held: set[str] = set()
        self.log: list[str] = []

    def take(self, what: str) -> None:
        self.held.add(what)
        self.log.append(f"+{what}")
        roles = any(part.endswith("role") for part in self.held)
        assert not (roles and any(part.endswith("kv_cache") for part in self.held)), self.log

    def give(self, what: str) -> None:
        self.held.discard(what)
        self.log.append(f"-{what}")


class FakeRole:
    def __init__(self, name: str, gpu: Gpu, *, offload: bool = True) -> None:
        self.name, self.gpu, self.serial = name, gpu, 0
        self.config = SimpleNamespace(
            training=SimpleNamespace(offload=offload),
            publication=SimpleNamespace(every=1, mode="drain"),
            engine=SimpleNamespace(enable_lora=False),
        )
        self.memory = SimpleNamespace(moved="")  # of its base
        gpu.take(f"{name} role")

    def rest(self) -> None:
        if f"{self.name} role" in self.gpu.held:
            self.gpu.give(f"{self.name} role")

    def wake(self) -> None:
        if f"{self.name} role" not in self.gpu.held:
            self.gpu.take(f"{self.name} role")


class FakeFleet:
    """Servers that hold what SGLang would, by the tags that they are sent."""

    def __init__(self, name: str, gpu: Gpu, engines: int = 1) -> None:
        self.name, self.gpu, self.engines = name, gpu, engines
        self.dead: set[str] = set()
        self.instance = 0
        self.asked: list[bool] = []  # whether it was known to be at rest
        self._start()

    def _start(self) -> None:
        for tag in ("weights", "kv_cache"):
            self.gpu.take(f"{self.name} {tag}")

    def ready(self) -> list[Endpoint]:
        return self.endpoints()

    def endpoints(self) -> list[Endpoint]:
        url = "http://127.0.0.1:9"
        return [Endpoint(f"{self.name}/{n}", url, "", 1, "cpu", self.instance) for n in range(self.engines)]

    def lost(self, *, resting: bool = False) -> list[str]:
        self.asked.append(resting)
        return sorted(self.dead)

    def restart(self, names: list[str], allowed: list[str]) -> None:
        if set(names) - set(allowed):
            raise PeerLost("the budget is spent", where=self.name)
        if names:
            self.dead -= set(names)
            self.instance += 1
            self._start()


class FakePublisher:
    """Publishes to servers whose weights' memory is there, with the role awake."""

    def __init__(self, gpu: Gpu, name: str) -> None:
        self.gpu, self.name = gpu, name
        self.fails = 0
        self.only: list[Any] = []

    def publish(self, version: int, only: Any = None) -> dict[str, float]:
        self.only.append(only)
        assert {f"{self.name} weights", f"{self.name} role"} <= self.gpu.held, self.gpu.log
        self.gpu.log.append(f"publish {self.name}")
        if self.fails:
            self.fails -= 1
            raise on_all_ranks(PeerLost("a server fell", where=self.name))
        return {"seconds": 0.0}


class FakeServed:
    """stages/served.py's OnServers with real `Servers` and without transport."""

    def __init__(self, servers: Servers, publisher: FakePublisher) -> None:
        self.servers, self.publisher = servers, publisher
        self.engine = SimpleNamespace(version=-1)

    lacking: tuple[str, ...] = ()
    bare = property(lambda self: self.servers.bare)
    sleeps = property(lambda self: self.servers.sleeps)
    doubted = property(lambda self: self.servers.doubted)

    def filled(self) -> None:
        self.servers.bare = False

    def restart_lost(self) -> list[str]:
        return self.servers.replace_lost()

    def restarts(self) -> int:
        return self.servers.restarts

    def sleep(self, *, weights: bool) -> None:
        self.servers.release("kv_cache", *(("weights",) if weights else ()))

    def wake(self, *, cache: bool) -> None:
        self.servers.take("weights", *(("kv_cache",) if cache else ()))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    held = Gpu()

    def released(client: ServerClient, tags: Any, **_: Any) -> None:
        for tag in tags:
            assert f"{client.name.split('/')[0]} {tag}" in held.held, "it fails where it is released twice"
            held.give(f"{client.name.split('/')[0]} {tag}")

    def resumed(client: ServerClient, tags: Any, **_: Any) -> None:
        for tag in tags:
            assert f"{client.name.split('/')[0]} {tag}" not in held.held, "or resumed twice"
            held.take(f"{client.name.split('/')[0]} {tag}")

    monkeypatch.setattr(ServerClient, "release_memory", released)
    monkeypatch.setattr(ServerClient, "resume_memory", resumed)
    return held


class Begun:
    """A run's serving, as stages/runtime.py begins it: servers, asleep; roles; then what connects them."""

    def __init__(self, gpu: Gpu, release: str, *, restarts: int = 3) -> None:
        self.gpu = gpu
        self.fleets = {name: FakeFleet(name, gpu) for name in NAMES}
        config = EngineConfig.model_validate({"kind": "sglang", "release": release, "restarts": restarts})
        servers = {name: Servers(config, fleet) for name, fleet in self.fleets.items()}  # type: ignore[arg-type]
        for one in servers.values():
            one.release("kv_cache", "weights")
        roles: Any = {name: FakeRole(name, gpu) for name in NAMES}
        self.publishers = {name: FakePublisher(gpu, name) for name in NAMES}
        served: Any = {name: FakeServed(servers[name], self.publishers[name]) for name in NAMES}
        self.roles = roles
        progress: Any = SimpleNamespace(phase=lambda name: _Nothing(), note=gpu.log.append)
        self.serving = Serving(roles, served, Progression(), progress)
        gpu.log.clear()

    def step(self) -> None:
        for role in self.roles.values():
            role.serial += 1


class _Nothing:
    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


def generate(gpu: Gpu) -> Any:
    """Asks both engines: everything of theirs is there, no role is."""

    def act() -> str:
        gpu.log.append("generate")
        assert gpu.held == {f"{name} {tag}" for name in NAMES for tag in ("weights", "kv_cache")}
        return "done"

    return act


@pytest.mark.parametrize("release", ["kv_cache", "all"])
def test_a_run_never_holds_a_role_and_a_kv_cache(gpu: Gpu, release: str) -> None:
    run = Begun(gpu, release)
    weights = {f"{name} weights" for name in NAMES}
    assert gpu.held == {"actor role", "critic role"} | (weights if release == "kv_cache" else set())
    run.serving.publish("actor", "critic")
    assert gpu.held == {"actor role", "critic role"} | weights
    for _ in range(3):
        assert run.serving.generating(generate(gpu)) == "done"
        assert gpu.held == {"actor role", "critic role"} | (weights if release == "kv_cache" else set())
        run.step()
        run.serving.publish("actor", "critic")
    assert [line for line in gpu.log if line.startswith(("publish", "generate"))] == [
        "publish actor", "publish critic", *["generate", "publish actor", "publish critic"] * 3
    ]  # fmt: skip
    assert all(only is None for publisher in run.publishers.values() for only in publisher.only)


def test_weights_that_were_given_up_are_brought_before_the_next_request(gpu: Gpu) -> None:
    """Those of a role that trains are published anyway, a frozen critic's again under their version."""
    run = Begun(gpu, "all")
    run.serving.publish("actor", "critic")
    run.serving.generating(generate(gpu))
    run.roles["actor"].serial += 1
    run.serving.publish("actor")
    gpu.log.clear()
    run.serving.generating(generate(gpu))
    assert gpu.log.index("publish critic") < gpu.log.index("generate")
    assert run.serving.at.versions == {"actor": 2, "critic": 1}
    assert "publish actor" not in gpu.log


@pytest.mark.parametrize("release", ["kv_cache", "all"])
def test_a_server_that_is_lost_while_it_generates_comes_back_where_roles_rest(gpu: Gpu, release: str) -> None:
    run = Begun(gpu, release)
    run.serving.publish("actor", "critic")
    run.fleets["critic"].dead.add("critic/0")
    failed = iter([True])

    def act() -> str:
        if next(failed, False):
            for tag in ("weights", "kv_cache"):
                gpu.give(f"critic {tag}")
            raise PeerLost("no answer", where="critic/0")
        return str(generate(gpu)())

    assert run.serving.generating(act) == "done"
    assert run.serving.restarts() == 1
    assert run.publishers["critic"].only[-1] in (["critic/0"], None)
    assert gpu.log[-1] in ("+actor role", "+critic role"), "roles have the GPU again"


def test_a_server_that_is_lost_in_a_publication_comes_back_where_roles_rest(gpu: Gpu) -> None:
    run = Begun(gpu, "kv_cache")
    run.serving.publish("actor", "critic")
    run.serving.generating(generate(gpu))
    run.step()
    run.publishers["actor"].fails = 1
    run.fleets["actor"].dead.add("actor/0")
    gpu.give("actor weights")
    # The dead server's memory is back, and its successor comes up with all of its own.
    gpu.held.add("actor weights")
    run.serving.publish("actor", "critic")
    assert run.serving.restarts() == 1
    assert run.fleets["actor"].asked == [True], "a server at rest is not asked for a token"
    assert run.serving.generating(generate(gpu)) == "done"


@pytest.mark.parametrize("live", [False, True])
def test_a_base_that_moved_is_published_under_every_role_on_it(gpu: Gpu, live: bool) -> None:
    """Whatever its cadence; to servers that load adapters once nothing is generated beside the trainer."""
    run, settled = Begun(gpu, "kv_cache"), []
    run.serving.settle = lambda: settled.append(dict(run.serving.at.versions))
    for role in run.roles.values():
        role.memory = run.roles["actor"].memory
        role.config.engine.enable_lora = live
        role.config.publication.mode = "in_flight"
    run.roles["critic"].config.publication.every = 4
    run.serving.publish("actor", "critic")
    for role in run.roles.values():
        role.serial += 1
    run.serving.publish("actor", step=1)
    assert (run.serving.at.versions, settled) == ({"actor": 2, "critic": 1}, [])
    run.roles["actor"].memory.moved = "elsewhere"
    for role in run.roles.values():
        role.serial += 1
    run.serving.publish("actor", step=2)
    assert run.serving.at.versions == {"actor": 3, "critic": 2}
    assert len(settled) == (2 if live else 0)
    run.roles["actor"].serial += 1
    run.serving.publish("actor", "critic", step=3)
    assert run.serving.at.versions == {"actor": 4, "critic": 2}


def test_beyond_the_budget_the_run_ends(gpu: Gpu) -> None:
    run = Begun(gpu, "kv_cache", restarts=0)
    run.serving.publish("actor", "critic")
    run.fleets["actor"].dead.add("actor/0")

    def act() -> None:
        raise PeerLost("no answer", where="actor/0")

    with pytest.raises(PeerLost, match="budget"):
        run.serving.generating(act)


def test_nothing_moves_where_nothing_is_to_rest(gpu: Gpu) -> None:
    fleet = FakeFleet("actor", gpu)
    servers = Servers(EngineConfig(kind="sglang"), fleet)  # type: ignore[arg-type]
    gpu.log.clear()
    turns = Turns([], {"actor": FakeServed(servers, FakePublisher(gpu, "actor"))})
    for _ in range(2):
        turns.train()
        turns.publish("actor")
        turns.generate()
        turns.restart()
    assert gpu.log == []


def test_a_role_that_finds_no_memory_ends_the_run_on_all_ranks(gpu: Gpu) -> None:
    """Agreed before the next collective, as torch's error on one rank would leave the others waiting."""
    role = FakeRole("actor", gpu)

    def wake() -> None:
        raise RuntimeError("CUDA out of memory")

    role.wake = wake  # type: ignore[method-assign]
    with pytest.raises(GenacError, match="CUDA out of memory") as raised:
        Turns([role], {}).train()
    assert raised.value.agreed


def test_a_server_that_does_not_do_as_told_is_replaced(
    gpu: Gpu, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fleet = FakeFleet("actor", gpu)
    servers = Servers(EngineConfig(kind="sglang", release="kv_cache"), fleet)  # type: ignore[arg-type]
    done = ServerClient.release_memory

    def deaf(client: ServerClient, tags: Any, **_: Any) -> None:
        raise PeerLost("no answer", where=client.name)

    monkeypatch.setattr(ServerClient, "release_memory", deaf)
    servers.release("kv_cache", "weights")
    monkeypatch.setattr(ServerClient, "release_memory", done)
    assert servers.replace_lost() == ["actor/0"]
    assert servers.given == ("kv_cache",)
    assert gpu.held == {"actor weights"}, "its successor rests as the others do"
    assert servers.replace_lost() == []


@pytest.mark.parametrize("call", ["release_memory", "resume_memory"])
def test_a_server_that_does_not_do_as_told_is_replaced_before_anything_is_asked(
    gpu: Gpu, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    run = Begun(gpu, "kv_cache")
    run.serving.publish("actor", "critic")
    done, deaf = getattr(ServerClient, call), iter([True])

    def told(client: ServerClient, tags: Any, **more: Any) -> None:
        if client.name == "actor/0" and next(deaf, False):
            for tag in ("weights", "kv_cache"):  # its memory is back once it is ended
                gpu.held.discard(f"actor {tag}")
            raise PeerLost("no answer", where=client.name)
        done(client, tags, **more)

    monkeypatch.setattr(ServerClient, call, told)
    assert run.serving.generating(generate(gpu)) == "done"
    assert run.serving.restarts() == 1
    assert gpu.log.count("generate") == 1
    assert run.serving.generating(generate(gpu)) == "done"
    assert run.serving.restarts() == 1


def test_what_the_last_pass_left_is_let_go_before_servers_take_their_weights(
    gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stub of torch's allocator: what it keeps of a pass no server can have."""
    run = Begun(gpu, "all")
    run.serving.publish("actor", "critic")
    run.serving.generating(generate(gpu))
    run.step()
    gpu.held.add("cached activations")
    monkeypatch.setattr("genac_megatron.platform.empty_cache", lambda: gpu.give("cached activations"))
    gpu.log.clear()
    run.serving.publish("actor")
    assert gpu.log.index("-cached activations") < gpu.log.index("+actor weights")
