"""Environments of verifiers and textarena, the packages themselves: played, refused by name, trained on.

They play under an interpreter of their own, GENAC_ENVIRONMENTS_PYTHON (`make test-e2e` builds it).
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from genac_megatron.environments.base import Checked
from genac_megatron.environments.host import Answer, Host, Job, digest
from genac_megatron.environments.theirs import TheirEpisode
from genac_megatron.errors import InputError
from genac_megatron.recipe.tasks import PackageTask, TextArenaTask, VerifiersTask
from genac_megatron.records import Prompt
from genac_megatron.tasks import Task, make_task
from genac_megatron.tasks.theirs.process import PYTHON_VARIABLE, Failed, TheirProcess, theirs_of
from genac_megatron.tasks.theirs.task import package_task
from tests.e2e.test_run import rows
from tests.warm import genac

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ROOT / "recipes" / "environments"
# Verifiers' classes with a few lines around them, as in a module of an environment.
OWN = '''
import time
import verifiers as vf
from datasets import Dataset

ROWS = [{"question": f"{n} + {n}?", "answer": str(2 * n)} for n in range(8)]


def add(a: int, b: int) -> int:
    """Add two numbers.

    Args:
        a: the first
        b: the second
    """
    return a + b


def said(completion, answer):
    return float(answer in completion[-1].content)


class Obeying(vf.MultiTurnEnv):
    async def env_response(self, messages, state, **kwargs):
        turn = messages[-1].content
        if turn == "raise":
            raise KeyError("no such turn")
        if turn == "end":
            state["final_env_response"] = [vf.UserMessage(content="over")]
            return state["final_env_response"]
        return [vf.UserMessage(content=f"{len(state['trajectory'])} {turn}")]


    async def get_prompt_messages(self, state):
        messages = await super().get_prompt_messages(state)
        rewrites = state["trajectory"] and state["trajectory"][-1]["completion"][-1].content == "rewrite"
        return [vf.UserMessage(content="something else"), *messages[1:]] if rewrites else messages


class Group(vf.SingleTurnEnv):
    pass


def load_environment(form="tools", reward=None):
    data, rubric = Dataset.from_list(ROWS), vf.Rubric(funcs=[said])
    if form == "tools":
        return vf.ToolEnv(tools=[add], dataset=data, rubric=rubric, max_turns=3)
    if form == "group":
        def best(completions, answers) -> list[float]:
            return [0.0 for _ in completions]
        return Group(dataset=data, rubric=vf.Rubric(funcs=[best]))
    if form == "broken":
        raise ConnectionError("no route to the hub")
    if form == "images":
        shown = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]
        return vf.SingleTurnEnv(dataset=Dataset.from_list([{"prompt": shown, "answer": "a"}]), rubric=rubric)
    if form == "moving":
        data = Dataset.from_list([{"question": f"{n}", "answer": str(time.time())} for n in range(8)])
        return vf.SingleTurnEnv(dataset=data, rubric=rubric)
    def judged(completion):
        if reward is None:
            raise ConnectionError("no judge")
        return reward
    return Obeying(dataset=data, rubric=vf.Rubric(funcs=[judged]), max_turns=6)
'''


@pytest.fixture(scope="session", autouse=True)
def python() -> str:
    """The packages' interpreter."""
    if PYTHON_VARIABLE not in os.environ:
        pytest.skip(f"{PYTHON_VARIABLE} is not set: `make test-e2e` builds the environment and sets it")
    return os.environ[PYTHON_VARIABLE]


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("own")
    (folder / "own_one.py").write_text(OWN)
    return folder


def verifiers(path: Path | None = None, **more: Any) -> VerifiersTask:
    given = {"kind": "verifiers", "id": "own_one", "path": path and str(path), "heldout_size": 2}
    return VerifiersTask.model_validate(given | more)


def textarena(id_: str, **more: Any) -> TextArenaTask:
    sizes = {"train_size": 4, "heldout_size": 2}
    return TextArenaTask.model_validate({"kind": "textarena", "id": id_, **sizes, **more})


class Played:
    """Environments of one package in one process of its, one after the other: importing it takes seconds."""

    def __init__(self, config: PackageTask) -> None:
        self.process = TheirProcess(theirs_of(config, 3))

    def load(self, config: PackageTask) -> tuple[Task, Callable[[Job], Answer]]:
        theirs = theirs_of(config, 3)
        task = package_task(config, None, 3, self.process.load(theirs, rows=True))
        return task, Host(lambda: TheirEpisode(self.process, theirs.rewards), 4000, str)


@pytest.fixture(scope="module")
def of_verifiers(own: Path) -> Iterator[Played]:
    played = Played(verifiers(own))
    yield played
    played.process.close()


