"""The report as one HTML file: no scripts, no other files, light and dark, readable on a phone."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from html import escape
from importlib import resources
from typing import TYPE_CHECKING, Any

import yaml

from genac_megatron.observe.progress import format_duration
from genac_megatron.observe.report_data import (
    KINDS,
    ROLES,
    FailedGate,
    Row,
    RunData,
    failed_gates,
    left_bands,
    number,
)
from genac_megatron.observe.report_gates import ways_on, went_on
from genac_megatron.observe.report_origin import end_card, origins
from genac_megatron.observe.report_suites import suite_section
from genac_megatron.recipe.schema import ObserveConfig
from genac_megatron.recipe.trains import trains

if TYPE_CHECKING:
    from genac_megatron.observe.report_plots import Plot

STYLE = resources.files(__package__).joinpath("report.css").read_text(encoding="utf-8")

_FIGURES = (
    ("brier", "Brier score", 4),
    ("brier_constant", "of the best constant", 4),
    ("mse", "MSE against Monte-Carlo values", 4),
    ("mse_constant", "of the best constant", 4),
    ("auc", "AUC", 3),
    ("ece", "calibration error (ECE)", 4),
    ("explained_variance", "explained variance", 3),
    ("spearman", "Spearman", 3),
    ("ranking_between", "ranking, between prompts", 3),
    ("ranking_prompt", "ranking, within a prompt", 3),
    ("ranking_response", "ranking, within a response", 3),
    ("parse_rate", "parse rate", 4),
    ("score_entropy", "entropy of scores, nats", 2),
)  # fmt: skip
_SHOWN_PER_KIND = 2
UNEQUAL = 3  # times as long as another: worth a word
PARSED = 0.5  # below this share of readable judgements, a critic's figures are not its own


def page(
    run: RunData,
    summary: Mapping[str, Any],
    plots: Sequence[Plot] | None,
    absent: Sequence[str],
    missing: Sequence[str],
) -> str:
    """The whole document. plots: None where they were not asked for."""
    body = "".join((
        head(run, summary),
        end_card(run),
        gate_cards(run),
        band_cards(run),
        missing_card(missing, absent),
        tiles(run, summary),
        _plots(run, plots),
        headlines(summary),
        suite_section(run),
        data_section(run),
        _rollouts(run),
        origins(run),
        folds(run, summary),
    ))  # fmt: skip
    title = escape(str(summary["run/name"]))
    return (
        "<!doctype html><html lang=en><head><meta charset=utf-8>"
        '<meta name=viewport content="width=device-width,initial-scale=1">'
        f"<title>{title} · GenAC report</title><style>{STYLE}</style></head>"
        f"<body><main>{body}</main></body></html>\n"
    )


def text_of(value: Any, digits: int = 3, per_cent: bool = False) -> str:
    """A figure for people; "–" where there is none."""
    x = number(value)
    if math.isnan(x):
        return "–"
    return f"{100 * x:.1f} %" if per_cent else f"{x:.{digits}f}"


def head(run: RunData, summary: Mapping[str, Any]) -> str:
    """The title: stages, models, when."""
    stages = " → ".join(f"{s.name} ({run.steps(s)} steps)" for s in run.spans if s.last > s.first)
    times = run.series("time")[1]
    when = (
        datetime.fromtimestamp(times[-1], UTC).strftime("last step %Y-%m-%d %H:%M UTC") if times.size else ""
    )
    roles = []
    for name, role in (run.recipe.get("roles") or {}).items():
        model = (role or {}).get("model") or {}
        roles.append(f"{name}: {model.get('hf') or model.get('family') or '?'}")
    line = " · ".join(escape(part) for part in (stages, ", ".join(roles), when) if part)
    told = "; ".join(f"{name}: {text}" for name, text in trains(run.recipe).items())
    told = f"<p class=soft>{escape(told)}</p>" if told else ""
    return f"<h1>{escape(str(summary['run/name']))}</h1><p class=soft>{line}</p>{told}"


def gate_cards(run: RunData) -> str:
    """A card for each gate that was not reached."""
    return "".join(map(_gate, failed_gates(run)))


def _gate(failed: FailedGate) -> str:
    """A gate that was not reached: what it means, what helps and, where it stopped the run, how to go on."""
    title = f"Stage {escape(failed.stage.name)} did not reach its gate"
    if not failed.stopped:
        title += f"; {went_on(failed.stage)}"
    items = "".join(
        f"<li><b>{escape(m.what)}</b>: {escape(m.means)}.<br>What usually helps: {escape(m.helps)}.</li>"
        for m in failed.missed
    )
    ways = "".join(
        f"<li><code>{escape(override)} --resume</code>: {escape(does)}</li>"
        for override, does in (ways_on(failed.stage, failed.missed) if failed.stopped else ())
    )
    resume = f"<p>What is trained is saved. The same command goes on, for example with</p><ul>{ways}</ul>"
    return f"<section class='card warn'><h3>{title}</h3><ul>{items}</ul>{resume if ways else ''}</section>"


def band_cards(run: RunData) -> str:
    """What is not as the recipe expects it."""
    items = "".join(
        f"<li><b>{escape(name)}, {escape(left.what)}</b>"
        + (f": {escape(left.means)}." if left.means else ".")
        + (f"<br>What usually helps: {escape(left.helps)}." if left.helps else "")
        + "</li>"
        for name, left in left_bands(run)
    )
    if not items:
        return ""
    return f"<section class='card warn'><h3>Not as expected (expect)</h3><ul>{items}</ul></section>"


def missing_card(missing: Sequence[str], absent: Sequence[str]) -> str:
    """What a whole run would have and this one has not."""
    items = [escape(m) for m in missing]
    if absent:
        items.append("no data for: " + escape(", ".join(absent)))
    if not items:
        return ""
    return (
        "<section class='card warn'><h3>Not all of a run is here</h3><ul>"
        + "".join(f"<li>{item}</li>" for item in items)
        + "</ul></section>"
    )


def _tile(title: str, value: str, note: str, verdict: bool | None = None) -> str:
    colour = "" if verdict is None else " class=good" if verdict else " class=bad"
    return (
        f"<div class='card tile'><span class=soft>{title}</span><b{colour}>{value}</b>"
        f"<span class=soft>{note}</span></div>"
    )


def tiles(run: RunData, s: Mapping[str, Any]) -> str:
    """The figures to look at first."""
    tiles = []
    before = number(s["actor/accuracy_sft"])
    if (end := run.actor_after) is not None:
        after = number(end["actor"].get("accuracy"))
        low, high = number(s.get("actor/accuracy_gain_low")), number(s.get("actor/accuracy_gain_high"))
        note = f"after {end['kind']}, from {text_of(before, per_cent=True)}"
        sure = None
        if not math.isnan(low):
            note += (
                f"; gain {100 * (after - before):+.1f} points (95 %: {100 * low:+.1f} to {100 * high:+.1f})"
            )
            sure = low > 0
        tiles.append(_tile("Actor, held out", text_of(after, per_cent=True), note, sure))
    elif not math.isnan(before):
        tiles.append(_tile("Actor, held out", text_of(before, per_cent=True), "before its RL"))
    for kind in KINDS:
        own = number(s.get(f"critic/brier_{kind}"))
        base = number(s.get(f"critic/brier_constant_{kind}"))
        if not math.isnan(own):
            better = None if math.isnan(base) else own < base
            tiles.append(
                _tile(
                    f"Critic Brier after {kind}", text_of(own, 4), f"best constant {text_of(base, 4)}", better
                )
            )
    if not math.isnan(number(s["critic/parse_rate"])):
        tiles.append(
            _tile(
                "Judgements that parse",
                text_of(s["critic/parse_rate"], per_cent=True),
                "last evaluation",
                None if number(s["critic/parse_rate"]) >= PARSED else False,
            )
        )
    if not math.isnan(p99 := number(s["parity/logp_p99"])):
        alarm = _parity_alarm(run.recipe)
        note = f"worst p99 of |Δ log-prob|; alarm at {alarm:g}"
        tiles.append(_tile("Trainer against engine", f"{p99:.2g}", note, p99 <= alarm))
    served = [f"{r} v{s[f'publish/{r}_version']}" for r in ROLES if s[f"publish/{r}_version"] is not None]
    if served:
        means = [s.get("publish/seconds_mean"), *(s.get(f"publish/{r}_s_mean") for r in ROLES)]
        seconds = sum(number(m) for m in means if m is not None) if any(means) else math.nan
        note = "last published" + ("" if math.isnan(seconds) else f"; {seconds:.2g} s each step")
        tiles.append(_tile("Served", ", ".join(served), note))
    if not math.isnan(total := number(s["time/total_s"])):
        tokens = number(s["tokens/total"])
        tiles.append(_tile("Time", format_duration(total), f"{tokens:,.0f} tokens" if tokens else ""))
    if not math.isnan(peak := number(s["memory/peak_gib"])):
        largest = number(s.get("memory/peak_rank_gib"))
        told = "all ranks added up" if math.isnan(largest) else f"the largest rank; all ranks {peak:.2f} GiB"
        shown = peak if math.isnan(largest) else largest
        tiles.append(_tile("Peak memory", f"{shown:.2f} GiB", f"of host memory, {told}"))
    if broken := int(s["metrics/nonfinite"]):
        tiles.append(_tile("Not finite", str(broken), "figures logged as null", False))
    return f"<div class=tiles>{''.join(tiles)}</div>" if tiles else ""


def _parity_alarm(recipe: Mapping[str, Any]) -> float:
    """The highest that a resolved recipe has for its roles, as the figure is the worst of them."""
    observe = recipe.get("observe") or {}
    fp8 = any(
        (role.get("training") or {}).get("fp8", "off") != "off"
        or (role.get("engine") or {}).get("quantization", "off") != "off"
        for role in (recipe.get("roles") or {}).values()
    )
    key = "parity_alarm_fp8" if fp8 else "parity_alarm"
    return number(observe.get(key) or getattr(ObserveConfig(), key))


def _plots(run: RunData, plots: Sequence[Plot] | None) -> str:
    if plots is None:
        return (
            "<p class=soft>The recipe wants no plots (observe.plots). <code>genac report</code> with this "
            "run's folder draws them.</p>"
        )
    if not plots:
        return ""
    return f"<h2>Plots</h2>{lengths(run)}<div class=plots>{''.join(map(embedded_plot, plots))}</div>"


def lengths(run: RunData) -> str:
    """That stages are drawn equally wide, where they are of unequal length."""
    steps = {span.name: run.steps(span) for span in run.spans if run.steps(span)}
    if not steps or max(steps.values()) < UNEQUAL * min(steps.values()):
        return ""
    told = ", ".join(f"{escape(name)} {count:,}" for name, count in steps.items())
    return (
        f"<p class=soft>Stages are drawn equally wide, though they are not equally long (steps: {told}): a "
        "curve's slope in one says nothing beside that in another.</p>"
    )


def embedded_plot(plot: Plot) -> str:
    """A plot with its images inside of the page."""
    light, dark = (base64.b64encode(image).decode() for image in (plot.light, plot.dark))
    caption = f"<figcaption>{escape(plot.caption)}</figcaption>" if plot.caption else ""
    return (
        f"<figure class=card id={plot.id}><h3>{escape(plot.title)}</h3>"
        f'<label><input type=checkbox aria-label="Enlarge: {escape(plot.title)}"><picture>'
        f'<source media="(prefers-color-scheme:dark)" srcset="data:image/png;base64,{dark}">'
        f'<img alt="{escape(plot.title)}" src="data:image/png;base64,{light}"></picture></label>'
        f"{caption}</figure>"
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    top = "".join(f"<th>{h}</th>" for h in head)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<div class=scroll><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>"


def _cell(text: str, unread: bool) -> str:
    return f"<span class=bad>{text}</span>" if unread and text != "–" else text


def _unread(s: Mapping[str, Any], kinds: Sequence[str]) -> str:
    """What figures are of where most judgements have no score."""
    rates = [f"{text_of(s[f'critic/parse_rate_{kind}'], per_cent=True)} after {kind}" for kind in kinds]
    if not rates:
        return ""
    return (
        f"<p class=bad>Of the judgements only {', '.join(rates)} have a score that can be read. Figures in "
        "this colour are mostly of the values that were used in place of the others.</p>"
    )


def headlines(s: Mapping[str, Any]) -> str:
    """The critic after each stage, and where the time went."""
    known = [k for k in KINDS if not math.isnan(number(s.get(f"critic/brier_{k}")))]
    unread = [k for k in known if number(s.get(f"critic/parse_rate_{k}")) < PARSED]
    rows = []
    for name, label, digits in _FIGURES:
        cells = [text_of(s.get(f"critic/{name}_{kind}"), digits) for kind in known]
        if any(cell != "–" for cell in cells):
            rows.append([label, *map(_cell, cells, [kind in unread for kind in known])])
    critic = ""
    if rows:
        critic = "<section><h2>The critic after each stage</h2><div class=card>"
        critic += _table(["", *known], rows) + _unread(s, unread) + "</div></section>"
    phases = [
        key[len("share/time_") :] for key in s if key.startswith("share/time_") and key != "share/time_other"
    ]
    cost_rows = [
        [escape(p), format_duration(number(s[f"time/{p}_s"])), text_of(s[f"share/time_{p}"], per_cent=True),
         f"{number(s[f'tokens/{p}']):,.0f}" if f"tokens/{p}" in s else "–"]
        for p in sorted(phases, key=lambda p: -number(s[f"time/{p}_s"]))
    ]  # fmt: skip
    costs = ""
    if cost_rows:
        head = ["phase", "time", "share", "tokens"]
        costs = "<section><h2>Where the time went</h2><div class=card>"
        costs += _table(head, cost_rows) + "</div></section>"
    return f"<div class=pair>{critic}{costs}</div>" if critic or costs else ""


def data_section(run: RunData) -> str:
    """How much data there is, and what was left out of it."""
    if not run.data:
        return ""
    items = "".join(f"<li><div class=text>{escape(line)}</div></li>" for line in run.data)
    return f"<section><h2>The data</h2><div class=card><ul>{items}</ul></div></section>"


# --- rollouts ------------------------------------------------------------------------------------


def chosen_rollouts(run: RunData) -> list[Row]:
    """The latest rollouts, latest stage first: of each kind of stage a right and a wrong one."""
    kind_of = {span.name: span.kind for span in run.spans}
    chosen: list[Row] = []
    for kind in reversed(KINDS):
        own = [r for r in reversed(run.rollouts) if kind_of.get(str(r.get("stage")), r.get("stage")) == kind]
        right = [r for r in own if number(r.get("outcome")) >= 0.5]
        wrong = [r for r in own if number(r.get("outcome")) < 0.5]
        chosen += (right[:1] + wrong[:1]) or own[:_SHOWN_PER_KIND]
    return chosen


def _rollouts(run: RunData) -> str:
    shown = chosen_rollouts(run)
    if not shown:
        return ""
    explain = (
        "<p class=soft>Each chip is a state: what the critic said the chance of success was, having read "
        "the text before it. The segment after a chip is what that value is the baseline of. "
        "<span class=scale></span> low to high. A chip with <b>?</b> did not parse; the value in "
        "brackets was used instead.</p>"
    )
    return "<h2>A few rollouts</h2>" + explain + "".join(_rollout(i, r) for i, r in enumerate(shown))


def _tint(value: float) -> str:
    if math.isnan(value):
        return ""
    side = "high" if value >= 0.5 else "low"
    return f"background:rgba(var(--{side}),{0.04 + 0.9 * abs(value - 0.5):.2f})"


def chip(anchor: str, state: Row) -> str:
    """A state's value, linked to what was said of it where `anchor` names that."""
    value, used = number(state.get("value")), number(state.get("used"))
    label = f"{value:.1f}" if not math.isnan(value) else f"? ({text_of(used, 2)})"
    return f'<a class=chip href="#{anchor}">{label}</a>' if anchor else f"<span class=chip>{label}</span>"


