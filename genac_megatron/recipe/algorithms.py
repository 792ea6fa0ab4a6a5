"""Losses, advantages, and the algorithms that a generative critic must beat (method §3, §5): recipe blocks.

Each algorithm's block has its own defaults: those of its paper as method §5 gives them. Learning rates are
the optimizers' (method §5: 1e-5 for a scalar critic of billions of weights, 4e-6 for SP3O's).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from genac_megatron.recipe.block import Block, Fraction, Positive, PositiveFloat


def _ordered(band: tuple[float, float]) -> tuple[float, float]:
    if not band[0] < 1.0 < band[1]:
        raise ValueError(
            "its first figure is below 1 and its second above: a token that has not moved counts"
        )
    return band


Band = Annotated[tuple[Annotated[float, Field(ge=0)], PositiveFloat], AfterValidator(_ordered)]


class CriticLossConfig(Block):
    """A generative critic's REINFORCE loss."""

    tis_cap: PositiveFloat | None = 2.0  # truncated importance sampling; None: off
    entropy_coef: float = 0.0  # of the tokens' entropy, which is rewarded
    # token: mean over tokens; sequence: mean over judgements of their means
    aggregate: Literal["token", "sequence"] = "token"


class LossConfig(Block):
    """The actor's PPO loss."""

    clip_low: Fraction = 0.2  # a ratio below 1 - clip_low teaches no more where the advantage is negative
    clip_high: PositiveFloat = 0.2  # nor one above 1 + clip_high where it is positive
    dual_clip: Annotated[float, Field(gt=1)] | None = 3.0  # with 1 or less nothing would be unlearnt
    tis_cap: PositiveFloat | None = 2.0  # truncated importance sampling; None: off
    # In the place of these four: tokens whose ratio to the engine's probability leaves it are masked (SAO)
    band: Band | None = None
    entropy_coef: float = 0.0  # of the tokens' entropy, which is rewarded
    kl_coef: Annotated[float, Field(ge=0)] = 0.0  # of the divergence from the role `reference`
    nll_coef: Annotated[float, Field(ge=0)] = 0.0  # of right responses' negative log-likelihood (VAPO)
    nll_from: Fraction = 1.0  # the outcome from which a response is right; lower where outcomes are graded
    # token: mean over tokens; sequence: mean over responses of their means; constant: sum over tokens,
    # divided by responses and rollout.max_new_tokens (Dr.GRPO)
    aggregate: Literal["token", "sequence", "constant"] = "token"


class LamSchedule(Block):
    """lambda from `start` to `end` over a stage's first steps."""

    shape: Literal["linear", "cosine"] = "linear"  # of the way between
    start: Fraction = 1.0  # lambda at the first step
    end: Fraction = 0.0  # and from `steps` on
    steps: Positive  # of the stage


LOWER_IS_BETTER = ("mse",)  # figures of a gate that open it below their threshold
OF_MONTE_CARLO = ("explained_variance_response", "mse")  # and those that need evaluation.mc_states


class LamGate(Block):
    """lambda is 1 unless the critic is accurate: its latest figure, which may close the gate again.

    Figures: explained variance of outcomes (0 is EVPO's threshold, 2604.19485), the same within prompts, of
    Monte-Carlo values within responses, and their mean squared error (a threshold that is not to be reached).
    """

    # of an evaluation or a batch, as said above
    figure: Literal[
        "explained_variance", "explained_variance_prompt", "explained_variance_response", "mse"
    ] = "explained_variance"
    threshold: float  # at which it opens
    # heldout: of the last evaluation; batch: of the batch before this one, whose outcomes it knows nothing of
    of: Literal["heldout", "batch"] = "heldout"


class Readiness(Block):
    """AC2's readiness of a problem (2609.39247): `lam` for its responses, 1 for all others.

    The error is the mean (v - r)^2 over the states of a step's responses, of steps before this one. A problem
    is ready where the mean over the last `steps` steps is below `error`, its own last one below `own_error`,
    and a right response to it was seen.
    """

    steps: Positive = 5  # over which the error is a mean
    error: PositiveFloat = 0.20  # of all problems, below
    own_error: PositiveFloat = 0.18  # of the problem itself, below
    lam: Fraction = 0.0  # of ready problems


class BlendConfig(Block):
    """A baseline between the critic's value and the mean of a group's other responses (TETHER, 2608.16739):
    w value + (1 - w) mean.
    """

    weight: Fraction | None = None  # None: the w of least squared error, by errors that were measured
    # running: a moving average over the batches before this one; heldout: the last evaluation
    of: Literal["running", "heldout"] = "running"
    momentum: Fraction = 0.9  # of the moving average


