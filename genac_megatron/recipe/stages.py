"""The typed recipe's stages: what each trains, on what, and the gate it ends with. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field, model_validator

from genac_megatron.recipe.algorithms import (
    AdvantageConfig,
    Algorithm,
    CriticLossConfig,
    LossConfig,
    OverlongConfig,
    RegressionConfig,
)
from genac_megatron.recipe.block import Block, Fraction, Gate, Positive, PositiveFloat
from genac_megatron.recipe.tasks import TaskConfig
from genac_megatron.recipe.training import OptimizerConfig


class RolloutConfig(Block):
    """How the actor is sampled."""

    prompts: Positive = 128  # per step
    samples: Positive = 8  # responses per prompt
    temperature: PositiveFloat = 1.0  # of the actor
    max_new_tokens: Positive = 1024  # of a response
    # What a cut-off response earns. verify: what an answer that is closed in it earns (docs/tasks.md).
    truncated_outcome: Literal["verify", "zero"] = "verify"
    # ... and what critics are to predict of it. The actor's accuracy and its advantages go by the one above.
    truncated_critic: Literal["same", "verify", "zero"] = "same"


class Band(Block):
    """What a figure should be early on: where it is not, the run and its report say so, and what helps."""

    figure: Annotated[str, Field(min_length=1)]  # of a step's row (docs/figures.md), or a ratio: A / B
    step: Positive = 20  # after which it is looked at
    until: Positive | None = None  # and after each one up to this; None: once
    low: float | None = None  # the least that is as it should be
    high: float | None = None  # the most
    over: Positive = 5  # the mean of its last so many values, as those of a batch are noisy
    action: Literal["warn", "stop"] = "warn"  # stop: what is trained is saved, and the run ends with code 3
    helps: str = ""  # what to do, in the place of what is known to help

    @model_validator(mode="after")
    def _bounded(self) -> Band:
        if self.low is None and self.high is None:
            raise ValueError("has neither low nor high: give one of them")
        if self.low is not None and self.high is not None and self.low > self.high:
            raise ValueError(f"has low {self.low:g} above high {self.high:g}")
        if self.until is not None and self.until < self.step:
            raise ValueError(f"has until {self.until} before step {self.step}")
        return self


class SftGate(Block):
    action: Gate = "stop"  # where the gate is missed: end the run, say so, or do not look
    parse_rate: Fraction = 0.98  # of a critic's scores, at least
    # The critic's Brier score below the best constant's, and its ranking within a prompt; None: asked for
    # (the ranking above 0.5) where its teacher's words are their own (self, endpoint, file), as a critic that
    # says the same of every state would pass by its form alone.
    brier_below_constant: bool | None = None
    ranking: Fraction | None = None  # of one prompt's responses; None: as said above


class CriticBounds(Block):
    """What a critic must have reached."""

    brier_below_constant: bool = True  # its Brier score is below the best constant's
    auc: Fraction = 0.65  # more than this
    ranking: Fraction = 0.5  # of one prompt's responses, more than this


class CriticGate(CriticBounds):
    action: Gate = "stop"  # where the gate is missed: end the run, say so, or do not look


class ReinforceGate(CriticBounds):
    # fallback: the critic goes back to earlier weights, and the run goes on with them
    action: Literal["stop", "warn", "off", "fallback"] = "stop"
    # An SFT stage of the critic's before, whose weights it goes back to; None: those REINFORCE began with
    fallback: str | None = None


class EntryGate(Block):
    """What a critic must be before an actor is trained by its values, at the stage's first evaluation.

    By default that it writes scores at all. An open re-implementation of GenAC (hamishivi/open-instruct) asks
    for parse_rate 0.99, mse 0.04, pearson 0.90 and spearman 0.87.
    """

    action: Gate | None = None  # None: as the critic's last gate in the recipe says; stop where it has none
    parse_rate: Fraction = 0.0  # at least; of none at all it is never reached
    brier_below_constant: bool = False  # its Brier score is below the best constant's
    auc: Fraction | None = None  # more than this; None: not asked for
    ranking: Fraction | None = None  # within a prompt, likewise
    mse: PositiveFloat | None = None  # to Monte-Carlo values, at most; with the next two evaluation.mc_states
    pearson: Fraction | None = None  # with Monte-Carlo values, at least
    spearman: Fraction | None = None  # likewise

    @property
    def of_monte_carlo(self) -> bool:
        """Whether it asks for figures that Monte-Carlo values give."""
        return any(bound is not None for bound in (self.mse, self.pearson, self.spearman))


class TeacherConfig(Block):
    """Where the critic's SFT traces come from (method §4)."""

    # monte_carlo: the score is the value by Monte Carlo, the reasoning the exact teacher's, if there is one
    # file: what `genac traces` has kept
    kind: Literal["exact", "self", "endpoint", "monte_carlo", "file"] = "exact"
    # exact: what of a trace is learnt (monte_carlo: all or the score). The score alone shows what reasoning
    # is worth; the reasoning alone makes a model that can think about tasks of whose values it has been told
    # nothing.
    writes: Literal["trace", "score", "reasoning"] = "trace"
    p_bar_range: tuple[Fraction, Fraction] | None = None  # exact: show actors from this range (ICC is learnt)
    continuations: Positive = 8  # self, monte_carlo: continuations per state, whose mean outcome is its value
    judgements: Positive = 1  # self: per state, of which the nearest to the value is looked at
    # self: kept where |v - value| is at most tolerance_floor + tolerance_errors standard errors of the value
    tolerance_floor: Fraction = 0.05
    tolerance_errors: Annotated[float, Field(ge=0)] = 2.0  # as said above
    rounds: Positive = 4  # self: at most so many times further states are drawn, until `size` are accepted
    url: str | None = None  # endpoint: OpenAI-compatible base URL
    model: str | None = None  # endpoint: its name there
    api_key_env: str | None = None  # name of the environment variable with the key
    timeout_s: PositiveFloat = 120.0  # of a request
    concurrency: Positive = 8  # requests at a time
    attempts: Positive = 4  # per request, the first included
    # endpoint: of an answer, the reasoning that it hides among them; None: judging.max_new_tokens
    max_tokens: Positive | None = None
    # Of models that reason: low, medium, high. With it the limit is asked for as max_completion_tokens, and
    # no temperature is sent unless one is given here, as those refuse the others
    reasoning_effort: str | None = None
    limit_name: Literal["max_tokens", "max_completion_tokens"] | None = None  # None: as said above
    temperature: Annotated[float, Field(ge=0)] | None = None  # None: 1, or, with reasoning_effort, not sent
    # endpoint, file: what it reasons apart from its answer is learnt too, between <think> tags
    learn_reasoning: bool = False
    # Dollars for a million tokens that are read, and for a million that are written: cost is shown
    price: tuple[Annotated[float, Field(ge=0)], Annotated[float, Field(ge=0)]] | None = None
    path: str | None = None  # file


