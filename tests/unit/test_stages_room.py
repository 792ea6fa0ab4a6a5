"""Rows without room in a model: found over all ranks before anything is built, dropped or told by line.

A run is a stand-in that has a recipe, tokenizers, a task and a world, as the checks use no more of it.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from genac_megatron.critic.icc import IccState
from genac_megatron.critic.prompt import build_prompt_ids
from genac_megatron.errors import InputError
from genac_megatron.recipe.schema import Recipe
from genac_megatron.stages.room import drawn, fit_chats, fit_task, longest
from genac_megatron.tasks import make_task
from genac_megatron.tasks.tokenizer import load_tokenizer

TINY = load_tokenizer("builtin:tiny")
MODEL = {"model": {"family": "qwen3", "tokenizer": "builtin:tiny"}}
STAGES: dict[str, dict[str, Any]] = {
    "policy": {"kind": "policy", "algorithm": {"kind": "grpo"}, "rollout": {"max_new_tokens": 64}},
    "ppo": {"kind": "ppo", "rollout": {"max_new_tokens": 64}},
    "sft": {"kind": "sft", "role": "actor", "data": "demonstrations", "rollout": {"max_new_tokens": 99}},
    "traces": {"kind": "sft", "role": "critic", "data": "traces", "rollout": {"max_new_tokens": 50}},
}


def rows(path: Path, words: dict[int, int], count: int = 13) -> str:
    """A file of questions; those of `words`, by line, have so many words more."""
    lines = (
        {
            "question": f"{n}+1?{' word' * words.get(n, 0)}",
            "answer": n + 1,
            "split": "test" if n > 10 else None,
        }
        for n in range(1, count + 1)
    )
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def stand_in(task: dict[str, Any], *stages: str | dict[str, Any], ranks: int = 1, **more: Any) -> Any:
    chosen = [STAGES[stage] if isinstance(stage, str) else stage for stage in stages]
    named = [{**stage, "name": str(number)} for number, stage in enumerate(chosen)]
    plain = task if task.get("kind") == "state_tracking" else {"kind": "jsonl", "verifier": "exact", **task}
    roles = {"actor": MODEL, "critic": MODEL}
    recipe = Recipe.model_validate({"name": "x", "roles": roles, "task": plain, "stages": named, **more})
    notes: list[str] = []
    return SimpleNamespace(
        recipe=recipe,
        task=make_task(recipe.task, TINY, 0),
        tokenizers={"actor": TINY, "critic": TINY},
        world=SimpleNamespace(rank=0, size=ranks),
        together=lambda act: act(),
        gather=list,
        share=list,
        progress=SimpleNamespace(note=notes.append),
        notes=notes,
    )


BOTH = ("train", "heldout")
ROOMY = {"actor": 512, "critic": 4096}


def test_what_has_no_room_ends_the_run_at_its_start_by_line(tmp_path: Path) -> None:
    run = stand_in({"path": rows(tmp_path / "a.jsonl", {7: 300, 9: 300})}, "policy")
    with pytest.raises(InputError, match=r"2 of 10 train prompts have no room") as caught:
        fit_task(run, ROOMY, BOTH)
    told = str(caught.value)
    assert f"{tmp_path}/a.jsonl:7: the actor reads " in told
    assert f"{tmp_path}/a.jsonl:9: the actor reads " in told
    assert "and may write 64, in 512 positions" in told
    assert "task.overlong: drop" in told
    assert caught.value.agreed
    assert caught.value.exit_code == 2


def test_dropped_rows_are_counted_and_told_and_never_drawn(tmp_path: Path) -> None:
    task = {"path": rows(tmp_path / "a.jsonl", {7: 300, 12: 300}), "overlong": "drop"}
    run = stand_in(task, "policy")
    fit_task(run, ROOMY, BOTH)
    assert (run.task.train_size, run.task.heldout_size) == (9, 2)
    drawn = [run.task.prompt("train", run.task.train_index(0, n)) for n in range(18)]
    assert {p.where for p in drawn} == {f"{tmp_path}/a.jsonl:{n}" for n in (1, 2, 3, 4, 5, 6, 8, 9, 10)}
    assert ["1 of 10 train" in run.notes[0], "1 of 3 heldout" in run.notes[1]] == [True, True]
    assert all("left out" in note for note in run.notes)
    assert f"{tmp_path}/a.jsonl:12:" in run.notes[1]


def test_evaluations_ask_for_held_out_prompts_alone(tmp_path: Path) -> None:
    run = stand_in({"path": rows(tmp_path / "a.jsonl", {7: 300})}, "policy")
    fit_task(run, ROOMY, ("heldout",))
    assert run.notes == []


def test_where_no_row_has_room_dropping_is_no_way_out(tmp_path: Path) -> None:
    run = stand_in({"path": rows(tmp_path / "a.jsonl", {}), "overlong": "drop"}, "policy")
    with pytest.raises(InputError, match="10 of 10 train prompts"):
        fit_task(run, {"actor": 65}, BOTH)


def test_a_critics_prompt_holds_the_longest_response(tmp_path: Path) -> None:
    """The actor's prompt and response fit; the critic's prompt around them does not."""
    judging = {"template": "brief", "max_new_tokens": 16, "states": {"max_states": 4, "min_segment": 8}}
    stage = {"kind": "ppo", "rollout": {"max_new_tokens": 230}}
    run = stand_in({"path": rows(tmp_path / "a.jsonl", {})}, stage, judging=judging)
    fit_task(run, {"actor": 300, "critic": 4096}, BOTH)
    with pytest.raises(InputError, match=r"a.jsonl:1: the critic reads \d+ tokens and may write 16, in 270"):
        fit_task(run, {"actor": 300, "critic": 270}, BOTH)
    prompt = run.task.prompt("train", 0)
    icc = IccState(1.0, step=1_000_000)
    alone = len(build_prompt_ids(TINY, run.recipe.judging, icc, prompt, "", 230, 230))
    longer = max(alone, *(len(_prompt_ids(run, n, icc)) for n in range(run.task.train_size)))
    enough = longer + 230 - 1 + 16
    fit_task(run, {"actor": 300, "critic": enough}, ("train",))
    with pytest.raises(InputError, match="the critic reads"):
        fit_task(run, {"actor": 300, "critic": enough - 1}, ("train",))


def _prompt_ids(run: Any, index: int, icc: IccState) -> tuple[int, ...]:
    prompt = run.task.prompt("train", index)
    return build_prompt_ids(TINY, run.recipe.judging, icc, prompt, "", 230, 230)


def test_the_longest_response_is_that_of_stages_which_play_the_split() -> None:
    def of(*stages: str) -> list[tuple[int, int]]:
        named = [{**STAGES[stage], "name": str(n)} for n, stage in enumerate(stages)]
        task = {"kind": "state_tracking"}
        recipe = Recipe.model_validate({"name": "x", "roles": {}, "task": task, "stages": named})
        return [longest(recipe, split) for split in ("train", "heldout")]

    assert of("sft", "policy") == [(64, 64), (99, 64)]
    assert of("sft") == [(0, 0), (99, 0)]
    assert of("traces") == [(50, 50), (50, 50)]
    assert of("sft", "traces", "ppo") == [(64, 64), (99, 64)]


def test_every_rank_looks_at_its_share(tmp_path: Path) -> None:
    path = rows(tmp_path / "a.jsonl", dict.fromkeys(range(1, 14), 300))
    run = stand_in({"path": path}, "policy", ranks=2)
    with pytest.raises(InputError, match="5 of 10 train prompts"):  # the gathering here adds no other rank's
        fit_task(run, ROOMY, BOTH)


def test_a_row_that_the_template_refuses_is_named_before_the_run_begins(tmp_path: Path) -> None:
    run = stand_in({"path": rows(tmp_path / "a.jsonl", {})}, "policy")
    run.task.tokenizer = load_tokenizer("builtin:tiny")
    run.task.tokenizer.chat_template = (
        "{% if '7+1' in messages[0].content %}{{ raise_exception('no sevens') }}{% endif %}x"
    )
    with pytest.raises(InputError, match=r"a.jsonl:7: the chat template .* no sevens"):
        fit_task(run, ROOMY, BOTH)


def chats(path: Path, lengths: list[int]) -> str:
    lines = (
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "word " * n}]}
        for n in lengths
    )
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def test_conversations_are_looked_at_before_the_run_begins(tmp_path: Path) -> None:
    stage = {
        "kind": "sft",
        "role": "actor",
        "data": "jsonl",
        "path": chats(tmp_path / "c.jsonl", [3, 900, 4]),
    }
    run = stand_in({"path": rows(tmp_path / "a.jsonl", {})}, "policy", stage)
    with pytest.raises(InputError, match=r"1 conversations have no room.*\n.*c.jsonl:2: \d+ tokens, in 512"):
        fit_chats(run, ROOMY, run.recipe.stages)
    run = stand_in({"path": rows(tmp_path / "a.jsonl", {})}, {**stage, "overlong": "drop"})
    [left_out] = fit_chats(run, ROOMY, run.recipe.stages)
    assert left_out.startswith(f"{tmp_path}/c.jsonl:2: ")
    run.tokenizers["actor"] = load_tokenizer("builtin:tiny")
    run.tokenizers["actor"].chat_template = "{{ raise_exception('never') }}"
    with pytest.raises(InputError, match=r"c.jsonl:1: the chat template"):
        fit_chats(run, ROOMY, run.recipe.stages)


SWAPS: dict[str, Any] = {"kind": "state_tracking", "objects": 3, "min_swaps": 2, "max_swaps": 40}


def test_a_generators_longest_problems_are_looked_at_before_the_run_begins() -> None:
    """A run that drew one of them would end then."""
    sizes = {"train_size": 300, "heldout_size": 8}
    run = stand_in({**SWAPS, **sizes}, "policy")
    lengths = {n: len(run.task.prompt("train", n).ids) for n in range(300)}
    most, short = (
        max(lengths.values()) + 64,
        sum(length < max(lengths.values()) for length in lengths.values()),
    )
    assert 0 < short < 300
    fit_task(run, {"actor": most, "critic": 4096}, ("train",))
    with pytest.raises(InputError, match=r"train prompts of the task have no room") as caught:
        fit_task(run, {"actor": most - 1, "critic": 4096}, ("train",))
    told = str(caught.value)
    assert f"and may write 64, in {most - 1} positions" in told
    assert "make the task's problems smaller" in told
    named = int(told.partition("train/")[2].partition(":")[0])
    assert lengths[named] + 64 == most


def test_what_has_no_room_in_the_critic_alone_ends_no_run_of_a_generators_prompts() -> None:
    run = stand_in({**SWAPS, "train_size": 50, "heldout_size": 8}, "ppo")
    fit_task(run, {"actor": 4096, "critic": 60}, BOTH)


def test_of_a_generator_no_more_is_made_than_the_stages_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    """A short run need not wait for the whole pool to be made; what it draws is looked at as before."""
    stages = [{**STAGES["ppo"], "steps": 3, "rollout": {"prompts": 5, "max_new_tokens": 64}}] * 2
    run = stand_in({**SWAPS, "train_size": 300, "heldout_size": 8}, *stages)
    looked: list[int] = []
    problem = run.task._problem

    def noted(split: str, index: int) -> Any:
        looked.append(index)
        return problem(split, index)

    monkeypatch.setattr(run.task, "_problem", noted)
    fit_task(run, {"actor": 4096, "critic": 4096}, ("train",))
    assert set(looked) - {0} <= {run.task.train_index(0, n) for n in range(30)} <= set(looked)
    last = max(range(30), key=lambda n: len(run.task.prompt("train", run.task.train_index(0, n)).ids))
    longest_one = len(run.task.prompt("train", run.task.train_index(0, last)).ids)
    with pytest.raises(InputError, match=f"train/{run.task.train_index(0, last)}: the actor reads"):
        fit_task(run, {"actor": longest_one + 63, "critic": 4096}, ("train",))


def test_what_stages_draw_at_most() -> None:
    def of(*stages: dict[str, Any]) -> int:
        named = [{**stage, "name": str(n)} for n, stage in enumerate(stages)]
        task = {"kind": "state_tracking"}
        return drawn(Recipe.model_validate({"name": "x", "roles": {}, "task": task, "stages": named}))

    grpo = {"kind": "policy", "algorithm": {"kind": "grpo"}, "steps": 7, "rollout": {"prompts": 4}}
    dapo = {**grpo, "algorithm": {"kind": "dapo", "rounds": 3}}
    sft = {"kind": "sft", "role": "actor", "data": "demonstrations", "size": 50}
    assert of(grpo) == 28
    assert of(grpo, dapo) == 28 + 3 * 28  # one goes on where the other has ended
    assert of(sft, grpo) == 100  # its own draws begin with the first
    assert of({**sft, "role": "critic", "data": "traces", "size": 5}, grpo) == 28
    assert of({**sft, "data": "jsonl", "path": "x.jsonl"}, grpo) == 28
