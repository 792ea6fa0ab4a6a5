"""JSONL files and datasets: reading, splits, grading, and one clear message for bad data."""

from __future__ import annotations

import asyncio
import copy
import gzip
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from genac_megatron.errors import InputError
from genac_megatron.recipe.tasks import DatasetTask, JsonlTask
from genac_megatron.tasks import make_task
from genac_megatron.tasks.base import Task
from genac_megatron.tasks.fields import read_field, text_of
from genac_megatron.tasks.rows import json_lines
from genac_megatron.tasks.tokenizer import load_tokenizer

TINY = load_tokenizer("builtin:tiny")


def write(path: Path, rows: list[dict[str, object]]) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def sums(count: int, first: int = 0, **more: object) -> list[dict[str, object]]:
    numbers = range(first, first + count)
    return [{"question": f"What is {n} + {n}?", "answer": 2 * n, **more} for n in numbers]


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


def test_what_is_given_as_held_out_is_held_out_whole_unless_told(tmp_path: Path) -> None:
    train = write(tmp_path / "train.jsonl", sums(310, first=1000))
    heldout = write(tmp_path / "heldout.jsonl", sums(300))
    whole = make_task(JsonlTask(kind="jsonl", path=train, heldout_path=heldout, verifier="exact"), TINY, 0)
    assert (whole.train_size, whole.heldout_size, whole.notes) == (310, 300, [])
    cut = JsonlTask(kind="jsonl", path=train, heldout_path=heldout, verifier="exact", heldout_size=50)
    some = make_task(cut, TINY, 0)
    assert some.heldout_size == 50
    assert "250 of 300 held-out questions are left aside (task.heldout_size 50)" in some.notes[0]
    assert make_task(JsonlTask(kind="jsonl", path=train, verifier="exact"), TINY, 0).heldout_size == 256


def test_rows_that_say_they_are_held_out_are_not_lost_beside_a_held_out_file(tmp_path: Path) -> None:
    both = write(tmp_path / "both.jsonl", [*sums(10), *sums(4, split="test")])
    heldout = write(tmp_path / "heldout.jsonl", sums(3, first=20))
    config = JsonlTask(kind="jsonl", path=both, heldout_path=heldout, verifier="exact")
    with pytest.raises(InputError, match=r"both\.jsonl:11: its 'split' names a held-out split"):
        make_task(config, TINY, 0)


@pytest.mark.parametrize(
    ("line", "what"),
    [
        (b'{"question": "1 + 1?", "answer": ', "not JSON"),
        (b'["question"]', "a list, not an object"),
        (b'{"question": "1 + 1?"}', "no text under 'answer' \\(there is: question\\)"),
        (b'{"question": "", "answer": "2"}', "no text under 'question'"),
        (b'{"question": "\xff"}', "not UTF-8"),
        (b'{"question": "a?", "answer": ["3", "4"]}', "'answer': it is a list of 2"),
        (b'{"question": "a?", "answer": []}', "'answer': it is a list of 0"),
        (b'{"question": "a?", "answer": null}', "'answer': it is null"),
        (b'{"question": "a?", "answer": [null]}', "'answer': it is null"),
        (b'{"question": "a?", "answer": true}', "'answer': it is true, a boolean"),
        (b'{"question": "a?", "answer": NaN}', "'answer': it is nan, which is no number"),
        (b'{"question": "a?", "answer": -Infinity}', "'answer': it is -inf, which is no number"),
        (b'{"question": "a?", "answer": 1e999}', "'answer': it is inf, which is no number"),
        (b'{"question": "a?", "answer": 9007199254740993.0}', "may have lost digits"),
        (b'{"question": "a?", "answer": {"value": "3"}}', r"an object \(there is: answer.value\)"),
        (rb'{"question": "smile \ud83d 3+1?", "answer": "4"}', r"'question': it is no Unicode.*\\ud83d"),
        (rb'{"question": "3+1?", "answer": "\udc00"}', "'answer': it is no Unicode"),
        (b'{"question": [{"role": "user", "content": ""}], "answer": "4"}', "'question' is empty"),
        (b'{"question": [{"role": "assistant", "content": "x"}], "answer": "4"}', "nothing to answer"),
        (b'{"question": [], "answer": "4"}', "no list of messages"),
        (b'{"question": ["hi"], "answer": "4"}', "message 1: a message lacks its role"),
        (b'{"question": "a?", "answer": "4", "split": "holdoutish"}', "'split' is 'holdoutish'"),
        (b'{"question": "a?", "answer": "4", "split": 1}', "'split' is 1"),
        (b'{"question": "a?", "answer": "4", "tools": [3]}', "'tools' is no list of functions"),
        (b"[" * 100_000, "nested too deeply"),
    ],
)
def test_a_bad_line_is_named_by_file_and_line(tmp_path: Path, line: bytes, what: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"question": "ok?", "answer": "yes"}\n\n' + line + b"\n")
    with pytest.raises(InputError, match=what) as caught:
        make_task(JsonlTask(kind="jsonl", path=str(path), verifier="exact"), TINY, 0)
    assert f"{path}:3:" in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ('["3"]', "3"),
        ("[3.0]", "3"),
        ("3.0", "3"),
        ("-0.5", "-0.5"),
        ("9007199254740993", "9007199254740993"),
        ("9" * 5000, "9" * 5000),
        ('"2024-05-01"', "2024-05-01"),
        ('" 007 "', "007"),
        ('"true"', "true"),
    ],
)
def test_answers_are_read_as_meant(tmp_path: Path, written: str, meant: str) -> None:
    path = tmp_path / "one.jsonl"
    path.write_text(f'{{"question": "a?", "answer": {written}}}\n{{"question": "b?", "answer": "x"}}\n')
    config = {"name": str(path), "heldout_size": 1, "verifier": "exact"}
    for task in (
        make_task(JsonlTask(kind="jsonl", path=str(path), heldout_size=1, verifier="exact"), TINY, 0),
        make_task(DatasetTask(kind="datasets", **config), TINY, 0),
    ):
        prompts = [task.prompt("train", 0), task.prompt("heldout", 0)]
        assert {p.problem: p.reference for p in prompts} == {"a?": meant, "b?": "x"}


