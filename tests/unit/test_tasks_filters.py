"""Known data sets in their own columns, and what is left out of a task: counted, told, or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from pydantic import TypeAdapter

from genac_megatron.cli import main
from genac_megatron.errors import EXIT_INPUT, EXIT_OK, InputError
from genac_megatron.recipe.data import MATHS, NAMED_SETS
from genac_megatron.recipe.loader import dump_recipe, load_recipe
from genac_megatron.recipe.tasks import DatasetTask, TaskConfig
from genac_megatron.tasks import Task, make_task
from genac_megatron.tasks.clean import benchmark_texts
from genac_megatron.tasks.filters import problem_digest
from genac_megatron.tasks.overlap import Looked, words
from genac_megatron.tasks.tokenizer import load_tokenizer

pytestmark = pytest.mark.usefixtures("one_math_process")
TINY = load_tokenizer("builtin:tiny")
WRAPPED = (
    "Solve the following math problem step by step. The last line of your response should be of the form "
    "Answer: $Answer (without quotes) where $Answer is the answer to the problem.\n\n{}\n\n"
    'Remember to put your answer on its own line after "Answer:".'
)
AIME = (
    "Every morning Aya goes for a $9$-kilometer-long walk and stops at a coffee shop afterwards. When she "
    "walks at a constant speed of $s$ kilometers per hour, the walk takes her 4 hours."
)
SHAPE = "{layers: 1, hidden: 8, ffn: 8, heads: 2, kv_heads: 1, max_positions: 4096}"
MODEL = f"{{model: {{family: qwen3, tokenizer: 'builtin:tiny', shape: {SHAPE}}}}}"


def task_of(**block: Any) -> Task:
    return make_task(TypeAdapter(TaskConfig).validate_python(block), TINY, 0)


def notes_of(task: Task) -> str:
    assert task.fixed is not None
    return "\n".join(task.fixed.notes)


def dapo(question: str, answer: str) -> dict[str, Any]:
    """A row as DAPO-Math-17k's card has them."""
    return {
        "data_source": "math_dapo",
        "prompt": [{"content": WRAPPED.format(question), "role": "user"}],
        "ability": "MATH",
        "reward_model": {"ground_truth": answer, "style": "rule-lighteval/MATH_v2"},
        "extra_info": {"index": f"id-{question[:20]}-{answer}"},
    }


def math(problem: str, answer: str, level: str = "Level 1") -> dict[str, Any]:
    solution = f"We see that it is $\\boxed{{{answer}}}$."
    return {"problem": problem, "level": level, "type": "Algebra", "solution": solution}


def parquet(path: Path, rows: list[dict[str, Any]]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)
    return str(path)


