"""Rows as people store them: what is read as meant, and what is refused by file, line and way out."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from genac_megatron.errors import InputError
from genac_megatron.recipe.tasks import DatasetTask, JsonlTask
from genac_megatron.tasks import make_task
from genac_megatron.tasks.base import Problem, split_problems
from genac_megatron.tasks.conversations import read_conversations
from genac_megatron.tasks.fields import MISSING, look_up, read_tools
from genac_megatron.tasks.questions import QuestionTask
from genac_megatron.tasks.rows import read_rows
from genac_megatron.tasks.tokenizer import load_tokenizer

TINY = load_tokenizer("builtin:tiny")
GOOD: dict[str, Any] = {"question": "1+1?", "answer": "2"}
ASKED = [{"role": "user", "content": "2+3?"}]
TOOL = {"type": "function", "function": {"name": "add", "parameters": {}}}


def lines(*rows: dict[str, Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def task_of(path: Path, **keys: Any) -> QuestionTask:
    keys = {"verifier": "exact", "heldout_size": 1} | keys
    task = make_task(JsonlTask(kind="jsonl", path=str(path), **keys), TINY, 0)
    assert isinstance(task, QuestionTask)
    return task


def asked(task: QuestionTask) -> dict[str, Any]:
    prompts = [task.prompt("train", n) for n in range(task.train_size)]
    prompts += [task.prompt("heldout", n) for n in range(task.heldout_size)]
    return {prompt.problem: prompt.reference for prompt in prompts}


@pytest.mark.parametrize(
    ("row", "keys"),
    [
        ({"prompt": json.dumps(ASKED), "reward_model": {"ground_truth": "5"}}, {}),
        ({"prompt": ASKED, "reward_model": json.dumps({"style": "rule", "ground_truth": 5})}, {}),
        ({"question": [{"from": "human", "value": "2+3?"}], "answer": "5"}, {}),
        ({"question": "2+3?", "answer": "5", "tools": "null", "split": ""}, {}),
        ({"question": "2+3?", "answer": "5", "tools": {}, "split": float("nan")}, {}),
        ({"question": "2+3?", "answer": "5", "tools": float("nan")}, {}),
    ],
)
def test_rows_of_other_forms_are_read_as_meant(tmp_path: Path, row: dict[str, Any], keys: Any) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(lines(row, GOOD))
    task = task_of(path, **keys)
    assert asked(task) == {"2+3?": "5", "1+1?": "2"}


@pytest.mark.parametrize(
    ("row", "key"),
    [
        ({"a.b": "x"}, "a.b"),
        ({"meta": {"q.text": "x"}}, "meta.q.text"),
        ({"v1.0": {"text": "x"}}, "v1.0.text"),
        ({"v1.0": [{"a.b": {"c": "x"}}]}, "v1.0.0.a.b.c"),
        ({"v1": {"1": "no"}, "v1.0": {"text": "x"}}, "v1.0.text"),
        ({"a": '{"b": ["x"]}'}, "a.b.0"),
    ],
)
def test_keys_may_hold_dots(row: dict[str, Any], key: str) -> None:
    assert look_up(row, key) == "x"


@given(st.lists(st.text("ab.", min_size=1, max_size=4), min_size=1, max_size=4))
def test_whatever_lies_under_a_path_is_found(path: list[str]) -> None:
    row: Any = "x"
    for key in reversed(path):
        row = {key: row}
    assert look_up(row, ".".join(path)) == "x"
    assert look_up(row, "c") is MISSING


@pytest.mark.parametrize("given", [[TOOL], TOOL, json.dumps([TOOL]), json.dumps(TOOL), [json.dumps(TOOL)]])
def test_tools_in_every_writing(given: object) -> None:
    assert read_tools({"tools": given}, "tools", "here") == (TOOL,)


PUBLIC: dict[str, tuple[dict[str, Any], dict[str, Any], tuple[str, str]]] = {
    "GSM8K": ({"question": "Q?", "answer": "1 + 1\n#### 72"}, {}, ("Q?", "1 + 1\n#### 72")),
    "GSM8K by a pattern": (
        {"question": "Q?", "answer": "1 + 1\n#### 1,072"},
        {"answer_pattern": r"#### (.+)"},
        ("Q?", "1,072"),
    ),
    "MATH": (
        {"problem": "Q?", "level": "Level 5", "type": "Algebra", "solution": "so $\\boxed{2}$"},
        {"question_key": "problem", "answer_key": "solution"},
        ("Q?", "so $\\boxed{2}$"),
    ),
    "DAPO-Math-17k": (
        {
            "data_source": "math_dapo",
            "prompt": [{"content": "Solve: Q?", "role": "user"}],
            "ability": "MATH",
            "reward_model": {"ground_truth": "34", "style": "rule-lighteval/MATH_v2"},
            "extra_info": {"index": "9a9b"},
        },
        {},
        ("Solve: Q?", "34"),
    ),
    "OpenR1-Math": (
        {
            "problem": "Q?",
            "solution": "s",
            "answer": "3",
            "generations": ["a", "b"],
            "correctness_math_verify": [True, False],
            "messages": [{"content": "Q?", "role": "user"}],
        },
        {"question_key": "problem"},
        ("Q?", "3"),
    ),
    "Open-Reasoner-Zero": (
        {"0": {"from": "human", "value": "Q?"}, "1": {"from": "assistant", "ground_truth": {"value": "7"}}},
        {"question_key": "0.value", "answer_key": "1.ground_truth.value"},
        ("Q?", "7"),
    ),
    "AIME": (
        {"ID": "I-1", "Problem": "Q?", "Answer": 204},
        {"question_key": "Problem", "answer_key": "Answer"},
        ("Q?", "204"),
    ),
    "Tulu 3's RLVR": (
        {"messages": [{"content": "Q?", "role": "user"}], "ground_truth": "72", "dataset": "gsm8k"},
        {"question_key": "messages", "answer_key": "ground_truth"},
        ("Q?", "72"),
    ),
    "TriviaQA": (
        {"question": "Q?", "answer": {"value": "a", "aliases": []}},
        {"answer_key": "answer.value"},
        ("Q?", "a"),
    ),
    "choices in the question": (
        {"question": "Q?\nA. w\nB. x", "choices": ["w", "x"], "answer": "B"},
        {},
        ("Q?\nA. w\nB. x", "B"),
    ),
    "a right choice in words": ({"question": "Q?", "choices": ["2", "4"], "answer": "4"}, {}, ("Q?", "4")),
    "options that are no choices": (
        {"question": "Q?", "options": {"level": "hard", "language": "en"}, "answer": "2"},
        {},
        ("Q?", "2"),
    ),
    "no choices": ({"question": "Q?", "choices": [], "options": None, "answer": "1"}, {}, ("Q?", "1")),
}


@pytest.mark.parametrize("name", PUBLIC)
def test_rows_of_public_sets_are_read_as_meant(tmp_path: Path, name: str) -> None:
    row, keys, found = PUBLIC[name]
    (tmp_path / "x.jsonl").write_bytes(lines(row, json.loads(json.dumps(row).replace("Q?", "R?"))))
    config = DatasetTask(
        kind="datasets", name=str(tmp_path / "x.jsonl"), verifier="exact", heldout_size=1, **keys
    )
    task = make_task(config, TINY, 0)
    assert isinstance(task, QuestionTask)
    assert asked(task)[found[0]] == found[1]


@pytest.mark.parametrize(
    ("choices", "answer"),
    [
        ({"choices": ["w", "x", "y", "z"]}, 1),  # MMLU
        ({"choices": {"text": ["w", "x"], "label": ["A", "B"]}}, "B"),  # ARC
        ({"options": ["A)21", "B)21.5"]}, "A"),  # AQuA-RAT
        ({"options": {"A": "w", "B": "x"}}, "B"),  # MedQA
        ({"options": [{"label": "A", "text": "w"}, {"label": "B", "text": "x"}]}, "(B)"),
        ({"choices": '["w", "x"]'}, "0"),  # a cell of CSV
    ],
)
def test_choices_that_the_question_does_not_show_are_told(
    tmp_path: Path, choices: dict[str, Any], answer: Any
) -> None:
    """A number or a letter that the actor could only guess would be the reward."""
    (tmp_path / "x.jsonl").write_bytes(lines(GOOD, {"question": "Q?", "answer": answer, **choices}))
    with pytest.raises(
        InputError, match=r"x.jsonl:2: the answer .* which the question does not show"
    ) as caught:
        task_of(tmp_path / "x.jsonl")
    assert "write the choices into the question" in str(caught.value)


STORED: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    "an array in a file for lines": ("x.jsonl", lambda data: b"[" + b",".join(data.splitlines()) + b"]"),
    "the same, printed": (
        "x.jsonl",
        lambda data: json.dumps(list(map(json.loads, data.splitlines())), indent=1).encode(),
    ),
    "gzip by another name": ("x.jsonl", gzip.compress),
    "ndjson": ("x.ndjson", bytes),
    "a mark before gzip's content": ("x.json.gz", lambda data: gzip.compress(b"\xef\xbb\xbf" + data)),
}


@pytest.mark.parametrize("form", STORED)
def test_files_in_other_dress(tmp_path: Path, form: str) -> None:
    name, dress = STORED[form]
    (tmp_path / name).write_bytes(dress(lines(GOOD, {"question": "b?", "answer": "007"})))
    assert [row for _, row in read_rows(tmp_path / name)] == [GOOD, {"question": "b?", "answer": "007"}]


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n"
BROKEN = gzip.compress(b"x" * 10 + bytes(range(256)) * 9)
REFUSED: dict[str, tuple[str, bytes, str]] = {
    "nothing": ("x.jsonl", b"", "no row in it"),
    "a header alone": ("x.csv", b"question,answer\n", "no row in it"),
    "a broken archive": (
        "x.jsonl.gz",
        BROKEN[:15] + b"\xff\xff\xff" + BROKEN[18:],
        "cannot be read.*\n.*fetch it",
    ),
    "an archive cut short": ("x.jsonl.gz", BROKEN[:-20], "cannot be read.*\n.*fetch it"),
    "a pointer": ("x.jsonl", LFS, "pointer of Git LFS"),
    "a pointer to Parquet": ("x.parquet", LFS, "pointer of Git LFS"),
    "a key twice": (
        "x.jsonl",
        b'{"question": "a?", "answer": "1", "answer": "2"}',
        "x.jsonl:1: the key 'answer'",
    ),
    "half a pair in a tool": (
        "x.jsonl",
        b'{"question": "a?", "answer": "1", "tools": [{"name": "\\ud83d"}]}',
        "'tools'",
    ),
    "messages of Python": (
        "x.jsonl",
        lines({"question": str(ASKED), "answer": "5"}),
        "as Python prints them",
    ),
    "an unknown speaker": (
        "x.jsonl",
        lines({"question": [{"from": "me", "value": "a"}], "answer": "5"}),
        "from 'me'",
    ),
    "a column twice": ("x.csv", b"question,answer,answer\na,1,2\n", "x.csv:1: two columns"),
    "semicolons": ("x.csv", b"question;answer\na;1\n", "x.csv:1: one column"),
    "an open quote": ("x.csv", b'question,answer\na,1\n"b,1\n', "x.csv:3: not CSV"),
    "tabs in a table of commas": (
        "x.csv",
        b"question\tanswer\na\t1\n",
        "x.csv:1: one column(.|\n)*by commas",
    ),
    "commas in a table of tabs": ("x.tsv", b"question,answer\na,1\n", "x.tsv:1: one column(.|\n)*by tabs"),
    "a tab too many": ("x.tsv", b"question\tanswer\na\tb\t1\n", "x.tsv:2: 1 cells more(.|\n)*with tabs"),
    "a tab too few": ("x.tsv", b"question\tanswer\na\t1\nb\n", "x.tsv:3: no text under 'answer': it is null"),
    "a quote open in a table of tabs": ("x.tsv", b'question\tanswer\n"tis a\t1\nb\t2\n', "x.tsv:2: not TSV"),
    "words behind a quote": ("x.tsv", b'question\tanswer\n"a" is what?\t1\n', "x.tsv:2: not TSV"),
    "tabs that are not UTF-8": ("x.tsv", b"question\tanswer\n\xff\t1\n", "x.tsv:2: not UTF-8"),
    "quotes behind slashes": ("x.csv", b'question,answer\n"a \\"x\\" b",1\n', "x.csv:2: not CSV"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_meant_is_refused(tmp_path: Path, name: str) -> None:
    file, data, what = REFUSED[name]
    (tmp_path / file).write_bytes(data)
    with pytest.raises(InputError, match=what) as caught:
        task_of(tmp_path / file)
    assert file in str(caught.value)
    assert caught.value.way_out


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"it is a folder(.|\n)*kind: datasets"):
        read_rows(tmp_path)


def test_blanks_around_names_of_columns_are_not_part_of_them(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("question, answer\na, 007\nb, 1e3\n")
    assert asked(task_of(tmp_path / "x.csv")) == {"a": "007", "b": "1e3"}


TABBED = 'question\tanswer\na, or "b"?\t007\n"two\nlines\tand ""a tab""?"\t1,5\n'


@pytest.mark.parametrize("dress", ["x.tsv", "x.TSV", "x.tsv.gz"])
def test_tables_of_tabs_are_read_as_pandas_writes_them(tmp_path: Path, dress: str) -> None:
    data = b"\xef\xbb\xbf" + TABBED.replace("\n", "\r\n").replace("two\r", "two").encode()
    (tmp_path / dress).write_bytes(gzip.compress(data) if dress.endswith(".gz") else data)
    found = [('a, or "b"?', "007"), ('two\nlines\tand "a tab"?', "1,5")]
    assert asked(task_of(tmp_path / dress)) == dict(found)
    rows = read_rows(tmp_path / dress)
    assert [where for where, _ in rows] == [f"{tmp_path / dress}:2", f"{tmp_path / dress}:3"]
    config = DatasetTask(kind="datasets", name=str(tmp_path / dress), verifier="exact", heldout_size=1)
    task = make_task(config, TINY, 0)
    assert isinstance(task, QuestionTask)
    assert asked(task) == dict(found)


def test_a_folder_of_tables_of_tabs(tmp_path: Path) -> None:
    for name, text in (("train", TABBED), ("test", "question\tanswer\nc?\t0\n")):
        (tmp_path / f"{name}.tsv").write_text(text)
    config = DatasetTask(
        kind="datasets", name=str(tmp_path), heldout_split="test", verifier="exact", heldout_size=1
    )
    task = make_task(config, TINY, 0)
    assert isinstance(task, QuestionTask)
    assert (task.train_size, task.heldout_size) == (2, 1)
    assert asked(task)['a, or "b"?'] == "007"


def test_conversations_in_a_table_of_tabs(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "a\tb?"}, {"role": "assistant", "content": "c"}]
    cell = json.dumps(chat).replace('"', '""')
    (tmp_path / "x.tsv").write_text(f'messages\tsystem\n"{cell}"\tBe brief.\n')
    [found] = read_conversations(tmp_path / "x.tsv")
    assert found.messages == ({"role": "system", "content": "Be brief."}, *chat)


@pytest.mark.parametrize("kind", [pa.float16(), pa.float32()])
def test_numbers_of_low_precision_are_those_that_were_meant(tmp_path: Path, kind: pa.DataType) -> None:
    wide = [0.1, 3.0, -2.5]
    narrow = pa.array(wide, pa.float32()).cast(kind)
    nested = pa.StructArray.from_arrays([pa.array(["r"] * 3), narrow], ["style", "ground_truth"])
    listed = pa.ListArray.from_arrays([0, 1, 2, 3], narrow)
    table = pa.table({"a": narrow, "b": nested, "c": listed, "d": pa.array([0.1, 0.2, 0.3])})
    pq.write_table(table, tmp_path / "x.parquet")
    rows = [row for _, row in read_rows(tmp_path / "x.parquet")]
    assert [row["a"] for row in rows] == wide
    assert [row["b"]["ground_truth"] for row in rows] == wide
    assert [row["c"] for row in rows] == [[number] for number in wide]
    assert [row["d"] for row in rows] == [0.1, 0.2, 0.3]


def test_a_saved_set_has_its_numbers_too(tmp_path: Path) -> None:
    from datasets import Dataset, Features, Value

    features = Features({"question": Value("string"), "answer": Value("float32")})
    rows = [{"question": "a?", "answer": 0.1}, {"question": "b?", "answer": 4.0}]
    Dataset.from_list(rows, features=features).save_to_disk(tmp_path / "saved")
    config = DatasetTask(kind="datasets", name=str(tmp_path / "saved"), verifier="exact", heldout_size=1)
    task = make_task(config, TINY, 0)
    assert isinstance(task, QuestionTask)
    assert asked(task) == {"a?": "0.1", "b?": "4"}


def test_text_that_is_no_unicode_in_parquet_is_refused(tmp_path: Path) -> None:
    bad = pa.array([b"\xff\xfea", b"b"]).view(pa.string())
    pq.write_table(pa.table({"question": bad, "answer": ["1", "2"]}), tmp_path / "x.parquet")
    with pytest.raises(InputError, match="not UTF-8"):
        read_rows(tmp_path / "x.parquet")


def test_rows_of_a_training_split_may_be_held_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "data"
    folder.mkdir()
    more = {"question": "b?", "answer": "1", "split": "geometry"}  # says something else
    held = {"question": "c?", "answer": "1", "split": "test"}
    (folder / "train.jsonl").write_bytes(lines(GOOD, more, held))
    (folder / "test.jsonl").write_bytes(lines({"question": "d?", "answer": "1"}))
    keys: dict[str, Any] = {"kind": "datasets", "name": str(folder), "verifier": "exact", "heldout_size": 1}
    task = make_task(DatasetTask(**keys), TINY, 0)
    assert [task.prompt("heldout", n).problem for n in range(task.heldout_size)] == ["c?"]
    with pytest.raises(
        InputError, match=r"train.jsonl:3: 'split' of a row of split 'train' names a held-out"
    ):
        make_task(DatasetTask(**keys, heldout_split="test"), TINY, 0)
    both = make_task(DatasetTask(**keys, heldout_split="test", split_key=None), TINY, 0)
    assert (both.train_size, both.heldout_size) == (3, 1)


def test_a_folder_that_needs_somebodys_code_is_refused(tmp_path: Path) -> None:
    (tmp_path / f"{tmp_path.name}.py").write_text("import datasets\n")
    (tmp_path / "train.jsonl").write_bytes(lines(GOOD))
    with pytest.raises(InputError, match="scripts are no longer supported"):
        make_task(DatasetTask(kind="datasets", name=str(tmp_path), verifier="exact"), TINY, 0)


def test_a_question_with_another_answer_in_the_other_split_is_refused_or_dropped(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(lines(GOOD, {"question": "c?", "answer": "7"}, {**GOOD, "answer": "3", "split": "test"},
                           {"question": "d?", "answer": "7", "split": "test"}))  # fmt: skip
    with pytest.raises(InputError, match=r"x\.jsonl:1 .* and .*x\.jsonl:3"):
        task_of(path)
    task = task_of(path, conflicting="drop")
    assert asked(task) == {"c?": "7", "d?": "7"}
    assert "left out" in task.notes[0]


def test_prompts_of_other_tasks_have_one_reference_each() -> None:
    problems = [Problem("a?", {"low": 1}), Problem("b?", {"low": 1}), Problem("a?", {"low": 2}, where="x:3")]
    with pytest.raises(InputError, match="x:3: the same prompt stands there with different references"):
        split_problems(problems, None, 1, 0, "x", [])
    assert len(split_problems([*problems[:2], problems[0]], None, 1, 0, "x", [])[0]) == 1
