"""Held-out evaluation: the actor's accuracy, and the critic on the states of held-out rollouts.

The same prompts and seeds every time, so that evaluations of one actor share their rollouts and
differences between critics are paired.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from genac_megatron import metrics
from genac_megatron.critic.icc import IccState
from genac_megatron.critic.score import fill_used, reward
from genac_megatron.errors import InputError, on_all_ranks
from genac_megatron.observe.manifest import find_checkpoint, read_manifest
from genac_megatron.observe.runinfo import EVALUATIONS
from genac_megatron.recipe.schema import PpoStage, Recipe, RolloutConfig, SftStage, StageConfig
from genac_megatron.records import Completion, Judgement, Prompt, Rollout, State
from genac_megatron.stages.accuracy import MEASURED, blend_errors, pairs_of, within_prompts, within_responses
from genac_megatron.stages.conversations import conversation_figures
from genac_megatron.stages.exact_error import exact_errors
from genac_megatron.stages.judging import Judge, StateJudge, TeacherJudge
from genac_megatron.stages.parity import measure_judgements, measure_rollouts
from genac_megatron.stages.ranks import ALONE, EVERYONE, Ranks
from genac_megatron.stages.reward_figures import earned, part_figures, source_figures
from genac_megatron.stages.rollouts import Generator, Group, continue_states, generate, judge_groups
from genac_megatron.stages.runtime import Run, mean
from genac_megatron.stages.seeds import seed_for
from genac_megatron.stages.shown import keep
from genac_megatron.stages.suites import ask, is_due, suite_figures
from genac_megatron.stages.values import is_scalar, judged_by_values
from genac_megatron.training.agreement import from_first


@dataclass
class HeldOut:
    """The current actor's held-out rollouts and, once asked for, Monte-Carlo values of some states."""

    key: tuple[int, str]  # actor version, how it was sampled
    groups: list[Group]  # this rank's share
    draws: dict[tuple[str, int], list[float]] | None = None  # (rollout key, state index) -> outcomes
    whole: bool = False  # they are of whole responses (`monte_carlo_draws`)
    judged: tuple[object, list[Group]] | None = None  # by which critic, told what; the groups with judgements

    def lacks(self, whole: bool) -> bool:
        """Whether there are no such draws, as a stage with another gate made them."""
        return self.draws is None or self.whole != whole

    def outcomes(self) -> dict[str, list[float]]:
        """This rank's outcomes by prompt."""
        return {g.prompt.id: [r.outcome for r in g.rollouts] for g in self.groups}


def evaluate(
    run: Run, stage: StageConfig, name: str, step: int, *, critic: bool = True, monte_carlo: bool = False
) -> dict[str, float]:
    """Evaluate and log; the flat figures, the same on every rank. Collective.

    The next row of figures has what it spent, and the parity of the weights it evaluated.
    """
    run.serving.wait_settled()
    with run.phase("evaluate"):
        row = _evaluated(run, stage, name, step, critic=critic, monte_carlo=monte_carlo)
    if run.suites.watched and is_due(run.recipe, name, step):
        with run.phase("suites"):
            row["suites"] = ask(run, stage, run.suites.watched)
    run.append(EVALUATIONS, row)
    if row["critic"] is not None:
        run.at.measure(row["critic"], MEASURED)  # the latest: a critic that collapses closes its gates
    figures = _flat(row)
    shown = ", ".join(
        f"{key.removeprefix('eval/')} {value:.3f}"
        for key, value in figures.items()
        if key.removeprefix("eval/") in SHOWN or key.startswith("suite/")
    )
    run.progress.note(f"[{stage.name}] held-out, {name}: {shown}")
    run.evaluated(stage, step, figures)
    return figures


