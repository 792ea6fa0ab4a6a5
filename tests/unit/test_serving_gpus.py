"""Which GPUs of a job its servers get. The pure logic, and servers' environments: no GPU is here."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given as for_all
from hypothesis import strategies as st

from genac_megatron.errors import InputError
from genac_megatron.recipe.schema import EngineConfig
from genac_megatron.recipe.servers import plan_gpus, too_few
from genac_megatron.serving.sglang.fleet import Fleet
from genac_megatron.serving.sglang.gpus import identity, ranks_on, refusals, server_gpus, visible_gpus
from genac_megatron.serving.sglang.server import ServerSpec

VARIABLE = "CUDA_VISIBLE_DEVICES"
A, B = "GPU-8932f937-d72c-4106-c12f-20bd9faed9f6", "GPU-0f3c55a1-1111-2222-3333-444455556666"
M, N = "MIG-74c6a31a-fde5-5c61-973b-70e12346c202", "MIG-GPU-0f3c55a1/1/0"


def engine(**given: Any) -> EngineConfig:
    return EngineConfig.model_validate({"kind": "sglang", **given})


@pytest.mark.parametrize(
    ("mask", "count", "wanted"),
    [
        ("4,5,6,7", 0, ("4", "5", "6", "7")),
        ("7, 2,5", 3, ("7", "2", "5")),
        (f"{A},{B}", 2, (A, B)),
        (f"{M},{N}", 1, (M, N)),
        ("0,-1,1", 0, ("0",)),
        ("0,1,9", 2, ("0", "1")),
        ("3,3", 0, ("3",)),
        ("", 0, ()),
        ("-1", 0, ()),
        ("NoDevFiles", 0, ()),
        (None, 3, ("0", "1", "2")),
        (None, 0, None),
    ],
)
def test_a_mask_is_read_as_cuda_reads_it(
    mask: str | None, count: int, wanted: tuple[str, ...] | None
) -> None:
    assert visible_gpus({} if mask is None else {VARIABLE: mask}, count) == wanted


@pytest.mark.parametrize(
    ("mask", "given", "wanted"),
    [
        ("4,5,6,7", {"engines": 2, "gpus": [0, 1]}, ["4", "5"]),
        ("7,5,6,4", {"engines": 2, "gpus": [1, 3]}, ["5", "4"]),
        ("4,5,6,7", {"engines": 2}, ["4", "5"]),
        ("4,5,6,7", {"engines": 2, "tp": 2}, ["4,5", "6,7"]),
        ("4,5,6,7", {"engines": 2, "tp": 2, "gpus": [3, 2, 1, 0]}, ["7,6", "5,4"]),
        (f"{A},{B}", {"engines": 2}, [A, B]),
        (f"{A},{B}", {"tp": 2}, [f"{A},{B}"]),
        (f"{M},{N}", {"engines": 2, "gpus": [1, 0]}, [N, M]),
        (None, {"engines": 2, "tp": 2}, ["0,1", "2,3"]),
    ],
)
def test_each_server_gets_its_own_of_the_job(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    mask: str | None,
    given: dict[str, Any],
    wanted: list[str],
) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    if mask is not None:
        monkeypatch.setenv(VARIABLE, mask)
    config = engine(**given)
    fleet = Fleet("actor", config, {"model_type": "llama"}, tmp_path / "model", tmp_path, "cuda")
    specs = [fleet._spec(index, 1000 + index) for index in range(config.engines)]
    assert [spec.environment()[VARIABLE] for spec in specs] == wanted
    unnumbered = config.tp > 1 and mask is not None and not mask[0].isdecimal()
    assert all(("--disable-custom-all-reduce" in spec.arguments()) == unnumbered for spec in specs)


def test_servers_of_the_second_node_count_on_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(VARIABLE, "6,2")
    config = engine(engines=4, nodes=[0, 1])
    fleet = Fleet("actor", config, {"model_type": "llama"}, tmp_path / "m", tmp_path, "cuda", node=1)
    assert [fleet._spec(index, 1).environment()[VARIABLE] for index in (2, 3)] == ["6", "2"]


@pytest.mark.parametrize(
    ("mask", "given", "said"),
    [
        ("4,5", {"engines": 2, "gpus": [1, 2]}, "actor/1 takes GPU 2 of the job.*sees 2 .*=4,5"),
        ("4,5", {"engines": 3}, "actor/2 takes GPU 2"),
        ("4,5", {"tp": 2, "gpus": [1, 1]}, "one of them twice"),
        ("", {"engines": 1}, "sees none"),
        (f"{M},{N}", {"tp": 2}, "2 MIG instances"),
    ],
)
def test_gpus_that_the_job_has_not_got_are_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, mask: str, given: dict[str, Any], said: str
) -> None:
    monkeypatch.setenv(VARIABLE, mask)
    with pytest.raises(InputError, match=said) as raised:
        Fleet("actor", engine(**given), {"model_type": "llama"}, tmp_path / "model", tmp_path, "cuda")
    assert raised.value.where == "roles.actor.engine.gpus"
    assert raised.value.way_out
    assert not (tmp_path / "model").exists()


def test_a_cpu_server_names_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(VARIABLE, "")
    fleet = Fleet("actor", engine(engines=2), {"model_type": "llama"}, tmp_path / "model", tmp_path, "cpu")
    assert VARIABLE not in fleet._spec(0, 1).environment()


def test_a_gpu_has_one_identity_whatever_the_mask() -> None:
    assert identity("4", A.removeprefix("GPU-")) == identity("0", A) == identity(A[:12], A) == A
    assert identity(M, A) == M
    assert identity("4", "") == "4"


def test_ranks_are_found_by_node_and_gpu() -> None:
    ranks = [(0, A), (0, B), (1, A), (1, B)]
    assert ranks_on({"actor/0": (0, (B, A)), "actor/1": (1, (A,))}, ranks) == {
        "actor/0": [1, 0],
        "actor/1": [2],
    }
    assert ranks_on({"actor/0": (0, (B,)), "actor/1": (0, (M,))}, ranks) is None
    assert ranks_on({"actor/0": (2, (B,))}, ranks) is None
    assert ranks_on({"actor/0": (0, ())}, ranks) is None


def test_where_nothing_is_known_numbers_are_the_nodes_own() -> None:
    assert server_gpus("actor", 1, [2, 3], None) == ["2", "3"]


# --- the plan over all roles ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("engines", "wanted"),
    [
        ({"a": {"engines": 2, "tp": 2}}, {"a": [[0, 1], [2, 3]]}),
        ({"a": {"engines": 2}, "b": {"engines": 2}}, {"a": [[0], [1]], "b": [[2], [3]]}),
        ({"a": {"engines": 2}, "b": {"gpus": [0]}}, {"a": [[1], [2]], "b": [[0]]}),
        ({"a": {"gpus": [0]}, "b": {"gpus": [0]}}, {"a": [[0]], "b": [[0]]}),
        ({"a": {"tp": 2}, "b": {"engines": 2, "gpus": [1, 3]}}, {"a": [[0, 2]], "b": [[1], [3]]}),
        (
            {"a": {"engines": 2}, "b": {"engines": 4, "nodes": [0, 1]}},
            {"a": [[0], [1]], "b": [[2], [3], [0], [1]]},
        ),
        ({"a": {"nodes": [1]}, "b": {"nodes": [0]}}, {"a": [[0]], "b": [[0]]}),
    ],
)
def test_every_server_has_gpus_of_its_own(
    engines: dict[str, Any], wanted: dict[str, list[list[int]]]
) -> None:
    assert plan_gpus({name: engine(**given) for name, given in engines.items()}) == wanted


sizes = st.fixed_dictionaries(
    {"each": st.integers(1, 3), "tp": st.integers(1, 4), "nodes": st.sets(st.integers(0, 2), min_size=1)}
)


@for_all(st.lists(sizes, min_size=1, max_size=3))
def test_no_gpu_has_two_servers_and_none_is_left_out(roles: list[dict[str, Any]]) -> None:
    engines = {
        f"r{n}": engine(engines=one["each"] * len(one["nodes"]), tp=one["tp"], nodes=sorted(one["nodes"]))
        for n, one in enumerate(roles)
    }
    seen: dict[int, list[int]] = {}
    for name, servers in plan_gpus(engines).items():
        for index, places in enumerate(servers):
            assert len(places) == engines[name].tp
            seen.setdefault(engines[name].node_of(index), []).extend(places)
    assert all(sorted(places) == list(range(len(places))) for places in seen.values())
    most = max(map(len, seen.values()))
    assert too_few(engines, most) == []
    assert too_few(engines, most - 1)


def test_too_few_gpus_are_told_by_key() -> None:
    both = {"actor": engine(engines=4, tp=2), "critic": engine()}
    (text,) = too_few(both, 8)
    assert "the servers of 'critic' take GPUs up to 8, a node has 8 ('actor' has servers there too)" in text
    assert "name them: roles.critic.engine.gpus and roles.actor.engine.gpus" in text
    (alone,) = too_few({"actor": engine(engines=9)}, 8)
    assert "roles.actor.engine.engines" in alone
    assert "name them" not in alone


def test_two_roles_without_gpus_start_on_gpus_of_their_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(VARIABLE, "4,5,6,7")
    engines = {"actor": engine(engines=2), "critic": engine(tp=2)}
    seen = []
    for role, places in plan_gpus(engines).items():
        fleet = Fleet(role, engines[role], {"model_type": "llama"}, tmp_path, tmp_path, "cuda", places=places)
        seen += [fleet._spec(n, 1).environment()[VARIABLE] for n in range(engines[role].engines)]
    assert seen == ["4", "5", "6,7"]


def test_all_roles_are_looked_at_before_a_server_is_started() -> None:
    engines = {"actor": engine(engines=2, nodes=[0, 1]), "critic": engine(tp=2), "judge": engine(nodes=[1])}
    assert refusals(engines, 0, ("4", "5", "6")) == refusals(engines, 1, ("0", "1")) == []
    (error,) = refusals(engines, 0, ("4", "5"))
    assert "server critic/0 takes GPU 2 of the job" in error.what
    assert error.where == "roles.critic.engine.gpus"
    assert len(refusals(engines, 1, ())) == 2


# --- limits --------------------------------------------------------------------------------------


def options(spec: ServerSpec) -> dict[str, str]:
    return dict(zip(spec.arguments(), spec.arguments()[1:], strict=False))


@pytest.mark.parametrize(
    ("device", "given", "requests", "tokens"),
    [
        ("cuda", {}, None, None),
        ("cuda", {"max_batch": 7}, "7", None),
        ("cuda", {"max_batch_tokens": 4096}, None, "4096"),
        ("cpu", {}, "64", "65536"),
        ("cpu", {"max_batch": 7, "max_batch_tokens": 4096}, "7", "4096"),
    ],
)
def test_limits_are_the_servers_own_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    device: Literal["cpu", "cuda"],
    given: dict[str, int],
    requests: str | None,
    tokens: str | None,
) -> None:
    monkeypatch.setenv(VARIABLE, "0")
    found = options(
        Fleet("a", engine(**given), {"model_type": "llama"}, tmp_path, tmp_path, device)._spec(0, 1)
    )
    assert found.get("--max-running-requests") == requests
    assert found.get("--max-total-tokens") == tokens