class AdvantageConfig(Block):
    """Segment-level GAE (method §3)."""

    gamma: Fraction = 1.0  # discount per segment
    lam: Fraction = 0.95  # GAE's lambda, per segment
    lam_schedule: LamSchedule | None = None  # in lam's place
    # lam is 1 unless the gate is open; a number: the held-out explained variance that opens it; None: no gate
    lam_gate: float | LamGate | None = 0.2
    readiness: Readiness | None = None  # problem by problem, in the place of lam and its gate
    blend: BlendConfig | None = None
    # Of the value, what is taken off as the baseline. Where an actor is nearly sure of every token that
    # matters, the share of least noise is far below 1 (docs/method.md, 3)
    value_share: Fraction = 1.0
    # Over the batch's tokens. whiten: mean 0, deviation 1; centre: mean 0; scale: mean square 1
    normalise: Literal["whiten", "centre", "scale", "none"] = "whiten"

    @model_validator(mode="before")
    @classmethod
    def _whiten(cls, given: Any) -> Any:
        """`whiten: true | false` is an earlier name of normalise: whiten | none."""
        if not isinstance(given, dict) or "whiten" not in given:
            return given
        rest = {key: value for key, value in given.items() if key != "whiten"}
        if not isinstance(given["whiten"], bool):
            raise ValueError(f"whiten is true or false, not {given['whiten']!r}")
        meant = "whiten" if given["whiten"] else "none"
        if rest.setdefault("normalise", meant) != meant:
            raise ValueError(
                f"whiten: {str(given['whiten']).lower()} and normalise: {rest['normalise']} differ"
            )
        return rest

    @model_validator(mode="after")
    def _mean_is_a_baseline(self) -> AdvantageConfig:
        if self.value_share < 1.0 and self.normalise in ("whiten", "centre"):
            raise ValueError(
                f"value_share {self.value_share:g} leaves a part of the value in the advantages, and "
                f"normalise: {self.normalise} takes its mean off again; set normalise: scale, or none"
            )
        return self

    @property
    def gate(self) -> LamGate | None:
        """`lam_gate` in full."""
        if isinstance(self.lam_gate, float):
            return LamGate(threshold=self.lam_gate)
        return self.lam_gate


class RegressionConfig(Block):
    """What a scalar critic learns, where, and how often."""

    # outcome: that of the response. exact: what the task's teacher says of each prefix. monte_carlo: the mean
    # of fresh continuations from the cuts of judging.states. The last two are for studies
    target: Literal["outcome", "exact", "monte_carlo"] = "outcome"
    continuations: Positive = 8  # monte_carlo: of each cut; of a prompt once

    gamma: Fraction = 1.0  # discount per token
    lam_critic: Fraction = 1.0  # of the returns that it learns; 1: the outcome itself
    clip: PositiveFloat | None = 0.5  # how far a value may move from that before the step; None: any way
    at: list[Fraction] = []  # where in a response it is trained, as shares of its length; none: everywhere
    at_cuts: bool = False  # at the cuts of judging.states that are nearest to `at`
    updates: Positive = 1  # passes over the batch, of each epoch (SAO's faster value update)
    minibatches: Positive | None = None  # None: as many as the stage's (EasyPPO: 4)
    by_spread: bool = False  # a prompt's loss is divided by the spread of its returns (EasyPPO)


class ValueConfig(RegressionConfig):
    """A scalar critic's regression, and the actor's token-level GAE from its values."""

    lam_actor: Fraction = 1.0  # GAE's lambda of the actor's advantages, per token
    length_alpha: PositiveFloat | None = None  # actor's lambda is 1 - 1 / (alpha length) instead (VAPO)
    # The critic is trained after the actor, on outcomes weighted by the ratio of what this has become to what
    # drew the token; tokens whose ratio is above are dropped (PACT: 6). None: beside it, unweighted
    importance_limit: PositiveFloat | None = None
    whiten: bool = True  # advantages get mean 0, deviation 1 over the batch's tokens


# --- losses and values by algorithm --------------------------------------------------------------


class SequenceLoss(LossConfig):
    aggregate: Literal["token", "sequence", "constant"] = "sequence"


class ConstantLoss(LossConfig):
    aggregate: Literal["token", "sequence", "constant"] = "constant"


class ClipHigherLoss(LossConfig):
    clip_high: PositiveFloat = 0.28


