"""Tasks whose prompts a function of the user's own gives, in real processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from genac_megatron.errors import InputError
from genac_megatron.recipe.own_code import Named
from genac_megatron.recipe.tasks import TaskConfig
from genac_megatron.tasks import Task, make_task
from genac_megatron.tasks.own_code import OwnCodeError
from genac_megatron.tasks.own_prompts import _lines
from genac_megatron.tasks.tokenizer import load_tokenizer

TINY = load_tokenizer("builtin:tiny")
SUMS = "[{'prompt': f'{n} + 1?', 'reference': n + 1} for n in range(9)]"
Make = Callable[..., Task]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    """A task whose prompts are the function `prompts` of the given source."""
    made: list[Task] = []

    def build(source: str, **changes: Any) -> Task:
        path = tmp_path / "own.py"
        path.write_text(source)
        block = {"kind": "python", "path": str(path), "prompts": "prompts", "verifier": "exact"}
        config = TypeAdapter(TaskConfig).validate_python({**block, "heldout_size": 3, **changes})
        made.append(make_task(config, TINY, 7))
        return made[-1]

    yield build
    for task in made:
        task.close()


def test_prompts_of_a_function(make: Make) -> None:
    task = make(f"def prompts(): return {SUMS}\n", instruction="Be brief.")
    assert (task.train_size, task.heldout_size) == (6, 3)
    prompts = [task.prompt("train", n) for n in range(6)] + [task.prompt("heldout", n) for n in range(3)]
    assert sorted(prompt.problem for prompt in prompts) == [f"{n} + 1?" for n in range(9)]
    assert prompts[0].messages[0]["content"].endswith("\n\nBe brief.")
    assert task.verify(prompts[0], prompts[0].reference) == 1.0
    assert task.verify(prompts[0], "none") == 0.0
    again = make(f"def prompts(): return {SUMS}\n", instruction="Be brief.")
    assert [again.prompt("train", n) for n in range(6)] == prompts[:6]
    assert again.digest == task.digest
    assert make(f"def prompts(): return {SUMS}[:-1]\n").digest != task.digest


def test_conversations_splits_and_a_reward_of_the_same_file(make: Make, tmp_path: Path) -> None:
    source = (
        "import random\n"
        "def prompts(seed):\n"
        "    rng = random.Random(seed)\n"
        "    for n in range(4):\n"
        "        chat = [{'role': 'system', 'content': 'Count.'}, {'role': 'user', 'content': f'to {n}'}]\n"
        "        yield {'prompt': chat, 'reference': {'limit': n, 'salt': rng.random()},\n"
        "               'split': 'heldout' if n == 3 else 'train'}\n"
        "def score(response, reference):\n"
        "    return response == str(reference['limit'])\n"
    )
    task = make(source, verifier={"python": f"{tmp_path}/own.py:score"})
    assert (task.train_size, task.heldout_size) == (3, 1)
    prompt = task.prompt("heldout", 0)
    assert [message["role"] for message in prompt.messages] == ["system", "user"]
    assert prompt.reference["limit"] == 3
    assert [task.verify(prompt, text) for text in ("3", "4")] == [1.0, 0.0]


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("return 3", "own.py:prompts: gave a int, not a list of prompts"),
        ("return {'prompt': 'a'}", "gave a dict, not a list of prompts"),
        ("return []", "gave no prompt"),
        ("return [{'prompt': 'a'}, 4]", "prompt 1 is a int, not a dict"),
        ("raise OSError('no disk')", r"raised OSError: no disk \(\S*own.py:2\)"),
        ("yield {'prompt': 'a'}; 1 / 0", r"raised ZeroDivisionError: .* \(\S*own.py:2\) at prompt 1"),
        ("while True: pass", "took longer than 2 s"),
        ("import os; return [str(os.getpid())]", "two processes were given other prompts, from prompt 0 on"),
        ("import random; return [str(random.random()) for _ in range(3)]", "two processes were given other"),
    ],
)
def test_what_a_function_gives_is_told_before_training(make: Make, body: str, why: str) -> None:
    with pytest.raises(InputError, match=why) as caught:
        make(f"def prompts():\n    {body}\n", timeout_s=2)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"prompt": "a", "reference": float("nan")}, "prompt 0, reference holds nan"),
        ({"prompt": "a", "reference": {1: 2}}, "prompt 0, reference has the key 1, which is no text"),
        ({"prompt": "a", "reference": {1, 2}}, "prompt 0, reference holds a set, which is no plain data"),
        ({"prompt": "smile \ud83d"}, "prompt 0, prompt holds text that is no Unicode"),
    ],
)
def test_what_is_no_plain_data(row: Any, why: str) -> None:
    with pytest.raises(OwnCodeError, match=why):
        _lines([row], Named("own.py", "prompts"))


@pytest.mark.parametrize(
    ("row", "why"),
    [
        (
            "{'prompt': 'a', 'answer': '1'}",
            "own.py:prompts, prompt 0: it has answer, which nothing would read",
        ),
        ("{'prompt': ' ', 'reference': '1'}", "no text and no chat messages that end with the user's"),
        ("{'prompt': [{'role': 'user'}], 'reference': '1'}", "no text and no chat messages"),
        ("{'prompt': 'a', 'reference': '1', 'split': 'test'}", "its split is 'test'"),
        ("{'prompt': 'a'}", "its reference is None, and the verifier 'exact' compares with a text"),
        ("{'prompt': 'a', 'reference': True}", "its reference is True"),
    ],
)
def test_a_prompt_that_is_wrong_is_named(make: Make, row: str, why: str) -> None:
    with pytest.raises(InputError, match=why):
        make(f"def prompts(): return [{row}]\n")


def test_too_few_prompts(make: Make) -> None:
    with pytest.raises(InputError, match="9 different problems do not suffice for heldout_size 20"):
        make(f"def prompts(): return {SUMS}\n", heldout_size=20)
