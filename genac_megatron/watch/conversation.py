"""A kept rollout as a conversation: the prompt's turns, the response token by token with the critic's values
between, and what the critic was asked and said. All of it is others' text, and escaped.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from typing import Any

from genac_megatron.observe.report_data import Row, number
from genac_megatron.observe.report_page import chip, segments, text_of

LEVELS = 5  # of a tint, on each side
LONG = 1500  # characters of a turn that is folded
TINTS = {"advantages": "advantage", "values": "value", "logprobs": "log-prob"}
ROLES = {"user": "user", "system": "system", "assistant": "assistant", "tool": "tool"}


def conversation(rollout: Row, index: int, address: str = "") -> str:
    """One rollout as a card. index: its number among those kept. address: of its own page."""
    states = [state for state in rollout.get("states") or [] if isinstance(state, dict)]
    rollout = {**rollout, "states": states}
    turns = "".join(_turn(str(m.get("role")), _content(m.get("content"))) for m in _messages(rollout))
    return (
        f"<section class='card talk' id=r{index}>{_head(rollout, index, address)}{turns}"
        f"<div class='turn actor'><span class=who>actor</span>{_response(rollout, states, index)}</div>"
        f"{_answer(rollout)}{_critic(rollout, states, index)}</section>"
    )


def _messages(rollout: Row) -> list[Row]:
    messages = [m for m in rollout.get("messages") or [] if isinstance(m, dict)]
    return messages or [{"role": "user", "content": rollout.get("problem")}]


def _content(content: Any) -> str:
    return content if isinstance(content, str) else json.dumps(content, ensure_ascii=False, indent=1)


def _turn(role: str, text: str) -> str:
    kind = ROLES.get(role, "tool")
    body = f"<div class=text>{escape(text)}</div>"
    if role == "system" or len(text) > LONG:
        body = f"<details><summary>{len(text):,} characters</summary>{body}</details>"
    return f"<div class='turn {kind}'><span class=who>{escape(role)}</span>{body}</div>"


def _head(rollout: Row, index: int, address: str) -> str:
    outcome = number(rollout.get("outcome"))
    colour = "good" if outcome >= 0.5 else "bad"
    verdict = "right" if outcome >= 1 else "wrong" if outcome <= 0 else "partly right"
    told = [
        {"training": "of a training batch", "heldout": "held out"}.get(str(rollout.get("of")), ""),
        f"{rollout['length']:,} tokens" if isinstance(rollout.get("length"), int) else "",
        "cut off" if rollout.get("truncated") else "",
        f"{rollout['turns']} turns" if isinstance(rollout.get("turns"), int) else "",
        f"ended: {rollout['ended']}" if rollout.get("ended") else "",
        f"actor v{rollout['version']}" if isinstance(rollout.get("version"), int) else "",
    ]
    place = f"{rollout.get('stage')}, step {rollout.get('step')}, {rollout.get('prompt')}"
    title = f"<a href='{escape(address)}'>{escape(place)}</a>" if address else escape(place)
    return (
        f"<h3>{title}: <span class={colour}>{verdict}</span> ({text_of(outcome, 2)})</h3>"
        f"<p class=soft>{' · '.join(part for part in told if part)}</p>"
    )


def _answer(rollout: Row) -> str:
    lines = []
    if "reference" in rollout:
        lines.append(f"expected: {rollout['reference']}")
    for name, value in (rollout.get("parts") or {}).items():
        lines.append(f"{name}: {text_of(number(value))}")
    return f"<p class=soft>{escape(' · '.join(lines))}</p>" if lines else ""


# --- the response --------------------------------------------------------------------------------


def _response(rollout: Row, states: Sequence[Row], index: int) -> str:
    tokens = rollout.get("tokens")
    response = str(rollout.get("response") or "")
    if not isinstance(tokens, dict) or not tokens.get("ends"):
        return f"<div class=text>{''.join(_by_segment(rollout, index))}</div>"
    ends = [min(max(int(end), 0), len(response)) for end in tokens["ends"]]
    begins = [int(begin) for begin in tokens.get("begins") or [0, *ends[:-1]]]
    figures = {name: _figures(tokens.get(name), len(ends)) for name in TINTS}
    if not any(value is not None for value in figures["values"]):
        figures["values"] = values_of(states, begins)
    known = {name: values for name, values in figures.items() if any(v is not None for v in values)}
    pieces = list(_by_token(response, begins, ends, states, figures, index))
    data = escape(json.dumps(known, separators=(",", ":")))
    shown = f'<div class="text tokens" data-figures="{data}">{"".join(pieces)}</div>'
    first = TINTS[next(iter(known))] if known else ""
    return f"<div class=tinted data-tint='{first}'>{_switch(known, index)}{shown}</div>"


def _figures(values: Any, count: int) -> list[float | None]:
    found: list[float | None] = [None] * count
    if isinstance(values, list):
        for at, value in enumerate(values[:count]):
            known = number(value)
            found[at] = None if math.isnan(known) else known
    return found


def values_of(states: Sequence[Row], begins: Sequence[int]) -> list[float | None]:
    """Of each token, by where it begins in the response, the value of the state before its segment. [T]"""
    found: list[float | None] = [None] * len(begins)
    cuts = [(number(s.get("cut_text")), number(s.get("used"))) for s in states]
    for cut, value in sorted(pair for pair in cuts if not math.isnan(pair[0])):
        for at, begin in enumerate(begins):
            if begin >= cut:
                found[at] = None if math.isnan(value) else value
    return found


def _switch(known: Iterable[str], index: int) -> str:
    """What tokens are coloured by."""
    buttons = "".join(
        f"<label><input type=radio name=tint{index} value={word}{' checked' * (n == 0)}>{word}</label>"
        for n, word in enumerate(TINTS[key] for key in known)
    )
    return f"<fieldset class=tint><legend class=soft>colour</legend>{buttons}</fieldset>" if buttons else ""


def _by_token(
    response: str,
    begins: Sequence[int],
    ends: Sequence[int],
    states: Sequence[Row],
    figures: dict[str, list[float | None]],
    index: int,
) -> Iterator[str]:
    """Chips, tokens and, as plain text, what lies between them: what others said in a conversation."""
    chips = [(number(s.get("cut_text")), chip(f"r{index}s{n}", s)) for n, s in enumerate(states)]
    chips = sorted((0 if math.isnan(cut) else int(cut), made) for cut, made in chips)
    most = max((abs(a) for a in figures["advantages"] if a is not None), default=0.0)
    done = 0
    for at, (begin, end) in enumerate(zip(begins, ends, strict=False)):
        yield _others(response[done:begin])
        while chips and chips[0][0] <= begin:
            yield chips.pop(0)[1]
        names = [
            _level("a", figures["advantages"][at], most),
            _level("v", _centred(figures["values"][at]), 0.5),
            _level("p", figures["logprobs"][at], 5.0),
        ]
        kinds = " ".join(["t", *filter(None, names)])
        done = max(begin, end)
        yield f"<span class='{kinds}' data-i={at}>{escape(response[begin:done])}</span>"
    yield _others(response[done:])
    yield from (made for _, made in chips)


def _others(text: str) -> str:
    """Text that has no figures: others wrote it, or it is beyond the tokens that have."""
    return f"<span class=soft>{escape(text)}</span>" if text else ""


def _centred(value: float | None) -> float | None:
    return None if value is None else value - 0.5


def _level(kind: str, value: float | None, most: float) -> str:
    """A class for a figure between -most and most: kind, then its sign and one of LEVELS."""
    if value is None or not most:
        return ""
    level = min(LEVELS, round(LEVELS * abs(value) / most))
    return f"{kind}{'m' if value < 0 else ''}{level}" if level else ""


def _by_segment(rollout: Row, index: int) -> Iterator[str]:
    """Of rows of earlier versions, which have no figures of tokens."""
    for number_, (state, text) in enumerate(segments(rollout)):
        yield (chip(f"r{index}s{number_}", state) if state is not None else "") + escape(text)


# --- the critic ----------------------------------------------------------------------------------


def asked(rollout: Row, state: Row) -> str | None:
    """What the critic was asked at a state; None where it was not, or the file is of an earlier version."""
    whole, kept = rollout.get("judge_prompt"), state.get("prompt")
    if not isinstance(whole, str) or not isinstance(kept, list) or len(kept) != 2:
        return None
    return whole[: int(kept[0])] + str(kept[1])


def _critic(rollout: Row, states: Sequence[Row], index: int) -> str:
    if not states:
        return ""
    notes = "".join(_state(rollout, state, f"r{index}s{n}") for n, state in enumerate(states))
    return f"<details><summary>The critic, state by state ({len(states)})</summary>{notes}</details>"


def _state(rollout: Row, state: Row, anchor: str) -> str:
    said = f"not asked: {state['unasked']}" if state.get("unasked") else str(state.get("text") or "(nothing)")
    prompt = asked(rollout, state)
    question = ""
    if prompt is not None:
        question = f"<details><summary>What it was asked</summary><pre>{escape(prompt)}</pre></details>"
    return (
        f"<div class=state id={anchor}>{chip('', state)}<div class=text>{escape(said)}</div>{question}</div>"
    )
