"""One batch: prompts rolled out by the actor, verified, judged by the critic; then made into samples."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypedDict, Unpack

import torch
from torch import Tensor

from genac_megatron.algorithms.advantages import normalised, segment_gae, to_tokens, whiten
from genac_megatron.algorithms.baselines.dapo import overlong_penalty
from genac_megatron.algorithms.baselines.vapo import positive_weights
from genac_megatron.algorithms.losses import means, token_weights
from genac_megatron.critic.score import fill_used, reinforce_weights, reward
from genac_megatron.critic.states import trained_indices, trained_responses
from genac_megatron.errors import GenacError, on_all_ranks
from genac_megatron.metrics import entropy, score_histogram
from genac_megatron.recipe.algorithms import CriticLossConfig
from genac_megatron.recipe.schema import (
    AdvantageConfig,
    LossConfig,
    PolicyStage,
    PpoStage,
    ReinforceStage,
    RolloutConfig,
    StageConfig,
    ValueStage,
)
from genac_megatron.records import Completion, Judgement, Prompt, Rollout, Sample, sample_of
from genac_megatron.stages.budget import Budget
from genac_megatron.stages.conversations import conversation_figures
from genac_megatron.stages.heldout import judge_for, tell_too_long
from genac_megatron.stages.minibatches import pop_tokens
from genac_megatron.stages.parity import parity_figures
from genac_megatron.stages.reward_figures import earned, part_figures, source_figures, source_shares
from genac_megatron.stages.rollouts import Generator, Group, generate, repeats
from genac_megatron.stages.runtime import Run, largest, mean
from genac_megatron.tasks.base import Task
from genac_megatron.training.role import StepResult

RolloutStage = ReinforceStage | PpoStage | ValueStage | PolicyStage  # the actor's responses are its data


class Judged(TypedDict, total=False):
    """Which responses are judged, where any are (`generator_for`)."""

    final: bool
    leaves_certain: bool


@dataclass
class Batch:
    """A gathered batch, the same on every rank."""

    groups: list[Group]
    fresh: frozenset[str] = frozenset(("actor", "critic"))  # roles that sampled it with their present weights

    @property
    def rollouts(self) -> list[Rollout]:
        return [rollout for group in self.groups for rollout in group.rollouts]

    @property
    def outcomes(self) -> list[float]:
        return [rollout.outcome for rollout in self.rollouts]

    @property
    def targets(self) -> list[float]:
        """The outcomes that critics are to predict."""
        return [rollout.target for rollout in self.rollouts]

    @property
    def judgements(self) -> list[list[Judgement]]:
        """Per rollout, in order of cut. A group shares its prompt state's judgement."""
        return [judgements for group in self.groups for judgements in group.judgements]

    @property
    def finals(self) -> list[Judgement]:
        """Per rollout, the judgement of the whole response; [] where these are not judged."""
        return [judgement for group in self.groups for judgement in group.finals]

    def only(self, kept: Sequence[bool]) -> Batch:
        """The batch with the `kept` ones of its responses, [B]; without groups that have none."""
        groups, left = [], iter(kept)
        for group in self.groups:
            own = [next(left) for _ in group.rollouts]
            if any(own):
                groups.append(group.only(own))
        return Batch(groups, self.fresh)


def next_prompts(run: Run, count: int) -> list[Prompt]:
    """The next `count` training prompts; the cursor moves on."""
    cursor = run.at.cursor
    run.at.cursor += count
    return train_prompts(run, cursor, count)


def train_prompts(run: Run, first: int, count: int, task: Task | None = None) -> list[Prompt]:
    """Training prompts `first` to `first + count` of the run's order. Collective: they may be read here.

    task: another than the run's.
    """
    asked = task or run.task
    indices = (asked.train_index(run.recipe.seed, first + i) for i in range(count))
    return run.together(lambda: [asked.prompt("train", index) for index in indices])