def segments(rollout: Row) -> list[tuple[Row | None, str]]:
    """A response cut at its states: (the state before the text, the text), in order, nothing lost."""
    response = str(rollout.get("response") or "")
    states = [s for s in rollout.get("states") or [] if not math.isnan(number(s.get("cut_text")))]
    states.sort(key=lambda s: number(s["cut_text"]))
    cuts = [min(max(0, int(s["cut_text"])), len(response)) for s in states]
    pieces: list[tuple[Row | None, str]] = []
    if not cuts or cuts[0] > 0:
        pieces.append((None, response[: cuts[0] if cuts else len(response)]))
    ends = [*cuts, len(response)][1:]
    for state, begin, end in zip(states, cuts, ends, strict=True):
        pieces.append((state, response[begin:end]))
    return pieces


def _rollout(number_: int, rollout: Row) -> str:
    outcome = number(rollout.get("outcome"))
    verdict = "right" if outcome >= 0.5 else "wrong"
    colour = "good" if outcome >= 0.5 else "bad"
    pieces, notes = [], []
    for k, (state, text) in enumerate(segments(rollout)):
        if state is None:
            pieces.append(escape(text))
            continue
        anchor = f"r{number_}s{k}"
        value = number(state.get("used"))
        pieces.append(f'<span class=seg style="{_tint(value)}">{chip(anchor, state)}{escape(text)}</span>')
        said = escape(str(state.get("text") or "(nothing)"))
        notes.append(f"<div class=state id={anchor}>{chip('', state)}<div class=text>{said}</div></div>")
    reasoning = (
        f"<details><summary>The critic's reasoning, state by state</summary>{''.join(notes)}</details>"
    )
    return (
        f"<section class='card rollout'><h3>{escape(str(rollout.get('stage')))}, step "
        f"{escape(str(rollout.get('step')))}, {escape(str(rollout.get('prompt')))}: "
        f"<span class={colour}>{verdict}</span> ({text_of(outcome, 2)})</h3>"
        f"<div class='text soft'>{escape(str(rollout.get('problem') or ''))}</div>"
        f"<div class=text>{''.join(pieces)}</div>{reasoning if notes else ''}</section>"
    )


