"""Estimators of the policy gradient: what each makes of one batch, by the same functions as training.

    reinforce_pp, rloo, grpo, dr_grpo   of outcomes alone; all but the first need two responses to a prompt
    ppo, vc_ppo, scalar-LAM             of a scalar critic's values of tokens, lambda 1, 0.95, LAM
    genac-LAM, genac-prompt             of a generative critic's values of states; of the prompt state alone
    exact-LAM, exact-prompt             the same with the values of the task's exact teacher: the ceiling

Each is taken as it trains: its own advantages, whitening and loss. A name ending in -raw is without whitening
and weighs all tokens alike, so that it is in the units of the reference; with lambda 1, or no critic, it is
unbiased wherever the states' choice looks at nothing that comes later.

Made where they are named (`exact-0-b0.25`, `reinforce_pp-b0-raw`, `exact-0-raw-rare`):
    -bX         reinforce_pp, genac-LAM, exact-LAM with the share X of their baseline (`value_share`,
                `mean_share`), over the root of the advantages' mean square; with -raw as they are
    -raw-rare   the part of a raw one's gradient that comes from tokens of a chance below a half
"""

from __future__ import annotations

import difflib
import math
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from genac_megatron.algorithms.advantages import others_mean
from genac_megatron.algorithms.baselines.rloo import rloo
from genac_megatron.critic.states import cut_states, state_text
from genac_megatron.errors import InputError
from genac_megatron.recipe.algorithms import (
    AdvantageConfig,
    DrGrpo,
    Grpo,
    LossConfig,
    ReinforcePlusPlus,
    Rloo,
    ScalarPpo,
    ValueConfig,
    VcPpo,
    WithoutCritic,
)
from genac_megatron.records import Completion, Judgement, Sample
from genac_megatron.stages.batch import Batch, actor_samples, response_samples, whitened
from genac_megatron.stages.policy import group_advantages, table
from genac_megatron.stages.rollouts import Group
from genac_megatron.stages.runtime import Run
from genac_megatron.stages.values import advantages_and_targets

Source = Literal["outcomes", "groups", "scalar", "generative", "exact"]
HALF = math.log(0.5)
LAMBDAS = (1.0, 0.95, 0.5, 0.0)
# Every token weighs alike, and nothing corrects or clips: the loss whose gradient is the policy gradient.
RAW = LossConfig(aggregate="constant", tis_cap=None)
WANTS = {
    "groups": "two responses to each prompt (--samples)",
    "scalar": "a scalar critic (a role `scalar`, --scalar RUN)",
    "generative": "a generative critic (--critic RUN)",
    "exact": "a task with an exact teacher",
}


@dataclass(frozen=True)
class Played:
    """A batch and what each kind of critic says of it; None where there is none."""

    outcomes: Batch
    generative: Batch | None = None  # its judgements are the generative critic's
    exact: Batch | None = None  # the same states with the exact teacher's values
    scalar: list[Tensor] | None = None  # per response, V before each token [T]


@dataclass(frozen=True)
class Estimator:
    """make(played, limit): samples whose loss has the estimator's gradient; limit: tokens of a response."""

    name: str
    source: Source
    make: Callable[[Played, int], list[Sample]]
    loss: LossConfig
    unbiased: bool = False  # in the reference's units, and unbiased if the states' choice is causal


def reference_samples(batch: Batch, limit: int) -> list[Sample]:
    """The reference's: outcomes less the mean of all the others. Unbiased, in units of RAW."""
    advantages = rloo(torch.tensor([batch.outcomes], dtype=torch.float64))[0]
    return _per_response(batch, advantages, RAW, limit)


