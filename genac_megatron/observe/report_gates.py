"""What gates ask for (method §4): a figure that misses its bound, what that means, what usually helps.

One wording for the run that a gate stops and for its report. A figure that is missing never passes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from genac_megatron.recipe.schema import (
    PpoStage,
    ReinforceStage,
    SftHeldout,
    SftStage,
    StageConfig,
    ValueStage,
)

JudgedStage = SftStage | ReinforceStage | ValueStage | PpoStage
Figures = Mapping[str, float]
SFT_RANKING = 0.5  # of a critic that copied scores, where the recipe does not say
PARSED = 0.98  # below this, judgements without a score weigh on the Brier score


@dataclass(frozen=True)
class Missed:
    """A criterion that a stage's figures do not meet."""

    what: str  # the figure and its bound
    means: str
    helps: str
    bound: str | None = None  # an override with which it would do; None: no bound would


def missed(stage: StageConfig, figures: Figures) -> list[Missed]:
    """The criteria of a stage's gate that its figures do not meet, whatever the gate then does.

    figures: those of the evaluation at the stage's end, of a ppo stage at its beginning (`eval/critic_...`),
    and of an SFT stage with a held-out target `heldout/<metric>`, which is only judged where it is given.
    """
    if isinstance(stage, SftStage):
        found = [_target(stage, figures)]
        if stage.role == "critic":
            found += [_parse_rate(stage, figures), _brier(stage, figures) if asks_for_brier(stage) else None]
            found.append(_ranking(stage, figures))
    elif isinstance(stage, ReinforceStage | ValueStage):
        asked = stage.gate.brier_below_constant
        found = [_brier(stage, figures) if asked else None, _auc(stage, figures), _ranking(stage, figures)]
    elif isinstance(stage, PpoStage):
        found = _entry(stage, figures)
    else:
        return []
    return [one for one in found if one is not None]


def ways_on(stage: JudgedStage, found: list[Missed]) -> list[tuple[str, str]]:
    """(override, what --resume does with it) for a run that the stage's gate has stopped."""
    if isinstance(stage, PpoStage):
        begins = [
            (
                "roles.critic.model.checkpoint=runs/...",
                "begins with the critic of a run that trained one (a run without a checkpoint of its own)",
            )
        ]
        return [*begins, *_asks_less(found), (f"stages.{stage.name}.gate.action=warn", "trains as it is")]
    if isinstance(stage, SftStage):
        upto = "up to " if stage.heldout is not None else ""
        more, what = f"epochs={2 * stage.epochs}", f"trains {upto}{_count(stage.epochs, 'epoch')} more"
        cools = stage.heldout is not None and stage.heldout.cooldown > 0
    else:
        more, what = f"steps={2 * stage.steps}", f"trains {_count(stage.steps, 'step')} more"
        cools = False
    if cools or stage.optimizer is None or stage.optimizer.schedule != "constant":
        what += " (a learning rate that has fallen is higher again)"
    ways = [(f"stages.{stage.name}.{more}", f"{what}, then judges again")]
    if isinstance(stage, SftStage) and stage.phased:
        ways = []  # a curriculum has one pass
    return [
        *ways,
        *_asks_less(found),
        (f"stages.{stage.name}.gate.action=warn", "goes on with the next stage as it is"),
    ]


def went_on(stage: JudgedStage) -> str:
    """How a run went on though a stage's gate was not reached, in words."""
    if not isinstance(stage, ReinforceStage) or stage.gate.action != "fallback":
        return "the run went on all the same"
    to = f"of the stage {stage.gate.fallback}" if stage.gate.fallback else "that the stage began with"
    return f"the critic went back to the weights {to}, and the run went on with them"


def _asks_less(found: list[Missed]) -> list[tuple[str, str]]:
    bounds = [one.bound for one in found if one.bound is not None]
    whole = len(bounds) == len(found)
    return [(" ".join(bounds), "asks for less: judges again at once")] if whole else []


def reached(heldout: SftHeldout, figure: float) -> bool:
    """Whether a held-out figure is as good as the target; False where there is no target, and of NaN."""
    if heldout.target is None:
        return False
    return figure <= heldout.target if heldout.metric == "loss" else figure >= heldout.target


# --- criteria ------------------------------------------------------------------------------------


def _target(stage: SftStage, figures: Figures) -> Missed | None:
    heldout = stage.heldout
    if heldout is None or heldout.target is None or f"heldout/{heldout.metric}" not in figures:
        return None
    figure, target, at = figures[f"heldout/{heldout.metric}"], heldout.target, f"stages.{stage.name}"
    loss = heldout.metric == "loss"
    if reached(heldout, figure):
        return None
    means = "nats a token on samples it is not trained on" if loss else (
        "how often it would write a sample it is not trained on word for word"
    )  # fmt: skip
    waits = " with a longer heldout.patience" if heldout.patience is not None else ""
    return Missed(
        f"held-out {heldout.metric} {figure:.3f} is {'above' if loss else 'below'} {target:g}",
        f"{means}: it has not learnt what carries over to new samples",
        f"{_passes(stage, waits)}another learning rate ({_lr(stage, stage.role)}); more samples "
        f"({at}.size) in a new run, as these are made when the stage begins",
        _bound(f"{at}.heldout.target", -_lower(-figure) if loss else _lower(figure), figure),
    )