class ActorConfig(Block):
    """One of several actors, whose states a critic learns on: so that it learns what it is told of them."""

    name: Annotated[str, Field(min_length=1, pattern=r"^[^\n{}]+$")]  # as the critic is told
    checkpoint: str | None = None  # of a run: its newest, or one; None: the run's own actor, as it is


COPIED = ("self", "endpoint", "file")  # teachers whose judgements are learnt as they are


class SftHeldout(Block):
    """Samples of an SFT stage that are not trained on: when it ends, and which weights it keeps."""

    size: Positive = 128  # samples
    every: Positive = 50  # steps between looks at them
    metric: Literal["loss", "exact_match"] = "loss"  # nats a token; a completion word for word
    target: PositiveFloat | None = None  # good enough: the stage cools down and ends; the gate asks for it
    patience: Positive | None = None  # looks without a better figure, after which it cools down and ends
    min_delta: Annotated[float, Field(ge=0)] = 0.0  # what counts as better, for patience
    cooldown: Annotated[int, Field(ge=0)] = 0  # last steps, in which the learning rate falls to min_lr
    keep: Literal["best", "last"] = "best"  # weights that the stage ends with


class SftSource(Block):
    """One of several sources of an SFT stage's samples: a task, and who writes what about it."""

    name: Annotated[str, Field(pattern=r"^[\w-]+$")] | None = None  # in figures; None: its place, from 1
    task: TaskConfig | None = None  # None: the recipe's
    share: Annotated[float, Field(gt=0, le=1)]  # of the samples; those of all sources sum to 1
    data: Literal["demonstrations", "traces"] | None = None  # None: the stage's
    # False: whole traces are learnt but for the tokens that say which score: nothing of what states are worth
    scored: bool = True
    # Over the stage's, key by key, unless it says another kind; of a replay, which has none: the exact one
    # about the actor as it is (no p_bar_range). Of a task of the recipe's kind it reads p_bar as the recipe's
    # does, whatever its lengths; of another kind, as the success rate at that task.
    teacher: TeacherConfig | None = None
    rollout: RolloutConfig | None = None  # over the stage's, key by key
    length_buckets: Positive | None = None  # None: the stage's
    # Of the pass over the data, the part in which its samples are met: a curriculum. Needs epochs: 1.
    phase: tuple[Fraction, Fraction] = (0.0, 1.0)


