"""The recipe's blocks of what is asked of the actor beside training, and what is kept by it. No torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from genac_megatron.recipe.block import Block, Positive, PositiveFloat
from genac_megatron.recipe.data import BenchmarkSource, by_name
from genac_megatron.recipe.tasks import DatasetTask, JsonlTask


class SuiteConfig(BenchmarkSource):
    """Questions that a run asks its actor: a named benchmark, or rows of your own."""

    # All rows of this block (of a data set: of its `split`) are asked; then `name` is yours to choose
    task: Annotated[JsonlTask | DatasetTask, Field(discriminator="kind")] | None = None
    samples: Positive | None = None  # responses to each question; None: the benchmark's own number, of rows 1
    problems: Positive | None = None  # the first so many; None: all
    temperature: PositiveFloat | None = None  # None: evaluation.temperature
    max_new_tokens: Positive | None = None  # of a response; None: as the stage's rollout


Suites = Annotated[list[SuiteConfig], BeforeValidator(by_name)]


class EvaluationConfig(Block):
    """Held-out evaluation: actor accuracy, and the critic on states of held-out rollouts."""

    prompts: Positive = 64  # held-out ones
    samples: Positive = 4  # responses to each
    temperature: PositiveFloat = 1.0  # of the actor
    mc_states: Annotated[int, Field(ge=0)] = 0  # states whose value is also estimated by Monte Carlo
    mc_continuations: Annotated[int, Field(ge=2)] = 16  # continuations per such state
    # Beside the held-out split, by the same engines: benchmarks by name, or as blocks; maths: the six of it
    suites: Suites = []
    # Steps between them, a multiple of stages' eval_every; also at a stage's ends. None: at every evaluation
    suites_every: Positive | None = None
    # Asked once, at the run's end, of the final weights and the best (checkpoint.best): what chose nothing
    test: Suites = []


class BestConfig(Block):
    """Which weights are kept as the best, in best/ of the run folder."""

    figure: str  # of an evaluation: eval/accuracy, eval/critic_brier, suite/NAME (docs/figures.md)
    mode: Literal["max", "min"] = "max"  # whether more of it is better
    stage: str | None = None  # of this stage's evaluations; None: of all stages'


class CheckpointConfig(Block):
    """When the run is saved."""

    every: Annotated[int, Field(ge=0)] = 10  # steps; 0: only at the end of a stage
    keep: Positive = 2  # how many complete ones stay
    asynchronous: bool | None = None  # training goes on while it is written; None: on Linux
    best: BestConfig | None = None  # None: none is kept apart
