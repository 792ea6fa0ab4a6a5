"""The pages of `genac watch`: plain HTML, all that a run or a model wrote escaped, no scripts in it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from html import escape
from typing import Any
from urllib.parse import quote, urlencode

from genac_megatron.observe.progress import format_duration
from genac_megatron.observe.report_data import RunData, what_is_missing
from genac_megatron.observe.report_origin import end_card, origins
from genac_megatron.observe.report_page import (
    band_cards,
    data_section,
    folds,
    gate_cards,
    head,
    headlines,
    lengths,
    missing_card,
    tiles,
)
from genac_megatron.observe.report_suites import suite_section
from genac_megatron.watch.compare import Comparison
from genac_megatron.watch.conversation import conversation
from genac_megatron.watch.find import CRITICS, OF, OUTCOMES, Query
from genac_megatron.watch.follow import Brief, Followed
from genac_megatron.watch.standing import StageAt, Standing

PER_PAGE = 6  # conversations
BADGES = {"running": "good", "starting": "good", "ended": "soft", "stalled": "bad", "failed": "bad",
          "silent": "bad", "none": "soft"}  # fmt: skip
THEMES = ("light", "dark")
GOES_ON = ("running", "starting", "stalled")
Plotted = tuple[str, str, str]  # id, title, caption


def document(title: str, body: str, *, places: Sequence[tuple[str, str, bool]] = ()) -> str:
    """A whole page. places: of its navigation, (address, words, whether it is this one)."""
    links = "".join(
        f"<a href='{escape(address)}'{' aria-current=page' if here else ''}>{escape(words)}</a>"
        for address, words, here in places
    )
    return (
        "<!doctype html><html lang=en><head><meta charset=utf-8>"
        '<meta name=viewport content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)} · genac watch</title><link rel=stylesheet href=/page.css>"
        "<script src=/page.js defer></script></head>"
        f"<body><nav>{links}</nav><main>{body}</main><div id=tip role=status hidden></div></body></html>\n"
    )


def run_address(key: str, *more: str, **query: Any) -> str:
    """Of a run's page, or of one below it."""
    path = "/".join(["/run", quote(key, safe=""), *more])
    return f"{path}?{urlencode(query)}" if query else path


# --- all runs ------------------------------------------------------------------------------------


def overview(cards: Iterable[str], waiting: Sequence[str]) -> str:
    """Every run beside the others."""
    wait = "".join(
        f"<section class='card warn'><p>Waiting for a run in <code>{escape(path)}</code>.</p></section>"
        for path in waiting
    )
    shown = f"<div class=runs>{''.join(cards)}</div>"
    return f"<h1>Runs</h1>{part('live', '', shown + wait)}"


def part(name: str, version: str, body: str) -> str:
    """What the page's script asks for again while a run goes on."""
    return f"<div id={name} data-version='{escape(version)}'>{body}</div>"


def run_card(run: Followed, at: Standing | None, told: Sequence[tuple[str, str]], *, linked: bool) -> str:
    """Where a run stands. told: its latest figures, as (name, text)."""
    name = escape(run.key)
    title = f"<a href='{run_address(run.key)}'>{name}</a>" if linked else name
    if at is None:
        return (
            f"<section class='card run'><h2>{title} <span class='badge bad'>cannot be read</span></h2>"
            f"<pre>{escape(run.error)}</pre></section>"
        )
    badge = f"<span class='badge {BADGES[at.state]}'>{escape(at.told)}</span>"
    figures = "".join(f"<dt>{escape(n)}</dt><dd>{escape(text)}</dd>" for n, text in told)
    return (
        f"<section class='card run'><h2>{title} {badge}</h2>{_times(at)}{_left(at)}{_stages(at)}{_phases(at)}"
        f"{f'<dl class=latest>{figures}</dl>' if figures else ''}"
        f"{f'<pre>{escape(at.note)}</pre>' if at.note else ''}</section>"
    )


def _times(at: Standing) -> str:
    parts = []
    if at.begun is not None:
        parts.append(f"this attempt began {clock(at.begun)}")
    if at.heard is not None and at.state != "ended":
        parts.append(f"heard of {clock(at.heard)}")
    if at.ranks > 1:
        parts.append(f"{at.ranks} ranks")
    return f"<p class=soft>{' · '.join(parts)}</p>" if parts else ""


def clock(moment: float) -> str:
    """A time for people, in UTC."""
    return datetime.fromtimestamp(moment, UTC).strftime("%Y-%m-%d %H:%M UTC")


