"""What is kept of rollouts for people: the places of tokens, the critic's prompts, which steps, how much."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from genac_megatron.observe.metrics import MetricsLog
from genac_megatron.observe.runinfo import ROLLOUTS
from genac_megatron.recipe.schema import ObserveConfig
from genac_megatron.records import Completion, Episode, Judgement, Prompt, Rollout, State, Turn
from genac_megatron.stages import shown
from genac_megatron.stages.batch import Batch
from genac_megatron.stages.rollouts import Group
from genac_megatron.stages.shown import MOST_TOKENS, critic_prompts, keep, keep_batch, token_ends
from genac_megatron.tasks.tokenizer import load_tokenizer

TINY = load_tokenizer("builtin:tiny")


@pytest.fixture(scope="module")
def by_bytes() -> PreTrainedTokenizerFast:
    """A token per byte, so that a character may be several; what stands between tags is special."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator([""], trainers.BpeTrainer(initial_alphabet=alphabet, show_progress=False))
    made = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|end|>")
    made.add_special_tokens({"additional_special_tokens": ["[THINK]"]})
    return made


def test_each_token_ends_where_its_text_does(by_bytes: PreTrainedTokenizerFast) -> None:
    text = "[THINK]naïve 🙂 x" + "ab " * 60
    ids = by_bytes(text + "<|end|>", add_special_tokens=False)["input_ids"]
    ends = token_ends(by_bytes, ids, None, text)
    assert ends[0] == len("[THINK]")  # special, and kept
    assert ends[-2:] == [len(text), len(text)]  # special, and left out
    assert ends == sorted(ends)
    own = [text[a:b] for a, b in zip([0, *ends], ends, strict=False)]
    assert "".join(own) == text
    assert own[1:5] == ["n", "a", "ï", ""]  # two bytes, one character: it is the first token's
    assert {"🙂", "x"} <= set(own)
    assert token_ends(by_bytes, [], None, "") == []


class Forgetful:
    """A tokenizer whose text depends on more than a window: the first token is doubled beside a late one."""

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return "".join("ab"[i % 2] for i in ids) + ("!" if len(ids) > 40 and ids[0] == 0 else "")

    added_tokens_decoder: dict[int, Any] = {}


def test_a_tokenizer_that_looks_further_back_is_asked_for_whole_prefixes() -> None:
    ids = [0, *range(1, 50)]
    tokenizer: Any = Forgetful()
    ends = token_ends(tokenizer, ids, None, tokenizer.decode(ids))
    assert ends[:40] == list(range(1, 41))
    assert ends[-1] == 51


def prompt(text: str = "1 + 1") -> Prompt:
    messages = ({"role": "system", "content": "Be brief."}, {"role": "user", "content": text})
    return Prompt("train/3", messages, text, "2", ids=(1, 2))


def rollout(length: int = 6) -> Rollout:
    ids = tuple(range(5, 5 + length)) if length < 20 else (5,) * length
    completion = Completion(ids, (-0.123456,) * length, "stop", ((7, length),))
    text = str(TINY.decode(list(ids), skip_special_tokens=True))
    return Rollout(prompt(), 0, completion, text, outcome=1.0)


def judgement(one: Rollout, cut: int, asked: str, index: int = 0, **more: Any) -> Judgement:
    ids = tuple(TINY(asked, add_special_tokens=False)["input_ids"])
    completion = Completion((1,), (0.0,), "stop")
    return Judgement(State(one, index, cut, 6), ids, completion, "so it goes", 0.7, used=0.7, **more)


def test_prompts_of_the_critic_are_kept_once_and_come_back_whole() -> None:
    one = rollout()
    asked = ["judge a b", "judge a b c d", "judge a x"]
    judged = [judgement(one, cut, text) for cut, text in enumerate(asked)]
    judged.append(Judgement(State(one, 3, 3, 6), (), Completion((), (), "abort"), "", None, skipped=True))
    found = critic_prompts(TINY, judged)
    wanted = [TINY.decode(list(j.prompt_ids)) for j in judged[:3]]
    assert found["judge_prompt"] == max(wanted, key=len)
    back = [found["judge_prompt"][: rest[0]] + rest[1] for rest in found["rest"][:3]]
    assert back == wanted
    assert found["rest"][3] is None
    assert critic_prompts(None, []) == {"rest": []}


class FakeRun:
    """Enough of a run to keep rollouts in: one rank, a real log."""

    def __init__(self, folder: Path, **observe: Any) -> None:
        config = ObserveConfig(tensorboard=False, **observe)
        self.recipe = SimpleNamespace(observe=config)
        self.log = MetricsLog(folder, config)
        self.tokenizers = {"actor": TINY, "critic": TINY}
        self.task = SimpleNamespace(reasoning_tags=None)
        self.told: set[str] = set()
        self.notes: list[str] = []
        self.progress = SimpleNamespace(note=self.notes.append)

    def gather(self, mine: list[Any]) -> list[Any]:
        return mine

    def append(self, log: str, row: dict[str, Any]) -> None:
        self.log.append(log, row)


