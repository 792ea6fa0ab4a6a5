"""Which judgements are learnt, with critics whose worth is known: invented values, the real filter."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from genac_megatron.critic.trace_rows import critic_prompt, file_samples, read_traces
from genac_megatron.critic.verdicts import accepted, evenly, monte_carlo, place, shares, teaching, verdict
from genac_megatron.errors import GateFailed, InputError
from genac_megatron.recipe.schema import JudgingConfig, TeacherConfig
from genac_megatron.tasks.tokenizer import load_tokenizer
from genac_megatron.tracing.filter import FilterOptions, filtered

Row = dict[str, Any]
K, STATES = 8, 6000
CONFIG = TeacherConfig(kind="self", continuations=K)
JUDGING = JudgingConfig(max_new_tokens=64)


def world(rates: Callable[[random.Random], float]) -> tuple[list[Row], dict[int, float]]:
    """States of known values, as GSM8K has them for a strong actor: with K outcomes each."""
    rng = random.Random(3)
    states, values = [], {}
    for number in range(STATES):
        value = rates(rng)
        used = rng.choice([0, 20, 60, 100])
        states.append(
            {"state": number, "used": used, "place": used / 120, "length": 100 + used + rng.randrange(200),
             "outcomes": [float(rng.random() < value) for _ in range(K)], "actor": "a", "p_bar": 0.5,
             "step": 0, "prompt_id": f"train/{number}", "problem": f"{number}?", "success": "",
             "privileged": {}, "partial": "so", "limit": 120}
        )  # fmt: skip
        values[number] = value
    return states, values


def saturated(rng: random.Random) -> float:
    return rng.betavariate(6, 0.4)  # 94 % on average: most are sure, some are open


def judged(
    values: dict[int, float], says: Callable[[float, random.Random], float | None], times: int = 1
) -> list[Row]:
    rng = random.Random(5)
    return [
        {"state": state, "judgement": n, "value": said, "finish": "stop", "refused": "",
         "text": f"Fine. <answer>{round(10 * (said or 0))}</answer>", "reasoning": ""}
        for state, value in values.items()
        for n in range(times)
        for said in [says(value, rng)]
    ]  # fmt: skip


def perfect(value: float, rng: random.Random) -> float:
    return round(10 * value) / 10


def noisy(value: float, rng: random.Random) -> float | None:
    if rng.random() < 0.2:
        return None
    return min(max(round(10 * (value + rng.gauss(0, 0.25))) / 10, 0.0), 1.0)


def always_nine(value: float, rng: random.Random) -> float:
    return 0.9


def test_a_perfect_critics_judgements_are_kept_alike_whatever_the_state_is_worth() -> None:
    """A fixed tolerance kept 100 % at 0 and 1, and 55 to 71 % between."""
    states, values = world(lambda rng: rng.random())
    kept = {pair[0]["state"] for pair in accepted(states, judged(values, perfect), CONFIG)}
    for low in range(10):
        inside = [n for n, value in values.items() if low / 10 <= value < (low + 1) / 10]
        assert sum(n in kept for n in inside) / len(inside) > 0.9, low


@pytest.mark.parametrize("says", [perfect, noisy])
def test_what_is_kept_of_a_strong_actors_states_is_not_mostly_near_one(says: Any) -> None:
    """92 % of what was kept was near 1, and 1 % below 0.3."""
    states, values = world(saturated)
    assert 0.92 < sum(values.values()) / STATES < 0.96
    rows, text = filtered(states, judged(values, says, times=2), FilterOptions(Path("x"), size=400))
    assert len(rows) == 400
    parts = [0] * 5
    for row in rows:
        parts[min(int(5 * row["monte_carlo"] + 1e-9), 4)] += 1
    assert max(parts) <= 0.4 * 400
    assert parts[0] + parts[1] + parts[2] > 0.2 * 400  # of 6,000 states drawn 3 % are so
    assert "by fifths of their values" in text


def test_a_critic_that_always_says_nine_cannot_teach() -> None:
    """It parses, and of a strong actor's states half of what it says is near: it passed."""
    states, values = world(saturated)
    with pytest.raises(GateFailed, match=r"cannot teach values: .*0\.500 in the right order"):
        filtered(states, judged(values, always_nine), FilterOptions(Path("x")))
    broad, known = world(lambda rng: rng.random())
    with pytest.raises(GateFailed, match="is not below the best constant's"):
        filtered(broad, judged(known, always_nine), FilterOptions(Path("x")))
    with pytest.raises(GateFailed, match="in the right order"):
        filtered(states, judged(values, lambda v, rng: round(10 * (1 - v)) / 10), FilterOptions(Path("x")))
    answers = judged(values, perfect)
    good = teaching(states, answers, accepted(states, answers, CONFIG), CONFIG)
    assert not good.faults
    assert good.ranking > 0.9
    assert good.brier < 0.9 * good.constant


