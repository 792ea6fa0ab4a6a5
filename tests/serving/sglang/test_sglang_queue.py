"""A real server of one request at a time, on one core: its queue is waited for, its processes stay there."""

from __future__ import annotations

import asyncio
import os
import time

from sglang_servers import Farm, engine_over, run, served_config
from tiny_models import plain_model, request

from genac_megatron.serving.sglang.boot import group_members
from genac_megatron.serving.sglang.cores import allowed_threads

MODEL = plain_model(served_config("qwen3"))
LIMIT_S = 6.0
PROBE = 40  # tokens, three times, to see how fast this machine is where it is least busy
COUNT = 8  # requests, each of a third of the limit alone: a machine may become twice as fast or slow


def test_a_queue_is_waited_for_and_the_server_runs_on_its_core(farm: Farm) -> None:
    core = max(allowed_threads())
    server = farm.start(max_running=1, cores=(core,))
    try:
        pid = server.pid
        assert pid is not None
        threads = [
            int(thread) for member in group_members(pid) for thread in os.listdir(f"/proc/{member}/task")
        ]
        assert len(threads) > 3, "of several processes"
        assert {frozenset(os.sched_getaffinity(thread)) for thread in threads} == {frozenset({core})}
        engine = engine_over([server], MODEL, request_timeout_s=LIMIT_S, attempts=1)

        async def work() -> list[float]:
            took = []
            for _ in range(3):
                began = time.monotonic()
                await engine.complete(request((1, 2), PROBE))
                took.append(time.monotonic() - began)
            new = min(1800, int(PROBE / min(took) * LIMIT_S / 3))
            began = time.monotonic()

            async def one(n: int) -> float:
                assert len((await engine.complete(request((1, 2, n), new, seed=n))).ids) == new
                return time.monotonic() - began

            return sorted(await asyncio.gather(*map(one, range(COUNT))))

        ends = run(work(), 500.0)
        assert ends[-2] > LIMIT_S, "the last one waited longer than its limit"
        assert ends[-1] - ends[0] > LIMIT_S, "they came one after another"
    finally:
        server.stop()
