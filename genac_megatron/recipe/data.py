"""What questions are chosen by: data sets known by name, filters, benchmarks to keep away from. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePath
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from genac_megatron.recipe.block import Block, Fraction, Positive

MATHS = ("aime24", "aime25", "amc23", "math500", "minerva", "olympiadbench")  # "maths" names them all
HELDOUT = "heldout"  # in the place of a benchmark's name: a recipe's own held-out prompts

# Training sets by a short name: where they lie on the hub, and how their rows are read. Names and columns are
# those of the sets' cards; none could be downloaded where this was written.
NAMED_SETS: dict[str, dict[str, Any]] = {
    "gsm8k": {
        "name": "openai/gsm8k",
        "config": "main",
        "heldout_split": "test",
        "question_key": "question",
        "answer_key": "answer",
        "answer_pattern": "#### (.*)",
        "verifier": "math",
    },
    "math": {
        "name": "EleutherAI/hendrycks_math",
        "config": [
            *("algebra", "counting_and_probability", "geometry", "intermediate_algebra"),
            *("number_theory", "prealgebra", "precalculus"),
        ],
        "question_key": "problem",
        "answer_key": "solution",
        "solution": True,
        "verifier": "math",
    },
    "dapo-math-17k": {  # verl's rows, each a hundred times; some questions have two answers there
        "name": "BytedTsinghua-SIA/DAPO-Math-17k",
        "question_key": "prompt",
        "answer_key": "reward_model.ground_truth",
        "verifier": "math",
        "conflicting": "drop",
    },
}


def with_named(block: Any) -> Any:
    """A `datasets` block whose name is a row of NAMED_SETS, with what that says under what it says itself.

    Of a file (`path`) there are no splits, so none is held out by name.
    """
    if not isinstance(block, Mapping) or not isinstance(block.get("name"), str):
        return block
    known = NAMED_SETS.get(block["name"])
    if known is None:
        return block
    path = block.get("path")
    if isinstance(path, str) and PurePath(path).suffix:
        known = {key: value for key, value in known.items() if key != "heldout_split"}
    return {**known, **block, "name": known["name"]}


def is_known_config(name: str, config: str | list[str] | None) -> bool:
    """Whether the configurations are those that NAMED_SETS has for the data set of this name on the hub."""
    return any(known["name"] == name and known.get("config") == config for known in NAMED_SETS.values())


class BenchmarkSource(Block):
    """A named benchmark, and where its questions lie."""

    name: Annotated[str, Field(min_length=1)]  # of the benchmark (docs/evaluation.md)
    path: str | None = None  # a local file or folder in the data set's own form; None: by its name


def by_name(value: Any) -> Any:
    """A list of benchmarks in which each may be its name alone; `maths` stands for the six maths sets."""
    if not isinstance(value, list):
        return value
    found: list[Any] = []
    for one in value:
        block = {"name": one} if isinstance(one, str) else one
        whole = isinstance(block, Mapping) and block.get("name") == "maths"
        found += [{**block, "name": name} for name in MATHS] if whole else [block]
    return found


class FilterConfig(Block):
    """Which questions stay. What is left out is counted and told."""

    values: dict[str, Annotated[list[str], Field(min_length=1)]] = {}  # by a row's key, the values that stay
    # Fewest and most tokens of a prompt, with the chat template, by the actor's tokenizer
    prompt_tokens: tuple[Annotated[int, Field(ge=0)], Positive] | None = None
    pass_rate: tuple[Fraction, Fraction] | None = None  # least and most; of questions that are trained on
    pass_rates: str | None = None  # the folder, or file, that `genac evaluate pass-rates` has made
    unmeasured: Literal["error", "drop", "keep"] = "error"  # questions that it has no rate of


class DecontaminateConfig(Block):
    """Questions of benchmarks that must not be trained on, or held out."""

    # Each by its name, or with the path of a local file; maths: the six maths sets
    against: Annotated[list[BenchmarkSource], BeforeValidator(by_name), Field(min_length=1)] = Field(
        default=["maths"], validate_default=True
    )
    ngram: Annotated[int, Field(ge=2)] = 8  # words in a row that are compared
    # This share of a benchmark question's n-grams, at least, stands in a question: it is the same one
    overlap: Annotated[float, Field(gt=0.0, le=1.0)] = 0.5
    found: Literal["drop", "error"] = "drop"  # what becomes of such questions: left out and told, or refused
