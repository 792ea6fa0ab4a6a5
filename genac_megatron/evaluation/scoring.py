"""`genac evaluate bank score`: a critic's values of a frozen bank's states.

BANK/scores/NAME/
    states.jsonl     per state: number (its prompt's in the bank), place (its own among that prompt's states),
                     prompt, response, index, the critic's value, words and tokens
    manifest.json    what made them (evaluation/parts.py; plan.json and parts/ while they are being made)
    reliability.png  values.png
    scores.json      figures with intervals (docs/evaluation.md says what each means); written last
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from genac_megatron import __version__
from genac_megatron.errors import InputError
from genac_megatron.evaluation import plots
from genac_megatron.evaluation.bank import Bank, Valued, read_bank, rendered_digest
from genac_megatron.evaluation.compare import SCORES, STATES
from genac_megatron.evaluation.critics import ValueOf, critic_of
from genac_megatron.evaluation.figures import Scored, critic_estimates, scored
from genac_megatron.evaluation.intervals import plain
from genac_megatron.evaluation.parts import PLAN, Key, Parts, Row
from genac_megatron.evaluation.session import identity, judged_by, made_from, stop_if_asked, with_role
from genac_megatron.evaluation.tables import table, with_interval
from genac_megatron.observe.lock import Held
from genac_megatron.observe.runinfo import write_json_atomic
from genac_megatron.recipe.schema import Recipe
from genac_megatron.stages.runtime import Run
from genac_megatron.stages.session import session
from genac_megatron.stages.stopping import StopFlag
from genac_megatron.tasks.tokenizer import chat_ids, prints_date
from genac_megatron.training.agreement import from_first
from genac_megatron.training.layout import World

FOLDER = "scores"
FORMAT = 1
ANY_MESSAGES = ({"role": "user", "content": "?"},)
PLOTS = ("reliability.png", "values.png")
FILLS = 4  # times that a chunk of prompts fills the engines: they idle at its end alone
SHOWN = (
    ("mse", "MSE to Monte-Carlo values, their noise taken off"),
    ("mse_constant", "  of the best constant"),
    ("explained_variance", "explained variance of the true values"),
    ("brier", "Brier, on the continuations"),
    ("brier_constant", "  of the best constant"),
    ("ece", "calibration error (ECE)"),
    ("spearman", "Spearman"),
    ("ranking_between", "pairs in order: of different prompts"),
    ("ranking_prompt", "  of one prompt's two responses"),
    ("ranking_response", "  of one response's states"),
    ("ranking_between_clear", "clear pairs: of different prompts"),
    ("ranking_prompt_clear", "  of one prompt's two responses"),
    ("ranking_response_clear", "  of one response's states"),
    ("bias", "bias (mean value - mean Monte-Carlo value)"),
    ("mse_prompt_state", "MSE on prompt states"),
    ("mse_right_early", "  right responses, first half"),
    ("mse_right_late", "  right responses, second half"),
    ("mse_wrong_early", "  wrong responses, first half"),
    ("mse_wrong_late", "  wrong responses, second half"),
    ("parse_rate", "scores that parse"),
    ("tokens_per_state", "critic tokens per state"),
)


@dataclass(frozen=True)
class ScoreOptions:
    """What is scored, and how."""

    banks: tuple[Path, ...]
    checkpoint: str | None = None  # the critic's; None: the recipe's model
    icc: str | None = None  # None: as the recipe says
    name: str | None = None
    again: bool = False  # put these in the place of others that have the name
    chunk: int | None = None  # prompts at a time, lost where it is killed; None: see `at_once`
    draws: int = 500  # bootstrap


def score_bank(recipe: Recipe, world: World, stop: StopFlag, options: ScoreOptions, folder: Path) -> None:
    """Have the recipe's critic value every state of each bank; write and show the figures. Collective.

    Raises InputError where a bank or the critic does not fit, or the scores are another critic's, before any
    is judged; StopRequested where it was asked to stop.
    """
    if "actor" not in recipe.roles:
        raise InputError(
            "the recipe has no role 'actor', whose tokens the bank holds",
            where="roles",
            way_out="score it by a recipe with both roles, such as that which built the bank",
        )
    actor = recipe.roles["actor"].model
    recipe = with_role(recipe, "critic", options.checkpoint)
    if options.icc is not None:
        judging = recipe.judging.model_copy(update={"icc": options.icc})
        recipe = recipe.model_copy(update={"judging": judging})
    with session(recipe, world, stop, "score", folder) as run:
        banks = run.together(lambda: [read_bank(folder) for folder in options.banks])
        critics = [critic_of(run, bank, actor) for bank in banks]
        scalar = run.critic.shape.value
        if not scalar:
            run.publish("critic")
        critic = identity(run, "critic")
        if not scalar and prints_date(run.tokenizers["critic"]):
            critic["chat"] = rendered_digest([chat_ids(run.tokenizers["critic"], ANY_MESSAGES)])
        name = options.name or score_name(recipe, options, scalar)
        made = {
            **made_from(recipe, "critic"),
            "weights": critic["weights"],
            "kind": "scalar" if scalar else "generative",
            "icc": None if scalar else recipe.judging.icc,
            "score": None if scalar else recipe.judging.score,
            "seed": recipe.seed,
            "version": __version__,
        }
        plans = [score_plan(recipe, bank, critic, scalar) for bank in banks]
        scorings = [
            Scoring(run, bank, one, plan, made, name, options)
            for bank, one, plan in zip(banks, critics, plans, strict=True)
        ]
        left = [scoring.begin() for scoring in scorings]
        for scoring, chunks in zip(scorings, left, strict=True):
            scoring.score(chunks)


def score_plan(recipe: Recipe, bank: Bank, critic: dict[str, str], scalar: bool) -> dict[str, Any]:
    """What a critic's values of a bank depend on. Raises InputError where the template cannot be read."""
    return {
        "format": FORMAT,
        "kind": "scores",
        "bank": bank.manifest["sha256"],
        "told": {**{key: bank.manifest[key] for key in ("p_bar", "step")}, "limit": bank.limit},
        "critic": critic,
        "judging": None if scalar else judged_by(recipe.judging),
        "seed": recipe.seed,
    }


