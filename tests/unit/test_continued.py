"""Conversations that go on from a state: the environment is brought back, and nothing else is otherwise.

The actor's engine is `Scripted` here, which says what it is told; environments have processes of their own.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from genac_megatron.critic.icc import IccState
from genac_megatron.critic.states import cut_states, state_text
from genac_megatron.critic.trace_rows import as_state, shown_partial, state_row, whole_partial
from genac_megatron.environments import Environments, make_environment
from genac_megatron.errors import InputError
from genac_megatron.escaping import Transcript
from genac_megatron.evaluation.bank import BankPrompt, BankState, from_row, no_response, to_row
from genac_megatron.recipe.environments import EnvironmentConfig
from genac_megatron.recipe.schema import RolloutConfig, StatesConfig
from genac_megatron.recipe.tasks import LockTask
from genac_megatron.records import Completion, Prompt, Request, Rollout, State
from genac_megatron.stages.conversations import begun_environment
from genac_megatron.stages.exact_error import error_figures, turns_before
from genac_megatron.stages.rollouts import Generator, continue_states
from genac_megatron.tasks import make_task
from tests.unit.test_conversations import TINY

LOCK = LockTask(kind="lock", symbols=2, min_length=2, max_length=2, turns=6)
GAMES = """
import time
class Adding:  # what it is worth is what was said, summed
    def reset(self, prompt, seed):
        self.sum, self.count = 0, 0
    def step(self, turn):
        self.sum += len(turn)
        self.count += 1
        given = {"outcome": (self.sum % 7) / 7} if self.count == 2 else {}
        return {"observation": f"sum {self.sum}", "done": self.count == 3, "parts": {"n": 1}, **given}
class Fickle(Adding):
    def step(self, turn):
        return {"observation": str(time.monotonic())}
class Lasting(Adding):
    replays = False
class Later(Adding):  # otherwise from its second answer on
    def step(self, turn):
        self.count += 1
        return {"observation": str(time.monotonic() if self.count == 2 else 0), "outcome": 0.5,
                "done": self.count == 4}
"""


class Scripted:
    """An engine that says the ids it is given, in order; beyond them the letter a."""

    inline = False

    def __init__(self, script: Sequence[Sequence[int]]) -> None:
        self.script, self.asked = [tuple(ids) for ids in script], list[Request]()

    def deal(self, places: Any) -> None:
        pass

    async def complete(self, request: Request) -> Completion:
        self.asked.append(request)
        ids = self.script.pop(0) if self.script else (*TINY.encode("a"), TINY.eos_token_id)
        kept = ids[: request.params.max_new_tokens]
        return Completion(kept, (-1.0,) * len(kept), "stop" if kept == ids else "length")


def generator(engine: Scripted, environment: Environments, seed: int = 1) -> Generator:
    task = SimpleNamespace(reasoning_tags=None, late=0, score_beside=None)
    config = RolloutConfig(max_new_tokens=300)
    made: Any = (engine, TINY, task, config, (TINY.eos_token_id,), (seed,))
    return Generator(*made, environment=environment)


def said(*texts: str) -> list[tuple[int, ...]]:
    return [(*TINY.encode(text), TINY.eos_token_id) for text in texts]


@pytest.fixture(scope="module")
def lock() -> Iterator[tuple[Environments, Prompt]]:
    task = make_task(LOCK, TINY, seed=3)
    environment = make_environment(EnvironmentConfig(kind="task", turns=6), LOCK)
    yield environment, task.prompt("train", 0)
    environment.close()


def played(environment: Environments, prompt: Prompt, turns: list[tuple[int, ...]]) -> Rollout:
    made = generator(Scripted(turns), environment)
    return asyncio.run(made.group(prompt, range(1))).rollouts[0]


def wrong_then_right(prompt: Prompt) -> list[str]:
    first, second = prompt.reference
    other = {"a": "b", "b": "a"}
    return [other[first], first, other[second], first, second]


def rest_of(state: State) -> list[tuple[int, ...]]:
    """What the actor said from a state on."""
    own = state.rollout.completion
    return [own.ids[max(begin, state.cut) : end] for begin, end in own.ranges if end > state.cut]


def again(environment: Environments, state: State) -> Rollout:
    """The state's conversation to its end, as it was the first time; by a generator of another seed."""
    engine = Scripted(rest_of(state))
    whole = asyncio.run(generator(engine, environment, seed=2).goes_on(state, f"k{state.cut}"))
    own = state.rollout
    assert engine.asked[0].ids == (*own.prompt.ids, *own.completion.ids[: state.cut])
    return whole


BETWEEN = StatesConfig(cutter="turns", min_segment=1, max_states=9)
INSIDE = StatesConfig(cutter="fixed", fixed_length=1, min_segment=1, max_states=64)


