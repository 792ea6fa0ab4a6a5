"""Mixtures: what is drawn, in which order, by whom it is verified."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from genac_megatron.errors import InputError
from genac_megatron.evaluation.bank import BankPrompt, from_row, to_row
from genac_megatron.recipe.loader import load_recipe
from genac_megatron.recipe.tasks import TaskConfig
from genac_megatron.records import Completion, Rollout
from genac_megatron.stages.reward_figures import earned, part_figures, source_figures, source_shares
from genac_megatron.tasks import Task, make_task
from genac_megatron.tasks.mixture import BLOCK, block_counts, draw_block
from genac_megatron.tasks.tokenizer import load_tokenizer

TINY = load_tokenizer("builtin:tiny")
OWN = {"python": "./no.py:f"}
SWAPS: dict[str, Any] = {"kind": "state_tracking", "objects": 3, "min_swaps": 1, "max_swaps": 3,
                         "train_size": 50, "heldout_size": 8}  # fmt: skip
CHAIN: dict[str, Any] = {"kind": "chained_arithmetic", "train_size": 40, "heldout_size": 4}


def mixture(*parts: Mapping[str, Any], seed: int = 3) -> Task:
    config = TypeAdapter(TaskConfig).validate_python({"kind": "mixture", "parts": list(parts)})
    return make_task(config, TINY, seed)


def two(seed: int = 3) -> Task:
    return mixture(
        {"name": "swaps", "weight": 3, "task": SWAPS},
        {"name": "chain", "weight": 1, "task": CHAIN},
        seed=seed,
    )


def drawn(task: Task, first: int, count: int, seed: int = 5) -> list[str]:
    return [task.prompt("train", task.train_index(seed, n)).id for n in range(first, first + count)]


def test_parts_are_drawn_by_weight_all_along() -> None:
    task = two()
    ids = drawn(task, 0, BLOCK)
    by_part = Counter(one.partition("/")[0] for one in ids)
    assert by_part == {"swaps": 750, "chain": 250}
    for first in range(0, BLOCK, 40):  # no batch of one part alone
        here = Counter(one.partition("/")[0] for one in ids[first : first + 40])
        assert 27 <= here["swaps"] <= 33


def test_a_resumed_run_draws_the_same_prompts() -> None:
    ids = drawn(two(), 0, 1200)
    assert drawn(two(), 990, 60) == ids[990:1050], "a task made anew, in the middle, over the edge of a block"
    task = two()
    drawn(task, 1100, 1)
    assert drawn(task, 3, 30) == ids[3:33], "going back gives the same"
    assert drawn(two(), 0, 40, seed=6) != ids[:40]


def test_each_part_goes_through_its_own_epochs() -> None:
    ids = drawn(two(), 0, 200)
    swaps = [one for one in ids if one.startswith("swaps/")]
    assert sorted(swaps[:50]) == sorted(f"swaps/train/{n}" for n in range(50))
    assert sorted(swaps[50:100]) == sorted(swaps[:50])
    assert swaps[50:100] != swaps[:50]


def test_held_out_prompts_hold_some_of_each_part() -> None:
    task = two()
    assert task.heldout_size == 12
    ids = [task.prompt("heldout", n).id for n in range(12)]
    assert len(set(ids)) == 12
    assert Counter(one.partition("/")[0] for one in ids[:4]) == {"swaps": 3, "chain": 1}
    with pytest.raises(IndexError):
        task.prompt("heldout", 12)
    with pytest.raises(IndexError):
        task.prompt("train", task.train_size)


def test_each_part_verifies_its_own_and_teaches_its_own() -> None:
    task = two()
    prompts = [task.prompt("heldout", n) for n in range(6)]
    assert {prompt.source for prompt in prompts} == {"swaps", "chain"}
    assert task.teacher is not None
    pairs = [(prompt, task.teacher.demonstrate(prompt, random.Random(0))) for prompt in prompts]
    assert task.verify_many(pairs) == [1.0] * 6
    assert [asyncio.run(task.score_beside(*pair)).outcome for pair in pairs] == [1.0] * 6
    assert task.verify_many([(prompt, "no") for prompt in prompts]) == [0.0] * 6
    assert all(prompt.success == "" for prompt in prompts)


def test_a_banks_prompts_are_verified_by_their_own_part() -> None:
    """A bank of another's states goes on from them with prompts that were written down."""
    task = two()
    for index in range(4):
        prompt = task.prompt("heldout", index)
        kept = from_row(json.loads(json.dumps(to_row(0, BankPrompt(prompt, (1.0,), "right"))))).prompt
        assert kept == prompt
        assert task.teacher is not None
        assert task.verify(kept, task.teacher.demonstrate(kept, random.Random(0))) == 1.0


@pytest.mark.parametrize(
    ("parts", "why"),
    [
        ([{"name": "a", "task": SWAPS}, {"name": "a", "task": CHAIN}],
         r"recipe.yaml:\d+: 2 parts of the mixture are called 'a'"),
        ([{"name": "a", "task": {"kind": "jsonl", "path": "./data.jsonl"}}],
         r"recipe.yaml:\d+: the task 'jsonl' has no verifier"),
        ([{"name": "a", "task": {"kind": "jsonl", "path": "./none.jsonl", "verifier": "exact"}}],
         r"recipe.yaml:\d+: there is no file \S*none.jsonl"),
        ([{"name": "a", "task": {"kind": "jsonl", "path": "./data.jsonl", "verifier": OWN}}],
         r"recipe.yaml:\d+: \S*no.py cannot be read"),
        ([{"name": "a", "task": {**SWAPS, "min_swap": 1}}],
         r"recipe.yaml:\d+: unknown key 'task.parts.0.task.min_swap'\n.*did you mean 'min_swaps'"),
        ([{"name": "a", "task": {**SWAPS, "min_swaps": 9}}], "min_swaps 9 is above max_swaps 3"),
        ([{"name": "a", "weigth": 2, "task": SWAPS}], "did you mean 'weight'"),
    ],
)  # fmt: skip
def test_a_recipe_is_told_where(tmp_path: Path, parts: list[Any], why: str) -> None:
    (tmp_path / "data.jsonl").write_text('{"question": "1?", "answer": "1"}\n')
    shape = {"layers": 2, "hidden": 32, "ffn": 64, "heads": 2, "kv_heads": 2}
    role = {"model": {"family": "qwen3", "tokenizer": "builtin:tiny", "shape": shape}}
    whole = {"name": "x", "task": {"kind": "mixture", "parts": parts}, "roles": {"actor": role},
             "stages": [{"kind": "policy", "algorithm": {"kind": "grpo"}}]}  # fmt: skip
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(whole))
    with pytest.raises(InputError, match=f"(?s){why}"):
        load_recipe(path)