def named_sources(sources: list[SftSource]) -> list[tuple[str, SftSource]]:
    """Sources by name, in order."""
    return [(source.name or str(place), source) for place, source in enumerate(sources, start=1)]


class ReplayConfig(Block):
    """What a critic is fine-tuned on further while REINFORCE trains it: SFT samples in every step."""

    sources: Annotated[list[SftSource], Field(min_length=1)]
    share: Annotated[float, Field(gt=0, lt=1)] = 0.1  # of a step's trained tokens
    # of their mean loss (nats a token), which is added to REINFORCE's; at judging.temperature, as all of a
    # step's log-probs are, where SFT's is at 1
    weight: PositiveFloat = 0.1
    size: Positive = 2000  # samples, made when the stage begins, from which steps draw
    length_buckets: Positive = 1  # as an sft stage's


class SftStage(Block):
    """Supervised fine-tuning of one role, loss on the completion only."""

    kind: Literal["sft"]
    name: str = "sft"  # of the stage, in logs, checkpoints and overrides
    role: str  # which is trained
    start_from: str | None = None  # begin from a copy of this role's current weights
    # made by the task, by a teacher of critics, or conversations of a file
    data: Literal["demonstrations", "traces", "jsonl"]
    path: str | None = None  # jsonl: lines of {"messages": [...], "tools": [...]}
    size: Positive | None = (
        None  # None: 2000 demonstrations or traces to make; all of a jsonl's conversations
    )
    turns: Literal["last", "all"] = "last"  # jsonl: which of the assistant's turns are learnt
    system: str = ""  # jsonl: a system message before conversations that have none
    overlong: Literal["error", "drop"] = "error"  # jsonl: conversations that have no room in the model
    epochs: Positive = 2  # at most, where `heldout` ends the stage
    batch: Positive = 64  # sequences per step
    teacher: TeacherConfig = TeacherConfig()
    sources: list[SftSource] = []  # demonstrations, traces: of several tasks or teachers, mixed by share
    # traces: the range of states' lengths in as many equal parts, which are drawn from evenly; 1: as they
    # fall, so that short ones are most
    length_buckets: Positive = 1
    rollout: RolloutConfig = RolloutConfig()  # traces: how the actor's states are made
    # traces: whose states; [] is the run's own actor. Each has as many, and its own name and success rate in
    # what the critic is told
    actors: list[ActorConfig] = []
    optimizer: OptimizerConfig | None = None  # over the role's, key by key
    heldout: SftHeldout | None = None  # None: all samples are trained on, `epochs` times
    gate: SftGate = SftGate()
    expect: list[Band] = []  # how it should look early on (docs/recipes.md)

    @property
    def made(self) -> int:
        """How many demonstrations or traces are made."""
        return 2000 if self.size is None else self.size

    @property
    def teachers(self) -> list[TeacherConfig]:
        """Those of its sources, or its own where it has none."""
        return [source.teacher or self.teacher for source in self.sources] or [self.teacher]

    @property
    def phased(self) -> bool:
        """Whether it is a curriculum: it has one pass, and no more are to be had."""
        return any(source.phase != (0.0, 1.0) for source in self.sources)

    @property
    def copies(self) -> bool:
        """Whether any of its traces' scores are somebody's own words, and not worked out from the task."""
        return self.data == "traces" and any(one.kind in COPIED for one in self.teachers)

    @property
    def asks_itself(self) -> bool:
        """Whether any of its traces are the critic's own."""
        return self.data == "traces" and any(teacher.kind == "self" for teacher in self.teachers)


