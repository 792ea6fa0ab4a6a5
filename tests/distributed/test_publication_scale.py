"""What a publication costs and how it fails, whatever the number of its buckets and of idle ranks."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.distributed.cases import Collected, make_role, role_config
from tests.distributed.recorded import recorded

WORLD = 4
BUCKET = 1 << 14
AGREEMENTS = 3  # of those that carry a publication: ready, all sent, figures
TOLD = 1  # of the whole world: how it went
TP2PP2 = {"count": 4, "tp": 2, "pp": 2}


class OnRank(Collected):
    """A sink that reads on one rank."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.reads = torch.distributed.get_rank() == rank


def exchanged_case(rank: int, config: Any, sizes: list[int | None], reader: int | None) -> list[Any]:
    """Per size of buckets: their number, and what this rank took part in at the second publication."""
    from genac_megatron.publication.publisher import Publisher

    role = make_role("actor", config, WORLD)
    found = []
    for size in sizes:
        publisher = Publisher(role, [Collected() if reader is None else OnRank(reader)], size)
        publisher.publish(1)
        with recorded() as calls:
            figures = publisher.publish(2)
        found.append((int(figures["buckets"]), dict(calls)))
    return found


def test_ranks_agree_as_often_however_many_buckets_there_are(pool: Any) -> None:
    results = pool.run(exchanged_case, role_config(layout=TP2PP2), [BUCKET, None], None)
    for (many, often), (few, seldom) in results:
        assert many > 3 * few
        objects = [sum(n for (name, _), n in calls.items() if "object" in name) for calls in (often, seldom)]
        assert objects[0] == objects[1] <= AGREEMENTS + TOLD
        assert often["broadcast", WORLD] == many  # the bytes: each rank has an engine
        assert seldom["broadcast", WORLD] == few
        assert not any(name == "barrier" for name, _ in often)


def test_buckets_go_to_the_ranks_that_read_them_and_to_no_others(pool: Any) -> None:
    """Rank 1 reads; the sources are ranks 0 and 2."""
    results = pool.run(exchanged_case, role_config(layout=TP2PP2), [BUCKET], 1)
    (many, _), *_ = results[0]
    broadcasts = [
        {size: n for (name, size), n in calls.items() if name == "broadcast"} for ((_, calls),) in results
    ]
    assert broadcasts[1] == {2: many}
    assert broadcasts[0].keys() == broadcasts[2].keys() == {2}
    assert broadcasts[0][2] + broadcasts[2][2] == many
    assert broadcasts[3] == {}


def test_ranks_without_a_part_are_told_once_how_it_went(pool: Any) -> None:
    """Rank 0 holds what rank 1 reads; of ranks 2 and 3 nothing is asked but to hear the end."""
    results = pool.run(exchanged_case, role_config(layout={"count": 4}), [BUCKET], 1)
    calls = [calls for ((_, calls),) in results]
    wide = [{name: n for (name, size), n in each.items() if size == WORLD} for each in calls]
    inner = {"broadcast": 2} if "broadcast" in wide[2] else {}  # of the one object, by torch's own hand
    assert wide == [{"broadcast_object_list": TOLD, **inner}] * WORLD
    assert all(size == WORLD for each in calls[2:] for _, size in each)
    assert calls[0]["all_gather_object", 2] == calls[1]["all_gather_object", 2] == AGREEMENTS


def late_case(rank: int, config: Any) -> bool:
    """What a rank finds that comes for the end when all others have gone on. Raises PeerLost for nothing."""
    from genac_megatron.publication import progress
    from genac_megatron.publication.publisher import Publisher

    Publisher(make_role("actor", config, WORLD), [OnRank(1)], BUCKET).publish(1)
    torch.distributed.barrier()
    progress._count -= 1  # the same publication's again
    progress.Progress([0], 1.0, "publication").wait_until_over()
    return True


def test_a_rank_that_comes_last_still_hears_the_end(pool: Any) -> None:
    """Of eight ranks the first source's broadcast returns before the last rank has even asked."""
    assert pool.run(late_case, role_config(layout={"count": 4})) == [True] * WORLD


