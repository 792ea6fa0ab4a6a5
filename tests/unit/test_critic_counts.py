"""The table of levers: counts against loops over tokens, and the page against the results."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest

from benchmarks.critic_cost import responses
from benchmarks.critic_counts import (
    DOCS,
    NAME,
    ROWS,
    Group,
    Levers,
    block,
    counted,
    judged_by_chance,
    lever_row,
    with_block,
)
from benchmarks.machine import RESULTS

OF = Group(responses(4, 4, 90))


def once(prompts: list[tuple[int, ...]]) -> int:
    return len({prompt[:n] for prompt in prompts for n in range(1, len(prompt) + 1)})


@pytest.mark.parametrize("judged", [[0, 1, 2, 3], [1, 3], []])
@pytest.mark.parametrize("states", [3, 8])
def test_tokens_against_loops(states: int, judged: list[int]) -> None:
    prompts, levers = OF.prompts(states), Levers(states=states, train_states=2, critic_tokens=9)
    assert 2 < len(prompts[0]) <= states
    asked = [prompts[n][i] for n in judged for i in prompts[n] if i] + [prompts[n][0] for n in judged[:1]]
    trained = [prompts[n][len(prompts[n]) - 1] for n in judged] + [prompts[n][0] for n in judged[:1]]
    found = counted(prompts, levers, judged)
    assert (found.read, found.written) == (once(asked), 9 * len(asked))
    assert (found.trained, found.trained_once) == (
        sum(map(len, trained)) + 9 * len(trained),
        once(trained) + 9 * len(trained),
    )


def test_who_is_certain_by_every_group_of_outcomes() -> None:
    chances: dict[tuple[int, ...], float] = {}
    for chance, judged in judged_by_chance(4):
        chances[tuple(judged)] = chances.get(tuple(judged), 0.0) + chance
    assert chances == pytest.approx({(): 0.4, (1, 2, 3): 0.2, (0, 1, 2): 0.2, (0, 1, 2, 3): 0.2})
    # Even success rates: p^3 + (1 - p)^3 of the responses are certain, 1/2 in the mean.
    assert sum(chance * len(judged) / 4 for judged, chance in chances.items()) == pytest.approx(0.5)


def test_levers_lower_what_they_should() -> None:
    rows = {what: lever_row(what, levers, OF)["FLOPs ÷ PPO"] for what, levers in ROWS.items()}
    whole = rows["defaults"]
    assert rows["prompt state judged for each response (not a choice)"] > whole < rows["soft scores"]
    for what in ("half of the responses trained", "certain outcomes left out", "two states"):
        assert rows[what] < whole
    assert rows["critic published every 4 steps"] == whole
    row = lever_row("", Levers(every=4), OF)
    assert row["published ÷ PPO"] == 1.25
    assert row["FLOPs ÷ PPO, flat packs"] > row["FLOPs ÷ PPO"]


def test_the_page_is_made_of_the_results_and_these_of_the_code() -> None:
    record: dict[str, Any] = json.loads((RESULTS / f"{NAME}.json").read_text())
    page = DOCS.read_text()
    assert with_block(page, block(record)) == page, "run python -m benchmarks.critic_cost --counts"
    assert [row["lever"] for row in record["rows"]] == list(ROWS)
    settings = record["settings"]
    of = Group(responses(settings["per_prompt"], settings["per_prompt"], settings["tokens"]))
    for row in itertools.islice(record["rows"], 0, None, 5):
        assert lever_row(row["lever"], ROWS[row["lever"]], of) == row
