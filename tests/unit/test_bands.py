"""Bands: what a run says where a figure is not as its recipe expects it early on."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest

from genac_megatron.errors import InputError
from genac_megatron.observe.bands import KNOWN, Watch, all_outside, figure_of, outside
from genac_megatron.recipe.estimate import describe
from genac_megatron.recipe.loader import load_recipe
from genac_megatron.recipe.schema import Band
from tests.warm import ROOT

RATIO = "judge/brier / judge/brier_constant"


def rows(*values: float | None, name: str = "rollout/outcome_mean") -> list[dict[str, Any]]:
    return [{"step": at, "actor/lr": 1e-6} | ({} if value is None else {name: value})
            for at, value in enumerate(values, start=1)]  # fmt: skip


def band(**keys: Any) -> Band:
    return Band(**{"figure": "rollout/outcome_mean", "step": 3, "over": 2, **keys})


@pytest.mark.parametrize(
    ("values", "keys", "said"),
    [
        ((0.9, 0.1, 0.2), {"low": 0.3}, r"step 3: rollout/outcome_mean 0\.15 \(mean of 2\) is below 0\.3"),
        ((0.9, 0.9, 0.2), {"low": 0.3}, None),  # the mean is above
        ((0.1, 0.9, 0.9), {"high": 0.5}, r"0\.9 \(mean of 2\) is above 0\.5"),
        ((0.1, 0.1), {"low": 0.3}, None),  # before its step
        ((0.9, 0.9, 0.9, 0.0, 0.0), {"low": 0.3}, None),  # after it
        ((0.9, 0.9, 0.9, 0.0, 0.0), {"low": 0.3, "until": 5}, "step 5: .*0 .* is below"),
        ((0.3, 0.3, 0.3), {"low": 0.3, "high": 0.3}, None),  # a bound is inside
        ((0.9, 0.1, None), {"low": 0.6}, r"0\.5 \(mean of 2\)"),  # a row without it
        ((math.nan, 0.1, math.nan), {"low": 0.6}, r"0\.1 is below"),
        ((None, None, None), {"low": 0.6}, "step 3: there is no rollout/outcome_mean"),
    ],
)
def test_a_band_is_judged_by_the_mean_of_its_last_values(
    values: tuple[float | None, ...], keys: dict[str, Any], said: str | None
) -> None:
    left = all_outside([band(**keys)], rows(*values))
    assert (said is None) == (left == [])
    if said is not None:
        assert re.search(said, left[0].what)


def test_a_known_figure_says_what_it_means_and_helps_and_a_recipe_may_say_it_itself() -> None:
    low = outside(band(low=0.3), 0, rows(0.0, 0.0, 0.0))
    assert low is not None
    assert "right answers are not recognised" in low.text
    assert "task.answer_forms" in low.text
    own = outside(band(low=0.3, helps="ask Ada"), 0, rows(0.0, 0.0, 0.0))
    assert own is not None
    assert own.text.endswith("what helps: ask Ada")
    strange = outside(band(figure="rollout/outcome_men", low=0.3), 0, rows(0.0, 0.0, 0.0))
    assert strange is not None
    assert "the stage's rows have rollout/outcome_mean" in strange.text


def test_a_ratio_of_two_figures() -> None:
    row = {"judge/brier": 0.3, "judge/brier_constant": 0.2}
    assert figure_of(row, RATIO) == pytest.approx(1.5)
    assert math.isnan(figure_of({**row, "judge/brier_constant": 0.0}, RATIO))
    assert math.isnan(figure_of({"judge/brier": 0.3}, RATIO))
    left = outside(band(figure=RATIO, high=1.0), 0, [{**row, "step": 3}])
    assert left is not None
    assert "no better than one number" in left.text


def test_each_band_is_told_once_in_the_order_of_steps() -> None:
    expect = [band(low=0.5, until=5), band(low=0.5, step=1, over=1)]
    found = all_outside(expect, rows(0.1, 0.9, 0.1, 0.1, 0.1))
    assert [(left.place, left.step) for left in found] == [(1, 1), (0, 4)]


def watched(expect: list[Band], before: list[Any], after: list[Any]) -> list[str]:
    """What is said of the rows after a resume."""
    watch = Watch(expect)
    for row in before:
        watch.look(row)
    return [left.what for row in after for left in watch.look(row)]


def test_a_resumed_stage_is_judged_by_the_rows_of_before_too() -> None:
    evaluated = rows(None, None, 0.9, None, None, None)  # between two evaluations
    assert watched([band(low=0.5, step=3, until=9, action="stop")], evaluated[:4], evaluated[4:]) == []
    (said,) = watched([band(low=0.5, step=4, over=4)], rows(0.3, 0.3, 0.3), rows(0.3, 0.3, 0.3, 0.9)[3:])
    assert said.startswith("step 4: rollout/outcome_mean 0.45 (mean of 4)")


def test_a_resumed_stage_says_nothing_twice() -> None:
    low = rows(*[0.1] * 9)
    assert watched([band(low=0.5, until=9)], low[:3], low[3:]) == []


def test_a_band_that_has_ended_the_run_waits_for_as_many_values_again() -> None:
    stop, low = band(low=0.5, until=9, action="stop"), rows(*[0.1] * 9)
    assert watched([stop], low[:3], low[3:4]) == []
    assert [said[:7] for said in watched([stop], low[:3], low[3:5])] == ["step 5:"]
    assert watched([stop], low[:5], low[5:6]) == [], "nor after the second end"
    assert watched([stop], low[:3], rows(*[0.1] * 4, 0.95, 0.9)[3:]) == [], "by values of after it alone"
    assert [(left.place, left.step) for left in all_outside([stop], low)] == [(0, 3)]


def test_known_figures_are_written_by_runs() -> None:
    """By docs/figures.md, which a test holds to the code; ROLE stands for both roles there."""
    page = (ROOT / "docs" / "figures.md").read_text()
    for name in KNOWN:
        for part in name.split(" / "):
            group, figure = part.split("/")
            roles = (
                part,
                re.sub("^(actor|critic)/", "ROLE/", part),
                re.sub("/(actor|critic)_", "/ROLE_", part),
            )
            told = any(f"`{one}`" in page for one in roles)
            assert told or (group == "eval" and f"`{figure.removeprefix('critic_')}`" in page), part


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ("figure: a/b", "neither low nor high"),
        ("figure: a/b, low: 2, high: 1", "low 2 above high 1"),
        ("figure: a/b, low: 1, step: 5, until: 4", "until 4 before step 5"),
    ],
)
def test_a_band_without_a_sense_is_refused_by_its_place(keys: str, said: str) -> None:
    with pytest.raises(InputError, match=said) as raised:
        load_recipe(ROOT / "recipes" / "quickstart.yaml", [f"stages.ppo.expect=[{{{keys}}}]"])
    assert "stages" in str(raised.value)


def test_a_dry_run_says_what_is_expected_and_what_is_never_looked_at() -> None:
    expect = "[{figure: a/b, low: 1, step: 5, until: 9}, {figure: c/d, high: 2, step: 99, action: stop}]"
    shown = describe(load_recipe(ROOT / "recipes" / "quickstart.yaml", [f"stages.ppo.expect={expect}"]))
    assert "expects a/b at least 1 after step 5 to 9\n" in shown
    assert "expects c/d at most 2 after step 99, or ends (never looked at: the stage has 20 steps)" in shown
