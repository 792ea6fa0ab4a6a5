"""Several sources of SFT samples and the critic's own judgements, made by the real stage from real tasks.

The engines are invented: they write what a task's exact teacher demonstrates, or a fixed judgement, and keep
what they were asked. No model is there.
"""

from __future__ import annotations

import random
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from genac_megatron.critic.icc import IccState
from genac_megatron.critic.score import parse_score
from genac_megatron.errors import InputError
from genac_megatron.recipe.schema import Recipe, SftStage
from genac_megatron.records import Completion, Request, Sample
from genac_megatron.stages.batch import supervised
from genac_megatron.stages.heldout import _trained_targets
from genac_megatron.stages.sft import part_figures
from genac_megatron.stages.sft_data import _read_samples, _write_samples, make_data, pass_order
from genac_megatron.stages.sft_heldout import figures_by_part
from genac_megatron.stages.sft_orders import held_out_texts, orders, sizes
from genac_megatron.tasks import make_task
from genac_megatron.tasks.tokenizer import load_tokenizer

TINY = load_tokenizer("builtin:tiny")
ROLE = {"model": {"family": "qwen3", "tokenizer": "builtin:tiny", "shape": {
    "layers": 1, "hidden": 8, "ffn": 8, "heads": 1, "kv_heads": 1}}}  # fmt: skip
SHORT = {"kind": "state_tracking", "min_swaps": 2, "max_swaps": 3, "heldout_size": 8, "slip_rate": 0.3}
LONG = {**SHORT, "min_swaps": 6, "max_swaps": 8}


class FakeActor:
    """Writes the demonstrations of whichever task a prompt is of; keeps the temperatures it was asked for."""

    version = 1

    def __init__(self, tasks: list[Any]) -> None:
        self.tasks, self.temperatures = tasks, Counter[float]()
        self.prompts: list[tuple[Any, Any]] = []

    def _find(self, ids: tuple[int, ...]) -> tuple[Any, Any]:
        if not self.prompts:
            for task in self.tasks:
                for split, size in (("train", task.train_size), ("heldout", task.heldout_size)):
                    self.prompts += [(task, task.prompt(split, index)) for index in range(size)]
        return next((task, prompt) for task, prompt in self.prompts if prompt.ids == ids[: len(prompt.ids)])

    async def complete(self, request: Request) -> Completion:
        self.temperatures[request.params.temperature] += 1
        return self._write(*self._find(request.ids), request)

    def _write(self, task: Any, prompt: Any, request: Request) -> Completion:
        text = task.teacher.demonstrate(prompt, random.Random(request.seed))
        ids = (*TINY.encode(text, add_special_tokens=False), TINY.eos_token_id)
        ids = ids[len(request.ids) - len(prompt.ids) :][: request.params.max_new_tokens] or (
            TINY.eos_token_id,
        )
        return Completion(ids, (-0.1,) * len(ids), "stop", ((1, len(ids)),))

    def deal(self, numbers: Any) -> None:
        """One engine has them all."""

    def stats(self) -> dict[str, float]:
        return {"tokens": 0.0, "prompt_tokens": 0.0, "seconds": 0.0}


class FakeCritic(FakeActor):
    """Says the same of every state."""

    def __init__(self, score: int) -> None:
        super().__init__([])
        self.score, self.seeds = score, list[int]()

    async def complete(self, request: Request) -> Completion:
        self.seeds.append(request.seed)
        ids = (*TINY.encode(f"<answer>{self.score}</answer>", add_special_tokens=False), TINY.eos_token_id)
        return Completion(ids, (-0.1,) * len(ids), "stop", ((1, len(ids)),))


def as_sampled(samples: list[Sample], temperature: float) -> list[list[float]]:
    """The trainer's log-probs, which are the engine's."""
    return [[-0.1] * sample.trained for sample in samples]


