"""Who gets which request: affinity, spread, back-pressure. No server is asked."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest
from sglang_servers import run

from genac_megatron.serving.sglang.client import ServerClient
from genac_megatron.serving.sglang.routing import Route, Router, group_of


def router(count: int, limit: int = 8) -> Router:
    return Router([ServerClient(f"http://127.0.0.1:{9000 + n}", name=f"s/{n}") for n in range(count)], limit)


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


def homes(made: Router, groups: int = 300) -> dict[str, str]:
    async def work() -> dict[str, str]:
        found = {}
        for n in range(groups):
            route = await made.take(f"g{n}")
            found[f"g{n}"] = route.client.name
            made.give_back(route)
        return found

    return run(work())


def test_groups_keep_their_server_and_spread_over_all() -> None:
    before, after = homes(router(4)), homes(router(3))
    assert min(Counter(before.values()).values()) > 40
    moved = [group for group in before if before[group] != after[group]]
    assert all(before[group] == "s/3" for group in moved)


def test_a_group_leaves_a_server_that_is_overloaded_or_rests() -> None:
    made = router(2, limit=8)

    async def work() -> None:
        home = await made.take("g")
        others = [await made.take("g") for _ in range(3)]
        assert [one is home for one in others] == [True, False, True]  # two more than the other's
        made.rest(home)
        assert await made.take("g") is not home

    run(work())


def test_requests_without_a_group_go_to_the_least_loaded() -> None:
    made = router(3)

    async def work() -> list[Route]:
        return [await made.take("") for _ in range(9)]

    assert {route.in_flight for route in run(work())} == {3}


def test_the_limit_holds_and_those_who_wait_are_served_in_order() -> None:
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
    assert served == [n for n in range(60) if not 10 <= n < 20]
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
