"""The recipe's `task` block: what is asked, and how an answer is verified. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from genac_megatron.recipe.block import Block, Fraction, Positive, PositiveFloat
from genac_megatron.recipe.data import DecontaminateConfig, FilterConfig, with_named

# Where a response's final answer may stand (tasks/answers.py, docs/tasks.md): \boxed{}; <answer> tags; a line
# "Answer: ..."; "#### ..."; a last sentence "The answer is ..."; the last line; the last number, whatever of.
AnswerForm = Literal["boxed", "tag", "line", "hashes", "sentence", "last_line", "number"]


class TaskBlock(Block):
    """What every task has."""

    success: str = ""  # what counts as success, in a sentence that the critic is shown; "": judged correct


class OwnReward(Block):
    """A reward of the user's own: a Python function, in processes of its own (docs/tasks.md)."""

    python: str  # path/to/file.py:function, or package.module:function
    # The weights of named parts, whose weighted mean the outcome is. {}: it returns a number.
    parts: dict[Annotated[str, Field(pattern=r"^[\w.-]+$")], Annotated[float, Field(ge=0)]] = {}
    timeout_s: PositiveFloat = 10.0  # for one response; then its process is ended
    workers: Positive = 1  # processes per rank
    failed_outcome: Fraction = 0.0  # of a response that it failed on; they are counted (verify/late)
    give_up: Positive = 32  # failures in a row, on a rank, that end the run


def _verifier_kind(given: Any) -> str:
    return "own" if isinstance(given, dict | OwnReward) else "named"


Verifier = Annotated[
    Annotated[Literal["math", "exact"], Tag("named")] | Annotated[OwnReward, Tag("own")],
    Discriminator(_verifier_kind),
]


BOXED = "Think step by step. Put the final answer in \\boxed{}."


class RowsBlock(TaskBlock):
    """What tasks over a fixed set of rows have."""

    # Rows whose prompt, with the longest response, has no room in the actor's or the critic's model; all are
    # looked at when a run begins. drop: they are left out, counted and told.
    overlong: Literal["error", "drop"] = "error"


class QuestionsBlock(RowsBlock):
    """What tasks over questions and reference answers have."""

    system: str = ""  # a system message before each question, unless its row has one
    tools_key: str | None = "tools"  # JSON schemas of functions, or JSON text of them: the chat template's
    split_key: str | None = "split"  # a row's own split, where one set of rows holds both
    conflicting: Literal["error", "drop"] = "error"  # questions that stand there with different answers
    solution: bool = (
        False  # the answer's field is a whole solution: its last box, or "#### X", is the reference
    )
    filter: FilterConfig = FilterConfig()
    decontaminate: DecontaminateConfig | None = None  # None: no benchmark is looked at
    # In which training questions come in the first pass over them; later ones are shuffled. easy_first and
    # hard_first go by filter.pass_rates, short_first by the question's text
    order: Literal["shuffled", "easy_first", "hard_first", "short_first"] = "shuffled"


class StateTrackingTask(TaskBlock):
    """Follow swaps of k objects; the answer is the whole final arrangement."""

    kind: Literal["state_tracking"]
    objects: Annotated[int, Field(ge=2, le=8)] = 4  # that are swapped
    min_swaps: Positive = 2  # per problem
    max_swaps: Positive = 5  # per problem
    train_size: Positive = 20_000  # problems
    heldout_size: Positive = 256  # problems
    slip_rate: Fraction = 0.0  # chance that a line of a demonstration goes wrong
    # words in each line of a demonstration that do not matter, each one of eight: what an actor is unsure of
    fillers: Annotated[int, Field(ge=0, le=8)] = 0


class ChainedArithmeticTask(TaskBlock):
    """A digit carried through steps modulo 10; the answer is the last digit."""

    kind: Literal["chained_arithmetic"]
    min_steps: Positive = 2  # per problem
    max_steps: Annotated[int, Field(ge=1, le=26)] = 5  # each has a letter
    operations: Annotated[str, Field(pattern=r"^[-+*]+$")] = "+-*"  # each step's is drawn from these
    train_size: Positive = 20_000  # problems
    heldout_size: Positive = 256  # problems
    slip_rate: Fraction = 0.0  # chance that a line of a demonstration goes wrong