class ReinforceStage(Block):
    """REINFORCE pre-training of the critic, actor frozen."""

    kind: Literal["reinforce"]
    name: str = "reinforce"  # of the stage
    steps: Positive = 50  # updates, each on a fresh batch
    rollout: RolloutConfig = RolloutConfig()
    # Whose responses the steps have, in turn, as for sft; [] is the run's own actor. Evaluations are of that
    actors: list[ActorConfig] = []
    train_states: Positive = 4  # at most this many states per response are trained
    train_share: Annotated[float, Field(gt=0, le=1)] = 1.0  # of the responses: the rest only gets values
    # taken off a judgement's reward: the batch's others' mean of the same outcome, or nothing
    baseline: Literal["leave_one_out", "none"] = "leave_one_out"
    loss: CriticLossConfig = CriticLossConfig()
    replay: ReplayConfig | None = None  # SFT samples that each step's loss has besides
    optimizer: OptimizerConfig | None = None  # over the role's, key by key
    eval_every: Annotated[int, Field(ge=0)] = 10  # 0: only at the end
    gate: ReinforceGate = ReinforceGate()
    expect: list[Band] = []  # how it should look early on (docs/recipes.md)


class PpoStage(Block):
    """Joint training: actor by PPO, critic by REINFORCE, both published every step."""

    kind: Literal["ppo"]
    name: str = "ppo"  # of the stage
    steps: Positive = 100  # batches
    rollout: RolloutConfig = RolloutConfig()
    train_states: Positive = 4  # as for reinforce
    train_share: Annotated[float, Field(gt=0, le=1)] = 1.0  # as for reinforce
    baseline: Literal["leave_one_out", "none"] = "leave_one_out"  # as for reinforce
    train_critic: bool = True  # no: the critic stays as it is
    # Updates of the critic per step, on the step's judgements. From 2 on the actor is trained first, and a
    # judgement is weighted by how much likelier the moved actor goes on as the old one did (PACT, 2609.26355)
    critic_updates: Positive = 1
    importance_limit: PositiveFloat = 6.0  # judgements beyond this weight are left out
    # Batches that are begun before their step, so off policy by as many publications at most (sglang
    # engines); true is 1. More than one go on over publications in flight
    overlap: bool | Annotated[int, Field(ge=0)] = False
    minibatches: Positive = 1  # parts of a batch, an update each
    epochs: Positive = 1  # passes over a batch
    overlong: OverlongConfig | None = None  # half of it is added to the actor's outcome, none to the critic's
    overlong_filter: bool = False  # cut-off responses teach the critic alone (EasyPPO, 2609.36802)
    advantage: AdvantageConfig = AdvantageConfig()
    actor_loss: LossConfig = LossConfig()
    critic_loss: CriticLossConfig = CriticLossConfig()
    actor_optimizer: OptimizerConfig | None = None  # over the role's, key by key
    critic_optimizer: OptimizerConfig | None = None  # over the role's, key by key
    eval_every: Annotated[int, Field(ge=0)] = 10  # steps; 0: only at the ends
    gate: EntryGate = EntryGate()  # what the critic must be when the stage begins
    expect: list[Band] = []  # how it should look early on (docs/recipes.md)