def limit_case(rank: int) -> list[float]:
    """Seconds after which collectives of a publication's group fail; empty where this rank is in none."""
    import torch.distributed as dist

    from genac_megatron.publication.groups import group_of

    groups = [group_of(ranks) for ranks in ([0, 2], [2, 0, 2], [1])]
    assert groups[0] is groups[1]
    assert groups[2] is None
    if rank not in (0, 2):
        return []
    backend: Any = groups[0]._get_backend(torch.device("cpu"))  # type: ignore[union-attr]
    return [backend.options._timeout.total_seconds(), float(dist.get_world_size(groups[0]))]


def test_a_publication_s_groups_have_the_limit_of_all_others(pool: Any) -> None:
    from tests.distributed.pool import COLLECTIVE_S

    assert pool.run(limit_case) == [[COLLECTIVE_S, 2.0], [], [COLLECTIVE_S, 2.0], []]


# --- a rank that fails by itself ------------------------------------------------------------------


class Failing(Collected):
    """A sink that fails at a bucket on one rank, as long as `rank` says so."""

    def __init__(self, rank: int, bucket: int) -> None:
        super().__init__()
        self.rank, self.bucket, self.calls = rank, bucket, 0

    def load_weights(
        self, version: int, tensors: Iterable[tuple[str, Tensor]], *, final: bool = True
    ) -> None:
        self.calls += 1
        if self.rank == torch.distributed.get_rank() and self.calls == self.bucket:
            raise MemoryError("no room for what a sink makes")
        super().load_weights(version, tensors, final=final)