# --- folds ---------------------------------------------------------------------------------------


def folds(run: RunData, summary: Mapping[str, Any]) -> str:
    """Every figure and the recipe, folded away."""
    shown = [[escape(k), escape(f"{v:.6g}" if isinstance(v, float) else str(v))] for k, v in summary.items()]
    folds = "<h2>Everything else</h2><div class=card>"
    table = _table(["figure", "value"], shown)
    folds += f"<details><summary>All figures of summary.json</summary>{table}</details>"
    folds += f"<details><summary>Every logged figure, stage by stage</summary>{_logged(run)}</details>"
    if run.recipe:
        text = yaml.safe_dump(run.recipe, sort_keys=False, allow_unicode=True, width=100)
        folds += f"<details><summary>The resolved recipe</summary><pre>{escape(text)}</pre></details>"
    return folds + "</div>"


def _logged(run: RunData) -> str:
    rows = []
    for span in run.spans:
        inside = run.metrics[span.first : span.last]
        for key in dict.fromkeys(k for row in inside for k in row if "/" in k):
            values = [x for x in (number(row.get(key)) for row in inside) if not math.isnan(x)]
            if values:
                shown = (values[0], values[-1], min(values), max(values))
                rows.append([escape(f"{span.name}: {key}"), *(f"{x:.5g}" for x in shown)])
    return _table(["figure", "first", "last", "least", "most"], rows)