@pytest.mark.parametrize("config", [BETWEEN, INSIDE], ids=["between", "inside"])
def test_the_same_turns_from_any_state_are_the_same_conversation(
    lock: tuple[Environments, Prompt], config: StatesConfig
) -> None:
    environment, prompt = lock
    own = played(environment, prompt, said(*wrong_then_right(prompt)))
    assert own.outcome == 1.0
    states = cut_states(replace_limit(own), TINY, config)
    assert len(states) >= 5
    for state in states:
        whole = again(environment, state)
        assert whole.completion.ids == own.completion.ids
        assert whole.completion.ranges == own.completion.ranges
        assert whole.episode is not None
        assert own.episode is not None
        assert whole.episode.turns == own.episode.turns
        assert whole.episode.answers == own.episode.answers
        assert (whole.episode.ended, whole.episode.outcome) == ("done", 1.0)
        assert whole.episode.seed == own.episode.seed


def replace_limit(rollout: Rollout) -> Rollout:
    return replace(rollout, limit=None)


def test_continuations_are_worth_what_the_environment_says(lock: tuple[Environments, Prompt]) -> None:
    """From the state before the last symbol: a player who only says a opens it where that is the symbol."""
    environment, prompt = lock
    own = played(environment, prompt, said(*wrong_then_right(prompt)))
    states = cut_states(replace_limit(own), TINY, BETWEEN)
    engine = Scripted([])
    draws = continue_states(generator(engine, environment, seed=5), states[-1:], 3)
    assert draws == [[float(prompt.reference[-1] == "a")] * 3]
    first = [request.seed for request in engine.asked if request.ids == engine.asked[0].ids]
    assert len(set(first)) == len(first) == 3, "each draw has a seed of its own"


@pytest.fixture(scope="module")
def games(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("games") / "games.py"
    path.write_text(GAMES)
    return path


def own_game(path: Path, name: str) -> Environments:
    config = EnvironmentConfig.model_validate({"kind": "python", "python": f"{path}:{name}", "step_s": 30.0})
    return make_environment(config, LOCK)


def test_what_was_given_before_the_state_still_counts(games: Path) -> None:
    """An outcome that is named once, before the state, and never again."""
    environment = own_game(games, "Adding")
    prompt = Prompt("train/0", ({"role": "user", "content": "go"},), "go", "", tuple(TINY.encode("go")))
    try:
        own = played(environment, prompt, said("ab", "abc", "b"))
        states = cut_states(replace_limit(own), TINY, BETWEEN)
        assert [turns_before(state) for state in states] == [0, 1, 2]
        assert again(environment, states[2]).episode.outcome == own.outcome == 5 / 7  # type: ignore[union-attr]
        draws = continue_states(generator(Scripted(said("c")), environment), states[2:], 2)
        assert draws == [[5 / 7, 5 / 7]]
    finally:
        environment.close()


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("Fickle", "answers the same turns otherwise"),
        ("Lasting", r"cannot be brought back .*replays is False"),
    ],
)
def test_what_cannot_be_brought_back_is_refused_before_anything_is_sampled(
    games: Path, name: str, why: str
) -> None:
    environment = own_game(games, name)
    prompt = Prompt("train/0", ({"role": "user", "content": "go"},), "go", "", tuple(TINY.encode("go")))
    engine = Scripted([])
    try:
        with pytest.raises(InputError, match=f"a Monte-Carlo value brings .*{why}"):
            continue_states(generator(engine, environment), [State(no_response(prompt, 1), 0, 0, 0)], 2)
        assert not engine.asked
    finally:
        environment.close()


def test_a_run_that_would_continue_is_refused_before_it_begins(games: Path) -> None:
    config = EnvironmentConfig.model_validate(
        {"kind": "python", "python": f"{games}:Lasting", "step_s": 30.0}
    )
    evaluation, task = SimpleNamespace(mc_states=4), make_task(LOCK, TINY, seed=3)
    recipe: Any = SimpleNamespace(environment=config, evaluation=evaluation, task=LOCK, stages=[], seed=3)
    recipe.roles = ("actor", "critic")
    with pytest.raises(InputError, match="a Monte-Carlo value brings conversations back by their turns"):
        begun_environment(recipe, task, TINY, print)
    evaluation.mc_states = 0
    begun = begun_environment(recipe, task, TINY, print)
    assert begun is not None
    begun.close()


