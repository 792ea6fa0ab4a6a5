"""The report's plots: each drawn once for a light and once for a dark page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from genac_megatron.metrics import LEVELS, reliability
from genac_megatron.observe.report_canvas import (
    DARK,
    LIGHT,
    Draw,
    Theme,
    bands,
    legend,
    per_cent,
    png,
    stacked,
    stage_lines,
)
from genac_megatron.observe.report_data import (
    KINDS,
    ROLES,
    Row,
    RunData,
    accuracy_interval,
    brier_interval,
    number,
    phase_totals,
)


@dataclass(frozen=True)
class Plot:
    """A drawn plot: PNG bytes for both pages."""

    id: str
    title: str
    caption: str
    light: bytes
    dark: bytes


def draw_all(run: RunData) -> tuple[list[Plot], list[str]]:
    """Every plot that the run has data for, and the titles of the others that its recipe would give."""
    plots, absent = [], []
    for id_, title, caption, height, draw in PLOTS:
        light = png(draw, run, LIGHT, height)
        dark = png(draw, run, DARK, height)
        if light is None or dark is None:
            absent += [title] if _wanted(run, id_, title) else []
        else:
            plots.append(Plot(id_, title, caption, light, dark))
    return plots, absent


def _wanted(run: RunData, id_: str, title: str) -> bool:
    """Whether the recipe's stages have what a plot shows: a critic, of what it gives a generative one."""
    kinds = set(run.judged_kinds)
    return bool(kinds & {"reinforce", "ppo"} if id_ == "credit" else kinds or not title.startswith("Critic:"))


# --- the actor -----------------------------------------------------------------------------------


def accuracy(figure: Figure, run: RunData, theme: Theme) -> bool:
    rows = [r for r in run.acted() if not math.isnan(number(r["actor"].get("accuracy")))]
    if not rows:
        return False
    axes = figure.subplots()
    x = [run.position(r) for r in rows]
    y = [number(r["actor"]["accuracy"]) for r in rows]
    low, high = zip(*(accuracy_interval(r) for r in rows), strict=True)
    axes.fill_between(x, low, high, color=theme.actor, alpha=0.16, linewidth=0)
    axes.plot(x, y, color=theme.actor, marker="o", markersize=4)
    axes.annotate(f"{100 * y[-1]:.1f} %", (x[-1], y[-1]), xytext=(-6, 8), textcoords="offset points",
                  ha="right", color=theme.ink, fontweight="bold")  # fmt: skip
    bands(axes, run, theme)
    per_cent(axes)
    return True


def reward(figure: Figure, run: RunData, theme: Theme) -> bool:
    axes = figure.subplots()
    if not stage_lines(axes, run, "rollout/outcome_mean", theme.actor, "mean outcome of rollouts"):
        return False
    stage_lines(axes, run, "judge/score_mean", theme.critic, "mean value given by the critic", "--")
    bands(axes, run, theme)
    per_cent(axes)
    legend(axes)
    return True


# --- the critic ----------------------------------------------------------------------------------


def _evaluated(run: RunData, figure: str, rows: Sequence[Row]) -> tuple[list[float], list[float]]:
    points = [(run.position(r), number(r["critic"].get(figure))) for r in rows]
    kept = [p for p in points if not math.isnan(p[1])]
    return [p[0] for p in kept], [p[1] for p in kept]