def _evaluated(
    run: Run, stage: StageConfig, name: str, step: int, *, critic: bool, monte_carlo: bool
) -> dict[str, Any]:
    """The row of an evaluation, without suites. p_bar begins with the first one. Collective."""
    held = held_out(run, stage)
    run.note(measure_rollouts(run, (rollout for group in held.groups for rollout in group.rollouts)))
    outcomes = {k: v for part in run.gather([held.outcomes()]) for k, v in part.items()}
    mine = [rollout for group in held.groups for rollout in group.rollouts]
    targets = [target for part in run.gather([[r.target for r in mine]]) for target in part]
    truncated = [flag for part in run.gather([[r.truncated for r in mine]]) for flag in part]
    found = [one for part in run.gather([earned(mine)]) for one in part]
    row: dict[str, Any] = {"stage": stage.name, "kind": stage.kind, "name": name, "step": step}
    row["actor"] = {
        "accuracy": metrics.avg_at_k(outcomes),
        "truncated": mean(truncated),
        "outcomes": outcomes,
        "version": held.key[0],
        "parts": part_figures(found),
        "sources": source_figures(found),
    }
    row["critic"] = None
    if run.icc is None:
        judging, seed = run.recipe.judging, run.recipe.seed
        told = _trained_targets(run, stage, targets)
        run.icc = IccState.from_evaluation(told, judging.icc_momentum, seed, _steps_before(run))
    if critic:
        row["critic"] = _evaluate_critic(run, stage, held, step, monte_carlo)
    else:
        share = run.even_share(run.recipe.observe.shown_rollouts)
        keep(run, stage, run.gather(held.groups[:share]), step)
    if run.environment is not None:
        row["conversations"] = _conversations(held)
    return row


def _flat(row: dict[str, Any]) -> dict[str, float]:
    """An evaluation's figures by their names, those that are not finite left out."""
    actor, critic = row["actor"], row["critic"] or {}
    figures = {"eval/accuracy": actor["accuracy"]}
    figures |= {f"eval/accuracy_{name}": value for name, value in actor["sources"].items()}
    figures |= {f"eval/reward_{name}": value for name, value in actor["parts"].items()}
    figures |= {f"eval/critic_{key}": value for key, value in critic.items() if isinstance(value, float)}
    figures |= suite_figures(row.get("suites") or {})
    return {key: value for key, value in figures.items() if not math.isnan(value)}


def _trained_targets(run: Run, stage: StageConfig, targets: list[float]) -> list[float]:
    """Targets of held-out responses that are sampled as the stage's training samples them: what p_bar begins
    with is what training goes on to tell. The evaluation's where its temperature is the same. Collective.
    """
    if stage.rollout.temperature == run.recipe.evaluation.temperature:
        return targets
    generator = replace(_held_generator(run, stage), config=stage.rollout)
    count = _held_prompts(run)
    prompts = _held_share(run, count)
    samples, places = run.recipe.evaluation.samples, run.places(count)
    groups = run.generating(lambda: generate(generator, prompts, samples, places=places))
    run.spend("evaluate", "actor")
    mine = [rollout.target for group in groups for rollout in group.rollouts]
    return [target for part in run.gather([mine]) for target in part]


def held_out_targets(run: Run, stage: StageConfig) -> list[float]:
    """What critics are to predict of the current actor's held-out responses, as the stage's training samples
    them: of all ranks. Collective.
    """
    held = held_out(run, stage)
    mine = [rollout.target for group in held.groups for rollout in group.rollouts]
    return _trained_targets(run, stage, [target for part in run.gather([mine]) for target in part])


def told_step(recipe: Recipe) -> int:
    """Steps of RL that the recipe's actor has had since its last SFT; 0 where no run has made it."""
    checkpoint = recipe.roles["actor"].model.checkpoint
    if checkpoint is None:
        return 0
    return told_step_of(read_manifest(find_checkpoint(Path(checkpoint))))


def told_step_of(manifest: Mapping[str, Any]) -> int:
    """The same of a checkpoint's manifest."""
    state = manifest.get("state") or {}
    return int(((state.get("at") or {}).get("icc") or {}).get("step", 0))


def _steps_before(run: Run) -> int:
    """The same of the actor that this run has now; its SFT made another one. Collective."""
    stages = run.recipe.stages[: run.at.stage + 1]
    if any(isinstance(stage, SftStage) and stage.role == "actor" for stage in stages):
        return 0
    return from_first(lambda: told_step(run.recipe))


SHOWN = ("accuracy", "critic_brier", "critic_brier_constant", "critic_auc", "critic_mse", "critic_parse_rate")


def held_out(run: Run, stage: StageConfig) -> HeldOut:
    """This rank's share of the current actor's held-out rollouts, made once per actor version."""
    key = (run.at.versions["actor"], _rollout_config(run, stage).model_dump_json())
    cached: HeldOut | None = run.heldout_cache.get("actor")
    late = run.task.late
    if cached is None or cached.key != key:
        config, count = run.recipe.evaluation, _held_prompts(run)
        prompts = _held_share(run, count)
        groups = run.generating(
            lambda: generate(
                _held_generator(run, stage),
                prompts,
                config.samples,
                places=run.places(count),
            )
        )
        cached = HeldOut(key, groups)
        run.heldout_cache["actor"] = cached
        run.spend("evaluate", "actor")
    run.count({"verify/late": float(run.task.late - late)})  # 0 too: a resumed run has not kept them
    return cached