@pytest.fixture(scope="module")
def of_textarena() -> Iterator[Played]:
    played = Played(textarena("GuessTheNumber-v0"))
    yield played
    played.process.close()


class Talk:
    """A conversation, turn by turn."""

    def __init__(self, host: Callable[[Job], Answer], prompt: Prompt, key: str = "a") -> None:
        self.host, self.job, self.key = host, Job(key, prompt, 5, opening=digest(None)), key
        assert host(self.job).failure == ""

    def say(self, turn: str) -> Answer:
        self.job = replace(self.job, turns=(*self.job.turns, turn))
        answer = self.host(self.job)
        if answer.step is not None:
            self.job = replace(self.job, seen=(*self.job.seen, digest(answer.step.messages)))
        return answer


def told(answer: Answer) -> str:
    """What the actor is shown, or why there is nothing."""
    return answer.failure if answer.step is None else "|".join(text for _, text in answer.step.messages)


def step_of(answer: Answer) -> Checked:
    assert answer.step is not None, answer.failure
    return answer.step


def test_a_tool_environment_of_verifiers_is_played(own: Path, of_verifiers: Played) -> None:
    task, host = of_verifiers.load(verifiers(own, id="own-one", heldout_size=3))
    assert (task.train_size, task.heldout_size, task.turns) == (5, 3, 3)
    prompt = task.prompt("train", 0)
    [tool] = prompt.tools
    assert tool["function"]["name"] == "add"
    assert set(tool["function"]["parameters"]["properties"]) == {"a", "b"}
    assert "own-one of verifiers 0." in task.notes[0]
    n, right = int(prompt.problem.split()[0]), prompt.reference["answer"]
    talk = Talk(host, prompt)
    calls = (
        f'<tool_call>{{"name": "{name}", "arguments": {{"a": {n}, "b": {n}}}}}</tool_call>'
        for name in ("add", "sub")
    )
    first = step_of(talk.say("I ask.\n" + "\n".join(calls)))
    assert [role for role, _ in first.messages] == ["tool", "tool"]
    assert first.messages[0][1] == right
    assert "sub" in first.messages[1][1], "there is no such tool, says the package"
    last = step_of(talk.say(f"it is {right}"))
    assert (last.messages, last.done, last.outcome) == ((), True, 1.0)
    assert last.parts == {"said": 1.0, "num_turns": 2.0, "total_tool_calls": 2.0, "add_calls": 1.0}
    broken = step_of(Talk(host, prompt, "b").say('<tool_call>{"name": "add", "arguments"</tool_call>'))
    assert (broken.done, broken.outcome) == (True, 0.0), "what is no call is an answer"


def test_the_sums_of_smollm2_are_worked_out(of_verifiers: Played) -> None:
    """By the very calls that recipes/smollm2/tools.jsonl teaches."""
    folder = ROOT / "recipes" / "smollm2"
    taught = json.loads((folder / "tools.jsonl").read_text().splitlines()[0])
    task, host = of_verifiers.load(verifiers(folder, id="sums", heldout_size=32))
    assert (task.train_size, task.heldout_size, task.turns) == (88, 32, 3)
    prompt = task.prompt("train", 0)
    talk = Talk(host, prompt)
    expression = re.findall(r"\d+ [+-] \d+", prompt.problem)[0]
    asked = re.findall(r"\d+ [+-] \d+", taught["messages"][0]["content"])[0]
    assert prompt.problem.replace(expression, asked) == taught["messages"][0]["content"]
    result = step_of(talk.say(taught["messages"][1]["content"].replace(asked, expression)))
    assert result.messages == (("tool", prompt.reference["answer"]),)
    said = step_of(talk.say(f"<answer>{result.messages[0][1]}</answer>"))
    assert (said.outcome, said.parts["calculator_calls"]) == (1.0, 1.0)


def test_a_class_of_verifiers_with_a_generators_rows_is_played(of_verifiers: Played) -> None:
    """ReasoningGymEnv, whole and by its name: one turn, graded by reasoning-gym."""
    args = {"gym": "chain_sum", "num_train_examples": 12, "num_eval_examples": 4}
    task, host = of_verifiers.load(verifiers(id="ReasoningGymEnv", args=args, heldout_size=3))
    assert (task.train_size, task.heldout_size, task.turns) == (12, 3, 1)
    prompt = task.prompt("train", 0)
    assert [message["role"] for message in prompt.messages] == ["system", "user"]
    [sums] = re.findall(r"\d[\d+\- ]+(?= =)", prompt.messages[1]["content"])
    result = sum(int(sign + number) for sign, number in re.findall(r"([+-]?)\s*(\d+)", sums))
    right, wrong = (
        step_of(Talk(host, prompt, str(one)).say(f"<answer>\n{one}\n</answer>"))
        for one in (result, result + 1)
    )
    assert (right.done, right.outcome) == (True, 1.0)
    assert right.parts["check_answer_reward_func"] == 1.0
    assert wrong.outcome is not None
    assert wrong.outcome < 0.1