def critic_error(figure: Figure, run: RunData, theme: Theme) -> bool:
    rows = run.judged()
    panels = [
        (name, constant, title)
        for name, constant, title in (
            ("brier", "brier_constant", "Brier score"),
            ("mse", "mse_constant", "MSE to Monte-Carlo"),
        )
        if _evaluated(run, name, rows)[0]
    ]
    if not panels:
        return False
    if len(panels) == 2:
        figure.set_figheight(4.8)
    for axes, (name, constant, title) in zip(stacked(figure, len(panels)), panels, strict=True):
        x, y = _evaluated(run, name, rows)
        if name == "brier":
            low, high = zip(*(brier_interval(r) for r in rows), strict=True)
            axes.fill_between(
                [run.position(r) for r in rows], low, high, color=theme.critic, alpha=0.16, lw=0
            )
        axes.plot(x, y, color=theme.critic, marker="o", markersize=4, label="critic")
        x, y = _evaluated(run, constant, rows)
        axes.plot(x, y, "--", color=theme.soft, marker="o", markersize=3, label="best constant")
        axes.set_ylabel(title)
        axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
        bands(axes, run, theme, names=name == panels[0][0])
    legend(figure.axes[0], ncols=2)
    for axes in figure.axes[:-1]:
        axes.set_xlabel("")
    return True


def _critic_points(row: Row, *names: str) -> list[np.ndarray]:
    """Columns of an evaluation's states, rows with a gap left out. One array per name."""
    columns = [[number(x) for x in row["critic"].get(name) or []] for name in names]
    table = np.array(list(zip(*columns, strict=False)), dtype=float).reshape(-1, len(names))
    table = table[np.isfinite(table).all(axis=1)]
    return [table[:, i] for i in range(len(names))]


def reliability_diagram(figure: Figure, run: RunData, theme: Theme) -> bool:
    axes = figure.subplots()
    drawn = False
    for kind, row in run.at_stage_end.items():
        values, outcomes = _critic_points(row, "values", "outcomes")
        if not values.size:
            continue
        drawn = True
        bins = reliability(np.clip(values, 0, 1), outcomes)
        full = bins.count > 0
        size = 12 + 160 * bins.count[full] / bins.count.sum()
        axes.plot(bins.value[full], bins.outcome[full], color=theme.of(kind), alpha=0.6, linewidth=1.2)
        axes.scatter(bins.value[full], bins.outcome[full], s=size, color=theme.of(kind),
                     label=f"{kind} (ECE {bins.ece:.3f})", linewidth=0, alpha=0.85)  # fmt: skip
    axes.plot([0, 1], [0, 1], ":", color=theme.soft, linewidth=1.2)
    axes.set(xlim=(-0.04, 1.04), ylim=(-0.04, 1.04), xlabel="value given", ylabel="share that succeeded")
    legend(axes, loc="upper left", markerscale=0.7)
    return drawn


def scores(figure: Figure, run: RunData, theme: Theme) -> bool:
    axes = figure.subplots()
    ends = {k: np.array([number(c) for c in r["critic"].get("scores_hist") or []])
            for k, r in run.at_stage_end.items()}  # fmt: skip
    ends = {k: h for k, h in ends.items() if h.size == LEVELS and h.sum() > 0}
    width = 0.8 / max(1, len(ends))
    for i, (kind, counts) in enumerate(ends.items()):
        at = np.arange(LEVELS) + (i - (len(ends) - 1) / 2) * width
        axes.bar(at, counts / counts.sum(), width * 0.94, color=theme.of(kind), label=kind)
    axes.set_xticks(range(LEVELS))
    axes.grid(axis="x", visible=False)
    axes.set(xlabel="score", ylabel="share of judgements")
    legend(axes)
    return bool(ends)


