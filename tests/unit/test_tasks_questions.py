"""JSONL files and datasets: reading, splits, grading, and one clear message for bad data."""

from __future__ import annotations

import asyncio
import copy
import json
from pathlib import Path

import pytest

from genac_megatron.errors import InputError
from genac_megatron.recipe.tasks import DatasetTask, JsonlTask
from genac_megatron.tasks import make_task
from genac_megatron.tasks.base import Task
from genac_megatron.tasks.tokenizer import load_tokenizer

TINY = load_tokenizer("builtin:tiny")


def write(path: Path, rows: list[dict[str, object]]) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def sums(count: int, **more: object) -> list[dict[str, object]]:
    return [{"question": f"What is {n} + {n}?", "answer": 2 * n, **more} for n in range(count)]


def problems(task: Task, split: str) -> set[str]:
    size = task.train_size if split == "train" else task.heldout_size
    return {task.prompt(split, index).problem for index in range(size)}  # type: ignore[arg-type]


def test_jsonl_with_a_seeded_share_held_out(tmp_path: Path) -> None:
    path = write(tmp_path / "sums.jsonl", [*sums(20), *sums(20)])  # each problem twice
    config = JsonlTask(kind="jsonl", path=path, heldout_size=6, verifier="exact")
    task, again, other = (make_task(config, TINY, seed) for seed in (1, 1, 2))
    assert (task.train_size, task.heldout_size) == (14, 6)
    assert not problems(task, "train") & problems(task, "heldout")
    assert problems(task, "heldout") == problems(again, "heldout") != problems(other, "heldout")
    prompt = task.prompt("heldout", 0)
    assert "boxed" in prompt.messages[0]["content"]
    assert "boxed" not in prompt.problem
    assert TINY.decode(prompt.ids).endswith("<|im_start|>assistant\n")
    assert task.verify(prompt, f"\\boxed{{{prompt.reference}}}") == 1.0
    assert task.verify(prompt, "\\boxed{-1}") == 0.0


