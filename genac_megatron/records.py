"""The words every room shares (docs/architecture.md). Plain data, no torch."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from genac_megatron import compact

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Experts = NDArray[np.unsignedinteger[Any]]  # [tokens, layers, top-k]: which experts they went to

Finish = Literal["stop", "length", "abort"]


@dataclass(frozen=True)
class Prompt:
    """One problem of a task: the chat messages to show, their ids, and what the verifier needs."""

    id: str  # stable over runs: "<split>/<index>"
    messages: tuple[dict[str, Any], ...]  # chat messages, ends with the user's turn
    problem: str  # the plain problem text, as the critic is shown it
    reference: Any  # what the verifier compares with
    ids: tuple[int, ...] = ()  # the chat template applied, generation prompt included
    success: str = ""  # what counts as success, as the critic is told; "": being judged correct
    tools: tuple[dict[str, Any], ...] = ()  # JSON schemas of functions, which the chat template shows
    where: str = field(default="", compare=False)  # in the user's data: file:line
    source: str = ""  # of a mixture: the name of the part that it is of
    # What a privileged critic is shown, by template placeholder: reference, rubric. Never the actor.
    privileged: Mapping[str, str] = field(default_factory=dict)
    opening: str = field(default="", compare=False)  # a digest of what its environment began with
    asked: Prompt | None = field(default=None, compare=False, repr=False)  # the task's own, of one so begun

    @property
    def digest(self) -> str:
        """Of its problem's text, whatever the white space: generators make one text under several ids. "" of
        none.
        """
        if not self.problem.strip():
            return ""
        return hashlib.sha256(" ".join(self.problem.split()).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class SamplingParams:
    """How a request is sampled. temperature 0 is greedy. Log-probs are those of the tempered distribution."""

    max_new_tokens: int
    temperature: float = 1.0
    stop_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class Request:
    """One generation: token ids in. The same (ids, params, seed, weights) gives the same tokens."""

    ids: tuple[int, ...]
    params: SamplingParams
    seed: int = 0
    key: str = ""  # for logs and abort


@dataclass(frozen=True)
class Completion:
    """What an engine sampled: exact ids (the stop token included) and their log-probs.

    Of a conversation, all that stands after its prompt: the actor's turns as they were sampled and, between
    them, what others wrote. Of the latter there is no log-prob, no version, no advantage and no loss. Ids and
    log-probs of whatever kind are held in compact form (compact.py).
    """

    ids: Sequence[int]
    logprobs: Sequence[float]  # one per sampled id, temperature applied
    finish: Finish
    spans: tuple[tuple[int, int], ...] = ()  # (weight version, number of tokens), in order
    # With routing replay: of each token that was read, so of the prompt's and of all ids but the last.
    experts: Experts | None = field(default=None, compare=False, repr=False)
    sampled: tuple[tuple[int, int], ...] = ()  # ranges [begin, end) of ids, in order; (): all were sampled
    cached: int | None = field(default=None, compare=False)  # of the request's ids, had read; None: not known

    def __post_init__(self) -> None:
        object.__setattr__(self, "ids", compact.ids(self.ids))
        object.__setattr__(self, "logprobs", compact.figures(self.logprobs))

    @property
    def version(self) -> int:
        """The oldest weight version that any token was sampled with."""
        return min((v for v, _ in self.spans), default=-1)

    @property
    def ranges(self) -> tuple[tuple[int, int], ...]:
        """`sampled`, in full."""
        return self.sampled or ((0, len(self.ids)),)

    @property
    def written(self) -> int:
        """Number of sampled ids."""
        return sum(end - begin for begin, end in self.ranges)

    def written_before(self, cut: int) -> int:
        """How many of ids[:cut] were sampled: where a per-token figure of id `cut` stands."""
        return sum(max(0, min(end, cut) - begin) for begin, end in self.ranges)


@dataclass(frozen=True)
class Turn:
    """A part of a conversation: what the actor wrote, or what its environment showed it."""

    who: str  # actor, or the role that a chat template has for it: user, tool
    text: str
    begin: int  # its tokens among the response's, the chat template's around a text included
    end: int


@dataclass(frozen=True)
class Episode:
    """What became of a conversation with an environment."""

    turns: tuple[Turn, ...]
    # done: the environment said so; turns, tokens: they ran out; failed: the environment did
    ended: Literal["done", "turns", "tokens", "failed"]
    outcome: float | None = None  # that it gave; None: it gave none
    parts: Mapping[str, float] = field(default_factory=dict)  # by name, summed
    shortened: int = 0  # observations that lost their middle
    failure: str = ""  # how the environment failed
    # Tokens that turns after the first stood behind and an earlier one had read or written; and how many of
    # them the engine still had in its prefix cache. None: it has none that says so
    again: int = 0
    cached: int | None = None
    seed: int = 0  # that the environment began with
    # Of each answer a digest, by which it is known when it is given again, and the outcome that it named
    answers: tuple[tuple[str, float | None], ...] = ()

    @property
    def taken(self) -> int:
        """Turns of the actor."""
        return sum(turn.who == ACTOR for turn in self.turns)


ACTOR = "actor"


@dataclass
class Rollout:
    """A prompt, one sampled response, and its verified outcome r in [0, 1]."""

    prompt: Prompt
    sample: int  # number among the batch's responses to this prompt, repeats of the prompt included
    completion: Completion
    text: str  # the response decoded, special tokens left out; of a conversation its last turn
    outcome: float = 0.0
    parts: Mapping[str, float] = field(default_factory=dict)  # of the outcome, where its task names some
    critic_outcome: float | None = None  # of a cut-off response, where critics have another rule
    limit: int | None = None  # tokens that it might have had; None: not known
    episode: Episode | None = None  # of a conversation
    # Of a conversation of which the chat template shows each turn something else than what stands before it
    # in the completion: those ids, by turn. (): every turn stands behind the prompt and all before it
    behind: tuple[tuple[int, ...], ...] = ()
    # Of its tokens, once they are known: what the actor is trained with, and a scalar critic's values.
    advantages: Sequence[float] | None = field(default=None, compare=False, repr=False)
    values: Sequence[float] | None = field(default=None, compare=False, repr=False)

    @property
    def key(self) -> str:
        """Unique in a batch."""
        return f"{self.prompt.id}#{self.sample}"

    @property
    def target(self) -> float:
        """What critics are to predict."""
        return self.outcome if self.critic_outcome is None else self.critic_outcome

    @property
    def truncated(self) -> bool:
        return self.completion.finish == "length"


@dataclass
class State:
    """The prefix of a response strictly before token `cut` (0 is the prompt state)."""

    rollout: Rollout
    index: int  # k, 0-based, in order of cut
    cut: int  # number of response tokens in the prefix
    end: int  # the segment this state is the baseline of is tokens [cut, end)


@dataclass
class Judgement:
    """The critic's completion for a state. `value` is the parsed v in [0, 1], None where none parses."""

    state: State
    prompt_ids: Sequence[int]  # held in compact form
    completion: Completion
    text: str
    value: float | None
    soft: float | None = None  # sum_n p(n) n/10 over the eleven answers, where asked for
    used: float = 0.0  # what advantages use: value or soft, or the fallback where neither parses
    skipped: bool = False  # never asked: the budget of critic tokens was spent, or no room (`too_long`)
    too_long: bool = False  # never asked: the prompt around the response left no room in the critic's model
    certain: float | None = None  # never asked: the outcome that all others of the response's group had
    weight: float = 0.0  # REINFORCE weight: R_v minus its leave-one-out baseline

    def __post_init__(self) -> None:
        self.prompt_ids = compact.ids(self.prompt_ids)


