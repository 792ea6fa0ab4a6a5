"""Gates: what passes, what stops, what only warns; a figure that is missing never passes."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from genac_megatron.errors import EXIT_GATE, GateFailed
from genac_megatron.recipe.schema import ReinforceStage, SftStage
from genac_megatron.stages.gates import check_critic_gate, check_sft_gate

NAN = float("nan")
GOOD = {
    "eval/critic_brier": 0.20,
    "eval/critic_brier_constant": 0.25,
    "eval/critic_auc": 0.66,
    "eval/critic_ranking_prompt": 0.51,
}


def reinforce(**gate: Any) -> ReinforceStage:
    return ReinforceStage.model_validate({"kind": "reinforce", "name": "pretrain", "gate": gate})


def sft(**gate: Any) -> SftStage:
    return SftStage.model_validate({"kind": "sft", "role": "critic", "data": "traces", "gate": gate})


def test_a_good_critic_passes() -> None:
    check_critic_gate(reinforce(), GOOD)
    check_sft_gate(sft(), {"eval/critic_parse_rate": 0.98})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"eval/critic_brier": 0.25}, "Brier 0.2500 is not below the constant predictor's 0.2500"),
        ({"eval/critic_brier": NAN}, "Brier nan"),
        ({"eval/critic_brier_constant": NAN}, "constant predictor's nan"),
        ({"eval/critic_auc": 0.65}, "AUC 0.650 is not above 0.65"),
        ({"eval/critic_auc": NAN}, "AUC nan"),
        ({"eval/critic_ranking_prompt": 0.5}, "within a prompt 0.500 is not above 0.5"),
        ({"eval/critic_ranking_prompt": NAN}, "within a prompt nan"),
    ],
)
def test_each_figure_can_stop(change: dict[str, float], words: str) -> None:
    with pytest.raises(GateFailed) as caught:
        check_critic_gate(reinforce(), GOOD | change)
    assert words in str(caught.value)
    assert "gate of stage pretrain" in str(caught.value)
    assert "stages.pretrain.gate.action" in str(caught.value), "the way out"
    assert str(caught.value).count(";") == 0, "only what failed is named"
    assert caught.value.exit_code == EXIT_GATE == 3


def test_missing_figures_fail_every_gate() -> None:
    """Evaluations drop what is NaN; that must not open a gate."""
    with pytest.raises(GateFailed) as caught:
        check_critic_gate(reinforce(), {})
    assert [word in str(caught.value) for word in ("Brier nan", "AUC nan", "prompt nan")] == [True] * 3
    with pytest.raises(GateFailed, match=r"parse rate nan is below 0\.98"):
        check_sft_gate(sft(), {})


def test_the_critics_parse_rate() -> None:
    with pytest.raises(GateFailed, match=r"parse rate 0\.979 is below 0\.98"):
        check_sft_gate(sft(), {"eval/critic_parse_rate": 0.979})
    check_sft_gate(sft(parse_rate=0.5), {"eval/critic_parse_rate": 0.5})


def test_warn_says_so_and_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        check_critic_gate(reinforce(action="warn"), {})
        check_sft_gate(sft(action="warn"), {"eval/critic_parse_rate": 0.1})
    assert len(caplog.records) == 2
    assert "stage pretrain: gate not reached: Brier nan" in caplog.text
    assert "parse rate 0.100" in caplog.text


def test_off_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        check_critic_gate(reinforce(action="off"), {})
        check_sft_gate(sft(action="off"), {})
    assert not caplog.records


def test_the_brier_gate_can_be_left_out() -> None:
    check_critic_gate(reinforce(brier_below_constant=False), GOOD | {"eval/critic_brier": 0.9})