class Scoring:
    """One critic on one bank, by chunks of prompts; rank 0 keeps the rows.

    Chunks are those of the whole bank, whatever is done: engines then batch the same after a kill.
    """

    def __init__(
        self,
        run: Run,
        bank: Bank,
        critic: ValueOf,
        plan: dict[str, Any],
        made: dict[str, Any],
        name: str,
        options: ScoreOptions,
    ) -> None:
        self.run, self.bank, self.critic, self.plan = run, bank, critic, plan
        self.made, self.options = made, options
        self.parts = Parts(bank.folder / FOLDER / name, STATES, ("number", "place"))
        self.judged = [number for number, prompt in enumerate(bank.prompts) if prompt.states]

    def keys(self, numbers: Sequence[int]) -> list[Key]:
        """(prompt, place) of every state of these prompts, in order."""
        return [(n, place) for n in numbers for place in range(len(self.bank.prompts[n].states))]

    def begin(self) -> list[list[int]]:
        """The chunks of prompts that are left. Collective.

        Raises InputError where other scores have the name.
        """
        known = set(from_first(lambda: sorted(self._begin())))
        size = self.options.chunk or at_once(self.run, self.bank)
        chunks = [self.judged[at : at + size] for at in range(0, len(self.judged), size)]
        return [chunk for chunk in chunks if not known.issuperset(self.keys(chunk))]

    def score(self, left: Sequence[Sequence[int]]) -> None:
        """Judge what is left, then write the figures. Collective."""
        run, total = self.run, len(self.judged)
        done = total - sum(map(len, left))
        if left:
            run.progress.stage("score", total, done)
        for chunk in left:
            with run.phase("judge"):
                values = self.critic([s for number in chunk for s in self.bank.prompts[number].states])
            rows = [
                {"number": number, "place": place, "value": v.value, "tokens": v.tokens, "text": v.text}
                for (number, place), v in zip(self.keys(chunk), values, strict=True)
            ]
            run.together(partial(self._keep, rows))
            done += len(chunk)
            run.progress.step(done, {})
            stop_if_asked(run, f"{done} of {total} prompts of {self.bank.folder}")
        run.together(lambda: self._finish() if run.world.rank == 0 else None)

    def _begin(self) -> dict[Key, Row]:
        try:
            return self.parts.begin(self.plan)
        except Held:
            raise
        except InputError as error:
            if not self.options.again:
                raise self._others(error) from error
        folder = self.parts.folder
        (folder / SCORES).unlink(missing_ok=True)
        self.parts.clear()
        for name in PLOTS:
            (folder / name).unlink(missing_ok=True)
        return self.parts.begin(self.plan)

    def _others(self, error: InputError) -> InputError:
        folder, what = self.parts.folder, error.what
        if (folder / SCORES).exists() and not (folder / PLAN).exists():
            what = "scores are there that say nothing of what they depend on: an earlier version made them"
        way_out = "add --again to put these in their place, or give these another --name"
        return InputError(what, where=str(folder), way_out=way_out)

    def _keep(self, rows: Sequence[Row]) -> None:
        if self.run.world.rank == 0:  # every rank has them all
            self.parts.append(rows, 0)

    def _finish(self) -> None:
        rows = self.parts.whole(self.plan, self.keys(self.judged))
        values = [Valued(row["value"], row["tokens"], row["text"]) for row in rows]
        found = scored(self.bank.prompts, values, self.bank.manifest["p_bar"])
        if not self.parts.complete:
            manifest = {"format": FORMAT, "kind": "scores", "plan": self.plan, "version": __version__}
            self.parts.finish(_full(rows, self.bank, found), manifest)
        write_scores(self.bank, found, self.parts.folder, self.made, self.options.draws)