def test_what_goes_wrong_in_a_conversation_is_its_own(own: Path, of_verifiers: Played) -> None:
    task, host = of_verifiers.load(verifiers(own, args={"form": "obeying", "reward": 7.0}))
    prompt = task.prompt("train", 0)
    other, raising, ending = (Talk(host, prompt, key) for key in ("other", "raising", "ending"))
    assert [told(talk.say("a")) for talk in (other, raising, ending)] == ["1 a"] * 3
    assert re.fullmatch(r"raised KeyError: 'no such turn' \(.*own_one\.py:\d+\)", told(raising.say("raise")))
    assert told(ending.say("end")) == "gave the reward 7, and task.rewards is [0, 1]"
    assert told(Talk(host, prompt, "past").say("rewrite")) == (
        "shows earlier messages otherwise later on, and here a conversation only grows"
    )
    assert [told(other.say(turn)) for turn in ("b", "c")] == ["2 b", "3 c"]
    again = Host(host._make, 4000, str)  # another process's, which has to bring it back
    assert told(again(replace(other.job, turns=(*other.job.turns, "d")))) == "4 d"


def test_a_rubric_that_fails_is_no_reward_of_zero(own: Path, of_verifiers: Played) -> None:
    """The package itself notes the error and goes on."""
    task, host = of_verifiers.load(verifiers(own, args={"form": "judged"}))
    assert told(Talk(host, task.prompt("train", 0)).say("end")) == (
        "raised RuntimeError: its rubric failed: Error calling reward function judged: no judge"
    )


