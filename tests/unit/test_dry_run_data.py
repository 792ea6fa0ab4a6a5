"""A dry run reads the data: counted, or refused by file and line, and without torch."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from genac_megatron.cli import main
from genac_megatron.errors import EXIT_INPUT, EXIT_OK
from genac_megatron.tasks.tokenizer import TINY_FOLDER

ROWS: list[dict[str, Any]] = [{"question": f"{n}+1?", "answer": n + 1} for n in range(6)]
CHAT = {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]}
SHAPE = "{layers: 1, hidden: 8, ffn: 8, heads: 2, kv_heads: 1}"
MODEL = f"{{model: {{family: qwen3, tokenizer: 'builtin:tiny', shape: {SHAPE}}}}}"


def written(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def recipe(folder: Path, task: str, sft: str = "") -> str:
    """A recipe of `task`, and of a stage of fine-tuning where there is one."""
    stage = f"kind: sft, role: actor, batch: 4, {sft}" if sft else "kind: policy, algorithm: {kind: grpo}"
    path = folder / "r.yaml"
    path.write_text(
        f"name: x\nworld: {{ranks: 1}}\nroles: {{actor: {MODEL}, critic: {MODEL}}}\ntask: {task}\n"
        f"stages: [{{{stage}}}]\n"
    )
    return str(path)


def told(capsys: pytest.CaptureFixture[str], path: str, code: int) -> str:
    assert main(["run", path, "--dry-run"]) == code
    shown = capsys.readouterr()
    return shown.err if code else shown.out


def test_rows_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = written(tmp_path / "a.jsonl", [*ROWS, ROWS[0] | {"answer": 9}])
    chats = written(tmp_path / "c.jsonl", [CHAT, CHAT])
    task = f"{{kind: jsonl, path: {rows}, verifier: math, heldout_size: 2, conflicting: drop}}"
    out = told(capsys, recipe(tmp_path, task, f"name: s, data: jsonl, path: {chats}"), EXIT_OK)
    assert f"task: 3 training and 2 held-out prompts in {rows}" in out
    assert "different answers" in out
    assert f"stage s: 2 conversations in {chats}" in out


def test_every_part_of_a_mixture_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "own.py").write_text("raise SystemExit('it was run')\ndef score(response): return 1\n")
    rows = written(tmp_path / "a.json", ROWS)
    prompts = written(tmp_path / "p.jsonl", [{"prompt": f"{n}", "rubric": "good"} for n in range(5)])
    own = (
        f"{{kind: datasets, name: {rows}, heldout_size: 2, verifier: {{python: '{tmp_path}/own.py:score'}}}}"
    )
    judged = (
        f"{{kind: rubric, path: {prompts}, heldout_size: 1, judge: {{url: 'http://127.0.0.1:9', model: m}}}}"
    )
    hub = "{kind: datasets, name: nobody/nothing, verifier: math}"
    parts = ", ".join(f"{{name: p{n}, task: {task}}}" for n, task in enumerate((own, judged, hub)))
    out = told(capsys, recipe(tmp_path, f"{{kind: mixture, parts: [{parts}]}}"), EXIT_OK)
    assert f"task: 4 training and 2 held-out prompts in {rows}" in out
    assert f"task: 4 training and 1 held-out prompts in {prompts}" in out
    assert "task: nobody/nothing is looked for when the run begins" in out


def test_a_data_set_of_a_path_may_be_called_as_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = written(tmp_path / "a.jsonl", ROWS)
    task = f"{{kind: datasets, name: math.json, path: {rows}, verifier: exact, heldout_size: 2}}"
    assert f"task: 4 training and 2 held-out prompts in {rows}" in told(
        capsys, recipe(tmp_path, task), EXIT_OK
    )


def test_the_command_to_run_is_one_that_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = recipe(tmp_path, "{kind: state_tracking, heldout_size: 2}")
    assert main(["run", path, "--dry", "--resume", "seed=3"]) == EXIT_OK
    assert capsys.readouterr().out.endswith(f" run {path} --resume seed=3\n")


@pytest.mark.parametrize("kind", ["jsonl", "datasets"])
def test_a_broken_row_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    rows = written(tmp_path / "a.jsonl", [*ROWS, '{"question": "b?", "answer":'])
    key = {"jsonl": "path", "datasets": "name"}[kind]
    task = f"{{kind: {kind}, {key}: {rows}, verifier: exact, heldout_size: 2}}"
    assert f"{rows}:7: not JSON" in told(capsys, recipe(tmp_path, task), EXIT_INPUT)


def test_a_broken_conversation_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chats = written(tmp_path / "c.jsonl", [CHAT, {"messages": []}])
    path = recipe(tmp_path, "{kind: state_tracking}", f"data: jsonl, path: {chats}")
    assert f"{chats}:2: no list of at least two messages" in told(capsys, path, EXIT_INPUT)


def test_it_needs_no_torch(tmp_path: Path) -> None:
    rows = written(tmp_path / "a.csv", ["question,answer", "a,1", "b,2", "c,3"])
    path = recipe(tmp_path, f"{{kind: jsonl, path: {rows}, verifier: math, heldout_size: 1}}")
    code = (
        "import sys; sys.modules |= {'torch': None, 'transformers': None}; "  # importing them raises
        "from genac_megatron.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, "run", path, "--dry-run"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "2 training and 1 held-out" in done.stdout
    told = "room for rows is looked at when the run begins: transformers is not installed here"
    assert all(f"{role}: {told}" in done.stdout for role in ("actor", "critic"))


def long_rows(path: Path) -> Path:
    """Lines 3 and 5 ask what has no room beside the longest response in 512 positions."""
    longer = " word" * 300
    rows = [row | {"question": row["question"] + longer * (n in (3, 5))} for n, row in enumerate(ROWS, 1)]
    return written(path, [*rows, {"question": "7+1?", "answer": 8, "split": "test"}])


SMALL = ["roles.actor.model.shape.max_positions=512", "roles.critic.model.shape.max_positions=4096"]


def looked(
    capsys: pytest.CaptureFixture[str], path: str, *overrides: str, code: int = EXIT_OK
) -> tuple[str, str]:
    assert main(["run", path, "--dry-run", "stages.0.rollout.max_new_tokens=64", *overrides]) == code
    return tuple(capsys.readouterr())  # type: ignore[return-value]


@pytest.mark.parametrize("kind", ["jsonl", "datasets"])
def test_prompts_that_are_too_long_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    rows = long_rows(tmp_path / "a.jsonl")
    key = {"jsonl": "path", "datasets": "name"}[kind]
    path = recipe(tmp_path, f"{{kind: {kind}, {key}: {rows}, verifier: exact, heldout_size: 1}}")
    _, err = looked(capsys, path, *SMALL, code=EXIT_INPUT)
    assert "2 of 6 train prompts have no room" in err
    assert f"{rows}:3: the actor reads " in err
    assert "in 512 positions" in err
    out, _ = looked(capsys, path, *SMALL, "task.overlong=drop")
    assert "2 of 6 train prompts have no room" in out
    assert "they are left out (task.overlong: drop)" in out
    out, _ = looked(capsys, path)
    assert "all of them have room in the model of actor and critic" in out


def test_roles_whose_tokenizer_is_elsewhere_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = long_rows(tmp_path / "a.jsonl")
    path = recipe(tmp_path, f"{{kind: jsonl, path: {rows}, verifier: exact, heldout_size: 1}}")
    gone = tmp_path / "gone"  # but for its config.json, as on a machine that plans
    gone.mkdir()
    llama = {"model_type": "llama", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    sizes = {"num_attention_heads": 2, "vocab_size": 512, "max_position_embeddings": 4096}
    (gone / "config.json").write_text(json.dumps(llama | sizes))
    hf = [f"roles.{role}.model={{hf: {gone}}}" for role in ("actor", "critic")]
    out, _ = looked(capsys, path, hf[1], SMALL[0], "task.overlong=drop")
    assert "2 of 6 train prompts have no room" in out
    assert f"critic: room for rows is looked at when the run begins: there is no tokenizer in {gone}" in out
    out, _ = looked(capsys, path, *hf)
    assert "have no room" not in out
    assert "have room" not in out
    assert f"actor: room for rows is looked at when the run begins: there is no tokenizer in {gone}" in out


def test_conversations_that_are_too_long_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": " word" * 600}]}
    chats = written(tmp_path / "c.jsonl", [CHAT, long])
    path = recipe(tmp_path, "{kind: state_tracking}", f"data: jsonl, path: {chats}")
    assert main(["run", path, "--dry-run", *SMALL]) == EXIT_INPUT
    assert f"{chats}:2: " in capsys.readouterr().err
    assert main(["run", path, "--dry-run", *SMALL, "stages.0.overlong=drop"]) == EXIT_OK
    assert "1 of 2 conversations have no room in actor's model and are left out" in capsys.readouterr().out


def test_a_row_that_the_chat_template_refuses_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = written(tmp_path / "a.jsonl", ROWS)
    path = recipe(tmp_path, f"{{kind: jsonl, path: {rows}, verifier: exact, heldout_size: 1}}")
    tiny = shutil.copytree(TINY_FOLDER, tmp_path / "tiny")
    (tiny / "chat_template.jinja").write_text("{{ raise_exception('never') }}")
    _, err = looked(capsys, path, f"roles.actor.model.tokenizer={tiny}", code=EXIT_INPUT)
    assert "refuses these messages: never" in err
    assert f"{rows}:" in err