def every_estimator() -> list[Estimator]:
    """All there are, in the order of tables."""
    free: list[tuple[str, Source, WithoutCritic]] = [
        ("reinforce_pp", "outcomes", ReinforcePlusPlus(kind="reinforce_pp")),
        ("rloo", "groups", Rloo(kind="rloo")),
        ("grpo", "groups", Grpo(kind="grpo")),
        ("dr_grpo", "groups", DrGrpo(kind="dr_grpo")),
    ]
    made = [
        Estimator(name, source, partial(_of_groups, algorithm, algorithm.loss), algorithm.loss)
        for name, source, algorithm in free
    ]
    raw = partial(_of_groups, Rloo(kind="rloo"), RAW)
    made.append(Estimator("rloo-raw", "groups", raw, RAW, unbiased=True))
    ppo, vc_ppo = ScalarPpo(kind="ppo"), VcPpo(kind="vc_ppo")
    values = [("ppo", ppo.value, ppo.loss), ("vc_ppo", vc_ppo.value, vc_ppo.loss)]
    values += [(f"scalar-{lam:g}", ValueConfig(lam_actor=lam), LossConfig()) for lam in (0.5, 0.0)]
    for name, value, loss in values:
        made.append(Estimator(name, "scalar", partial(_of_values, value, loss), loss))
    for who, source in (("genac", "generative"), ("exact", "exact")):
        made += _of_critic(who, source)  # type: ignore[arg-type]
    return made


def _of_critic(who: str, source: Literal["generative", "exact"]) -> list[Estimator]:
    """As trained by lambda, and of the prompt state; then without whitening."""
    made = []
    for raw in (False, True):
        loss, end = (RAW, "-raw") if raw else (LossConfig(), "")
        for lam in LAMBDAS:
            config = AdvantageConfig(lam=lam, lam_gate=None, normalise="none" if raw else "whiten")
            make = partial(_of_states, source, config, loss, False)
            made.append(Estimator(f"{who}-{lam:g}{end}", source, make, loss, unbiased=raw and lam == 1.0))
        config = AdvantageConfig(lam=1.0, lam_gate=None, normalise="none" if raw else "whiten")
        make = partial(_of_states, source, config, loss, True)
        made.append(Estimator(f"{who}-prompt{end}", source, make, loss, unbiased=raw))
    return made


NAMED = re.compile(
    r"(?P<base>reinforce_pp|(?P<who>genac|exact)-(?P<lam>[\d.]+))(-b(?P<share>[\d.]+))?(?P<raw>-raw)?(?P<rare>-rare)?"
)


def _of_name(name: str) -> Estimator | None:
    """One that is made where it is named; None where that is no such name."""
    found = NAMED.fullmatch(name)
    if found is None or (found["rare"] and not found["raw"]):
        return None
    try:
        share = float(found["share"] or 1.0)
    except ValueError:
        return None
    lam = next((lam for lam in LAMBDAS if found["lam"] == f"{lam:g}"), None)
    if share > 1.0 or (found["who"] and lam is None):
        return None
    raw, unbiased = bool(found["raw"]), bool(found["raw"]) and lam in (None, 1.0)
    source: Source = "outcomes"
    if lam is None:
        loss = RAW if raw else LossConfig()
        algorithm = ReinforcePlusPlus(kind="reinforce_pp", mean_share=share)
        make = partial(_less_a_share, share) if raw else partial(_of_groups, algorithm, loss)
    else:
        loss = RAW if raw else LossConfig()
        config = AdvantageConfig(
            lam=lam, lam_gate=None, value_share=share, normalise="none" if raw else "scale"
        )
        source = "generative" if found["who"] == "genac" else "exact"
        make = partial(_of_states, source, config, loss, False)
    if found["rare"]:
        make, unbiased = partial(_rare, make), False
    return Estimator(name, source, make, loss, unbiased)


def sources_of(names: Sequence[str]) -> set[Source]:
    """What those named need, or all of them. Raises InputError for a name that is none."""
    every = _named(names)
    return {every[name].source for name in names or every}


def _named(names: Sequence[str]) -> dict[str, Estimator]:
    """All estimators by name. Raises InputError where one of `names` is none."""
    every = {one.name: one for one in every_estimator()}
    for name in names:
        if name not in every and (made := _of_name(name)) is not None:
            every[name] = made
        if name not in every:
            near = difflib.get_close_matches(name, every, 1)
            what = f"'{name}' is no estimator" + (f"; did you mean '{near[0]}'?" if near else "")
            raise InputError(
                what,
                where="--estimators",
                way_out=f"there are: {', '.join(every)}; and NAME-bX, NAME-raw-rare",
            )
    return every