@pytest.mark.parametrize("name", ["val", "dev", "validation", "Test", "EVAL", "held-out", " valid "])
def test_rows_that_name_a_held_out_split_are_not_trained_on(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / "all.jsonl", [*sums(3, split="Train"), *sums(5)[3:], *sums(7, split=name)[5:]])
    for config in (
        JsonlTask(kind="jsonl", path=path, verifier="exact"),
        DatasetTask(kind="datasets", name=path, verifier="exact"),
        DatasetTask(kind="datasets", name=path, verifier="exact", split_key="split"),
    ):
        task = make_task(config, TINY, 0)
        assert problems(task, "heldout") == {"What is 5 + 5?", "What is 6 + 6?"}
        assert len(problems(task, "train")) == 5
    free = JsonlTask(kind="jsonl", path=path, verifier="exact", split_key=None, heldout_size=2)
    assert make_task(free, TINY, 0).train_size == 5, "the column says something else: a seeded share"


def verl(number: int, **more: object) -> dict[str, object]:
    return {
        "data_source": "sums",
        "prompt": [{"role": "user", "content": f"{number}+3?"}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": str(number + 3)},
        "extra_info": {"index": number, "answer": None},
        **more,
    }


@pytest.mark.parametrize("form", ["jsonl", "datasets", "parquet", "dataset", "dict", "folder", "gz"])
def test_verls_rows_in_every_form_of_storage(
    tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from datasets import Dataset, DatasetDict

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    rows, held = [verl(n) for n in range(4)], [verl(n) for n in (8, 9)]
    both = [{**row, "split": "train"} for row in rows] + [{**row, "split": "val"} for row in held]
    path = tmp_path / "data"
    config: dict[str, object] = {"kind": "datasets", "name": str(path), "heldout_size": 2}
    if form == "dataset":
        Dataset.from_list(both).save_to_disk(path)
    elif form == "dict":
        DatasetDict(train=Dataset.from_list(rows), val=Dataset.from_list(held)).save_to_disk(path)
        config["heldout_split"] = "val"
    elif form == "folder":
        path.mkdir()
        Dataset.from_list(rows).to_parquet(path / "train-00000.parquet")
        Dataset.from_list(held).to_parquet(path / "test.parquet")
        config["heldout_split"] = "test"
    elif form == "parquet":
        config["name"] = str(path) + ".parquet"
        Dataset.from_list(both).to_parquet(config["name"])
    else:
        file = write(tmp_path / "all.jsonl", [*rows, *({**row, "split": "dev"} for row in held)])
        if form == "gz":
            Path(f"{file}.gz").write_bytes(gzip.compress(Path(file).read_bytes()))
            file += ".gz"
        config["name"] = file
    if form == "jsonl":
        config = {"kind": "jsonl", "path": config["name"]}
    make = JsonlTask if form == "jsonl" else DatasetTask
    task = make_task(make.model_validate({**config, "verifier": "exact"}), TINY, 0)
    found = [task.prompt("train", n) for n in range(task.train_size)]
    assert {(p.messages[0]["content"], p.reference) for p in found} == {
        (f"{n}+3?", str(n + 3)) for n in range(4)
    }
    assert all(len(p.messages) == 1 for p in found), "chat messages are shown as they are"
    assert problems(task, "heldout") == {"8+3?", "9+3?"}


def test_keys_with_dots_system_prompts_and_instructions(tmp_path: Path) -> None:
    rows = [{"a": {"b": [f"{n}?"]}, "x.y": n, "chat": verl(n)["prompt"]} for n in range(3)]
    rows[2]["chat"] = [{"role": "system", "content": "own"}, {"role": "user", "content": "hi"}]
    path = write(tmp_path / "rows.jsonl", rows)
    plain = {"kind": "jsonl", "path": path, "heldout_size": 1, "verifier": "exact", "answer_key": "x.y"}
    config = JsonlTask.model_validate({**plain, "question_key": "a.b.0", "system": "be brief"})
    prompt = make_task(config, TINY, 0).prompt("train", 0)
    assert prompt.messages[0] == {"role": "system", "content": "be brief"}
    assert prompt.messages[1]["content"].startswith(f"{prompt.reference}?\n\nThink step by step")
    assert prompt.problem == f"{prompt.reference}?"
    config = JsonlTask.model_validate(
        {**plain, "question_key": "chat", "system": "be brief", "instruction": "Now."}
    )
    task = make_task(config, TINY, 0)
    shown = [task.prompt(split, n) for split, n in (("train", 0), ("train", 1), ("heldout", 0))]  # type: ignore[arg-type]
    by_answer = {p.reference: p for p in shown}
    assert [m["content"] for m in by_answer["1"].messages] == ["be brief", "1+3?\n\nNow."]
    assert [m["content"] for m in by_answer["2"].messages] == ["own", "hi\n\nNow."]
    assert by_answer["2"].problem == "system: own\n\nuser: hi"
    with pytest.raises(InputError, match=r"no text under 'reward' \(there is: a.b, x.y, chat\)"):
        make_task(JsonlTask.model_validate({**plain, "answer_key": "reward"}), TINY, 0)


TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


def test_tools_of_a_row_are_shown_by_the_template_or_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", sums(4, tools=[TOOL]))
    config = JsonlTask(kind="jsonl", path=path, heldout_size=1, verifier="exact")
    with pytest.raises(InputError, match=r"rows.jsonl:\d: the chat template .* leaves out .*the tool add"):
        make_task(config, TINY, 0).prompt("train", 0)
    knowing = load_tokenizer("builtin:tiny")
    knowing.chat_template = "{{ tools | tojson if tools }}" + str(knowing.chat_template)
    prompt = make_task(config, knowing, 0).prompt("train", 0)
    assert prompt.tools == (TOOL,)
    assert '"name": "add"' in knowing.decode(prompt.ids)


def test_what_a_template_refuses_or_drops_is_named_by_line(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", sums(2))
    strict, dropping, named = (load_tokenizer("builtin:tiny") for _ in range(3))
    strict.chat_template = "{{ raise_exception('roles must alternate from user') }}"
    dropping.chat_template = "{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}"
    named.chat_template = {"rag": "x"}
    config = {"kind": "jsonl", "path": path, "heldout_size": 1, "verifier": "exact", "system": "short"}
    for tokenizer, what in (
        (strict, "refuses these messages: roles must alternate"),
        (dropping, "leaves out .*the system message"),
        (named, "refuses these messages"),
    ):
        task = make_task(JsonlTask.model_validate(config), tokenizer, 0)
        with pytest.raises(InputError, match=rf"rows.jsonl:\d: the chat template .*{what}"):
            task.prompt("train", 0)


def test_questions_with_different_answers(tmp_path: Path) -> None:
    rows = [
        *sums(4),
        {"question": "What is  3 + 3?", "answer": 7},
        {"question": "What is 2 + 2?", "answer": 4},
    ]
    path = write(tmp_path / "rows.jsonl", rows)
    config = {"kind": "jsonl", "path": path, "heldout_size": 1, "verifier": "exact"}
    with pytest.raises(InputError, match=r"1 questions .*:4 \('6'\) and .*:5 \('7'\)"):
        make_task(JsonlTask.model_validate(config), TINY, 0)
    task = make_task(JsonlTask.model_validate({**config, "conflicting": "drop"}), TINY, 0)
    assert problems(task, "train") | problems(task, "heldout") == {f"What is {n} + {n}?" for n in range(3)}
    assert "left out" in task.notes[0]


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
    with pytest.raises(InputError, match=r"train.jsonl:1: no text under 'solution'"):
        make_task(DatasetTask(kind="datasets", name=path, answer_key="solution", verifier="exact"), TINY, 0)
    with pytest.raises(InputError, match="one set of rows"):
        make_task(DatasetTask(kind="datasets", name=path, heldout_split="test", verifier="exact"), TINY, 0)
    with pytest.raises(InputError, match=r"cannot load split 'nope': it has train"):
        make_task(DatasetTask(kind="datasets", name=str(tmp_path), split="nope", verifier="exact"), TINY, 0)


@pytest.mark.parametrize("form", ["file", "folder"])
def test_a_broken_line_of_a_dataset_is_named(
    tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "data"
    folder.mkdir()
    path = folder / "train.jsonl"
    path.write_text('{"question":"a?","answer":"1"}\n{"question":"b?","answer":\n')
    config = DatasetTask(kind="datasets", name=str(path if form == "file" else folder), verifier="exact")
    with pytest.raises(InputError, match=r"train.jsonl:2: not JSON"):
        make_task(config, TINY, 0)


def test_csv_cells_are_text_and_json_may_be_one_array(tmp_path: Path) -> None:
    table, array = tmp_path / "rows.csv", tmp_path / "rows.json"
    table.write_text('\ufeffquestion,answer\n"a, or\nb?",007\nc?,2024-05-01\n')
    array.write_text(
        json.dumps([{"question": "a, or\nb?", "answer": "007"}, {"question": "c?", "answer": 1}])
    )
    config = {"kind": "datasets", "heldout_size": 1, "verifier": "exact"}
    task = make_task(DatasetTask.model_validate({**config, "name": str(table)}), TINY, 0)
    found = [task.prompt("train", 0), task.prompt("heldout", 0)]
    assert {p.reference: p.where for p in found} == {"007": f"{table}:2", "2024-05-01": f"{table}:4"}
    task = make_task(DatasetTask.model_validate({**config, "name": str(array)}), TINY, 0)
    assert {task.prompt("train", 0).reference, task.prompt("heldout", 0).reference} == {"007", "1"}
    table.write_text("question,answer\na?,1,2\n")
    with pytest.raises(InputError, match=r"rows.csv:2: 1 cells more"):
        make_task(DatasetTask.model_validate({**config, "name": str(table)}), TINY, 0)


def test_types_of_parquet_columns(tmp_path: Path) -> None:
    import datetime
    from decimal import Decimal

    from datasets import Dataset

    def reference(value: object) -> object:
        path = tmp_path / "typed.parquet"
        Dataset.from_dict({"question": ["a?", "b?"], "answer": [value, value]}).to_parquet(path)
        config = DatasetTask(kind="datasets", name=str(path), heldout_size=1, verifier="exact")
        return make_task(config, TINY, 0).prompt("train", 0).reference

    assert reference(datetime.date(2024, 5, 1)) == "2024-05-01"
    assert reference(Decimal("3.00")) == "3"
    assert reference(Decimal("3.50")) == "3.5"
    for value, what in (
        (datetime.datetime(2024, 5, 1, 3), "a datetime 2024-05-01 03:00:00"),
        (b"3", "a bytes"),
        (float("nan"), "nan"),
    ):
        with pytest.raises(InputError, match=rf"typed.parquet, row 0: no text under 'answer': it is {what}"):
            reference(value)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec=None)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


def refusal(act: Callable[[], Any]) -> tuple[Any, str]:
    """(what comes of it, ""), or (None, the message of the refusal)."""
    try:
        return act(), ""
    except InputError as error:
        return None, str(error)


@given(JSON)
def test_any_value_is_text_or_refused_with_its_place(value: object) -> None:
    line = json.dumps({"answer": value}).encode()
    ((where, row),) = json_lines(line, "x.jsonl")
    text, refused = refusal(lambda: read_field(row, "answer", where))
    if refused:
        assert refused.startswith("x.jsonl:1: no text under 'answer': it is ")
    else:
        assert text == text.strip() != ""
        assert text.encode("utf-8").decode() == text
        assert text_of(text) == text


@given(st.binary(max_size=60))
def test_any_bytes_are_rows_or_refused_with_a_line(data: bytes) -> None:
    rows, refused = refusal(lambda: list(json_lines(data, "x.jsonl")))
    assert re.match(r"x\.jsonl:\d+: ", refused) if refused else all(isinstance(r, dict) for _, r in rows)