class LockTask(TaskBlock):
    """Find a hidden code by trying, a symbol a turn: a game of many turns (environment: {kind: task})."""

    kind: Literal["lock"]
    symbols: Annotated[int, Field(ge=2, le=8)] = 2  # that a code is made of
    min_length: Positive = 2  # of a code
    max_length: Annotated[int, Field(ge=1, le=9)] = 3  # of a code
    turns: Annotated[int, Field(ge=1, le=64)] = 8  # in which it must be found
    train_size: Positive = 20_000  # locks
    heldout_size: Positive = 256  # locks
    slip_rate: Fraction = 0.0  # chance that a turn of a demonstration is any symbol


class JsonlTask(QuestionsBlock):
    """One object per line: a question, a reference answer, optionally a split."""

    kind: Literal["jsonl"]
    path: str  # of the rows (docs/tasks.md)
    heldout_path: str | None = None  # None: a seeded share of path
    # At most so many held-out rows; None: all that are given, or a share of 256
    heldout_size: Positive | None = None
    question_key: str = "question"  # a.b: b inside a. Its value is text, or a list of chat messages
    answer_key: str = "answer"  # where both names are left as they are, verl's are read as well
    # how an answer is held to the reference: math, exact, or a function of yours; to be set
    verifier: Verifier | None = None
    # None: boxed, tag, line, sentence; with `exact` the last line too
    answer_forms: Annotated[list[AnswerForm], Field(min_length=1)] | None = None
    instruction: str | None = None  # None: BOXED after questions that are text, nothing after chat messages


class DatasetTask(QuestionsBlock):
    """A Hugging Face dataset by name or local folder."""

    kind: Literal["datasets"]
    # Of a data set, or a file or folder. gsm8k, math, dapo-math-17k: known sets, their keys set (tasks.md)
    name: str
    path: str | None = None  # a local file or folder with the rows of the set of that name
    config: str | list[str] | None = None  # of the data set; several: all their rows
    revision: str | None = None  # of the data set on its hub: a commit, tag or branch
    split: str = "train"  # to train on
    heldout_split: str | None = None  # None: a seeded share of split
    # At most so many held-out rows; None: all that are given, or a share of 256
    heldout_size: Positive | None = None
    question_key: str = "question"  # a.b: b inside a. Its value is text, or a list of chat messages
    answer_key: str = "answer"  # where both names are left as they are, verl's are read as well
    answer_pattern: str | None = None  # regex whose group 1 is the reference (GSM8K: "#### (.*)")
    # how an answer is held to the reference: math, exact, or a function of yours; to be set
    verifier: Verifier | None = None
    # None: boxed, tag, line, sentence; with `exact` the last line too
    answer_forms: Annotated[list[AnswerForm], Field(min_length=1)] | None = None
    instruction: str | None = None  # None: BOXED after questions that are text, nothing after chat messages

    @model_validator(mode="before")
    @classmethod
    def _named(cls, block: Any) -> Any:
        return with_named(block)

    @property
    def source(self) -> str:
        """Where its rows are read: the local path, else the name."""
        return self.path or self.name


class ReasoningGymTask(TaskBlock):
    """A reasoning-gym task by name."""

    kind: Literal["reasoning_gym"]
    name: str  # of reasoning-gym's task
    options: dict[str, int | float | str | bool] = {}  # of it
    train_size: Positive = 20_000  # problems
    heldout_size: Positive = 256  # problems
    pass_score: Fraction = 0.99  # scores below count as 0, at or above as 1
    binary: bool = True  # False: keep the score in [0, 1] as the outcome
    # behind each problem
    instruction: str = "Think step by step, then give the final answer as <answer>...</answer>."


class BenchmarkTask(TaskBlock):
    """A named benchmark (tasks/benchmarks.py), all of it held out: for evaluations, never for training."""

    kind: Literal["benchmark"]
    name: str  # of the benchmark (docs/evaluation.md)
    path: str | None = None  # a local file or folder in the dataset's own form; None: by its name


class JudgeConfig(Block):
    """A model behind an OpenAI-compatible endpoint that scores whole responses."""

    url: str  # the base, for example http://host:port/v1
    model: str  # its name there
    api_key_env: str | None = None  # name of the environment variable with the key
    timeout_s: PositiveFloat = 120.0  # of a request
    concurrency: Positive = 16  # per rank
    attempts: Positive = 4  # per response, the first included
    max_tokens: Positive = 512  # of a judgement
    temperature: Annotated[float, Field(ge=0)] = 0.0  # of the judge
    failed_outcome: Fraction = 0.0  # of a response that no attempt could score; they are counted
    give_up: Positive = 32  # failures in a row, on a rank, that end the run


