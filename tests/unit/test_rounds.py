"""A batch of embedded engines holds the same requests, whenever answers from outside come."""

from __future__ import annotations

import asyncio
import random
from typing import Any

from genac_megatron.recipe.schema import EngineConfig
from genac_megatron.records import Request, SamplingParams
from genac_megatron.serving.embedded import EmbeddedEngine
from genac_megatron.serving.rounds import rounds

CONFIG = {
    "model_type": "qwen3", "vocab_size": 32, "hidden_size": 16, "intermediate_size": 32,
    "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8,
}  # fmt: skip


def batches(seed: int, *, begun: bool = False) -> list[list[str]]:
    """Of six talks of four requests each, with answers from outside between them, in an order by `seed`.

    begun: an answer from outside is what a talk begins with.
    """
    draw, made = random.Random(seed), EmbeddedEngine(CONFIG, EngineConfig(dtype="fp32", max_batch=4), "cpu")
    made.load_weights(0, made._model.named_parameters())  # type: ignore[union-attr]
    seen: list[list[str]] = []
    run = made._run

    def noted(batch: list[Any]) -> None:
        seen.append([waiting.request.key for waiting in batch])
        run(batch)

    made._run = noted  # type: ignore[method-assign]

    async def talk(number: int) -> None:
        ids = [number + 1]
        if begun:
            async with rounds(asyncio.get_running_loop()).outside():
                await asyncio.sleep(draw.random() * 0.01)
        for turn in range(4):
            said = await made.complete(Request((*ids,), SamplingParams(2), turn, f"{number}/{turn}"))
            async with rounds(asyncio.get_running_loop()).outside():
                await asyncio.sleep(draw.random() * 0.01)
            ids += [*said.ids, 3]

    async def everything() -> None:
        await asyncio.gather(*(talk(number) for number in range(6)))

    asyncio.run(everything())
    made.close()
    return seen


def test_batches_are_the_same_however_long_answers_take() -> None:
    first = batches(1)
    assert sorted(key for batch in first for key in batch) == [f"{n}/{t}" for n in range(6) for t in range(4)]
    assert batches(2) == batches(3) == first
    assert max(len(batch) for batch in first) == 4


def test_they_are_where_all_that_wait_are_answered_before() -> None:
    """Which of them is answered last is nothing to the order."""
    assert batches(1, begun=True) == batches(2, begun=True) == batches(3, begun=True)


def test_who_fails_or_is_cancelled_outside_holds_nobody_up() -> None:
    async def work() -> list[str]:
        here, order = rounds(asyncio.get_running_loop()), list[str]()

        async def one(name: str, wait_s: float, error: Exception | None = None) -> None:
            async with here.outside():
                await asyncio.sleep(wait_s)
                if error is not None:
                    raise error
            order.append(name)

        late = asyncio.ensure_future(one("late", 60.0))
        others = [one("slow", 0.02), one("quick", 0.0), one("broken", 0.01, ValueError())]
        tasks = [asyncio.ensure_future(other) for other in others]
        await asyncio.sleep(0.05)
        assert order == []
        assert here.wait(lambda: order.append("engine"))
        late.cancel()
        found = await asyncio.gather(*tasks, return_exceptions=True)
        assert isinstance(found[2], ValueError)
        assert not here.wait(lambda: None)
        return order

    assert asyncio.run(work()) == ["engine", "slow", "quick"]
