"""A generative critic's judgements as a value head's lessons: files, prompts, what is held out, batches."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from genac_megatron.critic.judged import JudgedState, judged_rows, read_judged
from genac_megatron.errors import InputError
from genac_megatron.recipe.loader import load_recipe
from genac_megatron.recipe.schema import DistilConfig, ValueStage
from genac_megatron.recipe.tasks import MixtureTask, StateTrackingTask
from genac_megatron.stages.distil import Lessons, _batch, _lessons, find_prompts
from genac_megatron.tasks import Task, make_task
from genac_megatron.tasks.tokenizer import load_tokenizer, stop_token_ids
from tests.warm import ROOT

TOKENIZER = load_tokenizer("builtin:tiny")
TASK = make_task(
    StateTrackingTask(kind="state_tracking", objects=3, train_size=20, heldout_size=4), TOKENIZER, 0
)
STATE = {"actor": "a", "problem": "2+2?", "partial": "4", "ids": [5], "outcomes": [1.0, 0.0], "round": 0}


def write(path: Path, *rows: object) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_a_states_value_is_the_mean_of_the_answers_that_parse(tmp_path: Path) -> None:
    states = [{**STATE, "state": n, "prompt_id": f"train/{n}"} for n in range(3)]
    answers = [{"state": 0, "value": 0.2}, {"state": 0, "value": 0.6}, {"state": 0, "value": None},
               {"state": 1, "value": None}, {"state": 2, "value": 1.0}]  # fmt: skip
    found = read_judged(write(tmp_path / "judged.jsonl", *judged_rows(states, answers)))
    assert [(one.prompt_id, one.value) for one in found] == [("train/0", 0.4), ("train/2", 1.0)]
    assert (found[0].ids, found[0].outcomes) == ((5,), (1.0, 0.0))


def test_transcripts_with_values_of_their_prefixes_are_states(tmp_path: Path) -> None:
    row = {"problem": "2+2?", "response": "is\n4", "value": 0.9,
           "values": [{"characters": 0, "value": 0.5}, {"characters": 3, "value": None},
                      {"characters": 4, "value": 0.9}]}  # fmt: skip
    alone = {"problem": "2+2?", "response": "5", "value": 0.1}
    found = read_judged(write(tmp_path / "scored.jsonl", row, alone))
    assert [(one.partial, one.value, one.ids) for one in found] == [
        ("", 0.5, None), ("is\n4", 0.9, None), ("5", 0.1, None)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("no object", "not an object with a problem"),
        ({"problem": "2?"}, "neither a partial nor a response"),
        ({**STATE, "value": 1.5}, r"a value is 1\.5"),
        ({**STATE, "value": True}, "a value is True"),
        ({"problem": "2?", "response": "4", "value": None}, "no state with a value"),
    ],
)
def test_what_is_no_judged_state_is_refused_with_its_line(row: object, said: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=said) as raised:
        read_judged(write(tmp_path / "judged.jsonl", row))
    assert "judged.jsonl" in str(raised.value)


def judged(index: int, split: str = "train", **more: Any) -> JudgedState:
    prompt = TASK.prompt(split, index)  # type: ignore[arg-type]
    values = {"where": f"f:{index}", "prompt_id": prompt.id, "problem": prompt.problem, "partial": "",
              "ids": (7, 8), "value": 0.5} | more  # fmt: skip
    return JudgedState(**values)


def test_prompts_are_found_by_id_and_by_text_and_another_tasks_are_refused() -> None:
    by_text = [judged(3, prompt_id=None), judged(2, "heldout", prompt_id=None)]
    assert [prompt.id for prompt in find_prompts(TASK, [judged(5), *by_text])] == [
        "train/5", "train/3", "heldout/2"
    ]  # fmt: skip
    for wrong in (judged(5, problem="another"), judged(5, problem="another", prompt_id=None)):
        with pytest.raises(InputError, match="about no problem of the task"):
            find_prompts(TASK, [wrong])
    with pytest.raises(InputError, match="no prompt 'train/999'"):
        find_prompts(TASK, [judged(5, prompt_id="train/999")])


def lessons(states: list[JudgedState], share: float = 0.2, task: Task = TASK) -> Lessons:
    run: Any = SimpleNamespace(
        task=task, tokenizers={"actor": TOKENIZER}, recipe=SimpleNamespace(seed=1),
        stop_ids=lambda _: stop_token_ids(TOKENIZER),
    )  # fmt: skip
    config = DistilConfig(path="judged.jsonl", heldout=share)
    return _lessons(run, ValueStage(kind="value", distil=config), config, states)


def test_a_mixtures_states_are_found_in_their_parts_and_learnt() -> None:
    parts = [{"name": name, "task": {"kind": kind, "train_size": 20, "heldout_size": 4}}
             for name, kind in (("swaps", "state_tracking"), ("sums", "chained_arithmetic"))]  # fmt: skip
    mixed = make_task(MixtureTask.model_validate({"kind": "mixture", "parts": parts}), TOKENIZER, 0)
    prompts = [mixed.prompt("train", index) for index in (3, 7, 25, 26, 38)]
    prompts.append(mixed.prompt("heldout", 1))
    named = [
        judged(0, prompt_id=prompt.id if by_id else None, problem=prompt.problem)
        for prompt in prompts
        for by_id in (True, False)
    ]
    assert find_prompts(mixed, named) == [prompt for prompt in prompts for _ in range(2)]
    found = lessons(named, task=mixed)
    assert (len(found.trained), len(found.heldout)) == (8, 4)
    for wrong in ("sums/train/999", "others/train/1", "sums/1", "train/1"):
        with pytest.raises(InputError, match=f"no prompt '{wrong}'"):
            find_prompts(mixed, [judged(5, prompt_id=wrong)])


def test_whole_problems_are_held_out_and_what_the_task_holds_out_too() -> None:
    states = [judged(index, ids=(7,) * n) for index in range(10) for n in (0, 2)]
    found = lessons([*states, judged(1, "heldout", ids=None, partial="ab")])
    apart = {state.prompt_id for _, state in found.heldout}
    assert len(apart) == 3
    assert "heldout/1" in apart
    assert not apart & {state.prompt_id for _, state in found.trained}
    assert len(found.trained) == 16
    for sample, state in [*found.trained, *found.heldout]:  # one place behind the prefix
        length = (
            len(TOKENIZER("ab", add_special_tokens=False)["input_ids"])
            if state.ids is None
            else len(state.ids)
        )
        assert sample.trained == length + 1
    with pytest.raises(InputError, match="0 states to learn"):
        lessons([judged(1)])


def test_every_state_is_met_once_a_pass_and_its_last_place_alone_is_taught() -> None:
    found = lessons([judged(index, value=index / 20) for index in range(20)])
    count = len(found.trained)
    steps = [_batch(found, 4, step, (1, "value")) for step in range(1, count // 4 + 1)]
    targets = [sample.fields["targets"][-1] for step in steps for sample in step]
    assert sorted(targets) == sorted(state.value for _, state in found.trained)
    assert steps == [_batch(found, 4, step, (1, "value")) for step in range(1, count // 4 + 1)]
    for step in steps:
        assert [sample.fields["weights"] for sample in step] == [[0.0, 0.0, 0.25]] * 4


def test_a_stage_that_distils_says_nothing_of_rollouts_targets() -> None:
    path = ROOT / "recipes" / "quickstart" / "distilled.yaml"
    assert isinstance(load_recipe(path).stages[0], ValueStage)
    for key in ("value.target=monte_carlo", "minibatches=4"):
        with pytest.raises(InputError, match="is of rollouts"):
            load_recipe(path, [f"stages.value.{key}"])
