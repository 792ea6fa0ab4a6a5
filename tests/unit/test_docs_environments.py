"""The page on environments: its example is read, begins, plays, and is as short as it says."""

from __future__ import annotations

import asyncio
from pathlib import Path

from genac_megatron.environments import make_environment
from genac_megatron.environments.host import Job, digest
from genac_megatron.recipe.loader import load_recipe
from genac_megatron.recipe.schema import Recipe
from genac_megatron.stages.runtime import begun_task
from genac_megatron.tasks.tokenizer import load_tokenizer
from tests.unit.test_docs_commands import DOCS, make_files

PAGE = DOCS / "environments.md"


def begun(folder: Path) -> Recipe:
    """The example's recipe, with its files."""
    rows = [f'{{"question": "Number {n}: guess from 1 to 16.", "answer": "1"}}\n' for n in range(12)]
    (folder / "questions.jsonl").write_text("".join(rows))
    make_files(PAGE, folder)
    return load_recipe(folder / "guess.yaml")


def test_the_example_plays_as_the_page_says(tmp_path: Path) -> None:
    recipe = begun(tmp_path)
    assert recipe.environment is not None
    task = begun_task(recipe, load_tokenizer("builtin:tiny"))
    environment = make_environment(recipe.environment, recipe.task)
    prompt = task.prompt("train", 0)

    async def play() -> list[str]:
        """Halving what is left: four answers at most, then it is found."""
        low, high, turns, seen, told = 1, 16, list[str](), list[str](), list[str]()
        while not told or told[-1] != "done":
            turns.append(f"Is it {(low + high) // 2}?")
            answer = await environment.ask(Job("a", prompt, 3, tuple(turns), digest(None), tuple(seen)))
            assert answer.step is not None, answer.failure
            seen.append(digest(answer.step.messages))
            hint = answer.step.messages[0][1]
            low, high = (low, (low + high) // 2 - 1) if hint == "lower" else ((low + high) // 2 + 1, high)
            told.append("done" if answer.step.done else hint)
            if answer.step.done:
                assert answer.step.outcome == 1.0
                assert answer.step.parts == {"form": 1.0}
        return told

    try:
        environment.check([Job("c", prompt, 3)])
        told = asyncio.run(play())
    finally:
        environment.close()
        task.close()
    assert len(told) <= 5
    assert set(told) <= {"higher", "lower", "done"}


def test_it_is_forty_lines(tmp_path: Path) -> None:
    begun(tmp_path)
    lines = [(tmp_path / name).read_text().strip().splitlines() for name in ("guess.py", "guess.yaml")]
    assert sum(map(len, lines)) <= 40
