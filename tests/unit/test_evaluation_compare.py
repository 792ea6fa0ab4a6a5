"""`bank compare`: its differences by hand, their sign and their pairing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from genac_megatron.cli import main
from genac_megatron.errors import EXIT_INPUT, InputError
from genac_megatron.evaluation.compare import compare
from genac_megatron.evaluation.tables import with_interval
from genac_megatron.observe.runinfo import write_json_atomic

TRUTH = {"a": [0.0, 1.0], "b": [0.5, 0.5], "c": [0.25, 0.75]}  # Monte-Carlo values, by prompt
FIGURES = (
    "mse", "mse_constant", "explained_variance", "brier", "ece", "spearman", "parse_rate", "tokens_per_state",
    *(f"ranking_{scope}{kind}" for scope in ("between", "prompt", "response") for kind in ("", "_clear")),
)  # fmt: skip


def scores(folder: Path, off: dict[str, float], mse: float, bank: str = "ab") -> Path:
    """Scores of a critic that is off by so much on each prompt; `mse`: what its report says."""
    rows = [
        {"prompt": prompt, "used": p + off[prompt], "monte_carlo": p}
        for prompt, values in TRUTH.items()
        for p in values
    ]
    folder.mkdir(parents=True)
    (folder / "states.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    figures = {name: {"value": 0.5, "low": 0.4, "high": 0.6} for name in FIGURES}
    figures["mse"] = {"value": mse, "low": mse, "high": mse}
    write_json_atomic(folder / "scores.json", {"name": folder.name, "bank": bank, "figures": figures})
    return folder


def test_a_difference_is_the_others_error_less_the_firsts_prompt_by_prompt(tmp_path: Path) -> None:
    """Prompts differ a hundredfold in how hard they are; the second critic is 0.01 worse on every one, the
    third better on the whole: no interval of theirs is wider than what differs between prompts."""
    first = scores(tmp_path / "s" / "first", {"a": 1.0, "b": 0.1, "c": 0.5}, 0.42)
    worse = {prompt: (off**2 + 0.01) ** 0.5 for prompt, off in {"a": 1.0, "b": 0.1, "c": 0.5}.items()}
    second = scores(tmp_path / "s" / "second", worse, 0.43)
    third = scores(tmp_path / "s" / "third", {"a": 0.0, "b": 0.4, "c": 0.5}, 0.1367)
    text = compare([first, second, third], tmp_path / "out")
    report = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert report["names"] == ["first", "second", "third"]
    one, other = report["mse_less_the_first"]
    assert [one["value"], one["low"], one["high"]] == pytest.approx([0.01, 0.01, 0.01])
    assert other["value"] == pytest.approx((-1.0 + 0.15 + 0.0) / 3)
    assert other["low"] == pytest.approx(-1.0), "every prompt drawn was a"
    assert other["high"] == pytest.approx(0.15), "every prompt drawn was b"
    rows = {line.split("|")[1].strip(): line.split("|")[2:-1] for line in text.splitlines() if "|" in line}
    shown = [cell.strip() for cell in rows["less the first's"]]
    assert shown == ["", "0.010 [0.010, 0.010]", with_interval(other)]
    assert rows["MSE to Monte-Carlo values"][0].strip() == "0.420 [0.420, 0.420]"
    swapped = compare([second, first], tmp_path / "swapped")
    assert "-0.010 [-0.010, -0.010]" in swapped


def test_scores_of_several_banks_are_not_paired(tmp_path: Path) -> None:
    off = {"a": 0.0, "b": 0.0, "c": 0.0}
    folders = [scores(tmp_path / f"bank-{bank}" / "scores" / "c", off, 0.0, bank) for bank in "xy"]
    text = compare(folders, tmp_path / "out")
    assert "less the first's" not in text
    assert "not paired" in text
    report = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert report["mse_less_the_first"] == []
    assert report["names"] == ["bank-x/c", "bank-y/c"]


FIGURE = {"value": 0.5, "low": 0.4, "high": 0.6}
WHOLE = {"name": "a", "bank": "ab", "figures": dict.fromkeys(FIGURES, FIGURE)}


def given(**figures: Any) -> dict[str, Any]:
    """Scores with other figures; None: without it."""
    found = {k: v for k, v in (dict.fromkeys(FIGURES, FIGURE) | figures).items() if v is not None}
    return WHOLE | {"figures": found}


MADE_BY_HAND = [
    ([], "no object"),
    ({"name": "a", "figures": {}}, "bank"),
    (given(mse=0.5), "figures.mse"),
    (given(mse=FIGURE | {"value": "low"}), "figures.mse.value"),
    (given(mse={"value": 0.5}), "figures.mse.low"),
    (given(ece=None), "figures.ece"),
]


@pytest.mark.parametrize(("report", "said"), MADE_BY_HAND)
def test_scores_that_this_version_has_not_made_are_refused(
    report: object, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = scores(tmp_path / "a", {"a": 0.0, "b": 0.0, "c": 0.0}, 0.0)
    write_json_atomic(folder / "scores.json", report)
    assert main(["evaluate", "bank", "compare", str(folder), str(folder)]) == EXIT_INPUT
    told = capsys.readouterr().err
    assert said in told
    assert str(folder / "scores.json") in told
    assert "genac evaluate bank score" in told
    assert "Traceback" not in told


@pytest.mark.parametrize("change", ["gone", "half", "fewer", "other"])
def test_so_are_states_of_other_scores(change: str, tmp_path: Path) -> None:
    off = {"a": 0.0, "b": 0.0, "c": 0.0}
    first, second = (scores(tmp_path / "s" / name, off, 0.0) for name in ("first", "second"))
    states = second / "states.jsonl"
    lines = states.read_text().splitlines()
    if change == "gone":
        states.unlink()
    else:
        left = {
            "half": lines[-1][:9],
            "fewer": "",
            "other": json.dumps(json.loads(lines[-1]) | {"used": None}),
        }
        states.write_text("\n".join([*lines[:-1], left[change]]))
    with pytest.raises(InputError, match="states of these scores") as error:
        compare([first, second], None)
    assert str(states) in str(error.value)