def _held_prompts(run: Run) -> int:
    """Prompts of an evaluation, of all ranks."""
    return min(run.recipe.evaluation.prompts, run.task.heldout_size)


def _held_share(run: Run, count: int) -> list[Prompt]:
    """This rank's of the first `count` held-out prompts. Collective."""
    return run.together(lambda: [run.task.prompt("heldout", index) for index in run.share(range(count))])


def _rollout_config(run: Run, stage: StageConfig) -> RolloutConfig:
    """How an evaluation samples. How many a step of the stage samples is not in it: stages share rollouts."""
    config = run.recipe.evaluation
    sampled = {"temperature": config.temperature, "prompts": config.prompts, "samples": config.samples}
    return stage.rollout.model_copy(update=sampled)


def _held_generator(run: Run, stage: StageConfig) -> Generator:
    """The current actor, ready to be rolled out as it is in evaluations."""
    return Generator.of_actor(
        run, _rollout_config(run, stage), (run.recipe.seed, "heldout", "actor"), environment=run.environment
    )


def judge_for(run: Run, limit: int, seed: tuple[object, ...], *, final: bool = False) -> StateJudge:
    """The current critic, or the teacher in its place, ready to judge states of the actor.

    final: whole responses too.
    """
    assert run.icc is not None
    if run.recipe.judging.teacher is not None:
        assert run.task.teacher is not None  # recipe/joint_rules.py
        return TeacherJudge(
            run.task.teacher, run.tokenizers["actor"], run.recipe.judging, run.icc, seed, final=final
        )
    return Judge(
        engine=run.engines["critic"],
        tokenizer=run.tokenizers["critic"],
        actor_tokenizer=run.tokenizers["actor"],
        config=run.recipe.judging,
        icc=run.icc,
        stop_ids=run.stop_ids("critic"),
        limit=limit,
        seed=seed,
        positions=run.critic.shape.max_positions,
        final=final,
        reasoning_tags=run.recipe.roles["critic"].model.reasoning_tags,
    )


def tell_too_long(run: Run, judgements: Iterable[Judgement], ranks: Ranks = ALONE) -> None:
    """Say once in a run that states have no judgement as their prompt has no room in the critic's model.

    The judgements are those that all `ranks` have. Collective over them. Every batch's figures have the share
    of such states. Raises InputError where all of them are such: then there is no critic.
    """
    unique = {id(judgement): judgement for judgement in judgements}.values()
    long = [judgement for judgement in unique if judgement.too_long]
    count, whole = (int(x) for x in ranks.totals(len(long), len(unique)))
    if not count or ("too_long" in run.told and count < whole):
        return
    first = ranks.words([f"{j.state.rollout.key}@{j.state.index}" for j in long[:1]])[0]
    what = (
        f"{count} of {whole} states, {first} for example, leave no room "
        f"for a judgement in the {run.critic.shape.max_positions} positions of the critic's model"
    )
    way_out = "lower judging.max_new_tokens or rollout.max_new_tokens, or use a model with more positions"
    if count == whole:
        raise on_all_ranks(InputError(what, where="roles.critic.model", way_out=f"{way_out} (max_positions)"))
    run.told.add("too_long")
    run.progress.note(
        f"warning: {what}: they take the value before them, and judge/too_long counts them ({way_out})"
    )


def _evaluate_critic(
    run: Run, stage: StageConfig, held: HeldOut, step: int, monte_carlo: bool
) -> dict[str, Any]:
    told = run.at.versions.get("critic"), repr(run.icc), stage.rollout.max_new_tokens
    if held.judged is None or held.judged[0] != told or is_scalar(run):
        held.judged = told, _judged(run, stage, held.groups)
    judged = held.judged[1]  # a stage begins with what the one before ended with
    whole = needs_whole(stage)
    if monte_carlo and run.recipe.evaluation.mc_states and held.lacks(whole):
        held.draws, held.whole = monte_carlo_draws(run, stage, judged), whole
    # Only where asked for: a resumed run has no values left over from an earlier stage.
    mine = held.draws if monte_carlo and held.draws is not None else {}
    known = {k: v for part in run.gather([mine]) for k, v in part.items()}
    row = critic_row(run.gather([without_tokens(group) for group in judged]), known)
    row |= exact_errors(run, judged)
    row["tokens_per_state"] = tokens_per_state(judged, EVERYONE)
    tell_too_long(run, (j for group in judged for js in group.judgements for j in js), EVERYONE)
    keep(run, stage, run.gather(judged[: run.even_share(run.recipe.observe.shown_rollouts)]), step)
    return row


