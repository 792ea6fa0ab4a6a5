"""Several sources of SFT samples and the critic's own judgements, made by the real stage from real tasks.

The engines are invented: they write what a task's exact teacher demonstrates, or a fixed judgement, and keep
what they were asked. No model is there.
"""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import TypeAdapter

from genac_megatron.critic.icc import IccState
from genac_megatron.critic.score import parse_score
from genac_megatron.errors import InputError
from genac_megatron.recipe.schema import Recipe, ReinforceStage, SftHeldout, SftStage
from genac_megatron.recipe.tasks import TaskConfig
from genac_megatron.records import Completion, Request, Sample
from genac_megatron.stages import sft_data
from genac_megatron.stages.batch import supervised
from genac_megatron.stages.heldout import _trained_targets
from genac_megatron.stages.sft import part_figures
from genac_megatron.stages.sft_data import _read_samples, _write_samples, make_data, pass_order, unmade
from genac_megatron.stages.sft_heldout import figures_by_part, hold_out
from genac_megatron.stages.sft_orders import fit_sources, held_out_texts, orders, sizes, task_of
from genac_megatron.tasks import make_task
from genac_megatron.tasks.base import read_alike
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
        environment=None,
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
            score = round(10 * (parse_score(text) or 0.0))
            # What begins with the score: the success rate before it or, of 0, the answer itself.
            assert str(TINY.decode(masked)) == (f"p{score}" if score else "<answer>0")
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
    with pytest.raises(InputError, match="the self teacher gave no usable trace") as told:
        made_by(run)
    assert "needs another teacher" in told.value.way_out


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


# --- a resumed run -------------------------------------------------------------------------------


def jsonl(folder: Path, name: str, *repeats: int) -> dict[str, Any]:
    """A source's task whose questions are so many words long."""
    path = folder / f"{name}.jsonl"
    lines = (json.dumps({"question": f"{name} {n} " + "a " * n, "answer": "1"}) for n in repeats)
    path.write_text("\n".join(lines) + "\n")
    return {"kind": "jsonl", "path": str(path), "verifier": "exact", "heldout_size": 1, "overlong": "drop"}


def traces_of(name: str, task: dict[str, Any], tokens: int) -> dict[str, Any]:
    rollout = {"prompts": 2, "samples": 2, "max_new_tokens": tokens}
    return {"kind": "sft", "name": name, "role": "critic", "data": "traces", "epochs": 1, "size": 4,
            "teacher": {"kind": "monte_carlo", "continuations": 2}, "rollout": rollout,
            "sources": [{"share": 1, "task": task, "rollout": rollout}]}  # fmt: skip


def test_a_run_that_is_resumed_before_a_stage_holds_its_sources_to_the_models(tmp_path: Path) -> None:
    """Rows that have no room with the longest response of any stage are in none, whatever is still to do."""
    task = jsonl(tmp_path, "rows", 2, 3, 4, 5, 60, 90)
    other = jsonl(tmp_path, "others", 2, 3, 4)
    stages = [traces_of("first", task, 200), traces_of("second", task, 150), traces_of("third", other, 9)]
    positions = {"actor": 260, "critic": 9000}
    left: dict[int, list[int]] = {}
    for begin in range(3):
        run = run_of({})
        run.recipe = run.recipe.model_copy(
            update={"stages": [SftStage.model_validate(stage) for stage in stages]}
        )
        fit_sources(run, positions, run.recipe.stages[begin:])
        left[begin] = [one.train_size for one in run.more_tasks.values()]
        assert any("2 of" in note or "1 of" in note for note in run.notes) == (begin < 2)
    assert left[0] == [3, 2], (
        "of six, one is held out; those of 60 and 90 words have no room beside 200 tokens"
    )
    assert left[1] == left[0], "though they have beside 150"
    assert left[2] == [2], "what is over needs nothing any more"


def test_what_a_run_still_has_to_make(tmp_path: Path) -> None:
    run = run_of({})
    replay = {"kind": "reinforce", "name": "rl", "replay": {"sources": [{"share": 1}]}}
    stages = [SftStage.model_validate(traces_of(name, LONG, 9)) for name in ("a", "b")]
    stages.append(ReinforceStage.model_validate(replay))  # type: ignore[arg-type]
    recipe = run.recipe.model_copy(update={"stages": stages})

    def names(stage: int | None, step: int = 0) -> list[str]:
        at = None if stage is None else {"stage": stage, "step": step}
        return [one.name for one in unmade(recipe, tmp_path, at)]

    assert names(None) == names(0) == ["a", "b", "rl"]
    assert names(0, 3) == ["a", "b", "rl"], "they are gone, and made again"
    for name in ("a", "rl-replay"):
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / f"{name}.jsonl").touch()
    assert names(0, 3) == ["b", "rl"]
    assert names(0) == ["a", "b", "rl"], "killed before a checkpoint inside it: it begins again"
    assert names(1) == ["b", "rl"]
    assert names(2) == ["rl"]
    assert names(2, 5) == []
    assert names(3) == []


def test_the_names_of_sources_do_not_go_by_what_a_run_has_made_so_far() -> None:
    sources = [{"share": 0.5, "task": {**LONG, "train_size": 400}},
               {"share": 0.5, "task": {**LONG, "min_swaps": 5, "train_size": 400}}]  # fmt: skip
    run = run_of({"data": "demonstrations", "size": 8, "sources": sources})
    first = made_by(run)
    assert [one.source.split("/")[0] for one in first] == ["task1"] * 4 + ["task2"] * 4
    run.more_tasks = dict(reversed(run.more_tasks.items()))  # as a resume may make them
    assert made_by(run) == first


# --- one problem under several ids -----------------------------------------------------------------