def choose(names: Sequence[str], sources: Sequence[Source]) -> list[Estimator]:
    """Those named, or all that `sources` allow. Raises InputError for one that is none, or has no source."""
    every = _named(names)
    for name in names:
        source = every[name].source
        if source not in sources:
            way_out = f"give it, or leave {name} out"
            raise InputError(f"'{name}' needs {WANTS[source]}", where="--estimators", way_out=way_out)
    return [one for one in every.values() if one.source in sources and (not names or one.name in names)]


# --- what each makes of a batch ------------------------------------------------------------------


def _per_response(batch: Batch, advantages: Tensor, loss: LossConfig, limit: int) -> list[Sample]:
    lengths = [len(rollout.completion.ids) for rollout in batch.rollouts]
    full = [torch.full((n,), a) for a, n in zip(advantages.flatten().tolist(), lengths, strict=True)]
    return response_samples(batch, full, loss, limit)


def _less_a_share(share: float, played: Played, limit: int) -> list[Sample]:
    """Outcomes less a share of the mean of all the others."""
    outcomes = torch.tensor(played.outcomes.outcomes, dtype=torch.float64)
    others = others_mean(outcomes)
    return _per_response(played.outcomes, outcomes - share * others, RAW, limit)


def _rare(make: Callable[[Played, int], list[Sample]], played: Played, limit: int) -> list[Sample]:
    """The same, of the tokens that the engine sampled with a chance below a half."""
    samples = make(played, limit)
    for sample in samples:
        fields = sample.fields
        fields["weights"] = [
            weight * (logprob < HALF)
            for weight, logprob in zip(fields["weights"], fields["behaviour"], strict=True)
        ]
    return samples


def _of_groups(algorithm: WithoutCritic, loss: LossConfig, played: Played, limit: int) -> list[Sample]:
    advantages = group_advantages(algorithm, *table(played.outcomes), limit)
    return _per_response(played.outcomes, advantages, loss, limit)


def _of_values(config: ValueConfig, loss: LossConfig, played: Played, limit: int) -> list[Sample]:
    assert played.scalar is not None
    advantages, _ = advantages_and_targets(played.scalar, played.outcomes.outcomes, config)
    return response_samples(
        played.outcomes, whitened(played.outcomes, advantages) if config.whiten else advantages, loss, limit
    )


def _of_states(
    source: Literal["generative", "exact"],
    config: AdvantageConfig,
    loss: LossConfig,
    prompt: bool,
    played: Played,
    limit: int,
) -> list[Sample]:
    batch = played.generative if source == "generative" else played.exact
    assert batch is not None
    if prompt:
        batch = with_values(batch, [[js[0].used] * len(js) for js in batch.judgements])
    return actor_samples(batch, config, config.lam, loss, limit)


# --- other critics' values of the same states ----------------------------------------------------


def with_values(batch: Batch, values: Sequence[Sequence[float]]) -> Batch:
    """The batch with other values of its states: per response, in order of cut."""
    left = iter(values)
    groups = [
        Group(
            group.prompt,
            group.rollouts,
            [
                [replace(j, used=v) for j, v in zip(judgements, next(left), strict=True)]
                for judgements in group.judgements
            ],
        )
        for group in batch.groups
    ]
    return replace(batch, groups=groups)


def exact_batch(run: Run, batch: Batch, p_bar: float) -> Batch:
    """The batch with the exact teacher's values of all states, in tenths as it writes them.

    p_bar: the actor's success rate, from which the teacher takes the chance that a line comes out right. The
    task has a teacher.
    """
    teacher, tokenizer = run.task.teacher, run.tokenizers["actor"]
    assert teacher is not None
    nothing = Completion((), (), "stop")

    def judged(group: Group) -> list[list[Judgement]]:
        found = []
        for rollout in group.rollouts:
            states = cut_states(rollout, tokenizer, run.recipe.judging.states)
            rngs = [random.Random(f"exact/{run.recipe.seed}/{rollout.key}/{s.index}") for s in states]
            scores = [
                teacher.trace(group.prompt, state_text(state, tokenizer), p_bar, rng)[1] / 10
                for state, rng in zip(states, rngs, strict=True)
            ]
            found.append(
                [Judgement(s, (), nothing, "", v, used=v) for s, v in zip(states, scores, strict=True)]
            )
        return found

    return replace(batch, groups=[Group(g.prompt, g.rollouts, judged(g)) for g in batch.groups])
