"""`bank score` without a model: what is kept, gone on with, refused and put in another's place."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from banks import kept_bank

from genac_megatron.errors import InputError, StopRequested
from genac_megatron.evaluation import plots, scoring
from genac_megatron.evaluation.bank import Bank, BankState, Valued
from genac_megatron.evaluation.scoring import ScoreOptions, Scoring, at_once, score_plan
from genac_megatron.recipe.loader import load_recipe
from genac_megatron.recipe.schema import Recipe

CRITIC = {"weights": "ab", "tokenizer": "cd"}
ALL = (0, 2, 3, 4, 5)  # the bank's prompts that are judged
SAVE = plots.save


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "from_first", lambda act: act())
    monkeypatch.setattr(plots, "save", lambda path, *_: path.write_text("a plot"))


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return load_recipe("recipes/quickstart.yaml")


@pytest.fixture
def bank(tmp_path: Path) -> Bank:
    return kept_bank(tmp_path / "bank")


class Critic:
    """A value for each state, by the state alone, and what it was asked; `stop` is raised at that call."""

    def __init__(self, shift: float = 0.0, stop: int = -1) -> None:
        self.shift, self.stop, self.asked = shift, stop, list[int]()

    def __call__(self, states: Sequence[BankState]) -> list[Valued]:
        if len(self.asked) == self.stop:
            raise KeyboardInterrupt
        self.asked.append(len({state.prompt.id for state in states}))
        return [self.value(state) for state in states]

    def value(self, state: BankState) -> Valued:
        place = state.state.cut + int(state.prompt.id.split("/")[1])
        if place % 5 == 4:
            return Valued(None, 3, "no score")
        return Valued(min(1.0, place / 20 + self.shift), 4, f"word {place}\ud83d")


def run_of(recipe: Recipe, asked_to_stop: Callable[[], bool] = lambda: False, ranks: int = 1) -> Any:
    return SimpleNamespace(
        recipe=recipe,
        world=SimpleNamespace(rank=0, size=ranks),
        critic=SimpleNamespace(shape=SimpleNamespace(value=False)),
        progress=SimpleNamespace(stage=lambda *_: None, step=lambda *_: None),
        phase=lambda _: nullcontext(),
        together=lambda act: act(),
        stop_requested=asked_to_stop,
    )


def score(
    recipe: Recipe, bank: Bank, critic: Critic, weights: str = "ab", run: Any = None, **options: Any
) -> Path:
    """One `bank score`, in chunks of two prompts; its folder."""
    given = ScoreOptions((bank.folder,), name="c", chunk=2, draws=20, **options)
    plan = score_plan(recipe, bank, {**CRITIC, "weights": weights}, False)
    made = Scoring(run or run_of(recipe), bank, critic, plan, {"weights": weights}, "c", given)
    made.score(made.begin())
    return made.parts.folder


def test_rows_are_those_of_all_states_asked_at_once(
    recipe: Recipe, bank: Bank, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plots, "save", SAVE)
    critic = Critic()
    folder = score(recipe, bank, critic)
    assert critic.asked == [2, 2, 1]
    rows = [json.loads(line) for line in (folder / "states.jsonl").read_text().splitlines()]
    values = Critic()(bank.states)
    assert [row["value"] for row in rows] == [valued.value for valued in values]
    assert [row["tokens"] for row in rows] == [valued.tokens for valued in values]
    assert [row["monte_carlo"] for row in rows] == [state.value for state in bank.states]
    assert [(row["prompt"], row["response"], row["index"]) for row in rows] == [
        (state.prompt.id, state.response, state.state.index) for state in bank.states
    ]
    assert rows[2]["text"] == "word 8\ufffd", "no file holds half a pair"
    assert all(row["used"] is not None for row in rows)
    report = json.loads((folder / "scores.json").read_text())
    assert (report["prompts"], report["states"]) == (len(ALL), len(bank.states))
    states = zip(rows, bank.states, strict=True)
    noise = [s.value * (1 - s.value) / (len(s.draws) - 1) for s in bank.states]
    errors = [(row["used"] - state.value) ** 2 for row, state in states]
    mse = sum(error - off for error, off in zip(errors, noise, strict=True)) / len(errors)
    assert report["figures"]["mse"]["value"] == pytest.approx(mse)
    for name in ("reliability.png", "values.png"):
        assert (folder / name).stat().st_size > 5000


def test_what_was_killed_goes_on_after_the_last_chunk_to_the_same_files(
    recipe: Recipe, bank: Bank, tmp_path: Path
) -> None:
    whole = score(recipe, kept_bank(tmp_path / "other"), Critic())
    with pytest.raises(KeyboardInterrupt):
        score(recipe, bank, Critic(stop=1))
    assert not (bank.folder / "scores" / "c" / "scores.json").exists()
    critic = Critic()
    folder = score(recipe, bank, critic)
    assert critic.asked == [2, 1], "the first chunk was kept"
    for name in ("states.jsonl", "manifest.json", "scores.json"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes()
    assert not (folder / "parts").exists()


def test_a_chunk_of_which_rows_were_lost_is_asked_again_whole(recipe: Recipe, bank: Bank) -> None:
    with pytest.raises(KeyboardInterrupt):
        score(recipe, bank, Critic(stop=2))
    [kept] = (bank.folder / "scores" / "c" / "parts").glob("*.jsonl")
    lines = kept.read_text().splitlines(keepends=True)
    kept.write_text("".join(lines[:-1]) + lines[-1][:9])  # killed inside a write
    critic = Critic()
    score(recipe, bank, critic)
    assert critic.asked == [2, 1]


def test_a_stop_that_was_asked_for_comes_after_the_chunk(recipe: Recipe, bank: Bank) -> None:
    critic = Critic()
    with pytest.raises(StopRequested, match="2 of 5 prompts"):
        score(recipe, bank, critic, run=run_of(recipe, lambda: True))
    assert critic.asked == [2]
    again = Critic()
    score(recipe, bank, again)
    assert again.asked == [2, 1]


def test_finished_scores_are_written_again_without_asking(recipe: Recipe, bank: Bank) -> None:
    """So a study whose run was made anew to the same weights has scores that are newer than the run."""
    folder = score(recipe, bank, Critic())
    report = (folder / "scores.json").read_bytes()
    (folder / "scores.json").unlink()  # as after a kill between the rows and the figures
    critic = Critic()
    score(recipe, bank, critic)
    assert critic.asked == []
    assert (folder / "scores.json").read_bytes() == report


def judged_by(recipe: Recipe, **changes: Any) -> Recipe:
    return recipe.model_copy(update={"judging": recipe.judging.model_copy(update=changes)})


def test_other_scores_of_the_name_are_refused_until_told(recipe: Recipe, bank: Bank) -> None:
    folder = score(recipe, bank, Critic())
    before = (folder / "scores.json").read_bytes()
    others = [
        ("critic", partial(score, recipe, weights="ef")),
        ("judging", partial(score, judged_by(recipe, icc="off"))),
        ("seed", partial(score, recipe.model_copy(update={"seed": 9}))),
    ]
    for what, other in others:
        with pytest.raises(InputError, match=f"another {what}") as error:
            other(bank=bank, critic=Critic())
        assert "add --again" in str(error.value)
        assert "another --name" in str(error.value)
    told = replace(bank, manifest={**bank.manifest, "p_bar": 0.9})
    with pytest.raises(InputError, match="another told"):
        score(recipe, told, Critic())
    assert (folder / "scores.json").read_bytes() == before
    critic = Critic(0.5)
    score(recipe, bank, critic, weights="ef", again=True)
    assert critic.asked == [2, 2, 1]
    assert json.loads((folder / "scores.json").read_text())["critic"] == {"weights": "ef"}
    assert (folder / "scores.json").read_bytes() != before


def test_again_goes_on_with_its_own_and_keeps_no_figures_of_what_it_replaces(
    recipe: Recipe, bank: Bank
) -> None:
    folder = score(recipe, bank, Critic())
    with pytest.raises(KeyboardInterrupt):
        score(recipe, bank, Critic(stop=1), weights="ef", again=True)
    assert not (folder / "scores.json").exists()
    critic = Critic()
    score(recipe, bank, critic, weights="ef", again=True)
    assert critic.asked == [2, 1], "killed and given again, it does not begin anew"


def test_scores_of_an_earlier_version_and_damaged_ones_are_told(recipe: Recipe, bank: Bank) -> None:
    folder = score(recipe, bank, Critic())
    lines = (folder / "states.jsonl").read_text().splitlines(keepends=True)
    (folder / "states.jsonl").write_text("".join(lines[1:]))
    with pytest.raises(InputError, match="not the file that its manifest names"):
        score(recipe, bank, Critic())
    for name in ("plan.json", "manifest.json"):
        (folder / name).unlink()
    with pytest.raises(InputError, match="an earlier version made them") as error:
        score(recipe, bank, Critic())
    assert "add --again" in str(error.value)
    critic = Critic()
    score(recipe, bank, critic, again=True)
    assert critic.asked == [2, 2, 1]


def test_the_templates_text_is_part_of_the_plan(recipe: Recipe, bank: Bank, tmp_path: Path) -> None:
    text = "{actor} {p_bar} {problem} {partial} {used} of {limit}"
    plans = []
    for number, more in enumerate(("", "?")):
        path = tmp_path / f"{number}.txt"
        path.write_text(text + more)
        plans.append(score_plan(judged_by(recipe, template=str(path)), bank, CRITIC, False))
    assert plans[0]["judging"] != plans[1]["judging"]
    assert score_plan(recipe, bank, CRITIC, True)["judging"] is None


@pytest.mark.parametrize(("ranks", "prompts"), [(1, 73), (3, 219)])
def test_a_chunk_fills_the_engines_several_times_over(
    recipe: Recipe, bank: Bank, ranks: int, prompts: int
) -> None:
    """128 requests at a time on every rank, seven states a prompt."""
    assert recipe.roles["critic"].engine.max_batch == 128
    assert len(bank.states) == 7 * len(ALL)
    assert at_once(run_of(recipe, ranks=ranks), bank) == prompts
    scalar = run_of(recipe)
    scalar.critic.shape.value = True
    assert at_once(scalar, bank) == len(ALL)
