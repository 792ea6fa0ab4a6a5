"""Samples that several ranks make: the same on all, their numbers in one file that ranks map."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch.distributed as dist

from genac_megatron.records import Sample

COUNTS = (3, 0, 5, 1)  # what each rank makes


def made(rank: int, shift: int = 0) -> list[Sample]:
    first = sum(COUNTS[:rank])
    samples = []
    for n in range(first, first + COUNTS[rank]):
        tokens = [100_000 + n + shift, *range(n), 7]
        fields = {"weights": [1 / (3 + n)] * n, "values": [0.0] * n} if n % 3 else {}
        spans = ((2, 3),) if n == 4 else ()
        samples.append(
            Sample(
                tokens, 2, fields, source=f"train/{n}", part="a" if n % 2 else "", problem="p", spans=spans
            )
        )
    return samples


def run_of(rank: int, folder: str) -> Any:
    from genac_megatron.training.agreement import agree

    world = SimpleNamespace(rank=rank, size=dist.get_world_size())
    return SimpleNamespace(world=world, folder=SimpleNamespace(path=Path(folder)), together=agree)


def all_case(rank: int, folder: str) -> Any:
    """(samples that this rank has, the same once another stage's have taken the file's place, those)."""
    from genac_megatron.stages.sft_pool import MAKING, forget, held_once

    run = run_of(rank, folder)
    first = held_once(run, made(rank), f"{MAKING}demos-chats")
    again = held_once(run, made(rank, shift=50), f"{MAKING}demos-chats")
    empty = held_once(run, [], "nothing")
    kept = held_once(run, first if rank == 0 else [], "demos")
    forget(run, "demos")
    every: Any = [*first, *kept]
    mapped = all(isinstance(one.tokens._held, memoryview) for one in every)
    return first, again, empty, kept, mapped


def test_every_rank_has_all_and_none_a_copy(pool: Any, tmp_path: Path) -> None:
    expected = [one for rank in range(len(COUNTS)) for one in made(rank)]
    later = [one for rank in range(len(COUNTS)) for one in made(rank, shift=50)]
    for first, again, empty, kept, mapped in pool.run(all_case, str(tmp_path)):
        assert first == expected
        assert kept == expected
        assert again == later, "ranks that had mapped the file of before kept it"
        assert empty == []
        assert mapped
        assert [list(one.tokens) for one in first] == [list(one.tokens) for one in expected]
        assert [one.trained for one in first] == [one.trained for one in expected]
    files = sorted(file.name for file in (tmp_path / "data").iterdir())
    assert files == ["demos.numbers", "nothing.numbers"], "what only the making needed is gone"


def apart_case(rank: int, folder: str) -> str:
    from genac_megatron.errors import InputError
    from genac_megatron.stages.sft_pool import held_once

    run = run_of(rank, folder if rank != 2 else f"{folder}/elsewhere")
    try:
        held_once(run, made(rank), "demos")
    except InputError as error:
        return str(error)
    return ""


def test_a_folder_that_a_node_has_alone_is_named(pool: Any, tmp_path: Path) -> None:
    for words in pool.run(apart_case, str(tmp_path)):
        assert "elsewhere/data/demos.numbers" in words
        assert "a file system that all nodes share" in words
