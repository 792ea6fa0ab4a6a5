"""The examples of the page on own rewards, prompts, mixtures and privileged critics, as they stand there."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from genac_megatron.critic.icc import IccState
from genac_megatron.critic.prompt import prompt_text
from genac_megatron.recipe.loader import load_recipe
from genac_megatron.stages.begun import begun_task
from genac_megatron.tasks import Task
from genac_megatron.tasks.tokenizer import load_tokenizer

TINY = load_tokenizer("builtin:tiny")
PAGE = (Path(__file__).resolve().parents[2] / "docs" / "tasks.md").read_text(encoding="utf-8")
SHAPE = {"layers": 2, "hidden": 32, "ffn": 64, "heads": 2, "kv_heads": 2}
ROLE = {"model": {"family": "qwen3", "tokenizer": "builtin:tiny", "shape": SHAPE}}
BLOCKS = ("task", "stage", "judging")  # of a recipe; other blocks are files
SECTIONS = {
    section.partition("\n")[0]: section for section in re.split(r"^## ", PAGE, flags=re.MULTILINE)[1:]
}


def examples(title: str) -> list[dict[str, str]]:
    """A section's examples, which begin with a block of a recipe; each block by its first line's name."""
    found: list[dict[str, str]] = []
    for text in re.findall(r"^```\w+\n(.*?)^```$", SECTIONS[title], flags=re.MULTILINE | re.DOTALL):
        name, _, rest = text.partition("\n")
        name = name.removeprefix("# ")
        if name in BLOCKS:
            found.append({})
        found[-1][name] = rest
    return found


def begun(folder: Path, example: dict[str, str]) -> tuple[Task, Any]:
    """The example's task, and its recipe."""
    (folder / "sums.jsonl").write_text(
        "".join(f'{{"question": "{n} + 1?", "answer": "{n + 1}"}}\n' for n in range(9))
    )
    blocks = {"task": {"kind": "state_tracking", "heldout_size": 4}, "stage": {"kind": "ppo"}}
    for name, text in example.items():
        if name in BLOCKS:
            blocks[name] = yaml.safe_load(text)
        else:
            (folder / name).write_text(text)
    path = folder / "recipe.yaml"
    stages = [blocks.pop("stage")]
    whole = {"name": "own", **blocks, "roles": {"actor": ROLE, "critic": ROLE}, "stages": stages}
    path.write_text(yaml.safe_dump(whole))
    recipe = load_recipe(path)
    return begun_task(recipe, TINY), recipe


def test_every_example_is_tried_here() -> None:
    elsewhere = ("Data forms", "Conversations for SFT", "What the final answer is")
    assert [(title, len(examples(title))) for title in SECTIONS if title not in elsewhere] == [
        ("A reward of your own", 2),
        ("Prompts of your own", 1),
        ("Cut-off responses, by role", 1),
        ("Several sources", 1),
        ("A critic that sees the reference", 1),
    ]


def test_a_reward(tmp_path: Path) -> None:
    task, _ = begun(tmp_path, examples("A reward of your own")[0])
    prompt = task.prompt("train", 0)
    assert task.verify_many([(prompt, f"it is {prompt.reference}"), (prompt, "no")]) == [1.0, 0.0]
    task.close()


def test_a_reward_in_parts(tmp_path: Path) -> None:
    task, _ = begun(tmp_path, examples("A reward of your own")[1])
    prompt = task.prompt("train", 0)
    scored = asyncio.run(task.score_beside(prompt, f"so {prompt.reference}"))
    assert scored.parts == {"right": 1.0, "brief": 1.0, "words": 0.02}
    assert scored.outcome == 1.0
    assert task.verify(prompt, "no") == pytest.approx(0.2)
    task.close()


def test_prompts(tmp_path: Path) -> None:
    task, _ = begun(tmp_path, examples("Prompts of your own")[0])
    assert (task.train_size, task.heldout_size) == (16, 4)
    prompt = task.prompt("train", 3)
    assert prompt.messages[0]["content"].endswith("Use digits.")
    low, high = prompt.reference["low"], prompt.reference["high"]
    assert task.verify_many([(prompt, str(high)), (prompt, "")]) == [0.0, 0.0]
    assert high - low < 2 or task.verify(prompt, f"perhaps {low + 1}") == 1.0
    task.close()


def test_cut_off_responses(tmp_path: Path) -> None:
    _, recipe = begun(tmp_path, examples("Cut-off responses, by role")[0])
    [stage] = recipe.stages
    assert stage.overlong.cache == 128
    assert (stage.rollout.truncated_outcome, stage.rollout.truncated_critic) == ("zero", "verify")


def test_a_mixture(tmp_path: Path) -> None:
    task, _ = begun(tmp_path, examples("Several sources")[0])
    ids = [task.prompt("train", task.train_index(0, n)).id for n in range(1000)]
    assert sum(one.startswith("sums/train/") for one in ids) == 250
    assert task.heldout_size == 10


def test_a_privileged_critic(tmp_path: Path) -> None:
    task, recipe = begun(tmp_path, examples("A critic that sees the reference")[0])
    prompt = task.prompt("train", 0)
    before, _, _ = prompt_text(recipe.judging, IccState(0.5), prompt, "work", 3, 96)
    assert f"Reference: {prompt.reference}\n" in before