def run_of(stage: dict[str, Any], score: int = 5, **more: Any) -> Any:
    """What these functions use of a run, with one rank."""
    block = {"kind": "sft", "name": "traces", "role": "critic", "data": "traces", "epochs": 1,
             "rollout": {"prompts": 4, "samples": 2, "max_new_tokens": 96}, **stage}  # fmt: skip
    recipe = Recipe.model_validate({
        "name": "x", "roles": {"actor": ROLE, "critic": ROLE}, "task": {**SHORT, "train_size": 400},
        "judging": {"template": "brief", "max_new_tokens": 96, "states": {"min_segment": 4}},
        "stages": [block], **more,
    })  # fmt: skip
    task = make_task(recipe.task, TINY, 0)
    actor = FakeActor([task])
    run: Any = SimpleNamespace(
        recipe=recipe, task=task, more_tasks={}, tokenizers={"actor": TINY, "critic": TINY},
        icc=IccState(0.5), engines={"actor": actor, "critic": FakeCritic(score)}, notes=[], told=set(),
        actor=SimpleNamespace(shape=SimpleNamespace(max_positions=4096)),
        critic=SimpleNamespace(shape=SimpleNamespace(max_positions=4096)),
        world=SimpleNamespace(rank=0, size=1), stop_ids=lambda role: (TINY.eos_token_id,),
        share=list, gather=list, places=range, together=lambda act: act(), generating=lambda act: act(),
        roles={"critic": SimpleNamespace(config=SimpleNamespace(served=False), logprobs=as_sampled)},
        even_share=lambda count: count,
        spend=lambda phase, role: 0.0, count=lambda figures: None, note=lambda figures: None,
    )  # fmt: skip
    run.progress = SimpleNamespace(
        note=run.notes.append,
        shown=lambda name: nullcontext(),
        timer=SimpleNamespace(credit=lambda phase, seconds: None),
    )
    for source in recipe.stages[0].sources:  # type: ignore[union-attr]
        if source.task is not None:
            run.more_tasks[source.task.model_dump_json()] = make_task(source.task, TINY, 0)
    actor.tasks += run.more_tasks.values()
    return run


def made_by(run: Any) -> list[Sample]:
    return make_data(run, run.recipe.stages[0])


def written(sample: Sample) -> str:
    return str(TINY.decode(sample.tokens[sample.start :], skip_special_tokens=True))


# --- sources -------------------------------------------------------------------------------------


def test_sources_are_mixed_by_share_and_keep_their_scores_to_themselves() -> None:
    long = {"name": "long", "share": 0.3, "scored": False, "task": {**LONG, "train_size": 400}}
    body = {"name": "body", "share": 0.1, "data": "demonstrations"}
    run = run_of({"size": 60, "sources": [{"share": 0.6}, long, body]})
    samples = made_by(run)
    assert Counter(sample.part for sample in samples) == {"1": 36, "long": 18, "body": 6}
    for sample in samples:
        text = written(sample)
        assert (parse_score(text) is None) == (sample.part == "body")
        assert sample.source.startswith("task1/train/" if sample.part == "long" else "train/")
        weights = sample.fields.get("weights")
        assert (weights is not None) == (sample.part == "long")
        if weights is not None:
            masked = [token for token, w in zip(sample.tokens[sample.start :], weights, strict=True) if not w]
            assert 1 <= len(masked) <= 2
            assert str(TINY.decode(masked))[0].isdigit()
    counts = [int(written(s).split(" of ")[1].split()[0]) for s in samples if s.part == "long"]
    assert all(6 <= count <= 8 for count in counts), "of the longer task"
    again = made_by(run_of({"size": 60, "sources": [{"share": 0.6}, long, body]}))
    assert again == samples


def test_a_stage_without_sources_has_one_order() -> None:
    run = run_of({"size": 20})
    [order] = orders(run, run.recipe.stages[0])
    assert (order.name, order.size, order.seed, order.first) == ("", 20, (0, "traces"), 0)
    samples = made_by(run)
    assert len(samples) == 20
    assert all(sample.part == "" and not sample.fields for sample in samples)
    assert all(sample.source.startswith("train/") for sample in samples)


