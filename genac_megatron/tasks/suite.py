"""A suite: a benchmark, or rows of one's own, that an actor is asked. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from genac_megatron.errors import InputError
from genac_megatron.recipe.judged import SuiteConfig
from genac_megatron.recipe.schema import Recipe, RolloutConfig, StageConfig
from genac_megatron.records import Prompt
from genac_megatron.tasks.base import Task
from genac_megatron.tasks.benchmarks import find_benchmark, make_benchmark, make_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Suite:
    """Questions to ask, and how."""

    config: SuiteConfig
    task: Task
    prompts: list[Prompt]
    samples: int

    @property
    def name(self) -> str:
        return self.config.name

    def sampled(self, recipe: Recipe, stage: StageConfig) -> RolloutConfig:
        """How the actor is sampled on it."""
        own = self.config
        changes: dict[str, Any] = {
            "temperature": own.temperature or recipe.evaluation.temperature,
            "prompts": len(self.prompts),
            "samples": self.samples,
            "truncated_outcome": "verify",  # as `genac evaluate task` counts
        }
        if own.max_new_tokens is not None:
            changes["max_new_tokens"] = own.max_new_tokens
        return stage.rollout.model_copy(update=changes)


def make_suite(
    config: SuiteConfig, tokenizer: PreTrainedTokenizerBase | None, tags: tuple[str, str] | None
) -> Suite:
    """A suite with its questions read. Raises InputError where its data is missing or wrong."""
    try:
        if config.task is not None:
            task, samples = make_rows(config.task, tokenizer, tags), 1
        else:
            task = make_benchmark(config.name, config.path, tokenizer, tags)
            samples = find_benchmark(config.name).samples
    except InputError as error:
        what = f"suite {config.name}: {error.what}"
        raise InputError(what, where=error.where, way_out=error.way_out) from error
    count = min(config.problems or task.heldout_size, task.heldout_size)
    prompts = [task.prompt("heldout", index) for index in range(count)]
    return Suite(config, task, prompts, config.samples or samples)