def without_tokens(group: Group) -> Group:
    """The group without ids, log-probs and texts: what figures of all ranks' need of it on each."""
    prompt = replace(group.prompt, messages=(), problem="", reference=None, ids=(), tools=(), privileged={})
    nothing, made = Completion((), (), "stop"), Group(prompt)
    lean: dict[int, Judgement] = {}
    for rollout, judgements in zip(group.rollouts, group.judgements, strict=True):
        own = Rollout(
            prompt, rollout.sample, nothing, "", rollout.outcome, critic_outcome=rollout.critic_outcome
        )
        for judgement in judgements:  # a group shares its prompt state's
            state = replace(judgement.state, rollout=own)
            told = replace(judgement, state=state, prompt_ids=(), completion=nothing, text="")
            lean.setdefault(id(judgement), told)
        made.rollouts.append(own)
        made.judgements.append([lean[id(judgement)] for judgement in judgements])
    return made


def tokens_per_state(groups: Sequence[Group], ranks: Ranks = ALONE) -> float:
    """Tokens of a judgement, of those that the critic was asked for; 0 of none. Collective over `ranks`."""
    unique = {id(j): j for group in groups for judgements in group.judgements for j in judgements}.values()
    lengths = [len(judgement.completion.ids) for judgement in unique if not judgement.skipped]
    total, count = ranks.totals(sum(lengths), len(lengths))
    return total / count if count else 0.0


def _conversations(held: HeldOut) -> dict[str, float]:
    """Figures of the held-out conversations. Collective."""
    mine = [rollout for group in held.groups for rollout in group.rollouts]
    return conversation_figures(mine, EVERYONE)


def _judged(run: Run, stage: StageConfig, groups: list[Group]) -> list[Group]:
    """This rank's groups with the current critic's judgements of their states. Collective."""
    if is_scalar(run):
        return judged_by_values(run, groups)
    assert run.icc is not None
    judge = judge_for(run, stage.rollout.max_new_tokens, (run.recipe.seed, "heldout", "critic"))
    places = run.places(_held_prompts(run))
    judged = run.generating(lambda: judge_groups(judge, groups, places))
    if run.recipe.judging.teacher is None:
        run.spend("evaluate", "critic")
    run.note(measure_judgements(run, (j for group in judged for js in group.judgements for j in js)))
    for group in judged:
        for judgements in group.judgements:
            fill_used(judgements, run.icc.p_bar, run.recipe.judging.score)
    return judged


def monte_carlo_draws(
    run: Run, stage: StageConfig, groups: list[Group]
) -> dict[tuple[str, int], list[float]]:
    """Outcomes of fresh continuations from some states, over this rank's share: V(s) is their mean.

    A gate by what the critic knows within responses needs several states of each: then whole responses are
    drawn, and states one by one else.
    """
    config, whole = run.recipe.evaluation, needs_whole(stage)
    states = [j.state for g in groups for js in g.judgements for j in js if j.state.index > 0]
    states += [group.judgements[0][0].state for group in groups]
    ranked = draw_order(run.recipe.seed, [_key(state) for state in states], whole=whole)
    everywhere = sorted(pair for part in run.gather([ranked]) for pair in part)[: config.mc_states]
    wanted = {key for _, key in everywhere}
    chosen = [state for state in states if _key(state) in wanted]
    late = run.task.late
    outcomes = run.generating(
        lambda: continue_states(_held_generator(run, stage), chosen, config.mc_continuations)
    )
    run.count({"verify/late": float(run.task.late - late)})
    run.spend("evaluate", "actor")
    return {_key(state): drawn for state, drawn in zip(chosen, outcomes, strict=True)}


def needs_whole(stage: StageConfig) -> bool:
    """Whether Monte-Carlo values are wanted of all states of some responses."""
    gate = stage.advantage.gate if isinstance(stage, PpoStage) else None
    return gate is not None and gate.figure == "explained_variance_response"