def test_shares_are_kept_to_one_sample() -> None:
    for shares in ([0.5, 0.5], [1 / 3, 1 / 3, 1 / 3], [0.05, 0.95], [0.15, 0.7, 0.15]):
        for size in (7, 20, 999):
            block = {"kind": "sft", "role": "critic", "data": "traces", "size": size,
                     "sources": [{"share": share} for share in shares]}  # fmt: skip
            found = sizes(SftStage.model_validate(block))
            assert sum(found) == size
            assert all(abs(n - share * size) <= 1 for n, share in zip(found, shares, strict=True))


def test_what_the_recipes_task_holds_out_is_in_no_source() -> None:
    """Tasks of another size may draw the same text."""
    tiny = {"kind": "state_tracking", "objects": 3, "min_swaps": 1, "max_swaps": 1, "train_size": 200}
    other = {**tiny, "max_swaps": 2, "heldout_size": 1}
    run = run_of(
        {"data": "demonstrations", "size": 60, "sources": [{"share": 1, "task": other}]},
        task={**tiny, "heldout_size": 9},  # half of all problems of one swap
    )
    held = held_out_texts(run.task)
    [source] = run.more_tasks.values()
    texts = {source._problem("train", index).key for index in range(200)}
    assert held & texts, "or this shows nothing"
    samples = made_by(run)
    assert 0 < len(samples) < 60
    for sample in samples:
        index = int(sample.source.split("/")[-1])
        assert source._problem("train", index).key not in held
    assert any(f"{len(samples)} of 60 samples" in note for note in run.notes), "told"


def test_sources_of_one_task_have_other_prompts() -> None:
    run = run_of({"data": "demonstrations", "size": 40, "sources": [{"share": 0.5}, {"share": 0.5}]})
    samples = made_by(run)
    first, second = ({s.source for s in samples if s.part == part} for part in ("1", "2"))
    assert not first & second


# --- phases, weights, files ----------------------------------------------------------------------


def test_phases_are_met_in_their_part_of_the_pass() -> None:
    samples = [Sample([n, 1], 1, part=part) for part in ("a", "b", "c") for n in range(50)]
    order = pass_order(samples, {"a": (0.0, 0.5), "b": (0.5, 1.0), "c": (0.0, 1.0)}, seed=3)
    assert sorted(map(id, order)) == sorted(map(id, samples))
    places = {part: [n for n, sample in enumerate(order) if sample.part == part] for part in "abc"}
    assert max(places["a"]) < min(places["b"])
    assert min(places["c"]) < 15
    assert max(places["c"]) > 135
    assert order == pass_order(samples, {"a": (0.0, 0.5), "b": (0.5, 1.0), "c": (0.0, 1.0)}, seed=3)
    plain = random.Random(3).sample(samples, len(samples))
    assert pass_order(samples, {}, seed=3) == pass_order(samples, {"a": (0.0, 1.0)}, seed=3) == plain


def test_masked_tokens_carry_no_loss_and_count_for_none() -> None:
    batch = supervised([Sample([7] * 5, 2, {"weights": [1.0, 0.0, 1.0]}, part="x"), Sample([7] * 4, 2)])
    assert [s.fields["weights"] for s in batch] == [pytest.approx([0.25, 0, 0.25]), pytest.approx([0.25] * 2)]
    assert batch[0].part == "x"
    alone = supervised([Sample([7] * 3, 2, {"weights": [0.0]})])
    assert alone[0].fields["weights"] == [0.0]
    figures = part_figures("critic", batch, [[-1.0, -9.0, -3.0], [-5.0, -5.0]])
    assert figures == {"critic/nll_x": 2.0, "critic/tokens_x": 2.0}


