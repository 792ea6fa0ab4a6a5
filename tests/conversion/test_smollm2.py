"""SmolLM2-135M through Megatron in several layouts: bits, logits, greedy text and perplexity stay."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from genac_megatron.cli import main
from genac_megatron.models.hf_folder import HfFolder
from tests.conversion.real_cases import (
    LAYOUTS,
    TEXT,
    chat,
    greedy,
    greedy_case,
    perplexity,
    plain,
    save_case,
    scores_case,
    text_ids,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
LIMIT_S = 600.0
TOLERANCE = 1e-4  # of the largest; measured: log-probs 2e-6, logits 4e-6 (0 at TP1)


@pytest.fixture(scope="module")
def model(smollm2: Path) -> Any:
    return plain(smollm2)


def assert_same_bits(first: Path, second: Path) -> None:
    a, b = HfFolder(first), HfFolder(second)
    assert sorted(a.names) == sorted(b.names)
    for name in a.names:
        x, y = a.get(name), b.get(name)
        assert x.dtype == y.dtype == torch.bfloat16
        assert torch.equal(x.view(torch.int16), y.view(torch.int16)), name


def test_the_folder_speaks_sense(smollm2: Path, model: Any) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_dict=False,
    )
    assert "Paris" in tokenizer.decode(greedy(model, ids))
    assert perplexity(model, text_ids(smollm2)) < 40


@pytest.mark.parametrize("name", list(LAYOUTS))
def test_there_and_back_is_exact(
    name: str, smollm2: Path, checkpoint: Path, model: Any, six: Any, tmp_path: Path
) -> None:
    six.run(
        save_case,
        str(smollm2),
        str(checkpoint),
        LAYOUTS[name],
        str(tmp_path / "checkpoints"),
        timeout=LIMIT_S,
    )
    back = tmp_path / "back"
    given = ["convert", "to-hf", str(tmp_path), str(back), "--assets", str(smollm2), "--quiet"]
    assert main(given) == 0
    assert_same_bits(smollm2, back)
    ids = text_ids(back)  # by the tokenizer that came out
    assert ids == text_ids(smollm2)
    assert chat(back) == chat(smollm2)
    assert perplexity(plain(back), ids) == perplexity(model, ids)


@pytest.mark.parametrize("name", list(LAYOUTS))
def test_scores_are_those_of_transformers(
    name: str, smollm2: Path, checkpoint: Path, model: Any, six: Any
) -> None:
    ids = text_ids(smollm2)
    assert len(ids) > 90, TEXT
    results = six.run(scores_case, str(smollm2), str(checkpoint), LAYOUTS[name], ids, timeout=LIMIT_S)
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0]
    wanted = torch.log_softmax(logits, -1)[:-1].gather(1, torch.tensor(ids)[1:, None])[:, 0]
    logprobs, ours = results[0]
    assert relative(torch.tensor(logprobs), wanted) < TOLERANCE
    if "pp" not in name:
        assert relative(ours, logits) < TOLERANCE


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The largest difference, of the largest value; shown by pytest -rP."""
    difference = float((ours - theirs).abs().max() / theirs.abs().max())
    print(f"relative difference {difference:.3g}")
    return difference


@pytest.mark.parametrize("name", ["tp1", "tp3-pp2"])
def test_greedy_text_after_publication_is_that_of_transformers(
    name: str, smollm2: Path, checkpoint: Path, model: Any, six: Any
) -> None:
    ids = chat(smollm2)
    results = six.run(greedy_case, str(smollm2), str(checkpoint), LAYOUTS[name], ids, timeout=LIMIT_S)
    assert results[0] == greedy(model, ids)
