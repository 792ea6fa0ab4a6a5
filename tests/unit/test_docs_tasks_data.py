"""The examples of the docs on data forms: each block of rows with the recipe's block under it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import TypeAdapter

from genac_megatron.recipe.schema import SftStage
from genac_megatron.recipe.tasks import TaskConfig
from genac_megatron.stages.sft_chats import chat_samples, used_conversations
from genac_megatron.tasks import make_task
from genac_megatron.tasks.tokenizer import load_tokenizer

TEXT = (Path(__file__).parents[2] / "docs" / "tasks.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"### ([^\n]*)\n```jsonl\n(.*?)```\n```yaml\n(.*?)```", TEXT, re.DOTALL)
CHATS = re.findall(r"## Conversations for SFT\n```jsonl\n(.*?)```\n```yaml\n(.*?)```", TEXT, re.DOTALL)
TINY = load_tokenizer("builtin:tiny")
TINY.chat_template = "{{ tools | tojson if tools }}" + str(TINY.chat_template)


def stored(rows: str, path: Path) -> None:
    from datasets import Dataset

    if path.suffix == ".jsonl":
        path.write_text(rows)
        return
    data = Dataset.from_list([json.loads(row) for row in rows.splitlines()])
    if path.suffix == ".parquet":
        data.to_parquet(path)
    else:
        data.save_to_disk(path)


@pytest.mark.parametrize(
    ("rows", "recipe"), [example[1:] for example in EXAMPLES], ids=[e[0] for e in EXAMPLES]
)
def test_rows_are_read_as_the_docs_say(rows: str, recipe: str, tmp_path: Path) -> None:
    block: dict[str, Any] = yaml.safe_load(recipe)["task"]
    key = "path" if "path" in block else "name"
    block[key] = str(tmp_path / block[key])
    count = len(rows.splitlines())
    stored(rows, Path(block[key]))
    task = make_task(TypeAdapter(TaskConfig).validate_python(block), TINY, 0)
    assert (task.train_size, task.heldout_size) == (count - 1, 1)
    prompts = [task.prompt("train", n) for n in range(count - 1)] + [task.prompt("heldout", 0)]
    assert {p.reference for p in prompts} >= {"5", "8"}
    assert all(task.verify(p, f"\\boxed{{{p.reference}}}") == 1.0 for p in prompts)
    assert all(("Use the tools." in p.messages[0]["content"]) == ("system" in block) for p in prompts)


def test_there_are_examples() -> None:
    assert len(EXAMPLES) == 5
    assert len(CHATS) == 1


def test_conversations_are_learnt_as_the_docs_say(tmp_path: Path) -> None:
    ((rows, recipe),) = CHATS
    block = yaml.safe_load(recipe)["stages"][0]
    stage = SftStage.model_validate({**block, "path": str(tmp_path / block["path"])})
    (tmp_path / block["path"]).write_text(rows)
    ((chat,), count) = used_conversations(stage)
    samples = chat_samples(TINY, chat, stage)
    assert count == 1
    assert [TINY.decode(s.tokens[s.start :]) for s in samples] == ["one<|im_end|>", "two<|im_end|>"]
    assert all(TINY.decode(s.tokens).startswith("<|im_start|>system\nBe brief.") for s in samples)