def test_a_reward_is_worth_what_the_recipe_says(own: Path, of_verifiers: Played) -> None:
    task, host = of_verifiers.load(verifiers(own, args={"form": "x", "reward": 7}, rewards=[-1, 9]))
    step = step_of(Talk(host, task.prompt("train", 0)).say("end"))
    assert step.messages == (("user", "over"),)
    assert step.outcome == pytest.approx(0.8)
    assert step.parts["judged"] == 7.0


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "unknown": ({"id": "no-such-one"}, r"there is no environment 'no-such-one': no module 'no_such_one'"),
    "net": (
        {"args": {"form": "broken"}},
        r"raised ConnectionError: no route to the hub \(.*own_one\.py:\d+\)",
    ),
    "group": ({"args": {"form": "group"}}, "judges the responses of a group together"),
    "images": ({"args": {"form": "images"}}, "'image_url', and the actor reads text alone"),
    "arguments": ({"args": {"colour": 1}}, "unexpected keyword argument 'colour'"),
    "few": ({"heldout_size": 8}, "8 different rows do not suffice for heldout_size 8"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_played_is_refused_by_name(own: Path, of_verifiers: Played, case: str) -> None:
    given, why = REFUSED[case]
    with pytest.raises((InputError, Failed), match=why):
        of_verifiers.load(verifiers(own, **given))


def test_rows_that_differ_from_one_process_to_the_next_are_told(own: Path, of_verifiers: Played) -> None:
    config = verifiers(own, args={"form": "moving"})
    task, _ = of_verifiers.load(config)
    _, host = of_verifiers.load(config)
    answer = host(Job("a", task.prompt("train", 0), 5))
    assert "has other rows each time it is loaded" in answer.failure


def test_a_game_of_textarena_is_played_and_repeats_itself(of_textarena: Played) -> None:
    task, host = of_textarena.load(textarena("GuessTheNumber-v0"))
    assert (task.train_size, task.heldout_size, task.turns) == (4, 2, 10)
    prompt = task.prompt("train", 0)
    assert "between 1 and 20" in prompt.problem

    def halved(key: str) -> list[Answer]:
        talk, low, high, answers = Talk(host, prompt, key), 1, 20, list[Answer]()
        while not answers or not step_of(answers[-1]).done:
            guess = (low + high) // 2
            answers.append(talk.say(f"[{guess}]"))
            low, high = (low, guess - 1) if "lower" in told(answers[-1]) else (guess + 1, high)
        return answers

    first, again = halved("a"), halved("b")
    assert list(map(told, first)) == list(map(told, again))
    assert all(told(answer).startswith("The target number is") for answer in first[:-1])
    last = step_of(first[-1])
    assert (last.outcome, last.parts) == (1.0, {"reward": 1.0, "invalid": 0.0})
    assert "Congratulations" in told(first[-1])
    lost = Talk(host, prompt, "c")
    assert "You attempted an invalid move" in told(lost.say("nothing"))
    ended = step_of(lost.say("nothing"))
    assert (ended.done, ended.outcome, ended.parts["invalid"]) == (True, 0.0, 1.0)


def test_a_move_beyond_the_rules_costs_the_least_there_is(of_textarena: Played) -> None:
    """Secretary's author takes 1 off, where a loss is 0."""
    task, host = of_textarena.load(textarena("Secretary-v0"))
    talk = Talk(host, task.prompt("train", 0))
    answers = [talk.say("[no]") for _ in range(2)]
    assert step_of(answers[1]).parts == {"reward": -1.0, "invalid": 1.0}
    assert step_of(answers[1]).outcome == 0.0


@pytest.mark.parametrize(
    ("name", "move"),
    [
        ("Blackjack-v0", "[hit]"),
        ("2048-v0-3x3", "[left]"),
        ("Sokoban-v0", "[up]"),
        ("Minesweeper-v0-train", "[4 4]"),
    ],
)
def test_games_of_chance_are_dealt_alike_whoever_plays_beside(
    of_textarena: Played, name: str, move: str
) -> None:
    task, host = of_textarena.load(textarena(name))
    prompt, moves = task.prompt("train", 1), [move, move.replace("left", "up").replace("4", "2"), move]
    alone = Talk(host, prompt, "z")
    expected = [told(alone.say(one)) for one in moves]
    talks = [Talk(host, prompt, key) for key in ("x", "y")]
    beside = [[told(talk.say(one)) for talk in talks] for one in moves]
    assert beside == [[one, one] for one in expected]
    assert len(set(expected)) > 1


@pytest.mark.parametrize(
    ("id_", "why"),
    [
        ("GuessTheNumber", "no game 'GuessTheNumber'"),
        ("TicTacToe-v0", "is a game of several players"),
        ("Poker-v0", "is a game of several players"),
        ("Wordle-v0", "wants words that are not on this machine"),
        ("TwentyQuestions-v0", "OpenRouter API key not found"),
    ],
)
def test_games_that_cannot_be_played_are_refused_by_name(of_textarena: Played, id_: str, why: str) -> None:
    with pytest.raises(Failed, match=why):
        of_textarena.load(textarena(id_))


def test_a_refusal_says_the_way_out() -> None:
    with pytest.raises(InputError, match=r"textarena GuessTheNumber (.|\n)*did you mean GuessTheNumber-v0"):
        make_task(textarena("GuessTheNumber"), None, 3)


@pytest.mark.extended
def test_the_recipes_demonstrations_are_those_of_the_tool(tmp_path: Path) -> None:
    tool = ROOT / "tools" / "make_played_data.py"
    subprocess.run([sys.executable, str(tool), str(tmp_path)], check=True, cwd=tmp_path)
    for file in ("simon.jsonl", "guess.jsonl"):
        assert (tmp_path / file).read_text() == (RECIPES / file).read_text()


def test_a_run_over_an_environment_of_verifiers(tmp_path: Path) -> None:
    few = ("stages.0.epochs=1", "stages.0.size=32", "stages.1.steps=2", "evaluation.prompts=4")
    given = ("name=run", "world.ranks=1", "stages.1.rollout.prompts=4", *few)
    done = genac("run", str(RECIPES / "verifiers.yaml"), *given, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "simon of verifiers 0." in done.stdout + done.stderr
    steps = [row for row in rows(tmp_path) if "actor/loss" in row and row["stage"] != "sft-actor"]
    assert len(steps) == 2
    for row in steps:
        assert row["environment/failed"] == 0.0
        assert 1.0 <= row["rollout/turns_mean"] <= 4.0
        assert 0.0 <= row["reward/share"] <= 1.0
        assert row["parity/actor_p99"] < 1e-3, "the ids are the engine's own"


def test_a_run_over_a_game_of_textarena(tmp_path: Path) -> None:
    few = ("stages.0.epochs=1", "stages.0.size=16", "stages.1.steps=1", "evaluation.prompts=2")
    sizes = ("stages.1.rollout.prompts=4", "stages.1.rollout.samples=2", "task.train_size=20")
    given = ("name=run", "world.ranks=1", "task.heldout_size=4", *few, *sizes)
    done = genac("run", str(RECIPES / "textarena.yaml"), *given, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    [step] = [row for row in rows(tmp_path) if "actor/loss" in row and row["stage"] != "sft-actor"]
    assert step["environment/failed"] == 0.0
    assert 0.0 <= step["reward/invalid"] <= 1.0


def test_a_run_of_too_few_turns_ends_before_it_begins(tmp_path: Path) -> None:
    done = genac("run", str(RECIPES / "textarena.yaml"), "environment.turns=4", cwd=tmp_path)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "the environment plays 10 turns, and environment.turns ends a conversation after 4" in done.stderr
    assert "Traceback" not in done.stderr