def at_once(run: Run, bank: Bank) -> int:
    """Prompts whose states fill the critic's engines FILLS times; all for a scalar critic, which is quick."""
    judged = sum(bool(prompt.states) for prompt in bank.prompts)
    if run.critic.shape.value:
        return judged
    engine, ranks = run.recipe.roles["critic"].engine, run.world.size
    if engine.kind == "embedded":
        room = engine.batch * ranks
    else:  # of a server that limits itself, what ranks ask of it at a time
        room = (engine.max_batch or engine.max_in_flight) * engine.engines
    prompts = FILLS * room * judged / len(bank.states)
    return max(1, round(prompts / ranks)) * ranks  # the same share for every rank


def _full(rows: Sequence[Row], bank: Bank, found: Scored) -> list[Row]:
    """Rows as states.jsonl has them."""
    return [
        {
            "number": row["number"],
            "place": row["place"],
            "prompt": state.prompt.id,
            "response": state.response,
            "index": state.state.index,
            "monte_carlo": state.value,
            "value": row["value"],
            "used": used,
            "tokens": row["tokens"],
            "text": row["text"],
        }
        for row, state, used in zip(rows, bank.states, found.used.tolist(), strict=True)
    ]


def score_name(recipe: Recipe, options: ScoreOptions, scalar: bool) -> str:
    """A folder's name for a critic: where its weights came from, and what it was told."""
    model = recipe.roles["critic"].model
    source = Path(model.checkpoint or model.hf or recipe.name)
    parts = [source.parent.parent.name, source.name] if source.parent.name == "checkpoints" else [source.name]
    told = "" if scalar else f"-icc-{recipe.judging.icc}"
    return "-".join(part for part in parts if part) + told


def write_scores(bank: Bank, found: Scored, folder: Path, made: dict[str, Any], draws: int) -> None:
    """Plots and figures of a critic, by one process."""
    continuations = bank.manifest["plan"]["continuations"]
    estimates = critic_estimates(found, continuations, draws, 0)
    for name, draw, height in zip(PLOTS, (plots.reliability, plots.values), (4.2, 4.0), strict=True):
        plots.save(folder / name, height, draw(found))
    report = {
        "name": folder.name,
        "bank": bank.manifest["sha256"],
        "prompts": len(set(found.prompts)),
        "states": len(found.prompts),
        "continuations": continuations,
        "p_bar": bank.manifest["p_bar"],
        "critic": made,
        "scores_hist": _histogram(found),
        "figures": {name: plain(estimate) for name, estimate in estimates.items()},
    }
    write_json_atomic(folder / SCORES, report)
    print(shown(report, folder), flush=True)


def _histogram(found: Scored) -> list[int]:
    read = np.array([value for value in found.read if value is not None])
    return np.bincount(np.rint(read * 10).astype(np.int64), minlength=11).tolist()


def shown(report: dict[str, Any], folder: Path) -> str:
    """Scores as a person reads them."""
    rows = [[text, with_interval(report["figures"][key])] for key, text in SHOWN]
    head = (
        f"{report['name']}: {report['states']} states of {report['prompts']} prompts, "
        f"{report['continuations']} continuations each, success rate {report['p_bar']:.3f}"
    )
    return "\n".join([head, "", table(["", "[95 % interval]"], rows), "", str(folder / SCORES)])