def test_held_out_figures_leave_masked_tokens_out() -> None:
    held = [Sample([7] * 5, 2, {"weights": [1.0, 0.0, 1.0]}, part="x"), Sample([7] * 4, 2, part="y")]
    figures = figures_by_part([[-1.0, -9.0, -3.0], [-5.0, -5.0]], held)
    assert figures["loss"] == pytest.approx(14 / 4)
    assert figures["loss_x"] == pytest.approx(2.0)
    assert figures["loss_y"] == pytest.approx(5.0)
    assert figures["exact_match_x"] == pytest.approx(2.718281828**-4)


def test_kept_samples_have_their_weights(tmp_path: Path) -> None:
    path = tmp_path / "data" / "traces.jsonl"
    samples = [Sample([1, 2, 3], 1, {"weights": [1.0, 0.0]}, source="a", part="long"), Sample([1, 2], 1)]
    _write_samples(path, samples)
    assert _read_samples(path) == samples
    path.write_text(path.read_text().replace("[1.0, 0.0]", "[1.0]"))
    with pytest.raises(InputError, match="not all of them"):
        _read_samples(path)


# --- the critic's own judgements, Monte Carlo ----------------------------------------------------


def test_own_judgements_go_by_the_temperature_of_the_rollouts() -> None:
    """Monte-Carlo values were those of the policy that evaluations sample."""
    rollout = {"prompts": 4, "samples": 2, "max_new_tokens": 96, "temperature": 0.7}
    run = run_of(
        {"size": 6, "teacher": {"kind": "self", "continuations": 4, "judgements": 2, "rounds": 2},
         "rollout": rollout},
        score=5,
        evaluation={"temperature": 0.01},
    )  # fmt: skip
    made_by(run)
    assert set(run.engines["actor"].temperatures) == {0.7}
    seeds = run.engines["critic"].seeds
    assert len(seeds) == len(set(seeds)), "judgements of one state are drawn apart"


def test_p_bar_begins_with_the_policy_that_is_trained() -> None:
    run = run_of({"rollout": {"temperature": 0.7, "max_new_tokens": 96}}, evaluation={"temperature": 0.01})
    stage = run.recipe.stages[0]
    targets = _trained_targets(run, stage, [0.25])
    assert set(run.engines["actor"].temperatures) == {0.7}
    assert len(targets) == 8 * run.recipe.evaluation.samples
    same = run_of({"rollout": {"temperature": 0.7, "max_new_tokens": 96}}, evaluation={"temperature": 0.7})
    assert _trained_targets(same, same.recipe.stages[0], [0.25]) == [0.25]
    assert not same.engines["actor"].temperatures, "nothing is generated again"


def test_own_judgements_are_kept_where_monte_carlo_bears_them_out() -> None:
    stage = {"size": 6, "teacher": {"kind": "self", "continuations": 8, "rounds": 3}}
    kept = made_by(run_of(stage, score=6))
    assert kept
    assert all(parse_score(written(sample)) == 0.6 for sample in kept)
    run = run_of({**stage, "rollout": {"max_new_tokens": 1}})  # cut off: all are worth 0, and it says 0.5
    with pytest.raises(InputError, match="the self teacher gave no usable trace"):
        made_by(run)


def test_monte_carlo_scores_are_means_of_continuations() -> None:
    run = run_of({"size": 12, "teacher": {"kind": "monte_carlo", "continuations": 5}})
    samples = made_by(run)
    assert len(samples) == 12
    scores = {round(10 * (parse_score(written(sample)) or 0.0)) for sample in samples}
    assert scores <= {0, 2, 4, 6, 8, 10}, "fifths"
    assert len(scores) > 1
    assert all(written(sample).startswith("step ") for sample in samples), "the exact teacher's reasoning"
    bare = run_of({"size": 4, "teacher": {"kind": "monte_carlo", "writes": "score"}})
    assert all(written(sample).startswith("<answer>") for sample in made_by(bare))
