"""A benchmark, and a rubric's judge, by a real SGLang server's own OpenAI interface (CPU, a tiny model)."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from sglang_servers import START_S, Farm, served_config
from tiny_models import plain_model

from genac_megatron.errors import InputError
from genac_megatron.evaluation.trial import TrialOptions
from genac_megatron.evaluation.trial_server import ServerOptions, try_server
from genac_megatron.platform.network import spare_ports
from genac_megatron.recipe.tasks import RubricTask
from genac_megatron.serving.sglang.server import Server, ServerSpec
from genac_megatron.tasks.rubric import make_rubric_task
from genac_megatron.tasks.tokenizer import TINY_FOLDER, chat_ids, load_tokenizer

TOKENIZER = load_tokenizer("builtin:tiny")
QUESTIONS = ("What is 2 + 3?", "What is 4 + 4?")
INSTRUCTION = "Think step by step. Put the final answer in \\boxed{}."
NEW = 12


@dataclass(frozen=True)
class ChatSpec(ServerSpec):
    """A server that reads text: it loads the folder's tokenizer."""

    def arguments(self) -> list[str]:
        return [word for word in super().arguments() if word != "--skip-tokenizer-init"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with weights, config and the tiny tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    config = served_config("qwen3", vocab_size=len(TOKENIZER))
    model = plain_model(config)
    model.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config))
    for file in TINY_FOLDER.iterdir():
        if file.is_file():
            shutil.copy(file, folder)
    return folder


@pytest.fixture(scope="module")
def server(farm: Farm, folder: Path) -> Iterator[Server]:
    spec = ChatSpec("chat", folder, spare_ports(1)[0], dtype="fp32", load_format="auto", max_tokens=8192)
    started = Server(spec, farm.folder / "chat.log", zygote=farm.zygote)
    farm.servers.append(started)
    started.start()
    started.wait_healthy(START_S)
    yield started
    started.stop()


@torch.no_grad()
def greedy(folder: Path, question: str) -> str:
    """What transformers says to the question by the same weights, token by token."""
    model = plain_model(json.loads((folder / "config.json").read_text()))
    ids = list(chat_ids(TOKENIZER, [{"role": "user", "content": f"{question}\n\n{INSTRUCTION}"}]))
    made: list[int] = []
    for _ in range(NEW):
        logits = model(torch.tensor([ids + made])).logits[0, -1]
        made.append(int(logits.argmax()))
        if made[-1] == TOKENIZER.eos_token_id:
            made.pop()
            break
    return str(TOKENIZER.decode(made, skip_special_tokens=True))


def test_a_benchmark_by_sglangs_own_chat_interface(
    server: Server, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("SERVER_KEY", server.spec.key)
    path = tmp_path / "amc.jsonl"
    path.write_text("".join(json.dumps({"question": q, "answer": "8"}) + "\n" for q in QUESTIONS))
    options = TrialOptions(
        ["amc23"], tmp_path / "out", {"amc23": str(path)}, samples=2, max_new_tokens=NEW, temperature=0.0
    )
    url = f"{server.spec.url}/v1"
    table = try_server(ServerOptions(url, str(folder), api_key_env="SERVER_KEY"), options)
    assert "AMC 2023" in table
    lines = (tmp_path / "out" / "amc23" / "samples.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert len(rows) == 4
    for row in rows:
        assert row["text"].strip() == greedy(folder, QUESTIONS[row["index"]]).strip()
        assert 1 <= row["tokens"] <= NEW
    monkeypatch.setenv("SERVER_KEY", "wrong")
    with pytest.raises(InputError, match="refused with status 401"):
        try_server(
            ServerOptions(url, str(folder), api_key_env="SERVER_KEY"),
            TrialOptions(["amc23"], tmp_path / "other", {"amc23": str(path)}, samples=1),
        )


def test_a_tiny_model_is_a_poor_judge_and_its_failures_are_counted(
    server: Server, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random weights write no score: the rule for failures holds against a real server's answers too."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("SERVER_KEY", server.spec.key)
    path = tmp_path / "prompts.jsonl"
    path.write_text(
        "".join(json.dumps({"prompt": f"Sing {n}.", "rubric": "Rhymes."}) + "\n" for n in range(3))
    )
    judge = {"url": f"{server.spec.url}/v1", "model": str(folder), "api_key_env": "SERVER_KEY",
             "max_tokens": 8, "failed_outcome": 0.25}  # fmt: skip
    config = RubricTask.model_validate(
        {"kind": "rubric", "path": str(path), "heldout_size": 1, "judge": judge}
    )
    task = make_rubric_task(config, TOKENIZER, 0)
    try:
        prompt = task.prompt("train", 0)
        assert task.verify_many([(prompt, "La la la"), (prompt, "Lo lo lo")]) == [0.25, 0.25]
        assert task.failed == 2
    finally:
        task.close()
