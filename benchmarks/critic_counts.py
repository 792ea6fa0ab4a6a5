"""A GenAC step over a step of PPO with a scalar critic, by counting: what each lever of a recipe gives.

No model and no server: real prompts of the critic about nested states of a group's responses, cut, trained
and left out by the code of a run. FLOPs are 2 per weight and token forward and 6 in training, actor and
critic of one size, attention left out. Both sides have shared prefixes (training.share_prefixes, trees uncut)
and an engine that reads each prefix once.

PPO: the actor writes and is trained; the scalar critic reads every response once forward and is trained on
it. GenAC: the actor alike; the critic reads the prompts of its states, writes on each, is trained on some.
soft: the eleven scores are rated after each judgement. certain: responses whose group's others ended alike
are not judged; the mean over every number of right responses in a group, each as likely (success rates spread
evenly). published: weights that a step sends to engines, over those of PPO, whose critic has none.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from benchmarks.machine import save
from genac_megatron.critic.icc import IccState
from genac_megatron.critic.score import answer_candidates, format_answer
from genac_megatron.critic.states import cut_states, trained_indices, trained_responses
from genac_megatron.recipe.schema import JudgingConfig, StatesConfig
from genac_megatron.records import Rollout
from genac_megatron.serving.generation import unique_tokens
from genac_megatron.stages.judging import Judge
from genac_megatron.tasks.tokenizer import load_tokenizer

TOKENIZER = load_tokenizer("builtin:tiny")
DOCS = Path(__file__).parent.parent / "docs" / "performance.md"
NAME = "critic_levers"


@dataclass(frozen=True)
class Levers:
    """What a recipe may choose; the defaults are the recipe's."""

    states: int = 8  # judging.states.max_states
    train_states: int = 4  # of a response
    train_share: float = 1.0  # of the responses
    critic_tokens: int = 256  # that a judgement has
    soft: bool = False
    prompt_states: str = "group"  # or response: not a choice of a recipe, for comparison
    certain: bool = False
    every: int = 1  # publications of the critic


ROWS: dict[str, Levers] = {
    "defaults": Levers(),
    "prompt state judged for each response (not a choice)": Levers(prompt_states="response"),
    "soft scores": Levers(soft=True),
    "half of the responses trained": Levers(train_share=0.5),
    "two trained states": Levers(train_states=2),
    "certain outcomes left out": Levers(certain=True),
    "four states": Levers(states=4),
    "two states": Levers(states=2),
    "judgements of 64 tokens": Levers(critic_tokens=64),
    "critic published every 4 steps": Levers(every=4),
    "half trained, certain left out": Levers(train_share=0.5, certain=True),
    "four states, half trained": Levers(states=4, train_share=0.5),
    "four states, half trained, certain left out": Levers(states=4, train_share=0.5, certain=True),
    "two states, half trained, 64 tokens": Levers(states=2, train_share=0.5, critic_tokens=64),
}


@dataclass(frozen=True)
class Counts:
    """Tokens of a step for one group: read and written by engines, and computed in the critic's training."""

    read: float = 0.0
    written: float = 0.0
    scored: float = 0.0
    trained: float = 0.0  # flat
    trained_once: float = 0.0  # as trees

    def plus(self, other: Counts, share: float) -> Counts:
        return replace(
            self, **{f.name: getattr(self, f.name) + share * getattr(other, f.name) for f in fields(self)}
        )


Prompts = list[dict[int, tuple[int, ...]]]  # by response: the critic's prompts of its states


class Group:
    """A prompt's responses, and the critic's prompts of their states."""

    def __init__(self, rollouts: Sequence[Rollout]) -> None:
        self.rollouts = rollouts
        self.problem = len(TOKENIZER.encode(rollouts[0].prompt.problem, add_special_tokens=False))
        self.written = sum(len(rollout.completion.ids) for rollout in rollouts)
        self._prompts: dict[int, Prompts] = {}

    def prompts(self, states: int) -> Prompts:
        """With at most so many states to a response."""
        if states not in self._prompts:
            config = JudgingConfig(states=StatesConfig(max_states=states, min_segment=16))
            judge = Judge(None, TOKENIZER, TOKENIZER, config, IccState(0.5), (), 4096, (0,))  # type: ignore[arg-type]
            cut = [cut_states(rollout, TOKENIZER, config.states) for rollout in self.rollouts]
            self._prompts[states] = [{state.index: judge.prompt_ids(state) for state in own} for own in cut]
        return self._prompts[states]


def judged_by_chance(samples: int) -> list[tuple[float, list[int]]]:
    """(chance, who is judged) of a group of so many, every number of right responses as likely."""
    found: list[tuple[float, list[int]]] = []
    for right in range(samples + 1):
        outcomes = [i < right for i in range(samples)]
        judged = [i for i in range(samples) if len({*outcomes[:i], *outcomes[i + 1 :]}) > 1]
        found.append((1 / (samples + 1), judged))
    return found