def ranking(figure: Figure, run: RunData, theme: Theme) -> bool:
    axes = figure.subplots()
    kinds = [k for k in KINDS if k in run.at_stage_end]
    scopes = (
        ("between", "between\nprompts"),
        ("prompt", "within a\nprompt"),
        ("response", "within a\nresponse"),
    )
    known = [
        (s, t)
        for s, t in scopes
        if any(not math.isnan(number(run.at_stage_end[k]["critic"].get(f"ranking_{s}"))) for k in kinds)
    ]
    width = 0.8 / max(1, len(kinds))
    for i, kind in enumerate(kinds):
        heights = [number(run.at_stage_end[kind]["critic"].get(f"ranking_{s}")) for s, _ in known]
        at = np.arange(len(known)) + (i - (len(kinds) - 1) / 2) * width
        axes.bar(at, heights, width * 0.94, color=theme.of(kind), label=kind)
        for x, h in zip(at, heights, strict=True):
            if not math.isnan(h):
                axes.annotate(
                    f"{h:.2f}", (x, h), xytext=(0, 2), textcoords="offset points", ha="center", fontsize=8
                )
    axes.axhline(0.5, color=theme.soft, linestyle=":", linewidth=1.2)
    axes.set_xticks(range(len(known)), [t for _, t in known])
    axes.grid(axis="x", visible=False)
    axes.set(ylim=(0, 1.05), ylabel="pairs ordered right")
    legend(axes, loc="upper center", bbox_to_anchor=(0.5, 1.16), ncols=3)
    return bool(known)


def value_by_position(figure: Figure, run: RunData, theme: Theme) -> bool:
    rows = [r for r in run.judged() if r["critic"].get("positions")]
    if not rows:
        return False
    axes = figure.subplots()
    values, outcomes, positions = _critic_points(rows[-1], "values", "outcomes", "positions")
    drawn = False
    for good, colour, label in ((True, theme.ppo, "ended right"), (False, theme.sft, "ended wrong")):
        of = (outcomes >= 0.5) == good
        at = [k for k in np.unique(positions[of]) if (of & (positions == k)).sum() >= 3]
        cells = [values[of & (positions == k)] for k in at]
        if not at:
            continue
        drawn = True
        mean = np.array([c.mean() for c in cells])
        error = np.array([c.std(ddof=1) / math.sqrt(c.size) for c in cells])
        axes.fill_between(at, mean - 2 * error, mean + 2 * error, color=colour, alpha=0.16, linewidth=0)
        axes.plot(at, mean, color=colour, marker="o", markersize=4, label=label)
    axes.set(ylim=(0, 1), xlabel="state k of the response (0: only the problem)", ylabel="mean value")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    legend(axes)
    return drawn


def credit(figure: Figure, run: RunData, theme: Theme) -> bool:
    panels = [
        (title, [(key, style, label) for key, style, label in lines if run.series(key)[0].size])
        for title, lines in (
            ("gap", (("advantage/gap", "-", "right less wrong responses"),)),
            ("share within", (("advantage/within_response", "-", "of variance, within responses"),)),
            (
                "value",
                (("judge/value_first", "-", "of the problem"), ("judge/value_last", "--", "last state")),
            ),
            ("entropy, nats", (("judge/score_entropy", "-", "of a batch's scores"),)),
        )
    ]
    panels = [(title, lines) for title, lines in panels if lines]
    if not panels:
        return False
    figure.set_figheight(1.0 + 1.55 * len(panels))
    for i, (axes, (title, lines)) in enumerate(zip(stacked(figure, len(panels)), panels, strict=True)):
        for key, style, label in lines:
            stage_lines(axes, run, key, theme.critic, label, style)
        bands(axes, run, theme, names=i == 0)
        axes.set_ylabel(title)
        legend(axes, ncols=2)
        if i < len(panels) - 1:
            axes.set_xlabel("")
    return True


def parsing(figure: Figure, run: RunData, theme: Theme) -> bool:
    axes = figure.subplots()
    drawn = stage_lines(axes, run, "judge/parse_rate", theme.critic, "in training")
    x, y = _evaluated(run, "parse_rate", run.judged())
    axes.plot(x, y, "o", markersize=4.5, color=theme.ink, label="held out")
    bands(axes, run, theme)
    per_cent(axes)
    legend(axes)
    return drawn or bool(x)


# --- the machine ---------------------------------------------------------------------------------