@dataclass
class Sample:
    """One sequence to train on: tokens, of which those from `start` on carry loss, or those of `spans` alone.

    Per-token fields hold one figure for each token that carries loss, for example `weights`
    (loss weight), `advantages`, `behaviour` (the engine's log-probs), `old` (the trainer's). Tokens and
    figures may be any sequences of numbers: those of completions are compact ones.
    """

    tokens: Sequence[int]
    start: int
    fields: dict[str, Sequence[float]] = field(default_factory=dict)
    experts: Experts | None = field(default=None, compare=False, repr=False)  # of tokens[:-1], to be replayed
    source: str = ""  # what it was made of, a prompt's id for example; "": nothing that others share
    problem: str = ""  # a digest of its problem's text, which other ids' prompts may have too; "": not known
    part: str = ""  # of a stage's several sources of samples: the name of the one that it is of
    # The completion as it would stand there with a score of the other form; "": scores have one form
    otherwise: str = field(default="", compare=False, repr=False)
    spans: tuple[tuple[int, int], ...] = ()  # ranges of tokens, in order, the first from `start` on; (): all
    place: int = field(default=0, compare=False, repr=False)  # among the samples of all ranks, by their order

    @property
    def ranges(self) -> tuple[tuple[int, int], ...]:
        """`spans`, in full."""
        return self.spans or ((self.start, len(self.tokens)),)

    @property
    def trained(self) -> int:
        """Number of tokens that carry loss."""
        return sum(end - begin for begin, end in self.ranges)


def samples_of(rollout: Rollout, fields: Mapping[str, Sequence[float]]) -> list[Sample]:
    """What an actor is trained on: a response as one sequence or, where turns stand behind ids of their own,
    a sequence for each. fields: a figure for each sampled token.
    """
    completion = rollout.completion
    if not rollout.behind:
        return [sample_of(rollout.prompt.ids, completion, fields)]
    made, read = [], 0
    for (begin, end), before in zip(completion.ranges, rollout.behind, strict=True):
        own = {name: figures[read : read + end - begin] for name, figures in fields.items()}
        ids = compact.ids((*before, *completion.ids[begin:end]))
        made.append(Sample(ids, len(before), own))
        read += end - begin
    return made


def sample_of(
    prompt: Sequence[int], completion: Completion, fields: Mapping[str, Sequence[float]] | None = None
) -> Sample:
    """A completion after its prompt's ids; what was sampled of it carries loss."""
    start = len(prompt)
    spans = tuple((start + begin, start + end) for begin, end in completion.sampled)
    return Sample(
        compact.ids((*prompt, *completion.ids)),
        spans[0][0] if spans else start,
        dict(fields or {}),
        experts=completion.experts,
        spans=spans,
    )
