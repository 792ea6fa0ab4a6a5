"""What the benchmarks of trees and of TRL compare: the same prompts on both sides, samples as said."""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import pytest
from pydantic import TypeAdapter

from benchmarks import vs_trl
from benchmarks.tree_plans import critic_step, plan_rows
from benchmarks.trees import small_samples
from genac_megatron.recipe.tasks import TaskConfig
from genac_megatron.tasks import make_task
from genac_megatron.tasks.tokenizer import load_tokenizer, stop_token_ids
from genac_megatron.training.trees import order_of

TINY = load_tokenizer("builtin:tiny")


@pytest.mark.parametrize("shots", [0, 3])
def test_both_sides_have_the_same_prompts(tmp_path: Path, shots: int) -> None:
    block = vs_trl.write_prompts(tmp_path, 6, shots)
    rows = json.loads((tmp_path / "prompts.json").read_text())
    task = make_task(TypeAdapter(TaskConfig).validate_python(block), TINY, 1)
    ours = [task.prompt("train", n) for n in range(6)]
    assert [row["prompt"] for row in rows] == [TINY.decode(prompt.ids) for prompt in ours]
    assert [row["answer"] for row in rows] == [str(prompt.reference) for prompt in ours]
    if shots:
        assert task.verify(ours[0], f"so\n{ours[0].reference}") == 1.0
        shared = order_of([*_samples(ours)])
        assert min(shared.shared) > 60, "the solved problems are the same before each"


def _samples(prompts: list) -> list:  # type: ignore[type-arg]
    from genac_megatron.records import Sample

    return [Sample([*prompt.ids, 1], len(prompt.ids)) for prompt in prompts]


def test_small_samples_are_as_long_as_the_quickstarts() -> None:
    judged, written = small_samples()
    assert (len(judged), len(written)) == (192, 48)
    assert all(60 <= len(sample.tokens) <= 140 for sample in judged)
    order = order_of(judged)
    assert order.size(range(192)) < 0.65 * sum(order.lengths)


def test_plans_are_near_the_uncut_trees_and_level() -> None:
    rows = plan_rows(samples=256, widths=(1, 2))
    assert [row["step"] for row in rows] == ["actor", "actor", "critic", "critic"]
    for row in rows:
        assert row["uncut"] >= row["flat / tree"] > (2.0 if row["step"] == "critic" else 1.2)
        assert 0 <= row["rank imbalance %"] < 5
    lengths = [len(sample.tokens) for sample in critic_step(8, random.Random(1))]
    assert lengths[0] < lengths[1] < lengths[2] < lengths[3], "states nest"


def test_completions_end_at_one_token(tmp_path: Path) -> None:
    """As TRL's side has it; else ours, with one end more, would be shorter."""
    vs_trl.make_model(tmp_path, vs_trl.MODELS["0.2 M"])
    tokenizer = load_tokenizer(str(tmp_path))
    assert stop_token_ids(tokenizer, str(tmp_path)) == (tokenizer.eos_token_id,)


@pytest.mark.extended
def test_our_side_runs_on_long_prompts(tmp_path: Path) -> None:
    """With prompts of solved problems; trees compute fewer tokens, and the flat side all."""
    model = tmp_path / "model"
    vs_trl.make_model(model, vs_trl.MODELS["0.2 M"])
    options = argparse.Namespace(
        prompts=2, samples=4, new_tokens=8, tokens_per_microbatch=2048, lr=1e-6,
        task=vs_trl.write_prompts(model, 8, 3),
    )  # fmt: skip
    shares = {}
    for run in (vs_trl.run_ours, vs_trl.run_flat):
        folder = tmp_path / run.__name__
        folder.mkdir()
        shares[run.__name__] = run("grpo", model, folder, options, 2)["computed"]
    assert shares["run_ours"] < 0.5
    assert shares["run_flat"] == 1.0