def no_memory(real: Any, after: int) -> Any:
    """`real`, which fails from its `after`-th call on."""
    calls = 0

    def allocate(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > after:
            raise MemoryError("no room for a buffer")
        return real(*args, **kwargs)

    return allocate


def idle_case(rank: int, config: Any) -> tuple[str, bool, int]:
    """A publication between ranks 0 and 1 fails, and the next one does not: what each rank sees."""
    from genac_megatron.errors import GenacError
    from genac_megatron.publication.publisher import Publisher

    role = make_role("actor", config, WORLD)
    sink = OnRank(1)
    publisher = Publisher(role, [sink], BUCKET)
    if rank == 1:
        publisher.transport.allocate = no_memory(publisher.transport.allocate, 0)
    try:
        publisher.publish(2)
        told, agreed = "", False
    except GenacError as error:
        told, agreed = str(error), error.agreed
    publisher.transport.__dict__.pop("allocate", None)
    publisher.publish(3)
    return told, agreed, sink.version


def test_idle_ranks_raise_what_the_others_raise_and_go_on(pool: Any) -> None:
    results = pool.run(idle_case, role_config(layout={"count": 4}))
    assert results == [results[0]] * WORLD
    told, agreed, version = results[0]
    assert "rank 1: MemoryError: no room for" in told
    assert (agreed, version) == (True, 3)


def failing_case(rank: int, config: Any, kind: str, where: int) -> tuple[str, float, bool]:
    """The error on this rank, its seconds, and whether the next publication brings everything."""
    from genac_megatron.errors import GenacError
    from genac_megatron.publication import join
    from genac_megatron.publication.publisher import Publisher

    role = make_role("actor", config, WORLD)
    reference = Collected()
    Publisher(role, [reference], BUCKET).publish(1)
    sink = Failing(where if kind == "sink" else -1, 3)
    publisher = Publisher(role, [sink], BUCKET)
    unshard = join.unshard
    if rank == where and kind == "staging":
        publisher.transport.allocate = no_memory(publisher.transport.allocate, 0)
    elif rank == where and kind == "second staging":
        publisher.transport.allocate = no_memory(publisher.transport.allocate, 1)
    elif rank == where and kind == "gathering":
        publisher._joiner._bytes = no_memory(publisher._joiner._bytes, 0)
    elif rank == where and kind == "joining":
        join.unshard = no_memory(unshard, 5)
    began = time.monotonic()
    try:
        publisher.publish(2)
        told = ""
    except GenacError as error:
        told = str(error)
    seconds = time.monotonic() - began
    join.unshard = unshard
    publisher.transport.__dict__.pop("allocate", None)
    publisher._joiner.__dict__.pop("_bytes", None)
    sink.rank = -1
    publisher.publish(3)
    whole = all(torch.equal(sink.tensors[name], tensor) for name, tensor in reference.tensors.items())
    return told, seconds, whole and sink.version == 3


@pytest.mark.parametrize(
    ("kind", "where"),
    [
        ("sink", 1),
        ("sink", 3),
        ("staging", 0),
        ("staging", 3),
        ("second staging", 1),
        ("gathering", 0),
        ("gathering", 2),
        ("joining", 0),
        ("joining", 2),
    ],
)
def test_a_rank_that_fails_by_itself_leaves_nobody_waiting(pool: Any, kind: str, where: int) -> None:
    """Rank 0 and 2 are sources, 1 and 3 their tensor-parallel peers; each rank has a sink."""
    results = pool.run(failing_case, role_config(layout=TP2PP2), kind, where, timeout=200.0)
    assert len({told for told, _, _ in results}) == 1
    told = results[0][0]
    assert f"rank {where}: MemoryError: no room for" in told
    assert all(seconds < 150.0 for _, seconds, _ in results)
    assert all(whole for _, _, whole in results)


# --- a role that starts from another ----------------------------------------------------------------

BIG = {"layers": 8, "hidden": 256, "ffn": 1024, "heads": 4, "kv_heads": 2, "head_dim": 64, "vocab": 2048}


class Drops:
    """A sink that keeps nothing."""

    def load_weights(
        self, version: int, tensors: Iterable[tuple[str, Tensor]], *, final: bool = True
    ) -> None:
        for _ in tensors:
            pass


def starting_case(rank: int, layouts: Any) -> tuple[float, float, float, list[int]]:
    """MiB: the model's, its largest tensor's, the most that a rank held more; bytes held between buckets."""
    from genac_megatron.publication.publisher import Publisher, RoleSink
    from tests.distributed.cases import published

    bucket = 4 << 20
    source, target = (
        make_role(name, role_config(layout=layout, tie=False, shape=BIG), WORLD, seed)
        for name, layout, seed in zip(("actor", "critic"), layouts, (3, 9), strict=True)
    )
    held: list[int] = []

    class Watched(RoleSink):
        def load_weights(
            self, version: int, tensors: Iterable[tuple[str, Tensor]], *, final: bool = True
        ) -> None:
            super().load_weights(version, tensors, final=final)
            mine = [x for x in vars(self).values() if isinstance(x, dict)]
            held.append(sum(x.nbytes for part in mine for x in part.values() if isinstance(x, Tensor)))

    Publisher(source, [Drops()], bucket).publish(0)  # what is made once: groups, threads, buffers
    publisher = Publisher(source, [Watched(target)], bucket)
    figures = publisher.publish(1)
    a, b = published(source, bucket), published(target, bucket)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], tensor) for name, tensor in b.items())
    largest = max(tensor.nbytes for tensor in a.values())
    mib = 1 << 20
    return figures["bytes"] / mib, largest / mib, figures["host_peak_bytes"] / mib, held


@pytest.mark.parametrize(
    "layouts",
    [
        ({"count": 2, "tp": 2}, {"first_rank": 2, "count": 2}),
        ({"tp": 2, "pp": 2}, {"first_rank": 1, "count": 2}),
    ],
    ids=["apart", "tp2pp2-to-dp2"],
)
def test_a_role_that_starts_from_another_never_holds_its_model(pool: Any, layouts: Any) -> None:
    for rank, (model, largest, peak, held) in enumerate(pool.run(starting_case, layouts)):
        print(rank, f"model {model:.0f} MiB, largest {largest:.0f}, peak {peak:.0f}", len(held))
        assert model > 30
        assert set(held) <= {0}
        assert bool(held)
        # Two buckets of 4 MiB, and a fused parameter's parts: not the model.
        assert peak < 0.6 * model
