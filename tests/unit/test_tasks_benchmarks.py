"""Named benchmarks, read from local files of the datasets' own form (no network here)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from genac_megatron.errors import InputError
from genac_megatron.recipe.tasks import BenchmarkTask
from genac_megatron.tasks import make_task
from genac_megatron.tasks.benchmarks import (
    BENCHMARKS,
    GYM_SIZE,
    MATHS,
    GymSuite,
    benchmark_names,
    find_benchmark,
    make_benchmark,
)
from genac_megatron.tasks.tokenizer import load_tokenizer

pytestmark = pytest.mark.usefixtures("one_math_process")
ROOT = Path(__file__).resolve().parents[2]
# A row of each dataset, as its page shows columns; a right and a wrong response to it.
ROWS: dict[str, tuple[dict[str, Any], str, str]] = {
    "aime24": ({"id": 60, "problem": "P", "solution": "S", "answer": "204", "year": "2024"}, "204", "24"),
    "aime25": ({"problem": "P", "answer": "70", "id": "0"}, "70", "7"),
    "amc23": ({"id": 0, "question": "P", "answer": "27.0", "url": "u"}, "27", "28"),
    "math500": (
        {"problem": "P", "solution": "S", "answer": "\\left( 3, \\frac{\\pi}{2} \\right)", "subject": "s"},
        "(3, \\frac{\\pi}{2})",
        "(3, \\pi)",
    ),
    "minerva": ({"question": "P", "answer": "\\frac{1}{2}", "solution": "S"}, "0.5", "2"),
    "olympiadbench": ({"question": "P", "final_answer": ["2,-2"], "answer_type": "Numerical"}, "2,-2", "2"),
    "gsm8k": ({"question": "P", "answer": "48/2 = <<48/2=24>>24 clips\n#### 1,072"}, "1072", "24"),
}  # fmt: skip


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("name", ROWS)
def test_a_row_of_each_dataset_is_read_and_graded(tmp_path: Path, name: str) -> None:
    row, right, wrong = ROWS[name]
    task = make_benchmark(name, write(tmp_path / "set.jsonl", [row, row]), None)
    assert task.heldout_size == 2, "repeats are kept"
    prompt = task.prompt("heldout", 0)
    assert prompt.problem == "P"
    assert prompt.ids == ()
    assert prompt.messages[0]["content"].endswith("\\boxed{}.")
    responses = [f"So it is \\boxed{{{text}}}." for text in (right, wrong)]
    assert task.verify_many([(prompt, text) for text in responses]) == [1.0, 0.0]


def test_names_of_columns_may_be_capital_and_answers_numbers(tmp_path: Path) -> None:
    path = write(tmp_path / "set.jsonl", [{"ID": 3, "Problem": "P", "Answer": 204.0, "Solution": "long"}])
    prompt = make_benchmark("aime24", path, None).prompt("heldout", 0)
    assert (prompt.problem, prompt.reference, prompt.where) == ("P", "204", f"{path}:1")


def test_the_table_covers_what_users_expect() -> None:
    assert set(ROWS) == {name for name, row in BENCHMARKS.items() if row.dataset}
    assert benchmark_names("maths, gsm8k,aime24") == [*MATHS, "gsm8k"]
    assert find_benchmark("rg:chain_sum").suite == ("chain_sum",)
    with pytest.raises(InputError, match="did you mean math500"):
        benchmark_names("math50")


def test_a_suite_holds_every_task_and_asks_each_ones_verifier() -> None:
    task = make_benchmark("rg-planning", None, None)
    assert isinstance(task, GymSuite)
    assert task.heldout_size == 3 * GYM_SIZE
    for which, name in enumerate(task.names):
        prompt = task.prompt("heldout", which * GYM_SIZE)
        assert task.part(which * GYM_SIZE) == name == prompt.reference["metadata"]["source_dataset"]
    tower = task.prompt("heldout", 0)
    assert task.verify(tower, f"<answer>{tower.reference['answer']}</answer>") == 1.0
    assert task.verify(tower, "<answer>Move disk 1 from Peg 1 to Peg 1</answer>") == 0.0
    again = make_benchmark("rg-planning", None, None)
    assert again.prompt("heldout", 77).problem == task.prompt("heldout", 77).problem


def test_a_recipes_task_can_be_a_benchmark_but_not_to_train_on(tmp_path: Path) -> None:
    path = write(tmp_path / "set.jsonl", [ROWS["aime24"][0]])
    task = make_task(
        BenchmarkTask(kind="benchmark", name="aime24", path=path), load_tokenizer("builtin:tiny"), 1
    )
    assert len(task.prompt("heldout", 0).ids) > 10
    with pytest.raises(InputError, match="never trained on"):
        task.train_index(1, 0)


def test_a_dataset_that_is_not_here_says_how_to_give_it(tmp_path: Path) -> None:
    """In a process of its own: `datasets` reads HF_HUB_OFFLINE when it is imported."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "genac_megatron", "evaluate", "task", "aime24", "--out", "out",
         "--url", "http://127.0.0.1:9/v1", "--model", "m"],
        cwd=tmp_path, capture_output=True, text=True, timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 2
    assert "HuggingFaceH4/aime_2024" in done.stderr
    assert "--path aime24=FILE.jsonl, with problem or question, and answer in each line" in done.stderr
    assert "Traceback" not in done.stderr