def lines(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_dapo_rows_that_repeat_count_once_and_are_told(tmp_path: Path) -> None:
    rows = [dapo(f"What is {n} + {n}?", str(2 * n)) for n in range(9)]
    rows.append(dapo("What is 1 + 1?", "3"))  # the set has questions with two answers
    path = parquet(tmp_path / "dapo.parquet", rows * 100)
    task = task_of(kind="datasets", name="dapo-math-17k", path=path, heldout_size=2)
    assert (task.train_size, task.heldout_size) == (6, 2)
    assert "990 of 1,000 rows of train repeat another one" in notes_of(task)
    assert "1 questions stand there with different answers" in notes_of(task)
    prompt = task.prompt("train", 0)
    assert prompt.messages[0]["content"].startswith("Solve the following"), "as the set has it"
    assert task.verify(prompt, f"I add.\nAnswer: {prompt.reference}") == 1.0
    assert task.verify(prompt, "I add.\nAnswer: 77") == 0.0


def test_math_is_read_from_its_folders_and_answers_are_its_boxes(tmp_path: Path) -> None:
    for kind, first in (("algebra", 0), ("geometry", 10)):
        rows = [math(f"Find the number {first + n}.", f"\\frac{{{n}}}{{7}}", f"Level {n}") for n in range(5)]
        parquet(tmp_path / kind / "train-00000-of-00001.parquet", rows)
        parquet(tmp_path / kind / "test-00000-of-00001.parquet", [math("other", "0")])
    block = {"kind": "datasets", "name": "math", "path": str(tmp_path), "heldout_size": 2}
    task = task_of(**block)
    assert (task.train_size, task.heldout_size) == (8, 2)
    prompt = task.prompt("train", 0)
    assert prompt.reference.startswith("\\frac{")
    assert task.verify_many([(prompt, f"\\boxed{{{prompt.reference}}}"), (prompt, "\\boxed{8}")]) == [1, 0]
    hard = task_of(**block, filter={"values": {"level": ["Level 3", "Level 4"]}})
    assert hard.train_size + hard.heldout_size == 4
    assert "6 of 10 rows are left out by filter.values, level being Level 0: 2, " in notes_of(hard)
    with pytest.raises(InputError, match="no row has level Level 9"):
        task_of(**block, filter={"values": {"level": ["Level 9"]}})
    bad = lines(tmp_path / "b.jsonl", [math("p", "1") | {"solution": "it is clear"}, math("q", "2")])
    with pytest.raises(InputError, match="the solution has no"):
        task_of(kind="datasets", name="math", path=bad, heldout_size=1)


def test_a_folders_configurations_are_those_that_the_recipe_names(tmp_path: Path) -> None:
    for kind, count in (("algebra", 3), ("geometry", 5)):
        (tmp_path / kind).mkdir()
        lines(tmp_path / kind / "train.jsonl", [math(f"{kind} {n}?", str(n)) for n in range(count)])
    block = {"kind": "datasets", "name": "math", "path": str(tmp_path), "heldout_size": 1}

    def size(**keys: Any) -> int:
        task = task_of(**block, **keys)
        return task.train_size + task.heldout_size

    def refused(config: Any, told: str) -> None:
        with pytest.raises(InputError) as refusal:
            size(config=config)
        assert told in str(refusal.value)

    for card in (False, True):
        if card:  # its own names, as a data set's card gives them
            files = [{"config_name": k, "data_files": f"{k}/*.jsonl"} for k in ("algebra", "geometry")]
            (tmp_path / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': files})}---\n")
        assert [size(), size(config="algebra"), size(config=["geometry", "algebra"])] == [8, 3, 8]
        refused("algebr", "there is no configuration algebr")
        refused(["algebra", "precalculus"], "there is no configuration precalculus")
        refused("algebr", "there are: algebra, geometry")


def test_gsm8k_is_read_with_its_own_splits(tmp_path: Path) -> None:
    for split, count in (("train", 4), ("test", 3)):
        rows = [{"question": f"{split} {n}?", "answer": f"so\n#### 1,{n}00"} for n in range(count)]
        parquet(tmp_path / "main" / f"{split}-00000-of-00001.parquet", rows)
    parquet(tmp_path / "socratic/train-00000-of-00001.parquet", [{"question": "s?", "answer": "#### 1"}])
    task = task_of(kind="datasets", name="gsm8k", path=str(tmp_path))
    assert (task.train_size, task.heldout_size) == (4, 3)
    prompt = task.prompt("heldout", 0)
    assert prompt.reference.startswith("1,")
    assert task.verify(prompt, f"\\boxed{{{prompt.reference.replace(',', '')}}}") == 1.0


def test_a_known_name_stands_for_what_it_sets_and_what_is_written_goes_first() -> None:
    given = {
        "kind": "datasets",
        "name": "math",
        "config": "algebra",
        "revision": "abc",
        "heldout_split": "test",
    }
    task = TypeAdapter(TaskConfig).validate_python(given)
    assert isinstance(task, DatasetTask)
    assert (task.name, task.config, task.answer_key) == ("EleutherAI/hendrycks_math", "algebra", "solution")
    assert (task.heldout_split, task.verifier, task.revision) == ("test", "math", "abc")
    for name in NAMED_SETS:
        one = TypeAdapter(TaskConfig).validate_python({"kind": "datasets", "name": name})
        again = TypeAdapter(TaskConfig).validate_python(one.model_dump(mode="json"))
        assert one == again, "a resolved recipe reads back to the same"


def test_prompts_by_length_are_left_out_and_counted(tmp_path: Path) -> None:
    rows = [{"question": "x" * n, "answer": "1"} for n in (1, 20, 21, 22, 23, 300)]
    path = lines(tmp_path / "r.jsonl", rows)
    block = {"kind": "jsonl", "path": path, "verifier": "exact", "heldout_size": 1, "instruction": ""}
    over = len(task_of(**block).prompt("train", 0).ids) - len(task_of(**block).prompt("train", 0).problem)
    task = task_of(**block, filter={"prompt_tokens": [over + 10, over + 100]})
    assert task.train_size + task.heldout_size == 4
    assert "left out by filter.prompt_tokens" in notes_of(task)
    with pytest.raises(InputError, match="none of the"):
        task_of(**block, filter={"prompt_tokens": [1000, 2000]})


def test_pass_rates_choose_training_questions(tmp_path: Path) -> None:
    rows = [{"question": f"q{n}", "answer": "1"} for n in range(8)]
    path = lines(tmp_path / "r.jsonl", rows)
    block = {"kind": "jsonl", "path": path, "verifier": "exact", "heldout_size": 2}
    train = [p.text for p in task_of(**block).fixed.problems("train")]  # type: ignore[union-attr]
    rates = [
        {"question": problem_digest(text), "pass_rate": n / 5, "actor": "actor", "weights": "abcdef"}
        for n, text in enumerate(train)
    ]
    file = lines(tmp_path / "pass_rates.jsonl", rates)
    chosen = task_of(**block, filter={"pass_rate": [0.2, 0.8], "pass_rates": file})
    assert [p.text for p in chosen.fixed.problems("train")] == train[1:5]  # type: ignore[union-attr]
    assert chosen.heldout_size == 2
    assert "2 of 6 training questions are left out by filter.pass_rate: 1 below 0.2, 1 above 0.8" in notes_of(
        chosen
    )
    assert "actor (abcdef)" in notes_of(chosen), "whose rates they are"
    lines(tmp_path / "pass_rates.jsonl", rates[:4])
    folder = {"pass_rate": [0.2, 1.0], "pass_rates": str(tmp_path)}
    with pytest.raises(InputError, match="2 of 6 training questions have no pass rate"):
        task_of(**block, filter=folder)
    for rule, left in (("drop", 3), ("keep", 5)):
        task = task_of(**block, filter=folder | {"unmeasured": rule})
        assert task.train_size == left
        assert "have no pass rate and are" in notes_of(task)
    lines(tmp_path / "pass_rates.jsonl", [*rates, rates[0] | {"weights": "other"}])
    with pytest.raises(InputError, match="several actors"):
        task_of(**block, filter=folder)
    lines(tmp_path / "pass_rates.jsonl", rates)
    with pytest.raises(InputError, match="none of the 6 training questions"):
        task_of(**block, filter=folder | {"pass_rate": [0.3, 0.35]})


def test_what_a_mixture_never_measures_is_named_with_the_way_to_leave_it_out(tmp_path: Path) -> None:
    for name, numbers in (("a", range(6)), ("a_held", [77]), ("b", range(6, 10)), ("b_held", [5])):
        lines(tmp_path / f"{name}.jsonl", [{"question": f"q{n}?", "answer": "1"} for n in numbers])

    def mixed(**keys: Any) -> Task:
        parts = []
        for name in ("a", "b"):
            files = {"path": f"{tmp_path}/{name}.jsonl", "heldout_path": f"{tmp_path}/{name}_held.jsonl"}
            one = {"kind": "jsonl", "verifier": "exact", "instruction": "", **files, **keys}
            parts.append({"name": name, "task": one})
        return task_of(kind="mixture", parts=parts)

    whole = mixed()
    measured = {whole.prompt("train", index).problem for index in range(whole.train_size)}
    assert measured == {f"q{n}?" for n in range(10) if n != 5}
    rates = [{"question": problem_digest(text), "pass_rate": 0.5} for text in measured]
    lines(tmp_path / "pass_rates.jsonl", rates)
    rule = {"pass_rate": [0.1, 0.9], "pass_rates": str(tmp_path)}
    with pytest.raises(InputError, match=r"1 of 6 training questions .*a.jsonl:6: 'q5\?'") as refusal:
        mixed(filter=rule)
    assert str(refusal.value).index("filter.unmeasured: drop") < str(refusal.value).index("measure them")
    assert mixed(filter=rule | {"unmeasured": "drop"}).train_size == 9


# --- benchmarks are kept out -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "share"),
    [
        (AIME, 1.0),
        (AIME.upper().replace("$", " "), 1.0),
        (AIME.replace("$9$", "\\( 9 \\)").replace(",", " ,"), 1.0),
        (WRAPPED.format(AIME), 1.0),
        (AIME.replace("coffee", "tea"), 0.7),  # one word changed
        (AIME[: len(AIME) // 4], None),
        ("When she walks to the shop it takes her 4 hours.", None),
        ("", None),
    ],
)  # fmt: skip
def test_a_question_is_told_whatever_its_writing(text: str, share: float | None) -> None:
    found = Looked([("aime24", [AIME, "What is 2 + 3?", "Short one"])], 8, 0.5).find(text)
    assert (None if found is None else found.name) == (None if share is None else "aime24")
    if found is not None and share is not None:
        assert found.share >= share if share < 1.0 else found.share == 1.0


def test_shared_ngrams_are_counted_as_a_plain_count_would() -> None:
    question = AIME.replace("walk", "run").replace("coffee", "tea")
    size = 5

    def grams(text: str) -> set[tuple[str, ...]]:
        found = words(text)
        return {found[at : at + size] for at in range(len(found) - size + 1)}

    wanted = len(grams(AIME) & grams(question)) / len(grams(AIME))
    assert 0.1 < wanted < 1.0
    found = Looked([("b", [AIME])], size, wanted).find(question)
    assert found is not None
    assert found.share == pytest.approx(wanted)
    assert Looked([("b", [AIME])], size, wanted + 1e-6).find(question) is None


def test_questions_of_benchmarks_are_left_out_and_shown(tmp_path: Path) -> None:
    sets = []
    for name in MATHS:  # a local file for each: nothing is fetched
        key = "final_answer" if name == "olympiadbench" else "answer"
        problem = AIME if name == "aime24" else f"The {name} set asks how many marbles there are in the jar."
        sets.append(
            {"name": name, "path": lines(tmp_path / f"{name}.jsonl", [{"problem": problem, key: "1"}])}
        )
    rows = [{"question": f"How many apples are {n} apples and a pear?", "answer": "1"} for n in range(6)]
    path = lines(tmp_path / "r.jsonl", [*rows, {"question": WRAPPED.format(AIME), "answer": "204"}])
    block = {"kind": "jsonl", "path": path, "verifier": "exact", "heldout_size": 2}
    task = task_of(**block, decontaminate={"against": sets})
    assert task.train_size + task.heldout_size == 6
    told = notes_of(task)
    assert "1 of 7 rows are questions of a benchmark (aime24 1; 1 whole, 0 by n-grams)" in told
    assert f"{path}:7: 'Solve the following" in told
    with pytest.raises(InputError, match="questions of a benchmark"):
        task_of(**block, decontaminate={"against": sets, "found": "error"})
    clean = task_of(**block, decontaminate={"against": sets[1:]})
    assert "none of 7 rows is a question of aime25, " in notes_of(clean)


def test_suites_made_here_can_be_kept_out() -> None:
    [(name, texts)] = benchmark_texts(TypeAdapter(TaskConfig).validate_python(
        {"kind": "jsonl", "path": "x", "decontaminate": {"against": ["rg:chain_sum"]}}
    ).decontaminate.against)  # fmt: skip
    assert (name, len(texts)) == ("rg:chain_sum", 30)


# --- recipes -----------------------------------------------------------------------------------


def recipe(folder: Path, task: dict[str, Any]) -> str:
    path = folder / "r.yaml"
    path.write_text(
        f"name: x\nworld: {{ranks: 1}}\nroles: {{actor: {MODEL}}}\ntask: {json.dumps(task)}\n"
        "stages: [{kind: policy, algorithm: {kind: grpo}}]\n"
    )
    return str(path)


def test_a_dry_run_counts_what_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = parquet(
        tmp_path / "d.parquet", [dapo(f"What is the sum of {n} and seven?", "1") for n in range(8)] * 3
    )
    bench = lines(tmp_path / "aime24.jsonl", [{"problem": "What is the sum of 3 and seven?", "answer": "1"}])
    task = {
        "kind": "datasets", "name": "dapo-math-17k", "path": "./d.parquet", "heldout_size": 2,
        "decontaminate": {"against": [{"name": "aime24", "path": bench}, "math500"]},
    }  # fmt: skip
    assert main(["run", recipe(tmp_path, task), "--dry-run"]) == EXIT_OK
    out = capsys.readouterr().out
    assert "16 of 24 rows of train repeat another one" in out
    assert "1 of 8 rows are questions of a benchmark" in out
    assert "questions of math500 are looked for in it when the run begins" in out
    assert f"task: 5 training and 2 held-out prompts in {path}" in out
    loaded = load_recipe(recipe(tmp_path, task))
    (tmp_path / "again.yaml").write_text(dump_recipe(loaded))
    assert load_recipe(str(tmp_path / "again.yaml")) == loaded
    assert yaml.safe_load(dump_recipe(loaded))["task"]["name"] == "BytedTsinghua-SIA/DAPO-Math-17k"


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"filter": {"pass_rate": [0.1, 0.9]}}, "no pass rates to go by"),
        ({"filter": {"pass_rate": [0.1, 0.9], "pass_rates": "no"}}, "there are no pass rates in no"),
        ({"order": "easy_first"}, "order: easy_first has no pass rates to go by"),
        ({"filter": {"prompt_tokens": [9, 3]}}, "goes from 9 to 3"),
        ({"filter": {"prompt_token": [9, 3]}}, "did you mean 'prompt_tokens'"),
        ({"decontaminate": {"against": ["aime23"]}}, "no benchmark is called 'aime23'"),
        ({"decontaminate": {"against": ["aime24", "maths"]}}, "aime24 is named 2 times"),
        ({"decontaminate": {"against": [{"name": "aime24", "path": "no.x"}]}}, "no file or folder no.x"),
    ],
)  # fmt: skip
def test_wrong_keys_are_told_by_a_dry_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], keys: dict[str, Any], told: str
) -> None:
    path = lines(tmp_path / "r.jsonl", [{"question": f"q{n}", "answer": "1"} for n in range(4)])
    task = {"kind": "jsonl", "path": path, "verifier": "exact", "heldout_size": 1, **keys}
    assert main(["run", recipe(tmp_path, task), "--dry-run"]) == EXIT_INPUT
    assert told in capsys.readouterr().err