@pytest.mark.parametrize("data", ["demonstrations", "traces"])
def test_no_held_out_problem_is_trained_on_under_another_id(tmp_path: Path, data: str) -> None:
    """Two swaps have few texts, so a generated task repeats them; a longer task has them too."""
    short = {"min_swaps": 1, "max_swaps": 1, "objects": 3, "train_size": 400}
    long = {"kind": "state_tracking", **short, "max_swaps": 2, "heldout_size": 1}
    sources = [{"share": 0.5}, {"share": 0.5, "task": long}]
    run = run_of({"data": data, "size": 120, "sources": sources},
                 task={"kind": "state_tracking", **short, "heldout_size": 2})  # fmt: skip
    samples = made_by(run)
    _write_samples(tmp_path / "data/x.jsonl", samples)
    kept = _read_samples(tmp_path / "data/x.jsonl")
    assert kept == samples, "resumed, the same are held out"
    train, held = hold_out(samples, SftHeldout(size=24), "x", 3)

    def problems(some: list[Sample]) -> set[str]:
        """The text of each one's problem, out of its prompt."""
        shown = (str(TINY.decode(one.tokens[: one.start])) for one in some)
        found = (re.search(r"start : .*\nswaps \d(\n\d [a-c]{2}\b)+", text) for text in shown)
        return {one[0] for one in found if one}

    assert len({one.source for one in samples}) > len({one.problem for one in samples}), "or it shows nothing"
    assert 24 <= len(held) < 60
    assert len(problems(held)) == len({one.problem for one in held})
    assert not problems(train) & problems(held)


# --- what p_bar means ------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "unit"), [("state_tracking", "swaps"), ("chained_arithmetic", "steps")])
@pytest.mark.parametrize("mixed", [False, True])
def test_a_source_of_another_length_reads_p_bar_as_the_recipes_task(
    kind: str, unit: str, mixed: bool
) -> None:
    """One problem, one partial response, one p_bar: one score, whichever task it was drawn from."""

    def block(least: int, most: int, **more: Any) -> dict[str, Any]:
        return {"kind": kind, f"min_{unit}": least, f"max_{unit}": most, "heldout_size": 4, **more}

    def mixture(task: dict[str, Any]) -> dict[str, Any]:
        return {"kind": "mixture", "parts": [{"name": "only", "task": task}]}

    of_its_own = block(2, 3, train_size=40)
    task = mixture(of_its_own) if mixed else of_its_own
    run = run_of({"sources": [{"share": 1, "task": task}]}, task=block(2, 8, train_size=40))
    source = task_of(run, run.recipe.stages[0].sources[0].task)
    prompt = source.prompt("train", 0)
    assert source.teacher is not None
    for p_bar in (0.2, 0.5, 0.9):
        theirs = run.task.teacher.value(prompt, "", p_bar)
        assert source.teacher.value(prompt, "", p_bar) == theirs
        alone = make_task(run.recipe.stages[0].sources[0].task, TINY, 0).teacher
        assert alone is not None
        assert alone.value(prompt, "", p_bar) != theirs, "or it shows nothing"


def test_parts_of_one_kind_share_the_mixtures_success_rate() -> None:
    parts = [{"name": name, "weight": weight, "task": {"kind": "state_tracking", "min_swaps": n,
              "max_swaps": n, "heldout_size": 4, "train_size": 20}}
             for name, n, weight in (("short", 2, 3.0), ("long", 6, 1.0))]  # fmt: skip
    run = run_of({}, task={"kind": "mixture", "parts": parts})
    assert [part.teacher.mean_length for part in run.task.parts] == [3.0, 3.0]
    other = make_task(TypeAdapter(TaskConfig).validate_python(LONG), TINY, 0)
    read_alike(other, run.task)
    assert other.teacher is not None
    assert other.teacher.mean_length == 3.0


def test_a_scored_source_of_another_kind_is_told() -> None:
    other = {"kind": "chained_arithmetic", "train_size": 20, "heldout_size": 4}
    for more, told in (({}, True), ({"scored": False}, False), ({"task": LONG}, False),
                       ({"teacher": {"kind": "monte_carlo"}}, False)):  # fmt: skip
        run = run_of({"sources": [{"share": 1, "task": other, **more}]})
        fit_sources(run, {"actor": 4096, "critic": 4096})
        assert any("take the success rate" in note for note in run.notes) == told


# --- lengths, and draws of a source's own -----------------------------------------------------------


def test_a_part_of_the_lengths_that_is_short_is_told_once_with_both_numbers() -> None:
    task = {**SHORT, "min_swaps": 1, "max_swaps": 8, "train_size": 400}
    run = run_of({"size": 60, "length_buckets": 5, "sources": [{"share": 1, "task": task}]})
    made_by(run)
    [note] = [note for note in run.notes if "length_buckets" in note]
    count = int(note.split("] ")[1].split()[0])
    assert "part 5 of 5" in note
    assert "of 60 states" in note
    assert "an even share is 12" in note
    assert 0 < count < 12
    run = run_of({"size": 60, "sources": [{"share": 1, "task": task}]})
    made_by(run)
    assert not any("length_buckets" in note for note in run.notes)


def test_sources_draw_their_strengths_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts of two sources may have one id; a stage without sources draws as it did."""
    seeds: list[object] = []
    real = sft_data.taught

    def taught(run: Any, order: Any, states: Any, context: Any) -> list[Sample]:
        seeds.append(context.seed)
        return real(run, order, states, context)

    monkeypatch.setattr(sft_data, "taught", taught)
    made_by(run_of({"size": 8, "sources": [{"share": 0.5}, {"share": 0.5}]}))
    assert len(set(seeds)) == 2
    seeds.clear()
    made_by(run_of({"size": 8}))
    assert seeds == [0]