def generator_for(
    run: Run,
    config: RolloutConfig,
    seed: tuple[object, ...],
    *,
    judged: bool = True,
    final: bool = False,
    leaves_certain: bool = False,
    task: Task | None = None,
) -> Generator:
    """The actor and, where asked for, the critic as they are now, ready to play training prompts.

    final: whole responses are judged too. leaves_certain: but none whose outcome is certain. task: whose
    prompts they are, where it is not the run's.
    """
    judge = None
    if judged:
        if run.icc is None:
            raise on_all_ranks(GenacError("the critic judges before p_bar was seeded by an evaluation"))
        judge = judge_for(run, config.max_new_tokens, (*seed, "judge"), final=final)
        if run.recipe.judging.budget is not None:
            judge.budget = Budget(run.recipe.judging.budget // run.world.size)
    return Generator(
        engine=run.engines["actor"],
        tokenizer=run.tokenizers["actor"],
        task=task or run.task,
        config=config,
        stop_ids=run.stop_ids("actor"),
        seed=(*seed, "actor"),
        judge=judge,
        positions=run.actor.shape.max_positions,
        leaves_certain=leaves_certain,
        environment=run.environment,
    )


def play(
    run: Run,
    prompts: Sequence[Prompt],
    config: RolloutConfig,
    seed: tuple[object, ...],
    *,
    judged: bool = True,
    task: Task | None = None,
    **judging: Unpack[Judged],
) -> Batch:
    """Roll out `prompts` over all ranks and, where asked for, have their states judged. Collective.

    task: whose prompts they are, where it is not the run's. judging: `final` and `leaves_certain`, as for
    `generator_for`.
    """
    generator = generator_for(run, config, seed, judged=judged, task=task, **judging)
    began, late = time.perf_counter(), generator.task.late
    turns = repeats(prompts)
    share, mine_turns, places = run.share(prompts), run.share(turns), run.places(len(prompts))
    with run.progress.shown("rollout"):  # engines measure themselves
        mine = run.generating(lambda: generate(generator, share, config.samples, mine_turns, places))
    _credit(run, time.perf_counter() - began, generator.task.late - late)
    return gathered_batch(run, mine)


def gathered_batch(run: Run, mine: Sequence[Group]) -> Batch:
    """The whole batch from every rank's groups, with the values that advantages use. Collective."""
    groups = run.gather(mine)
    if run.icc is not None:
        for group in groups:
            for number, judgements in enumerate(group.judgements):
                whole = group.finals[number : number + 1]
                fill_used([*judgements, *whole], run.icc.p_bar, run.recipe.judging.score)
    batch = Batch(groups)
    batch.fresh = frozenset(role for role in run.roles if _is_fresh(run, role, batch))
    return batch


def _is_fresh(run: Run, role: str, batch: Batch) -> bool:
    if not run.roles[role].config.served:
        return False
    completions = [r.completion for r in batch.rollouts]
    if role == "critic":
        judged = [*(j for js in batch.judgements for j in js), *batch.finals]
        completions = [j.completion for j in judged if not j.skipped]
    return run.serving.behind(role) == 0 and all(c.version == run.at.versions.get(role) for c in completions)


def _credit(run: Run, spent: float, late: int) -> None:
    """Seconds by phase on this rank (generation overlaps: engines measure themselves), and counts.

    `late`: responses whose verification was ended by its time limit.
    """
    for role, phase in (("actor", "rollout"), ("critic", "judge")):
        if role in run.engines:
            seconds = run.spend(phase, role)
            run.progress.timer.credit(phase, seconds)
            spent -= seconds
    run.progress.timer.credit("verify", max(spent, 0.0))
    run.count({"verify/late": float(late)})


def is_judged(stage: StageConfig) -> bool:
    """Whether a generative critic judges what a stage rolls out."""
    return isinstance(stage, ReinforceStage | PpoStage)


def judged_responses(run: Run, stage: StageConfig) -> Judged:
    """Which of a stage's responses are judged, as `generator_for` is told.

    final: whole ones too, where the recipe says so and a critic learns from it. leaves_certain: in joint
    stages of a recipe that says so.
    """
    joint = isinstance(stage, PpoStage)
    learns = isinstance(stage, ReinforceStage) or (isinstance(stage, PpoStage) and stage.train_critic)
    return Judged(
        final=run.recipe.judging.states.final and learns,
        leaves_certain=joint and run.recipe.judging.certain == "left_out",
    )


def next_batch(run: Run, stage: RolloutStage, step: int) -> tuple[Batch, dict[str, float]]:
    """Play the stage's next prompts, judged where it has a generative critic; the batch and its figures."""
    prompts, seed = next_prompts(run, stage.rollout.prompts), (run.recipe.seed, stage.name, step)
    judged = is_judged(stage)
    batch = play(run, prompts, stage.rollout, seed, judged=judged, **judged_responses(run, stage))
    return batch, batch_figures(run, batch)


def batch_figures(run: Run, batch: Batch) -> dict[str, float]:
    """What the actor and, where it judged, the critic did in this batch."""
    judged = judge_figures(batch) | judge_staleness(batch, run.at.versions) if any(batch.judgements) else {}
    every = [*(j for judgements in batch.judgements for j in judgements), *batch.finals]
    tell_too_long(run, [judgement for judgement in every if judgement.certain is None])
    return {**rollout_figures(batch, run.at.versions), **judged, **run.serving.figures()}


def rollout_figures(batch: Batch, versions: Mapping[str, int]) -> dict[str, float]:
    """What the actor did in this batch. `versions`: the newest published of each role."""
    rollouts = batch.rollouts
    found = earned(rollouts)
    mixed = [len({r.outcome for r in group.rollouts}) > 1 for group in batch.groups]
    return {
        "rollout/outcome_mean": mean(batch.outcomes),
        "rollout/length_mean": mean(r.completion.written for r in rollouts),
        "rollout/truncated": mean(r.truncated for r in rollouts),
        "rollout/mixed_groups": mean(mixed),
        "rollout/staleness": float(versions["actor"] - min(r.completion.version for r in rollouts)),
        **({} if batch.targets == batch.outcomes else {"rollout/target_mean": mean(batch.targets)}),
        **conversation_figures(rollouts),
        **prefixed("reward", part_figures(found)),
        **prefixed("source_outcome", source_figures(found)),
        **prefixed("source_share", source_shares(found)),
    }


def judge_figures(batch: Batch) -> dict[str, float]:
    """How well the critic judged this batch, over all (state, outcome) pairs of responses that were not left
    out; and the share of those that were, where there are any.
    """
    rows = list(zip(batch.rollouts, batch.judgements, strict=True))
    found = [(rollout, judgements) for rollout, judgements in rows if judgements[0].certain is None]
    left = {} if len(found) == len(rows) else {"judge/certain": 1.0 - len(found) / len(rows)}
    if not found:
        return left
    pairs = [(judgement, rollout.target) for rollout, judgements in found for judgement in judgements]
    base = mean(outcome for _, outcome in pairs)
    scores = score_histogram([j.value for j in {id(j): j for j, _ in pairs}.values() if j.value is not None])
    wholes = [
        (final, rollout)
        for final, rollout in zip(batch.finals, batch.rollouts, strict=bool(batch.finals))
        if final.certain is None
    ]
    finals = {
        "judge/final_brier": mean((j.used - r.target) ** 2 for j, r in wholes if not j.skipped),
        "judge/final_skipped": mean(j.skipped for j, _ in wholes),
    }
    every = {id(j): j for j, _ in pairs}.values()
    unique = [judgement for judgement in every if not judgement.skipped]
    return {
        "judge/skipped": mean(judgement.skipped for judgement in every),
        "judge/too_long": mean(judgement.too_long for judgement in every),
        "judge/parse_rate": mean(j.value is not None for j in unique),
        "judge/brier": mean((j.used - outcome) ** 2 for j, outcome in pairs),
        "judge/brier_constant": mean((base - outcome) ** 2 for _, outcome in pairs),
        "judge/score_mean": mean(j.used for j in unique),
        "judge/states": float(len(unique)),
        "judge/length_mean": mean(len(j.completion.ids) for j in unique),
        "judge/truncated": mean(j.completion.finish == "length" for j in unique),
        "judge/value_first": mean(judgements[0].used for _, judgements in found),
        "judge/value_last": mean(judgements[-1].used for _, judgements in found),
        **({"judge/score_entropy": entropy(scores)} if scores.sum() else {}),  # nats; 0: all on one score
        **(finals if wholes else {}),
        **left,
    }


def judge_staleness(batch: Batch, versions: Mapping[str, int]) -> dict[str, float]:
    """How many versions behind the newest published critic the batch's oldest judgement is.

    {} where no critic has written one.
    """
    written = {j.completion.version for js in batch.judgements for j in js if j.completion.spans}
    return {"judge/staleness": float(versions["critic"] - min(written))} if written else {}


def actor_rewards(batch: Batch, limit: int, cache: int | None) -> Tensor:
    """The actor's reward per response: its outcome and, with a `cache`, DAPO's overlong penalty.

    The penalty is meant for rewards of -1 and 1 (algorithms/baselines/dapo.py), so half of it is added to
    outcomes of 0 and 1. Critics predict the outcome alone.
    """
    outcomes = torch.tensor(batch.outcomes)
    if cache is None:
        return outcomes
    lengths = torch.tensor([[len(rollout.completion.ids) for rollout in batch.rollouts]])
    return outcomes + 0.5 * overlong_penalty(lengths, limit, cache)[0]


def actor_samples(
    batch: Batch,
    config: AdvantageConfig,
    lam: float | Sequence[float],
    loss: LossConfig,
    limit: int,
    cache: int | None = None,
    values: Sequence[Tensor] | None = None,
) -> list[Sample]:
    """PPO samples: every token of a segment gets its segment's advantage (method §3).

    lam: of all responses, or of each. limit: the most tokens of a response. cache: the overlong penalty's;
    None: there is none. values: per response its segments' baselines; None: the critic's values.
    """
    lengths = [rollout.completion.written for rollout in batch.rollouts]
    if values is None:
        values = [torch.tensor([j.used for j in judgements]) for judgements in batch.judgements]
    per_segment = segment_gae(
        values, actor_rewards(batch, limit, cache), config.gamma, lam, config.value_share
    )
    advantages = [
        to_tokens(advantage, segment_lengths(judgements, rollout.completion))
        for advantage, judgements, rollout in zip(per_segment, batch.judgements, batch.rollouts, strict=True)
    ]
    flat = normalised(torch.cat(advantages), config.normalise)
    return response_samples(batch, flat.split(lengths), loss, limit)


def whitened(advantages: Sequence[Tensor]) -> list[Tensor]:
    """Per response [T], whitened over the batch's tokens."""
    lengths = [len(advantage) for advantage in advantages]
    return list(whiten(torch.cat(list(advantages))).split(lengths))


def response_samples(
    batch: Batch, advantages: Sequence[Tensor], loss: LossConfig, limit: int
) -> list[Sample]:
    """What the actor is trained on: every token of the batch's responses with its advantage.

    advantages: per response [T], of the tokens that were sampled. limit: the most tokens of a response.
    """
    rollouts = batch.rollouts
    lengths = [rollout.completion.written for rollout in rollouts]
    weights = token_weights(lengths, loss.aggregate, limit).tolist()
    likelihood = positive_weights(lengths, batch.outcomes, loss.nll_from)
    samples = []
    for i, rollout in enumerate(rollouts):
        fields = {
            "weights": [weights[i]] * lengths[i],
            "advantages": advantages[i].tolist(),
            "behaviour": list(rollout.completion.logprobs),
        }
        if loss.nll_coef != 0.0:
            fields["nll_weights"] = [likelihood[i]] * lengths[i]
        rollout.advantages = fields["advantages"]
        samples.append(sample_of(rollout.prompt.ids, rollout.completion, fields))
    return samples


def segment_lengths(judgements: Sequence[Judgement], completion: Completion) -> Tensor:
    """Sampled tokens of each segment of a response; the first begins at 0.

    So advantages jump over what others wrote: the state after a segment is the one before the next turn.
    """
    cuts = [0, *(judgement.state.cut for judgement in judgements[1:]), len(completion.ids)]
    return torch.tensor([completion.written_before(cut) for cut in cuts]).diff()


def critic_samples(
    batch: Batch,
    most: int,
    baseline: str,
    loss: CriticLossConfig,
    share: float = 1.0,
    *,
    ratios: Sequence[Sequence[float | None]] | None = None,
    final_weight: float = 1.0,
) -> list[Sample]:
    """REINFORCE samples: w = R_v - b on every token of a judgement's completion (method §2).

    most: states of a response that are trained. share: of the responses. ratios: per response and state, what
    its entry counts in w; None: it is left out. final_weight: of the tokens of whole responses' judgements,
    which are compared among themselves.
    """
    entries: list[tuple[Judgement, float, float]] = []
    finals: list[tuple[Judgement, float, float]] = []
    for chosen_response in trained_responses(len(batch.rollouts), share):
        rollout, judgements = batch.rollouts[chosen_response], batch.judgements[chosen_response]
        for index in trained_indices(len(judgements), most):
            ratio = 1.0 if ratios is None else ratios[chosen_response][index]
            if not judgements[index].skipped and ratio is not None:
                entries.append((judgements[index], rollout.target, ratio))
        if batch.finals and not batch.finals[chosen_response].skipped:
            finals.append((batch.finals[chosen_response], rollout.target, 1.0))
    trained = _weigh(entries, baseline)
    times = [1.0] * len(trained)
    trained += _weigh(finals, baseline)
    times += [final_weight] * (len(trained) - len(times))
    lengths = [len(j.completion.ids) for j in trained]
    shares = token_weights(lengths, loss.aggregate)
    if finals:
        shares = shares * torch.tensor(times)
        shares = shares / (shares * torch.tensor(lengths)).sum()
    return [judgement_sample(j, share) for j, share in zip(trained, shares.tolist(), strict=True)]


def _weigh(entries: Sequence[tuple[Judgement, float, float]], baseline: str) -> list[Judgement]:
    """The judgements of (judgement, target, ratio) entries, each once, with their REINFORCE weights set."""
    rewards = [reward(judgement.value, target) for judgement, target, _ in entries]
    targets, keys = [target for _, target, _ in entries], [id(judgement) for judgement, _, _ in entries]
    ratios = [ratio for _, _, ratio in entries]
    weights = reinforce_weights(rewards, targets, keys, baseline, ratios)  # type: ignore[arg-type]
    chosen = {id(judgement): judgement for judgement, _, _ in entries}
    for key, judgement in chosen.items():
        judgement.weight = weights[key]
    return list(chosen.values())


def judgement_sample(judgement: Judgement, share: float) -> Sample:
    """The exact ids that were sampled, with the judgement's REINFORCE weight."""
    count = judgement.completion.written
    fields = {
        "weights": [share] * count,
        "advantages": [judgement.weight] * count,
        "behaviour": list(judgement.completion.logprobs),
    }
    return sample_of(judgement.prompt_ids, judgement.completion, fields)


def supervised(samples: Iterable[Sample]) -> list[Sample]:
    """Give samples the token-mean loss weights of one batch.

    Weights that they have already are kept in proportion: a token of 0 carries no loss and counts for none.
    """
    batch = list(samples)
    own = [sample.fields.get("weights") or [1.0] * sample.trained for sample in batch]
    sums = torch.tensor([sum(weights) for weights in own], dtype=torch.float64)
    shares = token_weights(sums, "token").tolist()
    return [
        replace(sample, fields={"weights": [share * weight for weight in weights]})
        for sample, weights, share in zip(batch, own, shares, strict=True)
    ]


def prefixed(group: str, figures: dict[str, float]) -> dict[str, float]:
    """`figures` under `group/`."""
    return {f"{group}/{key}": value for key, value in figures.items()}


def trained_figures(
    role: str,
    results: Sequence[StepResult],
    batch: Batch,
    samples: list[Sample],
    logprobs: list[list[float]],
) -> dict[str, float]:
    """The figures of a step's updates: means of the losses' own, and tokens in all.

    Log-probs before the first against those of sampling: parity/, or drift/ where the batch is not `fresh`.
    """
    stats = {key: mean(result.stats[key] for result in results) for key in results[0].stats}
    stats = means(stats, sum(sum(sample.fields["weights"]) for sample in samples))
    stats["grad_norm"] = largest(result.stats["grad_norm"] for result in results)
    counts = pop_tokens(role, stats, len(results))
    return {
        **prefixed(role, stats),
        **counts,
        **parity_figures(role, samples, logprobs, "parity" if role in batch.fresh else "drift"),
    }