def left_in_words(at: Standing) -> str:
    """How long the whole run still takes, and how sure that is; "" where it goes on no more."""
    if at.state not in GOES_ON:
        return ""
    if at.run_left is None:
        return "whole run: its pace is not known yet"
    about = "about " if at.guessed else ""
    text = f"whole run: {about}{format_duration(at.run_left)} left"
    if at.unknown:
        text = f"whole run: more than {format_duration(at.run_left)} left"
        text += f"; the pace of {', '.join(at.unknown)} is not known yet"
    elif at.guessed:
        text += f" (the pace of {', '.join(at.guessed)} is guessed by tokens)"
    return text


def _left(at: Standing) -> str:
    words = left_in_words(at)
    return f"<p><b>{escape(words)}</b></p>" if words else ""


def _stages(at: Standing) -> str:
    goes_on = at.state in GOES_ON
    rows = "".join(_stage(stage, goes_on=goes_on) for stage in at.stages)
    return f"<div class=scroll><table class=stages><tbody>{rows}</tbody></table></div>" if rows else ""


def _stage(stage: StageAt, *, goes_on: bool) -> str:
    total = stage.total if stage.total is not None else 0
    most, done = max(total, stage.done, 1), stage.done
    count = f"{done:,} of {total:,}" if stage.total is not None else f"{done:,} of ?"
    pace = f"{'≈ ' if stage.guessed else ''}{stage.pace:.3g} s/step" if stage.pace is not None else ""
    left = stage.left
    rest = f"{format_duration(left)} left" if goes_on and left is not None and stage.state != "done" else ""
    return (
        f"<tr class={stage.state}><td>{escape(stage.name)}</td>"
        f"<td><progress max={most} value={done} aria-label='{escape(stage.name)}'></progress></td>"
        f"<td>{count}</td><td>{pace}</td><td>{rest}</td></tr>"
    )


def _phases(at: Standing) -> str:
    parts = []
    for name, spent, usual in at.phases:
        text = escape(name)
        if spent is not None:
            text += f" for {format_duration(spent)}"
        if usual is not None:
            text += f" of usually {format_duration(usual)}"
        parts.append(text)
    return f"<p>now: {' › '.join(parts)}</p>" if parts else ""


# --- one run -------------------------------------------------------------------------------------


def run_figures(
    run: Followed, data: RunData, summary: Mapping[str, Any], plots: Sequence[Plotted], version: str
) -> str:
    """What changes with a run's logs: gates, bands, tiles, plots (of a version of them), tables."""
    missing = what_is_missing(data) if data.attempts and data.attempts[-1][1] is not None else []
    return "".join((
        end_card(data),
        gate_cards(data),
        band_cards(data),
        missing_card(missing, []),
        tiles(data, summary),
        _plots(run, data, plots, version),
        headlines(summary),
        suite_section(data),
        data_section(data),
    ))  # fmt: skip


def _plots(run: Followed, data: RunData, plots: Sequence[Plotted], version: str) -> str:
    if not data.metrics and not data.evaluations:
        return "<p class=soft>No step and no evaluation is logged yet.</p>"
    made = "".join(_plot(run, plot, version) for plot in plots)
    return f"<h2>Plots</h2>{lengths(data)}<div class=plots>{made}</div>"


def _plot(run: Followed, plot: Plotted, version: str) -> str:
    id_, title, caption = plot
    return figure(f"plot-{id_}", title, caption, *_images(run, id_, version))


def figure(id_: str, title: str, caption: str, light: str, dark: str) -> str:
    """A plot that is a picture of this server's."""
    told = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return (
        f"<figure class=card id={id_}><h3>{escape(title)}</h3>"
        f'<label><input type=checkbox aria-label="Enlarge: {escape(title)}"><picture>'
        f'<source media="(prefers-color-scheme:dark)" srcset="{escape(dark)}">'
        f'<img alt="{escape(title)}" src="{escape(light)}" loading=lazy></picture></label>{told}</figure>'
    )


def run_page(
    run: Followed, data: RunData, summary: Mapping[str, Any], card: str, figures: str, version: str
) -> str:
    """A run's page."""
    links = (
        f"<p><a href='{run_address(run.key, 'rollouts')}'>Rollouts and what the critic said of them</a></p>"
    )
    return (
        f"{head(data, summary)}{links}{part('live', '', card)}{part('figures', version, figures)}"
        f"{origins(data)}{folds(data, summary)}"
    )


# --- rollouts ------------------------------------------------------------------------------------


