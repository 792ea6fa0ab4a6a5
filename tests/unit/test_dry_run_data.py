"""A dry run reads the data: counted, or refused by file and line, and without torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from genac_megatron.cli import main
from genac_megatron.errors import EXIT_INPUT, EXIT_OK

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
        "import sys; from genac_megatron.cli import main; c = main(sys.argv[1:]); "
        "assert not {'torch', 'transformers'} & sys.modules.keys(); sys.exit(c)"
    )
    command = [sys.executable, "-c", code, "run", path, "--dry-run"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "2 training and 1 held-out" in done.stdout
