"""Training prompts are made by the rank that plays them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import TypeAdapter

from genac_megatron.recipe.tasks import TaskConfig
from genac_megatron.stages.batch import shared_out, train_prompts
from genac_megatron.stages.rollouts import Asked
from genac_megatron.tasks import make_task
from genac_megatron.tasks.tokenizer import load_tokenizer


@pytest.mark.parametrize("ranks", [1, 3])
def test_each_rank_makes_its_share_of_the_prompts(ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    block = {"kind": "state_tracking", "train_size": 7, "heldout_size": 2}
    task = make_task(TypeAdapter(TaskConfig).validate_python(block), load_tokenizer("builtin:tiny"), 0)
    made, real = list[int](), task.prompt
    monkeypatch.setattr(task, "prompt", lambda split, index: made.append(index) or real(split, index))
    found: dict[int, Any] = {}
    for rank in range(ranks):
        run: Any = SimpleNamespace(  # no more of a run is used
            task=task,
            recipe=SimpleNamespace(seed=3),
            together=lambda act: act(),
            share=lambda items, rank=rank: list(items[rank::ranks]),
            places=lambda count: range(0),
        )
        asked = train_prompts(run, 2, 10)
        assert len(asked) == 10
        made.clear()
        share, turns, _ = shared_out(run, asked)
        assert made == asked.indices[rank::ranks]
        found |= dict(zip(range(10)[rank::ranks], zip(share, turns, strict=True), strict=True))
    wanted = [real("train", task.train_index(3, 2 + k)) for k in range(10)]
    assert [found[k][0] for k in range(10)] == wanted
    # The second epoch begins after five: some of its first prompts stood in the batch already.
    seen = [prompt.id for prompt in wanted]
    assert [found[k][1] for k in range(10)] == [seen[:k].count(seen[k]) for k in range(10)]
    assert [prompt.id for prompt in asked[3:5]] == seen[3:5]


def test_a_mistake_of_a_task_is_not_the_end_of_its_prompts() -> None:
    def prompt(split: str, index: int) -> int:
        return [5, 6][index]

    task: Any = SimpleNamespace(prompt=prompt)  # no more of a task is used
    assert list(Asked(task, [1, 0])) == [6, 5]
    with pytest.raises(IndexError):
        list(Asked(task, [0, 2, 1]))
