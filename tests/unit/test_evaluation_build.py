"""`bank build` without a model: what identifies a bank, and what is refused."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from banks import kept_bank

from genac_megatron.errors import InputError
from genac_megatron.evaluation import build
from genac_megatron.evaluation.bank import Bank, BankPrompt, read_bank, texts_digest
from genac_megatron.evaluation.build import Builder, BuildOptions, check_options
from genac_megatron.recipe.loader import load_recipe
from genac_megatron.records import Prompt
from genac_megatron.tasks.tokenizer import load_tokenizer

TINY = load_tokenizer("builtin:tiny")


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "from_first", lambda act: act())
    monkeypatch.setattr(build, "identity", lambda run, role: {"weights": "ab", "tokenizer": "cd"})


@pytest.fixture
def bank(tmp_path: Path) -> Bank:
    return kept_bank(tmp_path / "bank")


class Problems:
    """A task whose held-out problems are the bank's; `edited`: one of them is another today."""

    def __init__(self, bank: Bank, size: int = 6, edited: int | None = None) -> None:
        self.prompts, self.heldout_size, self.edited = [one.prompt for one in bank.prompts], size, edited

    def prompt(self, split: str, index: int) -> Prompt:
        if not index < self.heldout_size:
            raise IndexError(index)
        prompt = self.prompts[index]
        return replace(prompt, reference={"a": [2]}) if index == self.edited else prompt


def builder(task: Problems, base: Bank | None = None, **options: Any) -> Builder:
    recipe = load_recipe("recipes/quickstart.yaml")
    run: Any = SimpleNamespace(
        environment=None,
        recipe=recipe,
        world=SimpleNamespace(rank=0, size=1),
        engines={"actor": None},
        tokenizers={"actor": TINY},
        task=task,
        stop_ids=lambda _: (0,),
        actor=SimpleNamespace(shape=SimpleNamespace(max_positions=99)),
        together=lambda act: act(),
        share=list,
        generating=lambda act: act(),
        progress=SimpleNamespace(stage=lambda *_: None, step=lambda *_: None, note=lambda _: None),
        phase=lambda _: nullcontext(),
        stop_requested=lambda: False,
    )
    return Builder(run, BuildOptions(chunk=2, **options), base)


class Stubbed(Builder):
    """Takes its pieces from a bank that is there."""

    source: Bank
    made: list[int]
    until: int | None = None

    def pieces(self, numbers: Any) -> list[BankPrompt]:
        if self.until is not None and len(self.made) >= self.until:
            raise KeyboardInterrupt
        self.made += numbers
        return [self.source.prompts[number] for number in numbers]


def stubbed(bank: Bank, out: Path, until: int | None = None, **task: Any) -> Stubbed:
    made = builder(Problems(bank, **task), out=out)
    made.__class__ = Stubbed
    assert isinstance(made, Stubbed)
    made.source, made.made, made.until = bank, [], until
    return made


