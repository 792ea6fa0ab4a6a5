"""Bands: what a recipe expects of a run early on (`stages.N.expect`), and what it means to be outside.

One wording for the run that leaves a band and for its report. A figure that is missing is told, too.
"""

from __future__ import annotations

import difflib
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from genac_megatron.recipe.stages import Band

Row = Mapping[str, Any]
Words = tuple[str, str]  # what it usually means, what usually helps

LOOK = "look at the report's rollouts (genac report RUN)"
FORM = f"{LOOK}: does the answer stand in the form that the task asks for (task.answer_forms, instruction)"
SHORTER = "a thinking model without thinking (model.chat_template_kwargs), a larger max_new_tokens"
LOWER = "a lower learning rate, a longer warm-up (optimizer.warmup_steps)"
ENGINE = "trainer and engine disagree about the same tokens: `genac parity ROLE RECIPE` says where"
GUESSING = (
    "the critic tells good from bad no better than one number for all would",
    "more steps of reinforce before the actor trains; more states (judging.states), a higher critic's rate",
)

# By figure: below its band, above it; None: nothing usual.
KNOWN: dict[str, tuple[Words | None, Words | None]] = {
    "rollout/outcome_mean": (
        ("hardly any response is right: the task is too hard, or right answers are not recognised", FORM),
        ("the actor solves nearly all: little is left to learn", "harder data (task.filter.pass_rate)"),
    ),
    "rollout/mixed_groups": (
        ("most prompts are always or never solved: their responses teach next to nothing",
         "data by the actor's own rate (task.filter.pass_rate), more samples"),
        None,
    ),
    "rollout/truncated": (None, ("responses are cut off, and count as wrong without being so", SHORTER)),
    "rollout/length_mean": (
        ("responses have become short: the actor has found a way around the work", f"{LOOK}; {LOWER}"),
        ("responses run away in length", f"{LOOK}; stages.N.overlong, {LOWER}"),
    ),
    "judge/parse_rate": (
        ("the critic writes no score that can be read: values are fallbacks",
         f"{LOOK}; judging.max_new_tokens where judge/truncated is high, else a longer SFT of the critic"),
        None,
    ),
    "judge/truncated": (None, ("the critic is cut off before it says a score",
                               f"judging.max_new_tokens, or {SHORTER}")),
    "judge/brier / judge/brier_constant": (None, GUESSING),
    "judge/score_entropy": (
        ("the critic's scores have collapsed onto one or two numbers",
         "an earlier checkpoint with a lower critic's rate; a mixed task (its outcomes may all be alike)"),
        None,
    ),
    "advantage/gap": (
        ("wrong responses get more than right ones: the actor is taught what fails",
         "train_critic alone for a while (a reinforce stage), advantage.lam: 1 or lam_gate"),
        None,
    ),
    "actor/entropy": (
        ("the actor's sampling has collapsed: it explores no more",
         "actor_loss.clip_high 0.28 (DAPO), a lower learning rate"),
        ("the actor's distribution dissolves", LOWER),
    ),
    "actor/grad_norm": (None, ("gradients are far larger than usual", LOWER)),
    "critic/grad_norm": (None, ("gradients are far larger than usual", LOWER)),
    "critic/nll": (None, ("the SFT does not learn", "a higher learning rate; are its traces of one form?")),
    "actor/clip_share": (None, ("steps are larger than the clip allows", LOWER)),
    "actor/kl_behaviour": (None, (ENGINE, "FP8 off on one side, engine.dtype, overlap off")),
    "parity/actor_p99": (None, (ENGINE, "engine.dtype and training.dtype alike, FP8 off on one side")),
    "parity/critic_p99": (None, (ENGINE, "engine.dtype and training.dtype alike, FP8 off on one side")),
    "eval/critic_ranking_prompt": (
        ("of two responses to one prompt the critic does not know the better one", GUESSING[1]), None,
    ),
    "eval/critic_auc": ((GUESSING[0], GUESSING[1]), None),
    "eval/critic_parse_rate": (("the critic writes no score that can be read",
                                "a longer SFT of the critic, judging.max_new_tokens"), None),
    "eval/accuracy": (("the actor has got worse on held-out prompts", f"{LOOK}; {LOWER}"), None),
}  # fmt: skip


