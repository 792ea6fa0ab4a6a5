"""What the planner makes of a step's samples as trees: tokens, balance and time, no model (trees --planner).

Groups of 8 responses to a prompt, and the judgements of 4 nested states of responses, with lengths as
benchmarks.packing draws them, in micro-batches of 8,192 tokens at dp 1 to 8.
"""

from __future__ import annotations

import random
import time
from typing import Any

from benchmarks.packing import DISTRIBUTIONS, draw
from genac_megatron.records import Sample
from genac_megatron.training.plans import Rows
from genac_megatron.training.trees import Order, order_of, plan_trees

VOCAB = 50_000
GROUP, STATES, PROMPT, JUDGEMENT = 8, 4, 200, 120
LIMIT = 8192


def _ids(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(VOCAB) for _ in range(count)]


def actor_step(samples: int, rng: random.Random) -> list[Sample]:
    """Groups of responses; a length counts the prompt."""
    found = []
    for _ in range(samples // GROUP):
        prompt = _ids(rng, PROMPT)
        for length in draw(*DISTRIBUTIONS["actor"], count=GROUP, rng=rng):
            found.append(Sample([*prompt, *_ids(rng, max(length - PROMPT, 1))], PROMPT))
    return found


def critic_step(samples: int, rng: random.Random) -> list[Sample]:
    """Judgements of nested states; a length is that of the last one's prompt and judgement."""
    found = []
    for length in draw(*DISTRIBUTIONS["critic"], count=samples // STATES, rng=rng):
        trunk = _ids(rng, max(length - JUDGEMENT, PROMPT + STATES))
        for k in range(1, STATES + 1):
            cut = PROMPT + (len(trunk) - PROMPT) * k // STATES
            found.append(Sample([*trunk[:cut], *_ids(rng, JUDGEMENT)], cut))
    return found


def plan_row(what: str, order: Order, dp: int, planned_s: float) -> dict[str, Any]:
    began = time.perf_counter()
    plan = plan_trees(order, rows=Rows.whole(dp), tokens_per_microbatch=LIMIT, multiple=16)
    planned_s += time.perf_counter() - began
    assert plan is not None
    ranks = [sum(order.size(pack) for pack in row) for row in plan.rows]
    flat = int(order.lengths.sum())
    return {
        "step": what,
        "dp": dp,
        "flat tokens": flat,
        "computed": sum(ranks),
        "flat / tree": round(flat / sum(ranks), 2),
        "uncut": round(flat / order.size(range(len(order.lengths))), 2),
        "rank imbalance %": round(100 * (max(ranks) * dp / sum(ranks) - 1), 2),
        "order and plan s": round(planned_s, 2),
    }


def plan_rows(samples: int = 1024, widths: tuple[int, ...] = (1, 2, 4, 8)) -> list[dict[str, Any]]:
    """A row for each role's step and dp."""
    found = []
    for what, make in (("actor", actor_step), ("critic", critic_step)):
        step = make(samples, random.Random(0))
        began = time.perf_counter()
        order = order_of(step)
        spent = time.perf_counter() - began
        found += [plan_row(what, order, dp, spent) for dp in widths]
    return found