def test_a_build_that_was_killed_goes_on_with_the_same_problems_alone(bank: Bank, tmp_path: Path) -> None:
    stubbed(bank, tmp_path / "whole").build()
    with pytest.raises(KeyboardInterrupt):
        stubbed(bank, tmp_path / "out", until=2).build()
    with pytest.raises(InputError, match="another texts"):
        stubbed(bank, tmp_path / "out", edited=4).build()
    again = stubbed(bank, tmp_path / "out")
    again.build()
    assert again.made == [2, 3, 4, 5]
    for name in ("bank.jsonl", "manifest.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_bank_that_lost_lines_is_not_taken_for_a_smaller_one(bank: Bank, tmp_path: Path) -> None:
    out = tmp_path / "out"
    stubbed(bank, out).build()
    before = (out / "bank.jsonl").read_bytes()
    (out / "bank.jsonl").write_bytes(b"".join(before.splitlines(keepends=True)[:4]))
    again = stubbed(bank, out)
    with pytest.raises(InputError, match="not the file that its manifest names"):
        again.build()
    assert again.made == []
    for name in ("bank.jsonl", "manifest.json"):  # the way out
        (out / name).unlink()
    again.build()
    assert again.made == [0, 1, 2, 3, 4, 5]
    assert (out / "bank.jsonl").read_bytes() == before
    assert len(read_bank(out).prompts) == 6


def test_a_bank_of_which_a_node_kept_rows_for_itself_is_not_finished(bank: Bank, tmp_path: Path) -> None:
    out = tmp_path / "out"
    made = stubbed(bank, out)
    keep = made.parts.append
    made.parts.append = lambda rows, rank: keep([row for row in rows if row["number"] != 3], rank)  # type: ignore[method-assign]
    with pytest.raises(InputError, match="1 of 6 rows are not there, the first: number 3") as error:
        made.build()
    assert "a folder that all nodes share" in str(error.value)
    assert not (out / "manifest.json").exists()


def test_a_plan_of_an_earlier_version_is_told_apart_from_another_banks(bank: Bank, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        stubbed(bank, out, until=2).build()
    plan = json.loads((out / "plan.json").read_text())
    del plan["texts"]
    (out / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(InputError, match=r"another version .* says nothing of texts"):
        stubbed(bank, out).build()


def test_the_digest_of_texts_is_of_what_is_asked_and_what_is_right(bank: Bank) -> None:
    prompts = [one.prompt for one in bank.prompts]
    digest = texts_digest(prompts)
    for change in (
        {"problem": "q"},
        {"messages": ({"role": "user", "content": "q"},)},
        {"reference": {"a": [2]}},
        {"success": "it is right"},
    ):
        assert texts_digest([*prompts[:-1], replace(prompts[-1], **change)]) != digest
    assert texts_digest(prompts[:-1]) != digest
    assert texts_digest([replace(prompt, ids=(9,)) for prompt in prompts]) == digest
    texts_digest([replace(prompts[0], problem="half a pair \ud83d")])


def test_a_bank_whose_prompts_show_the_date_is_not_gone_on_with_on_another_day(
    bank: Bank, tmp_path: Path
) -> None:
    dated = load_tokenizer("builtin:tiny")
    dated.chat_template = "{{ strftime_now('%d %b') }}" + str(dated.chat_template)

    def on(day: int, until: int | None = None) -> Stubbed:
        made = stubbed(bank, tmp_path / "out", until=until)
        made.generator.tokenizer = dated
        made.prompts = [replace(prompt, ids=(day, *prompt.ids)) for prompt in made.prompts]
        return made

    with pytest.raises(KeyboardInterrupt):
        on(1, until=2).build()
    with pytest.raises(InputError, match="rendered"):
        on(2).build()
    on(1).build()
    assert "rendered" not in stubbed(bank, tmp_path / "other").plan()


def test_options_that_another_bank_decides_are_refused(tmp_path: Path) -> None:
    wrong = BuildOptions(tmp_path, prompts=4, max_new_tokens=8, states_from=tmp_path / "bank")
    with pytest.raises(InputError, match="--prompts and --max-new-tokens cannot be given with --states-from"):
        check_options(wrong)
    with pytest.raises(InputError, match="--max-new-tokens cannot") as error:
        check_options(replace(wrong, prompts=None))
    assert "leave --max-new-tokens out" in str(error.value)
    check_options(replace(wrong, prompts=None, max_new_tokens=None))
    check_options(replace(wrong, states_from=None))


def test_states_of_more_prompts_than_the_task_has_are_refused(bank: Bank, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="it has 6 prompts, the recipe's task 4 held-out ones"):
        builder(Problems(bank, size=4), bank, out=tmp_path / "out")
    assert len(builder(Problems(bank, size=4), out=tmp_path / "out").prompts) == 4
    assert len(builder(Problems(bank), bank, out=tmp_path / "out").prompts) == 6