class RubricTask(RowsBlock):
    """Open-ended prompts; a judge scores each response against a rubric. The outcome is score / scale."""

    kind: Literal["rubric"]
    path: str  # JSONL: a prompt (text, or a list of chat messages) and perhaps a rubric of its own
    heldout_path: str | None = None  # None: a seeded share of path
    # At most so many held-out rows; None: all that are given, or a share of 256
    heldout_size: Positive | None = None
    prompt_key: str = "prompt"  # of a row's prompt
    rubric_key: str = "rubric"  # of a row's rubric
    rubric: str | None = None  # of items that have none
    scale: Positive = 10  # the judge's best score
    instruction: str = ""  # behind each prompt
    judge: JudgeConfig


class PythonTask(RowsBlock):
    """Prompts from a function of the user's own (docs/tasks.md)."""

    kind: Literal["python"]
    path: str  # a Python file, or the name of a module
    prompts: str  # its function
    # At most so many held-out prompts; None: all that say so, or a seeded share of 256
    heldout_size: Positive | None = None
    instruction: str = ""  # behind each prompt
    verifier: Verifier | None = None  # math, exact, or a function of yours
    timeout_s: PositiveFloat = 600.0  # for the function to give all prompts


PartTask = Annotated[
    StateTrackingTask
    | ChainedArithmeticTask
    | JsonlTask
    | DatasetTask
    | ReasoningGymTask
    | RubricTask
    | PythonTask,
    Field(discriminator="kind"),
]


class PackageTask(RowsBlock):
    """An environment of another package, with its own rows: environment: {kind: task} plays it."""

    kind: str
    id: str  # of the environment
    args: dict[str, Any] = {}  # it is made with these
    python: str | None = (
        None  # an interpreter that has the package; None: $GENAC_ENVIRONMENTS_PYTHON, else this
    )
    path: str | None = None  # a folder that it is looked for in, beside what is installed there
    # The rewards that are worth 0 and 1, others in proportion. One beyond them fails its conversation
    rewards: tuple[float, float] = (0.0, 1.0)
    timeout_s: PositiveFloat = 600.0  # for it to load, with its rows
    # At most so many held-out rows; None: its whole evaluation set, or a seeded share of 256
    heldout_size: Positive | None = None

    @property
    def sizes(self) -> tuple[int, int] | None:
        """Rows to train on and held-out ones that are asked for; None: it has its own."""
        return None


class VerifiersTask(PackageTask):
    """An environment of verifiers: what its module's load_environment gives, or a class of the package."""

    kind: Literal["verifiers"]


class TextArenaTask(PackageTask):
    """A game of textarena for one player, by its id."""

    kind: Literal["textarena"]
    train_size: Positive = 1000  # seeds
    heldout_size: Positive = 128  # seeds

    @property
    def sizes(self) -> tuple[int, int]:
        """(train_size, heldout_size)"""
        return self.train_size, self.heldout_size


class MixturePart(Block):
    """A task of a mixture, with its own verifier."""

    name: Annotated[str, Field(pattern=r"^[\w-]+$")]  # in figures and in prompts' ids
    weight: PositiveFloat = 1.0  # of all training prompts, weight / the sum of weights are its
    task: PartTask  # any but a benchmark or a mixture


class MixturePhase(Block):
    """How much of each part is drawn during a part of the run."""

    until: Positive | None = None  # training prompts drawn by then, a multiple of 1000; None: the last phase
    weights: dict[str, Annotated[float, Field(ge=0)]]  # of every part by name; 0: none of it


class MixtureTask(TaskBlock):
    """Several tasks in one run, drawn by weight."""

    kind: Literal["mixture"]
    parts: Annotated[list[MixturePart], Field(min_length=1)]  # its tasks
    # A curriculum: weights that change with the prompts drawn (a step draws rollout.prompts). []: the parts'
    phases: list[MixturePhase] = []


TaskConfig = Annotated[
    StateTrackingTask
    | ChainedArithmeticTask
    | LockTask
    | JsonlTask
    | DatasetTask
    | ReasoningGymTask
    | BenchmarkTask
    | RubricTask
    | PythonTask
    | VerifiersTask
    | TextArenaTask
    | MixtureTask,
    Field(discriminator="kind"),
]


def single_tasks(task: TaskConfig) -> list[TaskConfig]:
    """The task, or those that a mixture is of."""
    return [part.task for part in task.parts] if isinstance(task, MixtureTask) else [task]