# --- curricula ---------------------------------------------------------------------------------


def drawn(task: Task, first: int, count: int, seed: int = 5) -> list[str]:
    indices = (task.train_index(seed, n) for n in range(first, first + count))
    return [task._problem("train", index).text for index in indices]


def test_the_first_pass_goes_by_the_order_and_later_ones_are_shuffled(tmp_path: Path) -> None:
    rows = [{"question": "q" * (n + 1), "answer": "1"} for n in range(12)]
    path = lines(tmp_path / "r.jsonl", rows)
    block = {"kind": "jsonl", "path": path, "verifier": "exact", "heldout_size": 2}
    train = [p.text for p in task_of(**block).fixed.problems("train")]  # type: ignore[union-attr]
    rates = {text: (n // 3) / 4 for n, text in enumerate(train)}  # three of each
    file = lines(tmp_path / "p.jsonl", [
        {"question": problem_digest(text), "pass_rate": rate, "actor": "a", "weights": "w"}
        for text, rate in rates.items()
    ])  # fmt: skip
    plain, size = drawn(task_of(**block), 0, 20), len(train)
    assert drawn(task_of(**block, order="short_first"), 0, size) == sorted(train, key=len)
    for order, sign in (("easy_first", -1), ("hard_first", 1)):
        task = task_of(**block, order=order, filter={"pass_rates": file})
        first = drawn(task, 0, size)
        assert first == sorted(plain[:size], key=lambda text: sign * rates[text]), (
            "ties as they were shuffled"
        )
        assert drawn(task, size, 10) == plain[size:], "shuffled again"
        assert drawn(task, 7, 2) == first[7:9], "by the cursor alone: a resumed run goes on"
        assert drawn(task, 0, size, seed=6) != first
    task.fixed.leave_out("train", [0, 1])  # type: ignore[union-attr]
    task.resized()
    assert [rates[text] for text in drawn(task, 0, size - 2)] == sorted(rates[text] for text in train[2:])


def mixed(tmp_path: Path, phases: list[dict[str, Any]]) -> dict[str, Any]:
    parts = []
    for name in ("easy", "hard"):
        rows = [{"question": f"{name} {n}", "answer": "1"} for n in range(3000)]
        path = lines(tmp_path / f"{name}.jsonl", rows)
        task = {"kind": "jsonl", "path": path, "verifier": "exact", "heldout_size": 2}
        parts.append({"name": name, "task": task})
    return {"kind": "mixture", "parts": parts, "phases": phases}


def test_weights_of_a_mixture_change_with_the_prompts_drawn(tmp_path: Path) -> None:
    phases = [
        {"until": 1000, "weights": {"easy": 1, "hard": 0}},
        {"until": 3000, "weights": {"easy": 1, "hard": 3}},
        {"weights": {"easy": 0, "hard": 1}},
    ]
    block = mixed(tmp_path, phases)
    task = task_of(**block)
    said = drawn(task, 0, 5000)
    of_hard = [sum(text.startswith("hard") for text in said[at : at + 1000]) for at in range(0, 5000, 1000)]
    assert of_hard == [0, 750, 750, 1000, 1000]
    for name in ("easy", "hard"):  # each part's own order, without a gap or a repeat, over the phases
        own = [text for text in said if text.startswith(name)]
        assert len(set(own[:2998])) == len(own[:2998])
        alone = task_of(**next(part["task"] for part in block["parts"] if part["name"] == name))
        assert own == drawn(alone, 0, len(own))
    assert drawn(task_of(**block), 2990, 20) == said[2990:3010], "by the cursor alone"


@pytest.mark.parametrize(
    ("phases", "told"),
    [
        ([{"weights": {"easy": 1}}], "weights of easy, and its parts are easy, hard"),
        ([{"weights": {"easy": 0, "hard": 0}}], "not 0 to all"),
        ([{"until": 1000, "weights": {"easy": 1, "hard": 1}}], "the last phase of a mixture has no end"),
        ([{"weights": {"easy": 1, "hard": 1}}] * 2, "a phase before the last has no end"),
        ([{"until": 1500, "weights": {"easy": 1, "hard": 1}}, {"weights": {"easy": 1, "hard": 1}}],
         "give multiples of 1000"),
    ],
)  # fmt: skip
def test_wrong_phases_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], phases: list[dict[str, Any]], told: str
) -> None:
    assert main(["run", recipe(tmp_path, mixed(tmp_path, phases)), "--dry-run"]) == EXIT_INPUT
    assert told in capsys.readouterr().err