def test_the_nearest_of_several_is_kept_and_the_rest_has_its_verdict() -> None:
    state: Row = {"state": 1, "outcomes": [1.0, 1.0, 0.0, 0.0]}
    says = [(0.9, "stop"), (0.6, "stop"), (0.5, "length"), (None, "stop"), (0.4, "stop")]
    answers = [
        {"state": 1, "judgement": n, "value": value, "finish": finish}
        for n, (value, finish) in enumerate(says)
    ]
    config = CONFIG.model_copy(update={"continuations": 4000})
    verdicts = [verdict(one, 0.5, config) for one in answers]
    assert verdicts == ["away", "away", "cut off", "unread", "away"]
    assert verdict({**answers[1], "refused": "status 400"}, 0.6, config) == "refused"
    [(kept, answer)] = accepted([state], answers, CONFIG.model_copy(update={"continuations": 4}))
    assert kept is state
    assert answer["judgement"] == 1


def test_places_and_lengths_are_even_within_the_values() -> None:
    states, _ = world(lambda rng: rng.random())
    chosen = evenly(states, lambda row: row, 600, 0)
    assert len({row["state"] for row in chosen}) == 600
    assert all(abs(share - 0.2) < 0.01 for share in shares(chosen))
    for part in range(3):
        assert abs(sum(place(row) == part for row in chosen) - 200) <= 10
    third = sorted(row["length"] for row in chosen)
    assert third[len(third) // 2] > 180
    assert evenly(states, lambda row: row, 600, 0) == chosen
    assert evenly([], lambda row: row, 5, 0) == []
    few = [row for row in states if monte_carlo(row) > 0.79]
    assert len(evenly(few, lambda row: row, 600, 0)) == math.ceil(2 * 600 / 5)  # and no more of that part


def test_a_file_of_traces_is_what_a_critic_trains_on(tmp_path: Path) -> None:
    states, values = world(lambda rng: rng.random())
    rows, _ = filtered(
        states[:300], judged(dict(list(values.items())[:300]), perfect), FilterOptions(tmp_path)
    )
    path = tmp_path / "traces.jsonl"
    rows[0] |= {"actor": "early", "p_bar": 0.125, "step": 7}
    rows[1] |= {
        "text": "<think>So <answer>1</answer></think> Then: <answer>4</answer> Bye.",
        "reasoning": "R",
    }
    rows[2] |= {"text": "long " * 200 + "<answer>4</answer>"}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    read = read_traces(str(path))
    tokenizer = load_tokenizer("builtin:tiny")
    samples = file_samples(read, tokenizer, JUDGING, TeacherConfig(kind="file", path=str(path)))
    assert len(samples) == len(rows) - 1
    shown = tokenizer.decode(samples[0].tokens[: samples[0].start])
    assert "Success rate of early at present: 0.12" in shown
    assert "Training step of early: 7" in shown
    assert tuple(samples[0].tokens[: samples[0].start]) == critic_prompt(read[0], tokenizer, JUDGING)
    assert tokenizer.decode(samples[1].tokens[samples[1].start : -1]) == "Then: <answer>4</answer>"
    assert samples[1].source == rows[1]["prompt_id"]
    assert samples[1].problem
    told = TeacherConfig(kind="file", path=str(path), learn_reasoning=True)
    [sample] = file_samples([read[1]], tokenizer, JUDGING, told)
    text = tokenizer.decode(sample.tokens[sample.start : -1])
    assert text == "<think>\nR\n</think>\n\nThen: <answer>4</answer>"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", r"traces\.jsonl:2: not JSON"),
        ("[]", r"traces\.jsonl:2: not an object"),
        ('{"actor": "a"}', r"traces\.jsonl:2: a trace has no p_bar"),
    ],
)
def test_a_line_that_is_no_trace_is_named(tmp_path: Path, line: str, said: str) -> None:
    path = tmp_path / "traces.jsonl"
    path.write_text(f"\n{line}\n")
    with pytest.raises(InputError, match=said):
        read_traces(str(path))
    path.write_text("\n")
    with pytest.raises(InputError, match="no trace is in it"):
        read_traces(str(path))
