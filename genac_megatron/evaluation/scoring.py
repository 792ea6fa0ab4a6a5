"""`genac evaluate bank score`: a critic's values of a frozen bank's states.

BANK/scores/NAME/
    scores.json      figures with intervals (docs/evaluation.md says what each means), and what made them
    states.jsonl     per state: prompt, response, index, the critic's value, words and tokens
    reliability.png  values.png
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from genac_megatron import __version__
from genac_megatron.errors import InputError
from genac_megatron.evaluation import plots
from genac_megatron.evaluation.bank import Bank, Valued, read_bank
from genac_megatron.evaluation.compare import SCORES, STATES
from genac_megatron.evaluation.critics import critic_of
from genac_megatron.evaluation.figures import Scored, critic_estimates, scored
from genac_megatron.evaluation.fingerprint import weights_digest
from genac_megatron.evaluation.intervals import plain
from genac_megatron.evaluation.session import made_from, session, with_role
from genac_megatron.evaluation.tables import table, with_interval
from genac_megatron.observe.runinfo import jsonable, write_json_atomic, write_text_atomic
from genac_megatron.recipe.schema import Recipe
from genac_megatron.stages.runtime import Run
from genac_megatron.stages.stopping import StopFlag
from genac_megatron.training.agreement import from_first
from genac_megatron.training.layout import World

FOLDER = "scores"
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
    draws: int = 500  # bootstrap


def score_bank(recipe: Recipe, world: World, stop: StopFlag, options: ScoreOptions) -> None:
    """Have the recipe's critic value every state of each bank; write and show the figures. Collective.

    Raises InputError where a bank or the critic does not fit, before any is judged.
    """
    if "actor" not in recipe.roles:
        raise InputError("the recipe has no role 'actor', whose tokens the bank holds", where="roles")
    model = recipe.roles["actor"].model
    actor_spec = model.tokenizer or model.hf or ""
    recipe = with_role(recipe, "critic", options.checkpoint)
    if options.icc is not None:
        judging = recipe.judging.model_copy(update={"icc": options.icc})
        recipe = recipe.model_copy(update={"judging": judging})
    with session(recipe, world, stop, "score") as run:
        banks = run.together(lambda: [read_bank(folder) for folder in options.banks])
        critics = [critic_of(run, bank, actor_spec) for bank in banks]
        scalar = run.critic.shape.value
        if not scalar:
            run.publish("critic")
        made = {
            **made_from(recipe, "critic"),
            "weights": _digest(run),
            "kind": "scalar" if scalar else "generative",
            "icc": None if scalar else recipe.judging.icc,
            "score": None if scalar else recipe.judging.score,
            "seed": recipe.seed,
            "version": __version__,
        }
        name = options.name or score_name(recipe, options, scalar)
        for bank, critic in zip(banks, critics, strict=True):
            with run.phase("judge"):
                values = critic(bank.states)
            _written(run, bank, values, name, made, options)


def _written(
    run: Run, bank: Bank, values: Sequence[Valued], name: str, made: dict[str, Any], options: ScoreOptions
) -> None:
    folder = bank.folder / FOLDER / name
    run.together(lambda: write_scores(bank, values, folder, made, options) if run.world.rank == 0 else None)


def _digest(run: Any) -> str:
    digest = weights_digest(run.critic)
    return from_first(lambda: digest)


def score_name(recipe: Recipe, options: ScoreOptions, scalar: bool) -> str:
    """A folder's name for a critic: where its weights came from, and what it was told."""
    model = recipe.roles["critic"].model
    source = Path(model.checkpoint or model.hf or recipe.name)
    parts = [source.parent.parent.name, source.name] if source.parent.name == "checkpoints" else [source.name]
    told = "" if scalar else f"-icc-{recipe.judging.icc}"
    return "-".join(part for part in parts if part) + told


def write_scores(
    bank: Bank, values: Sequence[Valued], folder: Path, made: dict[str, Any], options: ScoreOptions
) -> None:
    """Figures, states and plots of a critic, by one process."""
    found = scored(bank.prompts, values, bank.manifest["p_bar"])
    plan = bank.manifest["plan"]
    estimates = critic_estimates(found, plan["continuations"], options.draws, 0)
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {
            "prompt": state.prompt.id,
            "response": state.response,
            "index": state.state.index,
            "monte_carlo": state.value,
            "value": valued.value,
            "used": used,
            "tokens": valued.tokens,
            "text": valued.text,
        }
        for state, valued, used in zip(bank.states, values, found.used.tolist(), strict=True)
    ]
    lines = (json.dumps(jsonable(row), ensure_ascii=False) for row in rows)
    write_text_atomic(folder / STATES, "".join(f"{line}\n" for line in lines))
    plots.save(folder / "reliability.png", 4.2, plots.reliability(found))
    plots.save(folder / "values.png", 4.0, plots.values(found))
    figures = {name: plain(estimate) for name, estimate in estimates.items()}
    report = {
        "name": folder.name,
        "bank": bank.manifest["sha256"],
        "prompts": len({state.prompt.id for state in bank.states}),
        "states": len(rows),
        "continuations": plan["continuations"],
        "p_bar": bank.manifest["p_bar"],
        "critic": made,
        "scores_hist": _histogram(found),
        "figures": figures,
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