def test_a_cut_off_response_earns_by_what_is_closed_in_it(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", sums(3))
    task = make_task(JsonlTask(kind="jsonl", path=path, heldout_size=1, verifier="exact"), TINY, 1)
    prompt = task.prompt("heldout", 0)
    right = prompt.reference
    texts = [f"so \\boxed{{{right}}} and", f"so\n{right}", f"Answer: {right}", f"Answer: {right}\nFor"]
    pairs = [(prompt, text) for text in texts]
    assert task.verify_many(pairs) == [1.0, 1.0, 1.0, 1.0]
    assert task.verify_many(pairs, {0, 1, 2, 3}) == [1.0, 0.0, 0.0, 1.0]
    for text, wanted in zip(texts, [1.0, 0.0, 0.0, 1.0], strict=True):
        assert asyncio.run(task.verify_beside(prompt, text, cut_off=True)) == wanted


def test_reasoning_that_the_template_opens_is_no_answer(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", sums(3))
    tokenizer = copy.deepcopy(TINY)
    tokenizer.chat_template = "{{ messages[-1]['content'] }}<think>\n"
    task = make_task(JsonlTask(kind="jsonl", path=path, heldout_size=1, verifier="exact"), tokenizer, 1)
    prompt = task.prompt("heldout", 0)
    assert tokenizer.decode(prompt.ids).endswith("<think>")
    right = f"\\boxed{{{prompt.reference}}}"
    assert task.verify(prompt, f"perhaps {right}") == 0.0
    assert task.verify(prompt, f"perhaps \\boxed{{-1}}</think>{right}") == 1.0


def test_jsonl_split_by_a_second_file_or_by_a_key(tmp_path: Path) -> None:
    train = write(tmp_path / "train.jsonl", sums(10))
    heldout = write(tmp_path / "heldout.jsonl", sums(4))
    both = write(tmp_path / "both.jsonl", [*sums(10), *sums(4, split="test")])
    for config in (
        JsonlTask(kind="jsonl", path=train, heldout_path=heldout, verifier="exact"),
        JsonlTask(kind="jsonl", path=both, verifier="exact"),
    ):
        task = make_task(config, TINY, 0)
        assert problems(task, "heldout") == {f"What is {n} + {n}?" for n in range(4)}
        assert problems(task, "train") == {f"What is {n} + {n}?" for n in range(4, 10)}


@pytest.mark.parametrize(
    ("line", "what"),
    [
        (b'{"question": "1 + 1?", "answer": ', "not JSON"),
        (b'["question"]', "a list, not an object"),
        (b'{"question": "1 + 1?"}', "no text under 'answer' \\(there is: question\\)"),
        (b'{"question": "", "answer": "2"}', "no text under 'question'"),
        (b'{"question": "\xff"}', "not UTF-8"),
    ],
)
def test_a_bad_line_is_named_by_file_and_line(tmp_path: Path, line: bytes, what: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"question": "ok?", "answer": "yes"}\n\n' + line + b"\n")
    with pytest.raises(InputError, match=what) as caught:
        make_task(JsonlTask(kind="jsonl", path=str(path), verifier="exact"), TINY, 0)
    assert f"{path}:3:" in str(caught.value)
    assert caught.value.exit_code == 2


def test_jsonl_that_cannot_serve(tmp_path: Path) -> None:
    path = write(tmp_path / "sums.jsonl", sums(3))
    with pytest.raises(InputError, match="no verifier"):
        make_task(JsonlTask(kind="jsonl", path=path), TINY, 0)
    with pytest.raises(InputError, match="do not suffice for heldout_size 3"):
        make_task(JsonlTask(kind="jsonl", path=path, heldout_size=3, verifier="exact"), TINY, 0)
    with pytest.raises(InputError, match="cannot be read"):
        make_task(JsonlTask(kind="jsonl", path=str(tmp_path / "no.jsonl"), verifier="exact"), TINY, 0)


GSM: list[dict[str, object]] = [
    {
        "question": f"Ann has {n} pens and buys {n} more. How many?",
        "answer": f"{n}+{n}={2 * n}\n#### {2 * n:,}",
    }
    for n in range(400, 440)
]


@pytest.mark.parametrize("form", ["file", "folder"])
def test_datasets_from_local_data_in_gsm8k_form(
    tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "gsm"
    folder.mkdir()
    path = write(folder / "train.jsonl", GSM[:30])
    write(folder / "test.jsonl", GSM[20:])
    config = DatasetTask(
        kind="datasets",
        name=path if form == "file" else str(folder),
        heldout_split=None if form == "file" else "test",
        heldout_size=8,
        answer_pattern=r"#### (.*)",
        verifier="math",
    )
    task = make_task(config, TINY, 0)
    assert task.heldout_size == 8
    assert not problems(task, "train") & problems(task, "heldout")
    prompt = task.prompt("heldout", 0)
    figure = prompt.reference.replace(",", "")
    assert task.verify_many([(prompt, f"\\boxed{{{figure}}}"), (prompt, "\\boxed{3}")]) == [1.0, 0.0]


def test_datasets_that_cannot_serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    path = write(tmp_path / "train.jsonl", GSM)
    with pytest.raises(InputError, match="finds nothing"):
        make_task(
            DatasetTask(kind="datasets", name=path, answer_pattern=r"Answer: (.*)", verifier="exact"), TINY, 0
        )
    with pytest.raises(InputError, match="no group"):
        make_task(DatasetTask(kind="datasets", name=path, answer_pattern="####", verifier="exact"), TINY, 0)
    with pytest.raises(InputError, match=r"none of \.jsonl"):
        make_task(DatasetTask(kind="datasets", name=__file__, verifier="exact"), TINY, 0)
    with pytest.raises(InputError, match=r"row 0.*no text under 'solution'"):
        make_task(DatasetTask(kind="datasets", name=path, answer_key="solution", verifier="exact"), TINY, 0)