def draw_order(
    seed: int, keys: Iterable[tuple[str, int]], *, whole: bool
) -> list[tuple[int, tuple[str, int]]]:
    """(rank, (response, state)) in the order in which states are drawn; `whole`: response by response."""
    return sorted((seed_for(seed, "mc", *(key[:1] if whole else key)), key) for key in keys)


def critic_row(groups: list[Group], known: dict[tuple[str, int], list[float]]) -> dict[str, Any]:
    """Every figure of method §6 on the states of these rollouts; `known`: Monte-Carlo outcomes of some."""
    pairs = pairs_of(groups)
    used = [j.used for j, _ in pairs]
    outcomes = [r.target for _, r in pairs]
    figures: dict[str, Any] = metrics.critic_figures(
        used,
        outcomes,
        [r.prompt.id for _, r in pairs],
        [r.key for _, r in pairs],
        parsed=[j.value for j, _ in pairs],
    )
    figures |= _ordered(pairs)
    figures["brier_used"] = figures["brier"]
    # No score: the worst error, unless the critic was not asked.
    errors = [(j.used - r.target) ** 2 if j.skipped else 1.0 - reward(j.value, r.target) for j, r in pairs]
    figures["brier"] = mean(errors)
    unique = {id(j): j for j, _ in pairs}.values()
    asked = [judgement for judgement in unique if not judgement.skipped]
    figures["parse_rate"] = mean(j.value is not None for j in asked) if asked else 0.0
    with_value = {_key(j.state): j.used for j, _ in pairs if _key(j.state) in known}
    if with_value:
        keys = sorted(with_value)
        draws = [known[key] for key in keys]
        scores = [with_value[key] for key in keys]
        figures["mse"] = metrics.mse_monte_carlo(scores, draws)
        figures["mse_constant"] = metrics.mse_monte_carlo_constant(draws)
        figures["mse_spearman"] = metrics.spearman(scores, metrics.monte_carlo_means(draws))
        figures["mse_pearson"] = metrics.pearson(scores, metrics.monte_carlo_means(draws))
        figures["explained_variance_response"] = within_responses(groups, known)
    figures["explained_variance_prompt"] = within_prompts(groups)
    figures |= blend_errors(groups, [r.outcome for group in groups for r in group.rollouts])
    figures["values"] = used
    figures["errors"] = errors
    figures["outcomes"] = outcomes
    figures["positions"] = [j.state.index for j, _ in pairs]
    figures["prompts"] = [r.prompt.id for _, r in pairs]
    figures["scores_hist"] = metrics.score_histogram(
        [j.value for j, _ in pairs if j.value is not None]
    ).tolist()
    return figures


def _ordered(pairs: list[tuple[Judgement, Rollout]]) -> dict[str, float]:
    """AUC and pairs in order, a group's prompt state being one state (as in evaluation/figures.py).

    It is every response's first one and has all their outcomes. So it is left out where one response's
    outcome is told from another's (`auc`, `ranking_prompt`), and could only tie; between prompts it counts
    once, with the group's mean outcome. Where no response has a later state the AUC is over prompt states.
    """
    later = [(judgement, rollout) for judgement, rollout in pairs if judgement.state.index > 0]
    shared: dict[int, list[tuple[Judgement, Rollout]]] = {}
    for judgement, rollout in pairs:
        if judgement.state.index == 0:
            shared.setdefault(id(judgement), []).append((judgement, rollout))
    firsts = [(*group[0], mean(rollout.target for _, rollout in group)) for group in shared.values()]
    each = firsts + [(judgement, rollout, rollout.target) for judgement, rollout in later]
    told = later or pairs
    found = {"auc": metrics.auc([j.used for j, _ in told], [r.target for _, r in told])}
    scopes: dict[metrics.Scope, Any] = {"between": each, "prompt": [(j, r, r.target) for j, r in later]}
    for scope, rows in scopes.items():
        found[f"ranking_{scope}"], _ = metrics.ranking_accuracy(
            [judgement.used for judgement, _, _ in rows],
            [target for _, _, target in rows],
            [rollout.prompt.id for _, rollout, _ in rows],
            [rollout.key for _, rollout, _ in rows],
            scope,
        )
    return found


def _key(state: State) -> tuple[str, int]:
    return state.rollout.key, state.index
