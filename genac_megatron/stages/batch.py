"""One batch: prompts rolled out by the actor, verified, judged by the critic; then made into samples."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypedDict, Unpack

import numpy as np
import torch
from torch import Tensor

from genac_megatron import compact
from genac_megatron.algorithms.advantages import (
    normalised,
    segment_gae,
    to_tokens,
    token_moments,
    whiten,
)
from genac_megatron.algorithms.baselines.dapo import overlong_penalty
from genac_megatron.algorithms.baselines.vapo import positive_weights
from genac_megatron.algorithms.losses import token_weights
from genac_megatron.critic.score import fill_used, reinforce_weights, reward
from genac_megatron.critic.states import trained_indices, trained_responses
from genac_megatron.errors import GenacError, on_all_ranks
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
from genac_megatron.records import Completion, Judgement, Prompt, Rollout, Sample, sample_of, samples_of
from genac_megatron.stages.budget import Budget
from genac_megatron.stages.dealt import placed
from genac_megatron.stages.figures import batch_figures
from genac_megatron.stages.heldout import judge_for
from genac_megatron.stages.ranks import ALONE, EVERYONE, Ranks
from genac_megatron.stages.rollouts import Asked, Generator, Group, generate, repeats
from genac_megatron.stages.runtime import Run
from genac_megatron.tasks.base import Task
from genac_megatron.training.distributed_batch import distributed
from genac_megatron.training.role import Samples

RolloutStage = ReinforceStage | PpoStage | ValueStage | PolicyStage  # the actor's responses are its data


class Judged(TypedDict, total=False):
    """Which responses are judged, where any are (`generator_for`)."""

    final: bool
    leaves_certain: bool


@dataclass
class Batch:
    """Prompts with their responses: those that this rank drove, beside other ranks', or all of them.

    What depends on the whole batch (figures, whitening, loss weights) goes by `ranks`.
    """

    groups: list[Group]
    fresh: frozenset[str] = frozenset(("actor", "critic"))  # roles that sampled it with their present weights
    # Where this rank's groups, in order, stand among those of all ranks; None: all groups are here
    places: list[int] | None = None

    @property
    def ranks(self) -> Ranks:
        return ALONE if self.places is None else EVERYONE

    @cached_property
    def numbers(self) -> tuple[list[int], int]:
        """(each of these responses' number among those of all ranks, how many those are). Collective."""
        sizes = [len(group.rollouts) for group in self.groups]
        if self.places is None:
            return list(range(sum(sizes))), sum(sizes)
        table = self.ranks.rows(np.array([*zip(self.places, sizes, strict=True)], np.int64).reshape(-1, 2))
        table = table[np.argsort(table[:, 0])]
        firsts = dict(zip(table[:, 0].tolist(), (table[:, 1].cumsum() - table[:, 1]).tolist(), strict=True))
        here = zip(self.places, sizes, strict=True)
        return [firsts[place] + n for place, size in here for n in range(size)], int(table[:, 1].sum())

    @property
    def problems(self) -> dict[int, str]:
        """The prompt's id of each response of all ranks, by the responses' numbers. Collective."""
        numbers = self.ranks.rows(np.array(self.numbers[0], np.int64))
        ids = self.ranks.texts([rollout.prompt.id for rollout in self.rollouts])
        return dict(zip(numbers.tolist(), ids, strict=True))

    def dealt(self, samples: list[Sample]) -> Samples:
        """Samples of these responses as roles take them, of all ranks by their `place`. Collective."""
        return samples if self.places is None else distributed(samples)

    @property
    def placed(self) -> list[tuple[int, Group]]:
        """These groups, each with its place among those of all ranks."""
        places = range(len(self.groups)) if self.places is None else self.places
        return list(zip(places, self.groups, strict=True))

    def of(self, placed: Sequence[tuple[int, Group]]) -> Batch:
        """A batch of other groups, of all ranks as this one's."""
        places = None if self.places is None else [place for place, _ in placed]
        return Batch([group for _, group in placed], self.fresh, places)

    def all_places(self, mine: Iterable[int]) -> list[int]:
        """Places of groups, sorted; of all ranks'. Collective."""
        return sorted(self.ranks.rows(np.array([*mine], np.int64)).tolist())

    def first(self, count: int) -> Batch:
        """The first `count` groups of all ranks' that are here. Collective."""
        chosen = set(self.all_places(place for place, _ in self.placed)[:count])
        return self.of([one for one in self.placed if one[0] in chosen])

    @property
    def mean_target(self) -> float:
        """Of all ranks' responses. Collective."""
        return min(self.ranks.means({"": self.targets})[""], 1.0)  # rounding can pass 1 by an ulp

    def moments(self, tokens: Tensor) -> Tensor | None:
        """`token_moments` of all ranks' tokens; None: of these. Collective."""
        if self.places is None:
            return None
        return torch.tensor(self.ranks.totals(*token_moments(tokens).tolist()), dtype=torch.float64)

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
        groups, places, left = [], [], iter(kept)
        for number, group in enumerate(self.groups):
            own = [next(left) for _ in group.rollouts]
            if any(own):
                groups.append(group.only(own))
                places.append(number if self.places is None else self.places[number])
        return Batch(groups, self.fresh, None if self.places is None else places)


def next_prompts(run: Run, count: int) -> Asked:
    """The next `count` training prompts; the cursor moves on."""
    cursor = run.at.cursor
    run.at.cursor += count
    return train_prompts(run, cursor, count)


def train_prompts(run: Run, first: int, count: int) -> Asked:
    """Training prompts `first` to `first + count` of the run's order. Collective."""
    task, seed = run.task, run.recipe.seed
    return Asked(task, run.together(lambda: [task.train_index(seed, first + i) for i in range(count)]))


def shared_out(run: Run, prompts: Asked) -> tuple[list[Prompt], list[int], range]:
    """This rank's share of a batch's prompts, which are read here, for `generate`: themselves, how often each
    stands before its place in the batch, where the share stands. Collective.
    """
    share = run.together(lambda: run.share(prompts))
    return share, run.share(repeats(prompts.indices)), run.places(len(prompts))


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
    return Generator.of_actor(
        run,
        config,
        (*seed, "actor"),
        task,
        judge=judge,
        leaves_certain=leaves_certain,
        environment=run.environment,
    )


def play(
    run: Run,
    prompts: Asked,
    config: RolloutConfig,
    seed: tuple[object, ...],
    *,
    judged: bool = True,
    **judging: Unpack[Judged],
) -> Batch:
    """Roll out `prompts` over all ranks and, where asked for, have their states judged. Collective.

    judging: `final` and `leaves_certain`, as for `generator_for`.
    """
    generator = generator_for(run, config, seed, judged=judged, task=prompts.task, **judging)
    began, late = time.perf_counter(), generator.task.late
    share, turns, places = shared_out(run, prompts)
    with run.progress.shown("rollout"):  # engines measure themselves
        mine = run.generating(lambda: generate(generator, share, config.samples, turns, places))
    _credit(run, time.perf_counter() - began, generator.task.late - late)
    return played_batch(run, mine)


def played_batch(run: Run, mine: list[Group]) -> Batch:
    """The batch of every rank's groups, with the values that advantages use. Collective."""
    if run.icc is not None:
        for group in mine:
            for number, judgements in enumerate(group.judgements):
                whole = group.finals[number : number + 1]
                fill_used([*judgements, *whole], run.icc.p_bar, run.recipe.judging.score)
    batch = spread(run, mine)
    batch.fresh = frozenset(role for role in run.roles if _is_fresh(run, role, batch))
    return batch


def spread(run: Run, mine: list[Group]) -> Batch:
    """The batch of which this rank has the groups of its share (`Run.share`)."""
    size = run.world.size
    return Batch(mine, places=None if size == 1 else [run.world.rank + k * size for k in range(len(mine))])


def gathered_batch(run: Run, batch: Batch) -> Batch:
    """The batch with every rank's groups on every rank, for those who ask about single responses of all.

    Collective.
    """
    return batch if batch.places is None else Batch(run.gather(batch.groups), batch.fresh)


def _is_fresh(run: Run, role: str, batch: Batch) -> bool:
    if not run.roles[role].config.served:
        return False
    completions = [r.completion for r in batch.rollouts]
    if role == "critic":
        judged = [*(j for js in batch.judgements for j in js), *batch.finals]
        completions = [j.completion for j in judged if not j.skipped]
    version = run.at.versions.get(role)
    stale = run.serving.behind(role) != 0 or any(c.version != version for c in completions)
    return not batch.ranks.any(stale)


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
    flat = torch.cat([torch.zeros(0), *advantages])
    flat = normalised(flat, config.normalise, batch.moments(flat))
    return response_samples(batch, flat.split(lengths), loss, limit)


def whitened(batch: Batch, advantages: Sequence[Tensor]) -> list[Tensor]:
    """Per response [T], whitened over the batch's tokens. Collective."""
    lengths = [len(advantage) for advantage in advantages]
    flat = torch.cat([torch.zeros(0), *advantages])
    return list(whiten(flat, batch.moments(flat)).split(lengths))


def response_samples(
    batch: Batch, advantages: Sequence[Tensor], loss: LossConfig, limit: int
) -> list[Sample]:
    """What the actor is trained on: every token of the batch's responses with its advantage. Collective.

    advantages: per response [T], of the tokens that were sampled. limit: the most tokens of a response.
    """
    rollouts = batch.rollouts
    lengths = [rollout.completion.written for rollout in rollouts]
    weights = _weights(batch, lengths, loss.aggregate, limit).tolist()
    likelihood = positive_weights(lengths, batch.outcomes, loss.nll_from, batch.ranks.totals)
    samples, numbers = list[Sample](), list[int]()
    for i, (rollout, number) in enumerate(zip(rollouts, batch.numbers[0], strict=True)):
        fields = {
            "weights": [weights[i]] * lengths[i],
            "advantages": compact.figures(advantages[i].tolist()),
            "behaviour": rollout.completion.logprobs,
        }
        if loss.nll_coef != 0.0:
            fields["nll_weights"] = [likelihood[i]] * lengths[i]
        rollout.advantages = fields["advantages"]
        samples += samples_of(rollout, fields)
        numbers += [number] * (len(samples) - len(numbers))
    return placed(samples, numbers)


def _weights(batch: Batch, lengths: Sequence[int], aggregate: str, limit: int | None = None) -> Tensor:
    """`token_weights` of sequences that are a part of all ranks'. Collective."""
    sizes = batch.ranks.totals(sum(lengths), sum(length > 0 for length in lengths))
    return token_weights(lengths, aggregate, limit, (sizes[0], sizes[1]))


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
    (numbers, count), every, whole_finals = batch.numbers, batch.judgements, batch.finals
    entries, finals = list[Entry](), list[Entry]()
    chosen = set(trained_responses(count, share))
    for number, (place, rollout) in enumerate(zip(numbers, batch.rollouts, strict=True)):
        if place not in chosen:
            continue
        judgements = every[number]
        for index in trained_indices(len(judgements), most):
            ratio = 1.0 if ratios is None else ratios[number][index]
            if not judgements[index].skipped and ratio is not None:
                entries.append((judgements[index], rollout.target, ratio, place))
        if whole_finals and not whole_finals[number].skipped:
            finals.append((whole_finals[number], rollout.target, 1.0, count + place))
    trained = _weigh(entries, baseline, batch.ranks)
    times = [1.0] * len(trained)
    trained += _weigh(finals, baseline, batch.ranks)
    times += [final_weight] * (len(trained) - len(times))
    lengths = [len(j.completion.ids) for j, _ in trained]
    shares = _weights(batch, lengths, loss.aggregate)
    if batch.ranks.any(bool(finals)):
        shares = shares * torch.tensor(times)
        (whole,) = batch.ranks.totals(float((shares * torch.tensor(lengths)).sum()))
        shares = shares / whole
    samples = [judgement_sample(j, share) for (j, _), share in zip(trained, shares.tolist(), strict=True)]
    return placed(samples, [place for _, place in trained])


Entry = tuple[Judgement, float, float, int]  # with its target, its ratio, and its place among all ranks'


def _weigh(entries: Sequence[Entry], baseline: str, ranks: Ranks) -> list[tuple[Judgement, int]]:
    """The judgements of all entries, each once, with their REINFORCE weights set, and their places.

    Collective: baselines are of all ranks' entries.
    """
    rewards = [reward(judgement.value, target) for judgement, target, _, _ in entries]
    targets, keys = [target for _, target, _, _ in entries], [id(judgement) for judgement, _, _, _ in entries]
    ratios = [ratio for _, _, ratio, _ in entries]
    table = ranks.rows(np.array([rewards, targets], np.float64).T)
    everyone = table[:, 0], table[:, 1]
    weights = reinforce_weights(rewards, targets, keys, baseline, ratios, everyone)  # type: ignore[arg-type]
    chosen: dict[int, tuple[Judgement, int]] = {}
    for judgement, _, _, place in entries:
        chosen.setdefault(id(judgement), (judgement, place))
    for key, (judgement, _) in chosen.items():
        judgement.weight = weights[key]
    return list(chosen.values())


def judgement_sample(judgement: Judgement, share: float) -> Sample:
    """The exact ids that were sampled, with the judgement's REINFORCE weight."""
    count = judgement.completion.written
    fields = {
        "weights": [share] * count,
        "advantages": [judgement.weight] * count,
        "behaviour": judgement.completion.logprobs,
    }
    return sample_of(judgement.prompt_ids, judgement.completion, fields)


def supervised(samples: Iterable[Sample], ranks: Ranks = ALONE) -> list[Sample]:
    """Give samples the token-mean loss weights of one batch, which all `ranks` have. Collective over them.

    Weights that they have already are kept in proportion: a token of 0 carries no loss and counts for none.
    """
    batch = list(samples)
    own = [sample.fields.get("weights") or [1.0] * sample.trained for sample in batch]
    sums = torch.tensor([sum(weights) for weights in own], dtype=torch.float64)
    whole, count = ranks.totals(float(sums.sum()), float((sums > 0).sum()))
    shares = token_weights(sums, "token", whole=(whole, count)).tolist()
    return [
        replace(sample, fields={"weights": compact.figures(share * weight for weight in weights)})
        for sample, weights, share in zip(batch, own, shares, strict=True)
    ]