def rows(folder: Path) -> list[dict[str, Any]]:
    path = folder / ROLLOUTS
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def batch(one: Rollout, judged: list[Judgement] | None = None, groups: int = 3) -> Batch:
    return Batch([Group(one.prompt, [one], [judged] if judged else [])] * groups)


STAGE: Any = SimpleNamespace(name="ppo")


def test_a_row_has_the_conversation_the_critic_and_every_token(tmp_path: Path) -> None:
    run: Any = FakeRun(tmp_path, shown_rollouts=1)
    one = rollout()
    one.advantages, one.values = [0.5, 0.5, -0.25, 1 / 3, 0.0, 0.0], [0.1] * 6
    judged = [judgement(one, 0, "judge"), judgement(one, 3, "judge a b", 1, skipped=True, too_long=True)]
    keep_batch(run, STAGE, batch(one, judged), 1)
    (row,) = rows(tmp_path)
    assert row["of"] == "training"
    assert row["version"] == 7
    assert [m["role"] for m in row["messages"]] == ["system", "user"]
    assert row["reference"] == "2"
    tokens = row["tokens"]
    assert tokens["advantages"] == [0.5, 0.5, -0.25, 0.3333, 0.0, 0.0]
    assert tokens["logprobs"] == [-0.1235] * 6
    assert tokens["values"] == [0.1] * 6
    assert tokens["ends"][-1] == len(row["response"])
    assert [state["cut_text"] for state in row["states"]] == [0, tokens["ends"][2]]
    assert row["states"][1]["unasked"] == "no room in the critic's model"
    assert row["judge_prompt"][: row["states"][0]["prompt"][0]] + row["states"][0]["prompt"][1] == "judge"


def test_a_conversation_says_where_each_of_the_actors_tokens_begins(tmp_path: Path) -> None:
    run: Any = FakeRun(tmp_path, shown_rollouts=1)
    one = rollout(7)
    ids = one.completion.ids
    texts = [str(TINY.decode(list(part), skip_special_tokens=True)) for part in (ids[:2], ids[2:4], ids[4:])]
    turns = (Turn("actor", texts[0], 0, 2), Turn("user", texts[1], 2, 4), Turn("actor", texts[2], 4, 7))
    one.completion = Completion(ids, (-0.5,) * 5, "stop", ((7, 5),), sampled=((0, 2), (4, 7)))
    one.episode, one.advantages = Episode(turns, "done"), [0.1, 0.2, 0.3, 0.4, 0.5]
    keep_batch(run, STAGE, batch(one, [judgement(one, cut, "judge", n) for n, cut in enumerate((0, 4))]), 1)
    (row,) = rows(tmp_path)
    tokens, response = row["tokens"], row["response"]
    assert {len(values) for values in tokens.values()} == {5}
    own = [response[a:b] for a, b in zip(tokens["begins"], tokens["ends"], strict=True)]
    assert "".join(own[:2]) == texts[0]
    assert "".join(own[2:]) == texts[2]
    assert response[tokens["ends"][1] : tokens["begins"][2]] == f"\n<user>\n{texts[1]}\n<actor>\n"
    before = row["states"][1]["cut_text"]  # the state before the second turn, whose tag it is shown at
    assert tokens["ends"][1] < before <= tokens["begins"][2]


def test_steps_are_kept_by_the_recipe_and_long_responses_in_part(tmp_path: Path) -> None:
    run: Any = FakeRun(tmp_path, shown_rollouts=2, rollouts_every=3)
    for step in range(1, 9):
        keep_batch(run, STAGE, batch(rollout()), step)
    assert [row["step"] for row in rows(tmp_path)] == [1, 1, 4, 4, 7, 7]
    never: Any = FakeRun(tmp_path / "never", rollouts_every=0)
    keep_batch(never, STAGE, batch(rollout()), 1)
    assert rows(tmp_path / "never") == []
    long: Any = FakeRun(tmp_path / "long", shown_rollouts=1)
    keep_batch(long, STAGE, batch(rollout(MOST_TOKENS + 3)), 1)
    (row,) = rows(tmp_path / "long")
    assert row["length"] == MOST_TOKENS + 3
    assert {len(values) for values in row["tokens"].values()} == {MOST_TOKENS}


def test_a_full_file_is_said_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run: Any = FakeRun(tmp_path, shown_rollouts=1, rollouts_every=1)
    keep_batch(run, STAGE, batch(rollout()), 1)
    monkeypatch.setattr(shown, "MOST_BYTES", 10)
    for step in (2, 3):
        keep_batch(run, STAGE, batch(rollout()), step)
    assert len(rows(tmp_path)) == 1
    assert len(run.notes) == 1
    assert ROLLOUTS in run.notes[0]
    keep(run, STAGE, batch(rollout()).groups, 4)
    assert [row["step"] for row in rows(tmp_path)] == [1, 4], "evaluations' are always kept"
