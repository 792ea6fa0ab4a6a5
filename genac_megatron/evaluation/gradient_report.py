"""Figures, table and plot of what `genac evaluate gradients` has kept. No torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from genac_megatron.errors import InputError
from genac_megatron.evaluation.gradient_figures import (
    GradientFigures,
    Products,
    agrees,
    plain_figures,
    ratio,
)
from genac_megatron.evaluation.parts import Parts, Row
from genac_megatron.evaluation.plots import save
from genac_megatron.evaluation.tables import table, with_interval
from genac_megatron.observe.report_canvas import LIGHT
from genac_megatron.observe.runinfo import write_json_atomic, write_text_atomic

FIGURES, TABLE, PLOT = "figures.json", "table.md", "gradients.png"
BASES = ("rloo", "reinforce_pp")  # what others are compared with: the first that is there
Report = dict[str, Any]


def write_report(out: Path) -> str:
    """Write figures.json, table.md and the plot of finished work; the table. Raises InputError for none."""
    manifest, rows = Parts(out, "gradients.jsonl", ("kind", "number")).read()
    if manifest.get("kind") != "gradients":
        what = f"it holds {manifest.get('kind')}"
        raise InputError(what, where=str(out), way_out="give a folder of `genac evaluate gradients`")
    report = report_of(manifest, rows)
    write_json_atomic(out / FIGURES, report)
    text = f"{shown(report)}\n"
    write_text_atomic(out / TABLE, text)
    save(out / PLOT, height_of(report), draw({out.name: report}, {}))
    return text


def report_of(manifest: Row, rows: Sequence[Row]) -> Report:
    """What is known of every estimator, with intervals, and of the reference."""
    plan, products = manifest["plan"], manifest["products"]
    of_batches = [row for row in rows if row["kind"] == 1]
    block_of = np.repeat(np.arange(len(of_batches)), [row["batches"] for row in of_batches])
    figures = GradientFigures(np.array(products["chunks"]), len(of_batches))
    rollouts = plan["prompts"] * plan["samples"]
    found, estimators = {}, dict[str, Any]()
    for name in plan["estimators"]:
        inner = np.array([one for row in of_batches for one in row["inner"][name]])
        between = np.array(products["blocks"][name])
        found[name] = figures.of(Products(inner[:, :-1], inner[:, -1], block_of, between), rollouts)
    base = next((name for name in BASES if name in found), next(iter(found)))
    for name, each in found.items():
        known = each | {"ratio": ratio(each["snr"], found[base]["snr"])}
        if "-raw" not in name:  # of another scale
            known = {key: value for key, value in known.items() if key not in ("size", "excess", "noise")}
        estimators[name] = plain_figures(known)
        if name in manifest["unbiased"]:
            estimators[name]["agrees"] = agrees(each)
    return {
        "plan": plan,
        "made_from": manifest["made_from"],
        "success_rate": manifest["success_rate"],
        "success_rate_batches": float(np.mean([o for row in of_batches for o in row["outcomes"]])),
        "base": base,
        "reference": plain_figures(figures.reference(plan["reference"])),
        "estimators": estimators,
    }


HEAD = ["[95 % interval]", "cosine of a batch", "SNR of a rollout x 1000", "x {base}'s", "bias", "unbiased?"]
NOISE = "E‖g‖² / ‖G‖²"  # no bars: they would part columns


def shown(report: Report, predicted: Mapping[str, float] | None = None) -> str:
    """The table, Markdown: with a column of what was predicted of `x base's`, where anything was."""
    predicted, plan = predicted or {}, report["plan"]
    head = [title.format(base=report["base"]) for title in HEAD]
    if predicted:
        head.insert(4, "predicted")
    noise = any("noise" in found for found in report["estimators"].values())
    head += [NOISE] if noise else []
    rows = []
    for name, found in report["estimators"].items():
        row = [
            name,
            _figure(found["cosine"]),
            _figure(found["snr"], factor=1000.0),
            _figure(found["ratio"], 2),
            _figure(found["bias"], 2),
            told(found),
        ]
        if noise:
            row.append(_figure(found["noise"], 1) if "noise" in found else "")
        if predicted:
            row.insert(4, f"{predicted[name]:.2f}" if name in predicted else "")
        rows.append(row)
    reference, rollouts = report["reference"], plan["prompts"] * plan["samples"]
    text = (
        f"{plan['batches']} batches of {plan['prompts']} prompts x {plan['samples']} responses ({rollouts} "
        f"rollouts), success rate {report['success_rate']:.3f}; reference of {plan['reference']} rollouts, "
        f"whose cosine with the true gradient is about {_figure(reference['cosine'])}."
    )
    return f"{text}\n\n{table(head, rows)}"


def told(found: Mapping[str, Any]) -> str:
    """Whether an estimator may be unbiased, and how much of an excess would not have been seen."""
    if "agrees" not in found:
        return ""
    if found["agrees"] is None:
        return "cannot be told"
    bound = found.get("excess", {}).get("high")
    return ("agrees" if found["agrees"] else "DIFFERS") + (
        "" if bound is None else f", excess < {max(bound, 0.0):.2f}"
    )


def _figure(figure: Mapping[str, Any], digits: int = 3, factor: float = 1.0) -> str:
    """With its interval, and how many draws had none of it: those are not in the interval."""
    known = {
        key: math.nan if figure[key] is None else factor * figure[key] for key in ("value", "low", "high")
    }
    dropped = f" ({figure['dropped']} of {figure['draws']} draws dropped)" if figure.get("dropped") else ""
    return with_interval(known, digits) + dropped


# --- the plot ------------------------------------------------------------------------------------


def height_of(report: Report) -> float:
    """Inches."""
    return 1.4 + 0.24 * len(report["estimators"])


def draw(
    reports: Mapping[str, Report], predicted: Mapping[str, Mapping[str, float]]
) -> Callable[[Figure], None]:
    """A panel for each report: every estimator's ratio with its interval, and what was predicted."""

    def onto(figure: Figure) -> None:
        panels = figure.subplots(1, len(reports), sharey=True, squeeze=False)[0]
        names = list(dict.fromkeys(name for one in reports.values() for name in one["estimators"]))
        for axes, (title, report) in zip(panels, reports.items(), strict=True):
            told = predicted.get(title, {})
            for place, name in enumerate(names):
                found = report["estimators"].get(name, {}).get("ratio", {})
                value, low, high = (found.get(key) for key in ("value", "low", "high"))
                if value is not None and low is not None and high is not None:
                    axes.plot([max(low, 0.0), high], [place, place], color=LIGHT.phases[0])
                    axes.plot([value], [place], "o", color=LIGHT.phases[0], markersize=5)
                if name in told:
                    axes.plot([told[name]], [place], "D", mfc="none", mec=LIGHT.ink, markersize=5)
            axes.axvline(1.0, color=LIGHT.soft, linewidth=0.8, linestyle=":")
            axes.set_title(title, loc="left", fontsize=9)
            axes.set_xlabel(f"times {report['base']}'s", fontsize=8)
        panels[0].set_yticks(range(len(names)), names)
        panels[0].invert_yaxis()
        hollow = "; hollow: predicted before the run" if any(predicted.values()) else ""
        figure.supxlabel(f"signal to noise of a rollout{hollow}", fontsize=8)

    return onto