def write(path: Path, *questions: str) -> dict[str, Any]:
    path.write_text("".join(f'{{"question": "{q}", "answer": "1"}}\n' for q in questions))
    return {"kind": "jsonl", "path": str(path), "verifier": "exact", "heldout_size": 2}


def test_what_one_part_holds_out_no_other_trains_on(tmp_path: Path) -> None:
    """Two files that share questions, split apart by different held-out files."""
    first = write(tmp_path / "a.jsonl", *"abcdefgh")
    second = write(tmp_path / "b.jsonl", *"abcdefgh")
    first["heldout_path"] = write(tmp_path / "ah.jsonl", "a", "b")["path"]
    second["heldout_path"] = write(tmp_path / "bh.jsonl", "c", "d")["path"]
    task = mixture({"name": "a", "task": first}, {"name": "b", "task": second})
    held = {task.prompt("heldout", n).problem for n in range(task.heldout_size)}
    trained = {task.prompt("train", n).problem for n in range(task.train_size)}
    assert held == set("abcd")
    assert trained == set("efgh")
    assert [task.prompt("train", n) for n in range(task.train_size)] == [
        task.prompt("train", n) for n in range(task.train_size)
    ]


def test_nothing_left_to_train_on(tmp_path: Path) -> None:
    first, second = write(tmp_path / "a.jsonl", *"abxyzw"), write(tmp_path / "b.jsonl", *"cd")
    first["heldout_path"] = write(tmp_path / "ah.jsonl", "c", "d")["path"]
    second["heldout_path"] = write(tmp_path / "bh.jsonl", "a", "b")["path"]
    task = mixture({"name": "a", "task": first}, {"name": "b", "task": second})
    with pytest.raises(
        InputError, match="every training problem of the part 'b' is held out by another part"
    ):
        task.prompt("train", task.train_size - 1)


def test_a_parts_fault_names_the_part(tmp_path: Path) -> None:
    bad = write(tmp_path / "a.jsonl", "a")
    (tmp_path / "a.jsonl").write_text("{")
    with pytest.raises(InputError, match=r"a.jsonl:1: part 'broken' of the mixture: not JSON"):
        mixture({"name": "swaps", "task": SWAPS}, {"name": "broken", "task": bad})


def test_success_is_told_by_part() -> None:
    config = {"kind": "mixture", "success": "all is well", "parts": [
        {"name": "a", "task": {**SWAPS, "success": "the row is right"}},
        {"name": "b", "task": CHAIN}]}  # fmt: skip
    task = make_task(TypeAdapter(TaskConfig).validate_python(config), TINY, 0)
    told = {prompt.source: prompt.success for prompt in (task.prompt("heldout", n) for n in range(8))}
    assert told == {"a": "the row is right", "b": "all is well"}


@given(weights=st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=12), seed=st.integers(0, 99))
def test_every_block_has_every_part_by_weight(weights: list[float], seed: int) -> None:
    counts = block_counts(weights)
    assert sum(counts) == BLOCK
    assert min(counts) >= 1
    exact = [BLOCK * weight / sum(weights) for weight in weights]
    tiny = sum(share < 1 for share in exact)
    assert all(abs(count - share) <= 1 + tiny for count, share in zip(counts, exact, strict=True))
    block = draw_block(counts, seed, 2)
    assert Counter(part for part, _ in block) == dict(enumerate(counts))
    for part, count in enumerate(counts):
        assert [nth for which, nth in block if which == part] == list(range(count)), "in the part's own order"


def test_figures_are_told_by_part() -> None:
    task = two()
    prompts = [task.prompt("heldout", n) for n in range(4)]
    whole = Completion((), (), "stop")
    outcomes = {"swaps": 1.0, "chain": 0.25}
    rollouts = [Rollout(p, 0, whole, "", outcomes[p.source], {"form": 0.5}) for p in prompts]
    found = earned(rollouts)
    assert source_figures(found) == {"chain": 0.25, "swaps": 1.0}
    assert source_shares(found) == {"chain": 0.25, "swaps": 0.75}
    assert part_figures(found) == {"chain.form": 0.5, "swaps.form": 0.5}


@pytest.mark.parametrize(
    ("parts", "why"),
    [
        ([], "at least 1 item"),
        ([{"name": "a b", "task": SWAPS}], "match pattern"),
        ([{"name": "a", "weight": 0, "task": SWAPS}], "greater than 0"),
        (
            [{"name": "a", "task": {"kind": "benchmark", "name": "gsm8k"}}],
            "does not match any of the expected",
        ),
        ([{"name": "a", "task": {"kind": "mixture", "parts": []}}], "does not match any of the expected"),
    ],
)
def test_what_is_no_mixture(parts: list[Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        mixture(*parts)