def mismatch(figure: Figure, run: RunData, theme: Theme) -> bool:
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    drawn = False
    positive = False
    for role in ROLES:
        for statistic, style in (("max", ":"), ("p99", "-"), ("mean", "--")):
            key = f"parity/{role}_{statistic}"
            drawn |= stage_lines(top, run, key, theme.of(role), f"{role} {statistic}", style)
            positive |= bool((run.series(key)[1] > 0).any())
        drawn |= stage_lines(bottom, run, f"parity/{role}_k3", theme.of(role), role)
    if positive:
        top.set_yscale("log")
    bands(top, run, theme)
    bands(bottom, run, theme, names=False)
    top.set(ylabel="|Δ log-prob|", xlabel="")
    bottom.set_ylabel("k3 KL")
    handles, labels = top.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=2)
    return drawn


def _pick(run: RunData, role: str, names: Sequence[str]) -> str | None:
    return next((f"{role}/{n}" for n in names if run.series(f"{role}/{n}")[0].size), None)


def optimisation(figure: Figure, run: RunData, theme: Theme) -> bool:
    panels = [
        (title, {role: key for role in ROLES if (key := _pick(run, role, names))})
        for title, names in (
            ("loss", ("loss",)),
            ("gradient norm", ("grad_norm",)),
            ("entropy, nats", ("entropy", "entropy_mean")),
            ("share clipped", ("clip_share", "clip_fraction", "clipped")),
            ("learning rate", ("lr",)),
        )
    ]
    panels = [(title, keys) for title, keys in panels if keys]
    if not panels:
        return False
    figure.set_figheight(1.0 + 1.55 * len(panels))
    for i, (axes, (title, keys)) in enumerate(zip(stacked(figure, len(panels)), panels, strict=True)):
        for role, key in keys.items():
            stage_lines(axes, run, key, theme.of(role), role)
        if title == "share clipped":
            per_cent(axes)
        bands(axes, run, theme, names=i == 0)
        axes.set_ylabel(title)
        if i < len(panels) - 1:
            axes.set_xlabel("")
        if i == 0:
            legend(axes, ncols=2)
    return True


def lengths(figure: Figure, run: RunData, theme: Theme) -> bool:
    top, bottom = stacked(figure, 2)
    drawn = stage_lines(top, run, "rollout/length_mean", theme.actor, None)
    drawn |= stage_lines(bottom, run, "rollout/truncated", theme.actor, None)
    bands(top, run, theme)
    bands(bottom, run, theme, names=False)
    top.set(ylabel="tokens per response", xlabel="")
    bottom.set_ylabel("share cut off")
    per_cent(bottom)
    return drawn


def costs(figure: Figure, run: RunData, theme: Theme) -> bool:
    spans = [s for s in run.spans if s.last > s.first]
    panels = []
    for prefix, suffix, unit in (("time/", "_s", "seconds"), ("tokens/", "", "tokens")):
        totals = [phase_totals(run.metrics[s.first : s.last], prefix, suffix) for s in spans]
        if prefix == "time/":
            for span, phases in zip(spans, totals, strict=True):
                whole = sum(number(r.get("time/total_s", 0.0)) for r in run.metrics[span.first : span.last])
                if whole > sum(phases.values()):
                    phases["other"] = whole - sum(phases.values())
        if any(totals):
            panels.append((totals, unit))
    if not panels:
        return False
    names = _fold_small([totals for totals, _ in panels], len(theme.phases))
    colours = {"other": theme.soft, **dict(zip(names, theme.phases, strict=False))}
    figure.set_figheight(1.0 + 0.2 * len(names) / 2 + len(panels) * (0.75 + 0.34 * len(spans)))
    for axes, (totals, unit) in zip(np.atleast_1d(figure.subplots(len(panels), 1)), panels, strict=True):
        left = np.zeros(len(spans))
        for name in names:
            share = np.array([phases.get(name, 0.0) for phases in totals])
            axes.barh(range(len(spans)), share, 0.62, left=left, color=colours[name], label=name)
            left += share
        axes.set_yticks(range(len(spans)), [s.name for s in spans])
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.set_xlabel(unit)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: _short(v)))
        axes.xaxis.set_major_locator(MaxNLocator(6))
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=2)
    return True