@dataclass(frozen=True)
class Left:
    """A band that a run has left."""

    place: int  # in the stage's `expect`
    step: int
    what: str
    means: str
    helps: str

    @property
    def text(self) -> str:
        """In one line."""
        means = f"; usually: {self.means}" if self.means else ""
        helps = f"; what helps: {self.helps}" if self.helps else ""
        return f"{self.what}{means}{helps}"


def figure_of(row: Row, name: str) -> float:
    """A row's figure, or A / B of two; NaN where there is none."""
    parts = [row.get(part) for part in name.split(" / ")]
    numbers = [float(part) for part in parts if isinstance(part, int | float)]
    if len(numbers) != len(parts):
        return math.nan
    value, *by = numbers
    for one in by:
        value = value / one if one else math.nan
    return value


def outside(band: Band, place: int, rows: Sequence[Row]) -> Left | None:
    """What a band says of a stage's rows up to now, after the last one's step; None where all is well, or it
    is not looked at then.
    """
    step = int(rows[-1]["step"])
    if not band.step <= step <= (band.until or band.step):
        return None
    seen = _newest(band, rows)
    if not seen:
        return Left(place, step, f"step {step}: there is no {band.figure}", "", _nearest(band.figure, rows))
    mean = math.fsum(seen) / len(seen)
    low = band.low is not None and not mean >= band.low
    high = band.high is not None and not mean <= band.high
    if not low and not high:
        return None
    bound = band.low if low else band.high
    of = f" (mean of {len(seen)})" if len(seen) > 1 else ""
    what = f"step {step}: {band.figure} {mean:.4g}{of} is {'below' if low else 'above'} {bound:g}"
    words = (KNOWN.get(band.figure) or (None, None))[0 if low else 1] or ("", "")
    return Left(place, step, what, words[0], band.helps or words[1])


class Watch:
    """A stage's bands, row by row.

    A band that is left is told once. One that ends the run looks again, once it has `over` values of after
    that: whoever goes on has changed something.
    """

    def __init__(self, expect: Sequence[Band]) -> None:
        self._expect = expect
        self._rows: list[Row] = []
        self._left: dict[int, int] = {}  # by place: how many rows there were

    def look(self, row: Row) -> list[Left]:
        """The bands that the stage has left with its next row, in order of places."""
        self._rows.append(row)
        found = []
        for place, band in enumerate(self._expect):
            rows = self._rows
            if (before := self._left.get(place)) is not None:
                rows = rows[before:]
                if band.action == "warn" or len(_newest(band, rows)) < band.over:
                    continue
            if (left := outside(band, place, rows)) is not None:
                self._left[place] = len(self._rows)
                found.append(left)
        return found


def all_outside(expect: Sequence[Band], rows: Iterable[Row]) -> list[Left]:
    """Of a stage's rows the first time that each band is left, in order of steps."""
    watch = Watch(expect)
    found: dict[int, Left] = {}
    for row in rows:
        for left in watch.look(row):
            found.setdefault(left.place, left)
    return sorted(found.values(), key=lambda left: (left.step, left.place))


def is_step(row: Row) -> bool:
    """Whether a row is of a trained step: those before and after a stage's steps have no learning rate."""
    step = row.get("step")
    return (
        isinstance(step, int | float) and step > 0 and any(key.endswith(("/lr", "/skipped")) for key in row)
    )


def _newest(band: Band, rows: Sequence[Row]) -> list[float]:
    """The last `over` values of a band's figure, newest first; fewer where there are no more."""
    values = (figure_of(row, band.figure) for row in reversed(rows))
    return list(itertools.islice((value for value in values if not math.isnan(value)), band.over))


def _nearest(name: str, rows: Sequence[Row]) -> str:
    """Figures of like names that the rows have."""
    known = sorted({key for row in rows for key in row if "/" in key})
    near = [one for part in name.split(" / ") for one in difflib.get_close_matches(part, known, 2)]
    return f"the stage's rows have {', '.join(dict.fromkeys(near))}" if near else "docs/figures.md has names"
