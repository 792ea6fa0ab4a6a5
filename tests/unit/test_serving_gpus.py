"""Which GPUs of a job its servers get. The pure logic, and servers' environments: no GPU is here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from genac_megatron.errors import InputError
from genac_megatron.recipe.schema import EngineConfig
from genac_megatron.serving.sglang.fleet import Fleet
from genac_megatron.serving.sglang.gpus import identity, ranks_on, server_gpus, visible_gpus

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
    assert server_gpus("actor", engine(engines=2, tp=2), 1, None) == ["2", "3"]