def _fold_small(panels: Sequence[list[dict[str, float]]], most: int) -> list[str]:
    """Add to `other` all phases but the `most` with the largest shares of a panel; return who is left.

    Names are in order of first sight, `other` last.
    """
    shares: dict[str, float] = {}
    for totals in panels:
        whole = sum(sum(phases.values()) for phases in totals) or 1.0
        for name in dict.fromkeys(p for phases in totals for p in phases):
            own = sum(phases.get(name, 0.0) for phases in totals) / whole
            shares[name] = max(own, shares.get(name, 0.0))
    there = shares.pop("other", 0.0) > 0 or len(shares) > most
    kept = set(sorted(shares, key=lambda name: -shares[name])[:most])
    for phases in (phases for totals in panels for phases in totals):
        rest = sum(phases.pop(name) for name in list(phases) if name not in kept)
        phases["other"] = rest
    return [name for name in shares if name in kept] + ["other"] * there


def _short(value: float) -> str:
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.3g}{unit}"
    return f"{value:.3g}"


def versions(figure: Figure, run: RunData, theme: Theme) -> bool:
    axes = figure.subplots()
    drawn = False
    for role, style in zip(ROLES, ("-", "--"), strict=True):
        x, y = run.series(f"publish/{role}_version")
        if x.size:
            axes.step(x, y, style, where="post", color=theme.of(role), label=role)
            drawn = True
    bands(axes, run, theme)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel("version served")
    legend(axes, loc="upper left")
    return drawn


PLOTS: tuple[tuple[str, str, str, float, Draw], ...] = (
    ("accuracy", "Actor: held-out accuracy", "Band: 95 % interval, prompts resampled.", 3.3, accuracy),
    (
        "reward",
        "Training reward",
        "Mean outcome of a step's rollouts, and what the critic expected of them.",
        3.3,
        reward,
    ),
    (
        "critic_error",
        "Critic: error against the best constant",
        "A critic below the dashed line knows more than the mean outcome. Band: 95 % interval, prompts "
        "resampled. In ppo and policy the actor moves, and the constant with it.",
        3.3,
        critic_error,
    ),
    (
        "reliability",
        "Critic: reliability",
        "At the end of each stage; larger points hold more states. On the dotted line, values are honest "
        "chances.",
        3.9,
        reliability_diagram,
    ),
    (
        "scores",
        "Critic: scores given",
        "At the end of each stage. A critic that gives all states one score tells them not apart.",
        3.3,
        scores,
    ),
    (
        "ranking",
        "Critic: ranking accuracy",
        "Pairs of states that the values order rightly; 0.5 is chance.",
        3.5,
        ranking,
    ),
    (
        "position",
        "Critic: value along the response",
        "Last evaluation. Lines apart: the critic sees how a response will end. Band: two standard errors.",
        3.3,
        value_by_position,
    ),
    (
        "credit",
        "Critic: what it gives the actor",
        "Gap: mean advantage of right less that of wrong responses, above 0 where the actor is taught what "
        "succeeds. Share within: how much of the advantages' variance lies within responses, none for a "
        "baseline per prompt. Entropy: of a batch's scores, 0 where all are one.",
        6.5,
        credit,
    ),
    (
        "parse_rate",
        "Critic: judgements that parse",
        "A judgement without a readable score earns no reward.",
        3.1,
        parsing,
    ),
    (
        "mismatch",
        "Trainer against engine",
        "How far the trainer's log-probs of the sampled tokens lie from the engine's.",
        4.6,
        mismatch,
    ),
    ("optimisation", "Optimisation", "Running means; as logged where faint.", 6.5, optimisation),
    ("lengths", "Response length", "Of the rollouts of each step.", 3.9, lengths),
    ("costs", "Time and tokens by phase", "Totals of each stage.", 3.6, costs),
    ("versions", "Published versions", "Weights that the engines served after each step.", 3.1, versions),
)