def _parse_rate(stage: SftStage, figures: Figures) -> Missed | None:
    rate, at = figures.get("eval/critic_parse_rate", math.nan), f"stages.{stage.name}"
    if rate >= stage.gate.parse_rate:
        return None
    return Missed(
        f"parse rate {rate:.3f} is below {stage.gate.parse_rate:g}",
        _nothing_judged(rate)
        or f"{_per_cent(1 - rate)} of the critic's judgements end without a score that can be read, and say "
        "nothing of their state",
        f"{_passes(stage)}another learning rate ({_lr(stage, 'critic')}). In a "
        f"new run: more traces ({at}.size), and room to finish where judgements are cut off "
        "(judging.max_new_tokens)",
        _bound(f"{at}.gate.parse_rate", _lower(rate), rate),
    )


def asks_for_brier(stage: SftStage) -> bool:
    """Whether an SFT stage's critic must be better than a constant; unless said, where it copied scores."""
    asked = stage.gate.brier_below_constant
    return stage.copies if asked is None else asked


def asked_ranking(stage: SftStage | ReinforceStage | ValueStage) -> float | None:
    """What the ranking within a prompt must be above; None: it is not asked for."""
    if isinstance(stage, SftStage) and stage.gate.ranking is None:
        return SFT_RANKING if stage.copies else None
    return stage.gate.ranking


def _brier(stage: SftStage | ReinforceStage | ValueStage, figures: Figures) -> Missed | None:
    brier, constant, parsed = (
        figures.get(f"eval/critic_{name}", math.nan) for name in ("brier", "brier_constant", "parse_rate")
    )
    if brier < constant:
        return None
    means = _nothing_judged(brier) or (
        "the critic's scores foretell outcomes no better than one number for all would, the share of right "
        "responses"
    )
    helps = _better_traces(stage) if isinstance(stage, SftStage) else _longer(stage)
    if parsed < PARSED:
        means += f"; {_per_cent(1 - parsed)} of its judgements have no score, and count as wholly wrong"
    if parsed < PARSED and not isinstance(stage, SftStage):
        helps = f"first a longer SFT of the critic (in a new run), so that it writes scores; then {helps}"
    return Missed(
        f"Brier {brier:.4f} is not below the constant predictor's {constant:.4f}",
        means,
        helps,
        f"stages.{stage.name}.gate.brier_below_constant=false",
    )


def _auc(stage: ReinforceStage | ValueStage, figures: Figures) -> Missed | None:
    auc = figures.get("eval/critic_auc", math.nan)
    if auc > stage.gate.auc:
        return None
    what = f"AUC {auc:.3f} is not above {stage.gate.auc:g}"
    if math.isnan(auc):
        means = "there is none: held-out responses all ended alike, right or wrong"
        helps = (
            "more held-out prompts (evaluation.prompts); in a new run a task that the actor solves at times"
        )
        return Missed(what, means, helps)
    return Missed(
        what,
        f"where one state ends right and another wrong, the critic scores the right one higher in "
        f"{_per_cent(auc)} of cases; a coin does in 50 %",
        f"{_longer(stage)}; in a new run a longer SFT of the critic before it",
        _bound(f"stages.{stage.name}.gate.auc", _lower(auc, 2), auc),
    )


def _ranking(stage: SftStage | ReinforceStage | ValueStage, figures: Figures) -> Missed | None:
    ranking, at = figures.get("eval/critic_ranking_prompt", math.nan), f"stages.{stage.name}"
    asked = asked_ranking(stage)
    unsaid = isinstance(stage, SftStage) and stage.gate.ranking is None and math.isnan(ranking)
    if asked is None or unsaid or ranking > asked:
        return None
    what = f"ranking accuracy within a prompt {ranking:.3f} is not above {asked:g}"
    if math.isnan(ranking):
        means = (
            "there is none: no held-out prompt has both right and wrong responses with states after the "
            "prompt's (judging.states)"
        )
        return Missed(what, means, "more held-out responses (evaluation.prompts, evaluation.samples)")
    states = f" and states of each ({at}.train_states)" if isinstance(stage, ReinforceStage) else ""
    return Missed(
        what,
        f"of a right and a wrong response to one prompt, the critic scores the right one higher in "
        f"{_per_cent(ranking)} of cases (a coin: 50 %): it may know hard prompts, but not good responses",
        f"{_better_traces(stage)}; the figure is rough where few are held out (evaluation.prompts)"
        if isinstance(stage, SftStage)
        else f"more responses to a prompt ({at}.rollout.samples){states}, more steps ({at}.steps); the "
        "figure is rough where few are held out (evaluation.prompts)",
        _bound(f"{at}.gate.ranking", _lower(ranking, 2), ranking),
    )


TRAIN_IT = (
    "an sft and a reinforce stage of the critic before this one (recipes/quickstart.yaml has them), or the "
    "critic of a run that has them (roles.critic.model.checkpoint)"
)