class DistilConfig(Block):
    """A value head learns what a generative critic says of kept states."""

    path: str  # judged.jsonl of `genac traces ask`, or what `genac score --lines` has written
    batch: Positive = 256  # states of a step
    # Of the training problems, those that are not trained on but looked at, as are all held-out ones
    heldout: Annotated[float, Field(gt=0, lt=1)] = 0.1


class ValueStage(Block):
    """Value pre-training of a scalar critic on the frozen actor's outcomes (VC-PPO; VAPO's warm-up)."""

    kind: Literal["value"]
    name: str = "value"  # of the stage
    start_from: str | None = None  # begin from a copy of this role's current weights, the head apart
    steps: Positive = 50  # batches
    rollout: RolloutConfig = RolloutConfig()
    distil: DistilConfig | None = None  # in the place of rollouts: a generative critic's judgements
    value: RegressionConfig = RegressionConfig()
    minibatches: Positive = 1  # parts of a batch, an update each
    optimizer: OptimizerConfig | None = None  # over the role's, key by key
    eval_every: Annotated[int, Field(ge=0)] = 10  # steps; 0: only at the end
    gate: CriticGate = CriticGate(action="warn")
    expect: list[Band] = []  # how it should look early on (docs/recipes.md)


class PolicyStage(Block):
    """RL of the actor by an algorithm without a generative critic."""

    kind: Literal["policy"]
    name: str = "policy"  # of the stage
    algorithm: Algorithm
    start_from: str | None = None  # a scalar critic begins from a copy of this role's weights, the head apart
    steps: Positive = 100  # batches
    rollout: RolloutConfig = RolloutConfig()
    overlap: bool | Annotated[int, Field(ge=0)] = False  # as for ppo
    minibatches: Positive = 1  # parts of a batch, an update each
    epochs: Positive = 1  # passes over a batch
    actor_optimizer: OptimizerConfig | None = None  # over the role's, key by key
    # Cut-off responses are left out of the actor's loss and whitening; a critic learns from them (EasyPPO)
    overlong_filter: bool = False
    critic_optimizer: OptimizerConfig | None = None  # of a scalar critic: over the role's, key by key
    eval_every: Annotated[int, Field(ge=0)] = 10  # steps; 0: only at the ends
    expect: list[Band] = []  # how it should look early on (docs/recipes.md)


StageConfig = Annotated[
    SftStage | ReinforceStage | PpoStage | ValueStage | PolicyStage, Field(discriminator="kind")
]


def sources_of(stage: StageConfig) -> list[tuple[tuple[str | int, ...], SftSource]]:
    """A stage's sources of SFT samples, its replay's among them, and where they stand in its block."""
    if isinstance(stage, SftStage):
        return [(("sources", place), source) for place, source in enumerate(stage.sources)]
    if isinstance(stage, ReinforceStage) and stage.replay is not None:
        return [(("replay", "sources", place), one) for place, one in enumerate(stage.replay.sources)]
    return []


def entry_action(stages: Sequence[StageConfig], stage: PpoStage) -> Gate:
    """What a joint stage's entry gate does. Where the recipe does not say: what the critic's last gate before
    it does, as who lets an unready critic through there means it; stop where there is none.
    """
    if stage.gate.action is not None:
        return stage.gate.action
    before = stages[: [one.name for one in stages].index(stage.name)]
    for one in reversed(before):
        if isinstance(one, ReinforceStage) or (isinstance(one, SftStage) and one.role == "critic"):
            return "stop" if one.gate.action == "fallback" else one.gate.action
    return "stop"