def rollouts_page(
    run: Followed,
    query: Query,
    found: Sequence[tuple[int, Mapping[str, Any]]],
    more: int | None,
    briefs: Sequence[Brief],
) -> str:
    """Conversations that a search finds, newest first. more: the number that the next page begins below."""
    cards = "".join(conversation(dict(row), at, _permalink(run, at)) for at, row in found)
    none = "<p class=soft>None of them are as asked.</p>" if briefs else (
        "<p class=soft>No rollouts are kept yet: a run keeps some of its first step, of every tenth and of "
        "evaluations (observe.rollouts_every, observe.shown_rollouts).</p>"
    )  # fmt: skip
    older = ""
    if more is not None:
        asked = urlencode({**query.words(), "below": more})
        older = f"<p><a rel=next href='{run_address(run.key, 'rollouts')}?{escape(asked)}'>Older ones</a></p>"
    explain = (
        "<p class=soft>Chips stand where the critic was asked: the chance of success that it gave, having "
        "read the text before. One with <b>?</b> had no readable score; what was used instead is in "
        "brackets. Point at a token, or tap it, for its figures.</p>"
    )
    count = f"<p class=soft id=count data-count={len(briefs)}>{len(briefs):,} are kept.</p>"
    top = f"<h1>{escape(run.key)}: rollouts</h1>{_form(run, query, briefs)}"
    return f"{top}{count}{explain}{cards or none}{older}"


def _permalink(run: Followed, index: int) -> str:
    return run_address(run.key, "rollouts", str(index))


def _form(run: Followed, query: Query, briefs: Sequence[Brief]) -> str:
    stages = list(dict.fromkeys(brief.stage for brief in briefs))
    fields = (
        _select("stage", "stage", {"": "any stage", **{name: name for name in stages}}, query.stage),
        _select("of", "of", OF, query.of),
        _select("outcome", "outcome", OUTCOMES, query.outcome),
        _select("critic", "critic", CRITICS, query.critic),
        f"<label>text<input name=text type=search value='{escape(query.text)}' "
        "placeholder='in prompt, response or judgement'></label>",
    )
    action = run_address(run.key, "rollouts")
    return f"<form class='card find' action='{action}'>{''.join(fields)}<button>Find</button></form>"


def _select(name: str, label: str, options: Mapping[str, str], chosen: str) -> str:
    inner = "".join(
        f"<option value='{escape(value)}'{' selected' if value == chosen else ''}>{escape(words)}</option>"
        for value, words in options.items()
    )
    return f"<label>{label}<select name={name}>{inner}</select></label>"


# --- several runs --------------------------------------------------------------------------------


def compare_page(
    made: Comparison | None,
    why: str,
    runs: Sequence[Followed],
    every: Sequence[str],
    own: Sequence[Plotted],
    shared: Sequence[Plotted],
    version: str,
) -> str:
    """Runs beside each other: the table, plots of all in one, and each run's own plots side by side.

    made: None where they cannot be compared, and `why` says so. every: the keys of all runs.
    """
    chosen = {run.key for run in runs}
    picks = "".join(
        f"<label><input type=checkbox name=run value='{escape(key)}'{' checked' if key in chosen else ''}>"
        f"{escape(key)}</label>"
        for key in every
    )
    form = f"<form class='card find pick' action='/compare'>{picks}<button>Compare</button></form>"
    if made is None:
        return f"<h1>Compare</h1>{form}<section class='card warn'><p>{escape(why)}</p></section>"
    body = comparison_part(made, runs, own, shared, version)
    return f"<h1>Compare</h1>{form}{part('figures', version, body)}"


def comparison_part(
    made: Comparison,
    runs: Sequence[Followed],
    own: Sequence[Plotted],
    shared: Sequence[Plotted],
    version: str,
) -> str:
    """What changes with the runs' logs."""
    asked = urlencode([*(("run", run.key) for run in runs), ("v", version)])
    drawn = "".join(
        figure(f"compare-{id_}", title, caption, *(f"/compare/{id_}-{theme}.png?{asked}" for theme in THEMES))
        for id_, title, caption in shared
    )
    notes = "".join(f"<li>{escape(note)}</li>" for note in made.notes)
    warn = f"<section class='card warn'><ul>{notes}</ul></section>" if notes else ""
    strips = "".join(_strip(runs, plot, version) for plot in own)
    return (
        f"{warn}<div class=card>{made.html()}</div><h2>All in one</h2><div class=plots>{drawn}</div>"
        f"<h2>Side by side</h2><details><summary>Every plot of each run</summary>{strips}</details>"
    )


def _strip(runs: Sequence[Followed], plot: Plotted, version: str) -> str:
    """One plot of each run, side by side."""
    figures = "".join(figure(f"strip-{plot[0]}-{n}", run.key, "", *_images(run, plot[0], version))
                      for n, run in enumerate(runs))  # fmt: skip
    return f"<h3>{escape(plot[1])}</h3><div class=strip>{figures}</div>"


def _images(run: Followed, plot: str, version: str) -> list[str]:
    """Addresses of a run's plot, by theme."""
    return [run_address(run.key, "plot", f"{plot}-{theme}.png", v=version) for theme in THEMES]