def test_so_is_what_turns_out_not_to_be_where_it_does(games: Path) -> None:
    environment = own_game(games, "Later")
    prompt = Prompt("train/0", ({"role": "user", "content": "go"},), "go", "", tuple(TINY.encode("go")))
    try:
        own = played(environment, prompt, said("a", "b", "c", "d"))
        states = cut_states(replace_limit(own), TINY, BETWEEN)
        with pytest.raises(InputError, match="answers the same turns otherwise"):
            continue_states(generator(Scripted([]), environment), states[3:], 1)
    finally:
        environment.close()


def test_a_banks_rows_keep_conversations(lock: tuple[Environments, Prompt]) -> None:
    environment, prompt = lock
    own = played(environment, prompt, said(*wrong_then_right(prompt)))
    assert own.episode is not None
    states = [BankState(State(no_response(own.prompt, own.episode.seed), 0, 0, 0), None, (1.0,))]
    states += [BankState(state, 0, (0.5,)) for state in cut_states(replace_limit(own), TINY, BETWEEN)[1:]]
    found = BankPrompt(own.prompt, (1.0,), None, (own,), tuple(states), own.episode.seed)
    read = from_row(json.loads(json.dumps(to_row(7, found))))
    assert read.seed == own.episode.seed
    for one, other in zip(read.states, found.states, strict=True):
        text = state_text(one.state, TINY)
        assert isinstance(text, Transcript)
        assert text == state_text(other.state, TINY)
        assert one.prompt.opening == own.prompt.opening
        assert one.prompt.success.endswith("(in at most 6 turns)")
    assert again(environment, read.states[3].state).completion.ids == own.completion.ids
    first = State(replace(read.states[0].state.rollout), 0, 0, 0)
    draws = continue_states(generator(Scripted([]), environment), [first], 1)
    assert draws == [[0.0]], "a alone does not open it"


def test_rows_of_traces_keep_what_was_before_a_state_and_nothing_after_it(
    lock: tuple[Environments, Prompt],
) -> None:
    environment, prompt = lock
    turns = wrong_then_right(prompt)
    own = played(environment, prompt, said(*turns[:-1], "secret", turns[-1]))
    for state in cut_states(replace_limit(own), TINY, INSIDE):
        row = json.loads(json.dumps(state_row(state, TINY, 12, "actor", IccState(0.5, 1), 300)))
        before = state_text(state, TINY)
        assert whole_partial(row) == before
        if "secret" not in before:
            assert "secret" not in json.dumps(row)
        shown = shown_partial(row)
        assert isinstance(shown, Transcript)
        assert shown == state_text(state, TINY, 12)
        found = as_state(row, prompt)
        assert found.rollout.prompt.opening == own.prompt.opening
        assert found.rollout.prompt.ids == own.prompt.ids
        assert state_text(found, TINY) == before
        if state.cut in (0, state.rollout.completion.ranges[2][0], state.rollout.completion.ranges[2][0] + 1):
            engine = Scripted(rest_of(state))
            whole = asyncio.run(generator(engine, environment, 9).goes_on(found, f"r{state.cut}"))
            assert whole.completion.ids == own.completion.ids


def test_a_prompt_comes_back_as_its_environment_began_it(lock: tuple[Environments, Prompt]) -> None:
    """In rows of traces and banks: the actor is shown the same, and the environment asked as it was."""
    environment, task_prompt = lock
    own = played(environment, task_prompt, said(*wrong_then_right(task_prompt)))
    rules = ({"role": "system", "content": "rules"}, *own.prompt.messages)
    begun = replace(own.prompt, messages=rules, tools=({"type": "function"},))
    assert begun.asked is task_prompt
    state = State(replace(own, prompt=begun), 0, 0, len(own.completion.ids))
    row = json.loads(json.dumps(state_row(state, TINY, 12, "actor", IccState(0.5, 1), 300)))
    bank = BankPrompt(begun, (1.0,), None, (state.rollout,), (BankState(state, 0, ()),), 1)
    kept = from_row(json.loads(json.dumps(to_row(0, bank))), begun).states[0].state
    for found in (as_state(row, task_prompt).rollout.prompt, kept.rollout.prompt):
        assert (found.messages, found.tools, found.ids) == (begun.messages, begun.tools, begun.ids)
        assert found.asked is task_prompt


def test_errors_against_exact_values_by_turn() -> None:
    rows = [(0, 0.5, 0.25), (1, 1.0, 0.5), (1, 0.0, 0.5), (3, 0.75, 0.75)]
    assert error_figures(rows) == {
        "exact_mse": pytest.approx((0.0625 + 0.25 + 0.25) / 4),
        "exact_mse_constant": pytest.approx((0.25**2 + 0.25**2) / 4),
        "exact_mse/turn_1": 0.0625,
        "exact_mse/turn_2": 0.25,
        "exact_mse/turn_4": 0.0,
    }
    assert error_figures([]) == {}