class VapoLoss(ClipHigherLoss):
    nll_coef: Annotated[float, Field(ge=0)] = 0.1


class VcPpoValue(ValueConfig):
    lam_actor: Fraction = 0.95


class VapoValue(ValueConfig):
    length_alpha: PositiveFloat | None = 0.05


class Sp3oValue(ValueConfig):
    at: list[Fraction] = [0.0, 0.3, 0.6, 0.9]  # the prompt too: it is asked about wherever a critic is


class SaoLoss(LossConfig):
    band: Band | None = (0.7, 6.0)  # the paper's for maths; for code (0.2, 4.0)


class SaoValue(ValueConfig):
    clip: PositiveFloat | None = None
    length_alpha: PositiveFloat | None = 1.5
    updates: Positive = 2


class PactValue(ValueConfig):
    clip: PositiveFloat | None = None
    importance_limit: PositiveFloat | None = 6.0


class OverlongConfig(Block):
    """DAPO's soft penalty: from 0 at max_new_tokens - cache down to -1 at max_new_tokens."""

    cache: Positive = 128  # tokens


# --- algorithms ----------------------------------------------------------------------------------


class ScalarPpo(Block):
    """PPO (1707.06347) with a scalar critic on every token."""

    kind: Literal["ppo"]
    loss: LossConfig = LossConfig()
    value: ValueConfig = ValueConfig()


class VcPpo(Block):
    """VC-PPO (2503.01491): decoupled GAE. Its value pre-training is a stage of kind `value` before it."""

    kind: Literal["vc_ppo"]
    loss: LossConfig = LossConfig()
    value: VcPpoValue = VcPpoValue()


class Vapo(Block):
    """VAPO (2504.05118): length-adaptive GAE, clip-higher, a likelihood term on right responses."""

    kind: Literal["vapo"]
    loss: VapoLoss = VapoLoss()
    value: VapoValue = VapoValue()


class Sp3o(Block):
    """SP3O (value flattening): the value is trained at the prompt and at three places of each response."""

    kind: Literal["sp3o"]
    loss: LossConfig = LossConfig()
    value: Sp3oValue = Sp3oValue()


class Sao(Block):
    """SAO (2607.07508): double-sided masking, a critic with frozen attention and two updates a step.

    The paper's are of one response per prompt (rollout.samples: 1); its value pre-training is a stage of kind
    `value` before it.
    """

    kind: Literal["sao"]
    frozen_attention: bool = True  # as the role's training.frozen_attention must be too
    loss: SaoLoss = SaoLoss()
    value: SaoValue = SaoValue()


class Pact(Block):
    """PACT (2609.26355): lambda 1, a critic of log-odds (head: logit) that is trained after the actor.

    With value.lam_actor 0 the advantage is the token's credit alone.
    """

    kind: Literal["pact"]
    loss: LossConfig = LossConfig()
    value: PactValue = PactValue()


class Grpo(Block):
    """GRPO (2402.03300). Its KL term is off: set loss.kl_coef, and add a frozen role `reference`."""

    kind: Literal["grpo"]
    loss: SequenceLoss = SequenceLoss()


class DrGrpo(Block):
    """Dr.GRPO (2503.20783): no deviation, no length in the norm."""

    kind: Literal["dr_grpo"]
    loss: ConstantLoss = ConstantLoss()


class Dapo(Block):
    """DAPO (2503.14476): clip-higher, dynamic sampling, token mean, overlong penalty."""

    kind: Literal["dapo"]
    loss: ClipHigherLoss = ClipHigherLoss()
    rounds: Positive = 8  # of sampling at most, until every group is mixed; then fewer groups are trained
    overlong: OverlongConfig | None = None


class Rloo(Block):
    """RLOO (2402.14740)."""

    kind: Literal["rloo"]
    loss: LossConfig = LossConfig()


class ReinforcePlusPlus(Block):
    """REINFORCE++ (2501.03262): returns whitened over the batch; `baseline`: less the group's mean first."""

    kind: Literal["reinforce_pp"]
    baseline: bool = False  # take off the group's mean first
    # Of the batch's mean, what is taken off; 0: rewards as they are, over the root of their mean square
    mean_share: Fraction = 1.0
    loss: LossConfig = LossConfig()


WithScalarCritic = ScalarPpo | VcPpo | Vapo | Sp3o | Sao | Pact
WithoutCritic = Grpo | DrGrpo | Dapo | Rloo | ReinforcePlusPlus
Algorithm = Annotated[WithScalarCritic | WithoutCritic, Field(discriminator="kind")]
