"""Rewards of the user's own: what a recipe may name, what a function may give, and what becomes of failures.

The functions are real files, in real processes.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from genac_megatron.errors import InputError
from genac_megatron.recipe.loader import load_recipe
from genac_megatron.recipe.own_code import check_named, parse_named
from genac_megatron.recipe.tasks import TaskConfig
from genac_megatron.records import Prompt
from genac_megatron.tasks import Task, make_task
from genac_megatron.tasks.own_code import OwnCodeError
from genac_megatron.tasks.own_reward import OwnRewarded, read_result
from genac_megatron.tasks.tokenizer import load_tokenizer

TINY = load_tokenizer("builtin:tiny")
Make = Callable[..., OwnRewarded]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    """A JSONL task whose reward is the function `score` of the given source."""
    made: list[Task] = []

    def build(source: str, **verifier: Any) -> OwnRewarded:
        (tmp_path / "rewards.py").write_text(source)
        data = tmp_path / "data.jsonl"
        rows = [f'{{"question": "{n} + 1?", "answer": "{n + 1}"}}' for n in range(6)]
        data.write_text("\n".join(rows))
        block = {"python": f"{tmp_path}/rewards.py:score", **verifier}
        config = TypeAdapter(TaskConfig).validate_python(
            {"kind": "jsonl", "path": str(data), "heldout_size": 2, "verifier": block}
        )
        task = make_task(config, TINY, 0)
        assert isinstance(task, OwnRewarded)
        made.append(task)
        return task

    yield build
    for task in made:
        task.close()


RIGHT = "def score(response, reference):\n    return response == reference\n"


def answer(task: Task, text: str, index: int = 0) -> float:
    return task.verify(task.prompt("train", index), text)


# --- what it is given and what it may give -------------------------------------------------------


def test_a_function_takes_what_it_names(make: Make) -> None:
    task = make(
        "def score(response, *, key, problem, reference, strict=True, **rest):\n"
        "    [(name, messages)] = rest.items()\n"
        "    assert strict and name == 'messages'\n"
        "    assert messages[-1]['role'] == 'user' and problem in messages[-1]['content']\n"
        "    return key.startswith(('train/', 'heldout/')) and response == reference\n"
    )
    prompt = task.prompt("train", 1)
    assert task.verify(prompt, prompt.reference) == 1.0
    assert task.verify_many([(prompt, "?"), (prompt, prompt.reference)]) == [0.0, 1.0]
    assert asyncio.run(task.verify_beside(prompt, prompt.reference)) == 1.0


def test_the_names_of_public_trainers_are_known_and_position_counts_where_it_must(make: Make) -> None:
    task = make("def score(solution_str, ground_truth, /):\n    return solution_str == ground_truth\n")
    assert answer(task, "?") == 0.0


def test_an_async_function_keeps_its_loop(make: Make) -> None:
    task = make(
        "import asyncio\n"
        "lock = asyncio.Lock()\nloops = set()\n"
        "async def score(response):\n"
        "    async with lock:\n"
        "        await asyncio.sleep(0.001)\n"
        "    loops.add(id(asyncio.get_running_loop()))\n"
        "    return 1 / len(loops)\n"
    )
    assert [answer(task, text) for text in "abc"] == [1.0] * 3


def test_a_file_may_import_its_neighbour(make: Make, tmp_path: Path) -> None:
    (tmp_path / "own_helper_of_rewards.py").write_text("HALF = 0.5\n")
    task = make("from own_helper_of_rewards import HALF\ndef score(response): return HALF\n")
    assert answer(task, "x") == 0.5


def test_a_modules_function(make: Make) -> None:
    make(RIGHT)
    config = {"kind": "jsonl", "path": "", "verifier": {"python": "statistics:fmean"}}
    assert TypeAdapter(TaskConfig).validate_python(config).verifier.python == "statistics:fmean"
    with pytest.raises(InputError, match="takes 'data', which there is not"):
        make(RIGHT, python="statistics:fmean")
    with pytest.raises(InputError, match=r"cannot be imported: ModuleNotFoundError: .*no_such_module"):
        make(RIGHT, python="no_such_module:score")


def test_parts_are_weighted_and_told(make: Make) -> None:
    task = make(
        "def score(response, reference):\n"
        "    return {'right': response == reference, 'short': 0.5, 'seen': 0.25}\n",
        parts={"right": 3, "short": 1, "seen": 0},
    )
    prompt = task.prompt("heldout", 0)
    scored = asyncio.run(task.score_beside(prompt, prompt.reference))
    assert scored.outcome == pytest.approx((3 + 0.5) / 4)
    assert scored.parts == {"right": 1.0, "short": 0.5, "seen": 0.25}


@pytest.mark.parametrize(
    ("given", "number"),
    [(True, 1.0), (0, 0.0), (0.25, 0.25), (np.float32(0.5), 0.5), (np.bool_(True), 1.0), (np.int64(1), 1.0),
     (np.array(0.5), 0.5), (0.1 + 0.2 + 0.7, 1.0), (1 + 1e-9, 1.0), (-1e-12, 0.0)],
)  # fmt: skip
def test_numbers(given: Any, number: float) -> None:
    assert read_result(given, {}).outcome == number


@pytest.mark.parametrize(
    ("given", "weights", "why"),
    [
        (float("nan"), {}, r"returned nan, not a number in \[0, 1\]"),
        (float("inf"), {}, r"returned inf, not a number in \[0, 1\]"),
        (1.5, {}, r"returned 1.5, not a number in \[0, 1\]"),
        (-1, {}, r"returned -1, not a number in \[0, 1\]"),
        ("0.5", {}, r"returned '0.5' \(str\), not a number"),
        (None, {}, r"returned None \(NoneType\), not a number"),
        ([1.0], {}, r"returned \[1.0\] \(list\), not a number"),
        (1j, {}, r"returned 1j \(complex\), not a number"),
        (np.array([0.5, 0.5]), {}, r"\(ndarray\), not a number"),
        ({"a": 1.0}, {}, r"the recipe gives none a weight: set task.verifier.parts to {a: 1}"),
        (0.5, {"a": 1.0}, r"returned 0.5 \(float\), not a dict of the parts a"),
        ({"a": 1.0}, {"a": 1.0, "b": 1.0}, "returned no part b"),
        ({"a": 1.0, "c": 0.0}, {"a": 1.0}, "returned the part c, which task.verifier.parts does not name"),
        ({"a": float("nan")}, {"a": 1.0}, r"returned for the part a nan, not a number in \[0, 1\]"),
        ({"a": "yes"}, {"a": 1.0}, r"returned for the part a 'yes' \(str\), not a number"),
    ],
)
def test_what_is_no_reward(given: Any, weights: dict[str, float], why: str) -> None:
    with pytest.raises(OwnCodeError, match=why):
        read_result(given, weights)


weighted = st.dictionaries(
    st.sampled_from("abcdef"), st.tuples(st.floats(0, 1e6), st.floats(0, 1)), min_size=1
).filter(lambda found: any(weight > 0 for weight, _ in found.values()))


@given(found=weighted)
@example(found={"a": (5e-324, 0.5)})
def test_the_weighted_mean_lies_among_the_parts(found: dict[str, tuple[float, float]]) -> None:
    weights = {name: weight for name, (weight, _) in found.items()}
    values = {name: value for name, (_, value) in found.items()}
    counted = [value for name, value in values.items() if weights[name] > 0]
    outcome = read_result(values, weights).outcome
    assert min(counted) - 1e-9 <= outcome <= min(max(counted) + 1e-9, 1.0)


@given(
    thing=st.none() | st.text() | st.floats() | st.integers() | st.lists(st.floats())
    | st.dictionaries(st.text(), st.floats() | st.text()),
    named=st.booleans(),
)  # fmt: skip
def test_whatever_is_returned_is_an_outcome_or_says_what_it_is(thing: Any, named: bool) -> None:
    try:
        result = read_result(thing, {"a": 1.0} if named else {})
    except OwnCodeError as error:
        told = str(error)
    else:
        told = f"returned {result.outcome}"
        assert 0.0 <= result.outcome <= 1.0
    assert told.startswith("returned")


# --- before training -----------------------------------------------------------------------------


BEGIN = "def score(response):\n    "


@pytest.mark.parametrize(
    ("source", "why"),
    [
        (BEGIN + "return {}[response]\n",
         r"score: raised KeyError: '\d' \(\S*rewards.py:2\), on train/0 with its reference as the response"),
        (BEGIN + "return 1.0 if response else 1 / 0\n",
         r"ZeroDivisionError: division by zero \(\S*rewards.py:2\), on train/0 with an empty response"),
        (BEGIN + "import sys\n    sys.exit(3)\n", r"raised SystemExit: 3 \(\S*rewards.py:3\)"),
        (BEGIN + "return float('nan')\n", r"returned nan, not a number in \[0, 1\], on train/0"),
        (BEGIN + "while True: pass\n", "took longer than 1 s, on train/0"),
        (f"async {BEGIN}import asyncio\n    await asyncio.sleep(99)\n", "took longer than 1 s"),
        (f"import os\n{BEGIN}os._exit(0)\n", "lost 2 processes at it, on train/0"),
        (f"import os\nos._exit(0)\n{BEGIN}return 1.0\n", "its process did not start"),
        (f"import sys\nsys.exit('no')\n{BEGIN}return 1.0\n", "cannot be imported: SystemExit: no"),
        (f"import not_here\n{BEGIN}return 1.0\n",
         r"cannot be imported: ModuleNotFoundError: No module named 'not_here' \(\S*rewards.py:1\)"),
        ("def score(response, extra_info): return 1.0\n",
         "takes 'extra_info', which there is not; there is: response, reference, problem"),
        ("score = 3\n", "is a int, not a function"),
    ],
)  # fmt: skip
def test_a_reward_that_fails_is_told_before_training(make: Make, source: str, why: str) -> None:
    with pytest.raises(InputError, match=why) as caught:
        make(source, timeout_s=1)
    assert caught.value.exit_code == 2
    assert "rewards.py:score" in str(caught.value)


# --- later ---------------------------------------------------------------------------------------

FAILS_LATER = "def score(response):\n    return 1.0 if response != 'bad' else 'a string'\n"


def test_a_later_failure_is_scored_by_the_recipes_rule_counted_and_told(
    make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    task = make(FAILS_LATER, failed_outcome=0.25)
    with caplog.at_level(logging.WARNING):
        assert answer(task, "bad", 3) == 0.25
    assert task.late == 1
    told = "rewards.py:score returned 'a string' (str), not a number, on train/3: it counts as 0.25"
    assert told in caplog.text
    assert answer(task, "good") == 1.0


def test_failures_in_a_row_end_the_run(make: Make) -> None:
    task = make(FAILS_LATER, give_up=3)
    for text in ("bad", "bad", "good", "bad", "bad"):
        answer(task, text)
    with pytest.raises(
        InputError, match=r"rewards.py:score: failed on 3 responses in a row; the last, on train"
    ):
        answer(task, "bad")
    assert task.late == 5


def test_a_late_response_counts_and_the_next_is_scored(make: Make) -> None:
    source = (
        "import time\ndef score(response):\n    time.sleep(99 if response == 'slow' else 0)\n    return 1\n"
    )
    task = make(source, timeout_s=2)
    assert [answer(task, text) for text in ("slow", "quick")] == [0.0, 1.0]
    assert task.late == 1


def test_workers_score_beside_one_another_and_hold_no_loop_up(make: Make) -> None:
    source = "import time\ndef score(response):\n    time.sleep(float(response or 0) / 10)\n    return 1\n"
    task = make(source, workers=3)
    prompt = task.prompt("train", 0)

    async def together() -> tuple[list[float], int]:
        ticks = 0

        async def tick() -> None:
            nonlocal ticks
            while True:
                await asyncio.sleep(0.01)
                ticks += 1

        beside = asyncio.ensure_future(tick())
        outcomes = await asyncio.gather(*(task.verify_beside(prompt, "5") for _ in range(3)))
        beside.cancel()
        return list(outcomes), ticks

    outcomes, ticks = asyncio.run(together())
    assert outcomes == [1.0] * 3
    assert ticks >= 5, "the event loop went on"


def started(path: Path) -> psutil.Process:
    return psutil.Process(int(path.read_text()))


def test_what_a_reward_starts_ends_with_it(make: Make, tmp_path: Path) -> None:
    note = tmp_path / "started"
    task = make(
        "import subprocess, sys, time\n"
        "def score(response):\n"
        "    if response == 'run':\n"
        "        child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"        open({str(note)!r}, 'w').write(str(child.pid))\n"
        "        child.wait()\n"
        "    return 1\n",
        timeout_s=3,
    )
    assert answer(task, "run") == 0.0
    child = int(note.read_text())
    until = time.monotonic() + 20
    while psutil.pid_exists(child) and psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < until, "a program under test outlives its reward"
        time.sleep(0.05)


def test_closing_ends_the_processes(make: Make) -> None:
    task = make("import os\ndef score(response):\n    return 1\n")
    mine = {child.pid for child in psutil.Process(os.getpid()).children(recursive=True)}
    task.close()
    left = {child.pid for child in psutil.Process(os.getpid()).children(recursive=True)}
    assert len(mine - left) == 1


def test_closing_waits_for_no_response(make: Make, tmp_path: Path) -> None:
    note = tmp_path / "begun"
    task = make(
        "import time\n"
        "def score(response):\n"
        "    if response == 'slow':\n"
        f"        open({str(note)!r}, 'w').close()\n"
        "        time.sleep(600)\n"
        "    return 1\n",
        timeout_s=500,
    )
    with ThreadPoolExecutor(1) as thread:
        waiting = thread.submit(answer, task, "slow")
        while not note.exists():
            time.sleep(0.01)
        began = time.monotonic()
        task.close()
        assert time.monotonic() - began < 60
        with pytest.raises(InputError):
            waiting.result()


# --- recipes -------------------------------------------------------------------------------------


@pytest.fixture
def recipe(tmp_path: Path) -> Callable[[Any], Path]:
    def write(verifier: Any) -> Path:
        (tmp_path / "data.jsonl").write_text(
            '{"question": "1?", "answer": "1"}\n{"question": "2?", "answer": "2"}'
        )
        shape = {"layers": 2, "hidden": 32, "ffn": 64, "heads": 2, "kv_heads": 2}
        model = {"family": "qwen3", "tokenizer": "builtin:tiny", "shape": shape}
        task = {"kind": "jsonl", "path": "./data.jsonl", "heldout_size": 1, "verifier": verifier}
        path = tmp_path / "recipe.yaml"
        stages = [{"kind": "policy", "algorithm": {"kind": "grpo"}}]
        path.write_text(yaml.safe_dump({"name": "own", "task": task, "roles": {"actor": {"model": model}},
                                        "stages": stages}))  # fmt: skip
        return path

    return write


def test_a_path_in_a_recipe_is_relative_to_it(recipe: Callable[[Any], Path], tmp_path: Path) -> None:
    (tmp_path / "rewards.py").write_text(RIGHT)
    loaded = load_recipe(recipe({"python": "./rewards.py:score"}))
    assert loaded.task.verifier.python == f"{tmp_path.resolve()}/rewards.py:score"  # type: ignore[union-attr]
    overridden = load_recipe(recipe("math"), [f"task.verifier={{python: {tmp_path}/rewards.py:score}}"])
    assert overridden.task.verifier.python == f"{tmp_path}/rewards.py:score"  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("verifier", "why"),
    [
        (
            {"python": "./rewards.py:scored"},
            r"recipe.yaml:\d+: \S*rewards.py has no function 'scored'\n.*score",
        ),
        ({"python": "./nowhere.py:score"}, r"recipe.yaml:\d+: \S*nowhere.py cannot be read: No such file"),
        ({"python": "./broken.py:score"}, r"broken.py:2: not Python"),
        (
            {"python": "./rewards.py"},
            "names no function of a file or module\n.*write path/to/file.py:function",
        ),
        ({"python": "rewards:not a name"}, "names no function of a file or module"),
        ({"python": "./rewards.py:score", "parts": {"a": 0}}, "every part of the reward has the weight 0"),
        ({"python": "./rewards.py:score", "parts": {"a": -1}}, r"'task.verifier.parts.a'"),
        ({"python": "./rewards.py:score", "parts": {"a b": 1}}, r"'task.verifier.parts.a b"),
        ({"python": "./rewards.py:score", "timeout": 3}, "'task.verifier.timeout'\n.*timeout_s"),
        ({"parts": {"a": 1}}, "'task.verifier.python' is missing"),
        ("maths", r"'task.verifier.*' must be one of math, exact"),
    ],
)
def test_a_recipe_is_told_where(
    recipe: Callable[[Any], Path], tmp_path: Path, verifier: Any, why: str
) -> None:
    (tmp_path / "rewards.py").write_text(RIGHT)
    (tmp_path / "broken.py").write_text("x = 1\ndef score(:\n")
    with pytest.raises(InputError, match=f"(?s){why}"):
        load_recipe(recipe(verifier))


def test_a_function_is_found_without_running_its_file(tmp_path: Path) -> None:
    path = tmp_path / "many.py"
    path.write_text(
        "raise SystemExit('never run')\n"
        "try:\n    import json as one\nexcept ImportError:\n    two = None\n"
        "if one:\n    async def three(): ...\nelse:\n    from math import sqrt as four\n"
        "five = six, (seven, eight) = 1, (2, 3)\nclass Nine: ...\nwith open('x') as ten: pass\n"
    )
    for name in ("one", "two", "three", "four", "five", "six", "seven", "eight", "Nine", "ten"):
        check_named(parse_named(f"{path}:{name}"), "here")
    with pytest.raises(InputError, match=r"here: .* has no function 'nine'\n.*did you mean Nine"):
        check_named(parse_named(f"{path}:nine"), "here")
    (tmp_path / "star.py").write_text("from somewhere import *\n")
    check_named(parse_named(f"{tmp_path}/star.py:anything"), "here")


def test_the_critic_is_told_that_a_function_scores(make: Make) -> None:
    prompt: Prompt = make(RIGHT).prompt("train", 0)
    assert prompt.success.startswith("a reward function scores the finished response")
