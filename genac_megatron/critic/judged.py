"""States with what a generative critic says of them: what a value head is taught (docs/traces.md). No torch.

`genac traces ask` leaves judged.jsonl, every state that was asked about; `genac score --lines` writes
transcripts with values of their prefixes. Both are read here.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from genac_megatron.critic.verdicts import Row
from genac_megatron.errors import InputError

WAY_OUT = "give judged.jsonl of `genac traces ask`, or what `genac score --lines` has written"


@dataclass(frozen=True)
class JudgedState:
    """A prefix of a response, and its value in [0, 1] by the critic that is to be learnt from."""

    where: str  # file and line
    prompt_id: str | None  # None: it is found by the problem's text
    problem: str
    partial: str
    ids: tuple[int, ...] | None  # the prefix as it was sampled; None: its text is tokenized
    value: float
    outcomes: tuple[float, ...] = ()  # of fresh continuations, whose mean is the true value


def judged_rows(states: Sequence[Row], answers: Sequence[Row]) -> list[Row]:
    """Of every state with an answer that parses, what judged.jsonl keeps: the mean of these answers."""
    said: dict[Any, list[float]] = defaultdict(list)
    for answer in answers:
        if answer["value"] is not None:
            said[answer["state"]].append(answer["value"])
    kept = ("actor", "prompt_id", "problem", "partial", "ids", "outcomes")
    return [
        {key: state[key] for key in kept}
        | {"value": math.fsum(values) / len(values), "judgements": len(values)}
        for state in states
        if (values := said.get(state["state"]))
    ]


def read_judged(path: str) -> list[JudgedState]:
    """The states of a file. Raises InputError that names file and line."""
    try:
        with open(path, encoding="utf-8") as file:
            lines = file.read().split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read judged states: {error}", where=path, way_out=WAY_OUT) from error
    found = [
        state
        for number, line in enumerate(lines, start=1)
        if line.strip()
        for state in _states(line, f"{path}:{number}")
    ]
    if not found:
        raise InputError("no state with a value is in it", where=path, way_out=WAY_OUT)
    return found


def _states(line: str, where: str) -> Iterator[JudgedState]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise InputError(f"not JSON: {error}", where=where, way_out=WAY_OUT) from error
    if not isinstance(row, dict) or not isinstance(row.get("problem"), str):
        raise InputError("not an object with a problem", where=where, way_out=WAY_OUT)
    problem = row["problem"]
    if isinstance(row.get("partial"), str):
        ids, outcomes = row.get("ids"), row.get("outcomes") or ()
        yield JudgedState(
            where, row.get("prompt_id"), problem, row["partial"], None if ids is None else tuple(ids),
            _value(row.get("value"), where), tuple(_value(one, where) for one in outcomes),
        )  # fmt: skip
        return
    response = row.get("response")
    if not isinstance(response, str):
        raise InputError("it has neither a partial nor a response", where=where, way_out=WAY_OUT)
    values = row.get("values") or [{"characters": len(response), "value": row.get("value")}]
    for one in values:
        if one.get("value") is not None:  # no judgement of it parsed
            partial, value = response[: int(one["characters"])], _value(one["value"], where)
            yield JudgedState(where, None, problem, partial, None, value)


def _value(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise InputError(f"a value is {value!r}, not a number from 0 to 1", where=where, way_out=WAY_OUT)
    return float(value)
