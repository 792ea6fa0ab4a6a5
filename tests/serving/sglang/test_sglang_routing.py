"""Who gets which request: affinity, spread, back-pressure. No server is asked."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sglang_servers import run

from genac_megatron.serving.sglang.client import ServerClient
from genac_megatron.serving.sglang.routing import Route, Router, group_of, home_of
from genac_megatron.stages.runtime import Run


def router(count: int, limit: int = 8, first: int = 0) -> Router:
    clients = [ServerClient(f"http://127.0.0.1:{9000 + n}", name=f"s/{n}") for n in range(count)]
    return Router(clients, limit, first)


def world_of(rank: int, size: int) -> Any:
    return SimpleNamespace(world=SimpleNamespace(rank=rank, size=size))


@pytest.mark.parametrize(
    ("key", "group"),
    [
        ("train/3#7", "train/3"),
        ("train/3#7@2", "train/3#7"),
        ("train/3#7@2+1", "train/3#7"),
        ("", ""),
        ("a", "a"),
    ],
)
def test_groups_share_what_their_requests_share(key: str, group: str) -> None:
    assert group_of(key) == group


def homes(made: Router, groups: Sequence[str] = [f"g{n}" for n in range(300)]) -> dict[str, str]:
    async def work() -> dict[str, str]:
        found: dict[str, str] = {}
        for group in groups:
            route = await made.take(group)
            assert found.setdefault(group, route.client.name) == route.client.name
            made.give_back(route)
        return found

    return run(work())


def spread(found: dict[str, str], servers: int) -> list[int]:
    counts = Counter(found.values())
    return sorted(counts[f"s/{n}"] for n in range(servers))


@given(st.integers(1, 9), st.integers(0, 60), st.sets(st.integers(0, 8), max_size=8))
def test_the_fullest_server_has_one_group_more_than_the_emptiest(
    servers: int, groups: int, lost: set[int]
) -> None:
    lost = {server for server in lost if server < servers}
    whole = [home_of(number, servers, ()) for number in range(groups)]
    found = [home_of(number, servers, lost) for number in range(groups)]
    if len(lost) == servers:
        assert found == whole, "there is nobody else"
        return
    counts = [found.count(server) for server in range(servers) if server not in lost]
    assert max(counts) - min(counts) <= 1
    assert sum(counts) == groups
    assert all(now == was for was, now in zip(whole, found, strict=True) if was not in lost)


def test_dealt_groups_go_by_their_number_whatever_comes_first() -> None:
    made = router(4)
    made.deal({f"g{n}": n + 2 for n in range(300)})
    assert homes(made) == {f"g{n}": f"s/{(n + 2) % 4}" for n in range(300)}


@pytest.mark.parametrize(("ranks", "count"), [(1, 10), (4, 30), (8, 12), (3, 128)])
def test_over_all_ranks_each_server_has_as_many_groups(ranks: int, count: int) -> None:
    """As stages/rollouts.py deals prompts, each rank its own: no rank is asked what another does."""
    found: dict[str, str] = {}
    for rank in range(ranks):
        share, places = list(range(count))[rank::ranks], Run.places(world_of(rank, ranks), count)
        made = router(8, first=rank)
        made.deal({f"g{prompt}": place for prompt, place in zip(share, places, strict=True)})
        found |= homes(made, [f"g{prompt}" for prompt in share])
    assert len(found) == count
    counts = spread(found, 8)
    assert counts[-1] - counts[0] <= 1


def test_groups_that_nobody_dealt_take_turns_and_keep_their_server() -> None:
    made = router(4, first=3)
    names = [f"g{n}" for n in range(30)]
    found = homes(made, [*names, *reversed(names)])
    assert [found[name] for name in names] == [f"s/{(3 + n) % 4}" for n in range(30)]


def test_a_lost_servers_groups_are_dealt_over_the_others_and_come_back() -> None:
    made = router(4)
    made.deal({f"g{n}": n for n in range(300)})
    before = homes(made)
    made.rest(made.routes[1])
    after = homes(made)
    assert spread(after, 4) == [0, 100, 100, 100]
    assert all(after[group] == home for group, home in before.items() if home != "s/1")
    made.routes[1].rests_until = 0.0
    assert homes(made) == before


def test_who_waits_for_a_server_that_is_lost_goes_elsewhere() -> None:
    made = router(2, limit=1)
    made.deal({"g": 0, "h": 2})

    async def work() -> None:
        home = await made.take("g")
        waits = asyncio.ensure_future(made.take("h"))
        await asyncio.sleep(0)
        assert not waits.done(), "its server is full, and the other one idle"
        made.rest(home)
        assert (await waits) is not home

    run(work(), 5.0)


def test_requests_without_a_group_go_to_the_least_loaded() -> None:
    made = router(3)

    async def work() -> list[Route]:
        return [await made.take("") for _ in range(9)]

    assert {route.in_flight for route in run(work())} == {3}


def test_the_limit_holds_and_those_who_wait_for_a_server_are_served_in_order() -> None:
    made = router(2, limit=3)
    most = 0
    served: list[int] = []

    async def one(n: int) -> None:
        nonlocal most
        route = await made.take(f"g{n % 5}")
        most = max(most, *(other.in_flight for other in made.routes))
        served.append(n)
        await asyncio.sleep(0.001)
        made.give_back(route)

    async def work() -> None:
        tasks = [asyncio.ensure_future(one(n)) for n in range(60)]
        await asyncio.sleep(0)
        for n in range(10, 20):
            tasks[n].cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    run(work())
    assert most == 3
    for server in range(2):  # g0, g2 and g4 have the first, g1 and g3 the second
        mine = [n for n in range(60) if n % 5 % 2 == server and not 10 <= n < 20]
        assert [n for n in served if n in mine] == mine
    assert len(served) == 50
    assert [route.in_flight for route in made.routes] == [0, 0]


def test_where_all_rest_requests_are_tried_all_the_same() -> None:
    made = router(2)

    async def work() -> None:
        for route in made.routes:
            made.rest(route)
        assert await made.take("g") in made.routes

    run(work(), 5.0)


def test_a_new_event_loop_starts_with_nothing_in_flight() -> None:
    made = router(1, limit=1)
    run(made.take("g"))
    run(made.take("g"), 5.0)