def scored_tokens() -> int:
    """New tokens that it takes to rate the eleven scores after a judgement: each distinct beginning once."""
    ids = TOKENIZER.encode("so it goes " + format_answer(7), add_special_tokens=False)
    found = answer_candidates(TOKENIZER, ids)
    assert found is not None
    return len({candidate[:at] for candidate in found[1] for at in range(1, len(candidate))})


def counted(prompts: Prompts, levers: Levers, judged: Sequence[int]) -> Counts:
    """What judging and training on the `judged` responses of a group takes."""
    if not judged:
        return Counts()
    shared = levers.prompt_states == "group"
    asked = [prompts[n][i] for n in judged for i in prompts[n] if i or not shared]
    asked += [prompts[judged[0]][0]] if shared else []
    trained = [
        (n if i or not shared else judged[0], i)
        for n in trained_responses(len(prompts), levers.train_share)
        if n in judged
        for i in trained_indices(len(prompts[n]), levers.train_states)
    ]
    samples = [prompts[n][i] for n, i in dict.fromkeys(trained)]
    written = len(samples) * levers.critic_tokens
    return Counts(
        read=unique_tokens(asked),
        written=len(asked) * levers.critic_tokens,
        scored=len(asked) * scored_tokens() * levers.soft,
        trained=sum(map(len, samples)) + written,
        trained_once=unique_tokens(samples) + written,
    )


def lever_row(what: str, levers: Levers, of: Group) -> dict[str, Any]:
    """A row of the table."""
    samples, prompts = len(of.rollouts), of.prompts(levers.states)
    cases = judged_by_chance(samples) if levers.certain else [(1.0, list(range(samples)))]
    critic = Counts()
    for chance, judged in cases:
        critic = critic.plus(counted(prompts, levers, judged), chance)
    group, flat = of.problem + of.written, of.problem * samples + of.written
    judging = critic.read + critic.written + critic.scored
    own = 2 * group + 6 * group  # what the actor writes, and its training, on both sides
    generative, scalar = own + 2 * judging + 6 * critic.trained_once, own + 2 * group + 6 * group
    own_flat = 2 * group + 6 * flat
    return {
        "lever": what,
        **{f.name: getattr(levers, f.name) for f in fields(levers)},
        "judging % of FLOPs": round(100 * 2 * judging / generative),
        "critic training % of FLOPs": round(100 * 6 * critic.trained_once / generative),
        "FLOPs ÷ PPO": round(generative / scalar, 2),
        "FLOPs ÷ PPO, flat packs": round(
            (own_flat + 2 * judging + 6 * critic.trained) / (own_flat + 8 * flat), 2
        ),
        "tokens ÷ PPO": round((2 * group + judging + critic.trained_once) / (4 * group), 2),
        "published ÷ PPO": round(1 + 1 / levers.every, 2),
    }


def lever_table(of: Group) -> list[dict[str, Any]]:
    return [lever_row(what, levers, of) for what, levers in ROWS.items()]


def length_table(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """FLOPs ÷ PPO of each lever, a column for each length of responses."""
    columns = {f"{len(of.rollouts[0].completion.ids)} tokens": of for of in groups}
    return [
        {"lever": what} | {name: lever_row(what, levers, of)["FLOPs ÷ PPO"] for name, of in columns.items()}
        for what, levers in ROWS.items()
    ]


def markdown(rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> str:
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    lines += [f"| {' | '.join(str(row[column]) for column in columns)} |" for row in rows]
    return "\n".join(lines)


def block(record: dict[str, Any]) -> str:
    """What stands in docs/performance.md between the marks."""
    rows, lengths = record["rows"], record["settings"]["by length"]
    shown = ["lever", *[key for key in rows[0] if "%" in key or "÷" in key]]
    of = record["settings"]
    return (
        f"Groups of {of['per_prompt']} responses of {of['tokens']} tokens:\n\n"
        f"{markdown(rows, shown)}\n\n"
        f"FLOPs ÷ PPO by the length of responses:\n\n{markdown(lengths, list(lengths[0]))}"
    )


BEGIN, END = f"<!-- {NAME}: by python -m benchmarks.critic_cost --counts -->", f"<!-- end of {NAME} -->"


def with_block(text: str, made: str) -> str:
    """A page with what stands between its marks replaced."""
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{made}\n{END}{after}"


def write(settings: dict[str, Any], rows: list[dict[str, Any]], lengths: list[dict[str, Any]]) -> Path:
    """results/critic_levers.json, and docs/performance.md's tables from it."""
    path = save(NAME, {**settings, "by length": lengths}, rows)
    DOCS.write_text(with_block(DOCS.read_text(), block(json.loads(path.read_text()))))
    return path