def _entry(stage: PpoStage, figures: Figures) -> list[Missed | None]:
    """What a critic must be before an actor is trained by its values."""
    gate, at = stage.gate, f"stages.{stage.name}.gate"
    brier, constant = (figures.get(f"eval/critic_{name}", math.nan) for name in ("brier", "brier_constant"))
    found: list[Missed | None] = [_readable(stage, figures.get("eval/critic_parse_rate", math.nan))]
    if gate.brier_below_constant and not brier < constant:
        found.append(
            Missed(
                f"Brier {brier:.4f} is not below the constant predictor's {constant:.4f}",
                _nothing_judged(brier)
                or "its scores foretell outcomes no better than one number for all would",
                TRAIN_IT,
                f"{at}.brier_below_constant=false",
            )
        )
    asked = (
        ("AUC", "auc", "auc", gate.auc, "how often the right of two states has the higher score"),
        ("ranking accuracy within a prompt", "ranking_prompt", "ranking", gate.ranking,
         "how often the right of two responses to one prompt has the higher score"),
        ("Pearson's correlation", "mse_pearson", "pearson", gate.pearson, CORRELATED),
        ("Spearman's correlation", "mse_spearman", "spearman", gate.spearman, CORRELATED),
    )  # fmt: skip
    for words, name, key, bound, means in asked:
        figure = figures.get(f"eval/critic_{name}", math.nan)
        strict = key in ("auc", "ranking")
        if bound is not None and not (figure > bound if strict else figure >= bound):
            what = f"{words} {figure:.3f} is {'not above' if strict else 'below'} {bound:g}"
            less = _bound(f"{at}.{key}", _lower(figure, 2), figure)
            found.append(Missed(what, _nothing_judged(figure) or means, TRAIN_IT, less))
    mse = figures.get("eval/critic_mse", math.nan)
    if gate.mse is not None and not mse <= gate.mse:
        means = _nothing_judged(mse) or "the mean squared error of its scores against Monte-Carlo values"
        less = _bound(f"{at}.mse", -_lower(-mse), mse)
        found.append(Missed(f"MSE {mse:.4f} is above {gate.mse:g}", means, TRAIN_IT, less))
    return found


CORRELATED = "how its scores go with the Monte-Carlo values of the states"


def _readable(stage: PpoStage, rate: float) -> Missed | None:
    bound = stage.gate.parse_rate
    if rate > 0 and rate >= bound:
        return None
    if rate > 0:
        return Missed(
            f"parse rate {rate:.3f} is below {bound:g}",
            f"{_per_cent(1 - rate)} of the critic's judgements end without a score that can be read",
            TRAIN_IT,
            _bound(f"stages.{stage.name}.gate.parse_rate", _lower(rate), rate),
        )
    return Missed(
        f"parse rate {rate:.3f}: none of the critic's judgements can be read",
        _nothing_judged(rate)
        or "it writes no scores, so all states would have one value, and its tokens be paid for nothing",
        f"{TRAIN_IT}; room to finish where judgements are cut off (judging.max_new_tokens)",
    )


# --- words ---------------------------------------------------------------------------------------


def _longer(stage: ReinforceStage | ValueStage) -> str:
    at = f"stages.{stage.name}"
    return f"more steps ({at}.steps), larger ones ({at}.rollout.prompts), a higher {_lr(stage, 'critic')}"


def _better_traces(stage: SftStage) -> str:
    at = f"stages.{stage.name}"
    return (
        f"{_passes(stage)}another learning rate ({_lr(stage, 'critic')}). In "
        f"a new run: another teacher, or, of its own judgements, more to choose from "
        f"({at}.teacher.judgements, {at}.teacher.continuations)"
    )


def _passes(stage: SftStage, waits: str = "") -> str:
    """The advice to train longer; none of a curriculum, which has one pass."""
    if stage.phased:
        return ""
    return f"more passes over the {_made(stage)} (stages.{stage.name}.epochs){waits}, "


def _made(stage: SftStage) -> str:
    return "traces" if stage.data == "traces" else "samples"


def _lr(stage: SftStage | ReinforceStage | ValueStage, role: str) -> str:
    """The key that the stage's learning rate comes from."""
    return f"roles.{role}.optimizer.lr" if stage.optimizer is None else f"stages.{stage.name}.optimizer.lr"


def _nothing_judged(figure: float) -> str:
    return "there is none: the evaluation had no state to judge" if math.isnan(figure) else ""


def _per_cent(share: float) -> str:
    return f"{100 * share:.3g} %"


def _count(number: int, unit: str) -> str:
    return f"{number} {unit}" + ("" if number == 1 else "s")


def _lower(figure: float, digits: int = 3) -> float:
    """A number of few digits just below a figure."""
    if math.isnan(figure):
        return figure
    scale = 10**digits
    return math.floor(figure * scale - 1e-6) / scale


def _bound(key: str, value: float, figure: float) -> str | None:
    """The override that asks for less; None where there is no figure, or less cannot be asked for."""
    return None if math.isnan(figure) or value < 0 else f"{key}={value:g}"
