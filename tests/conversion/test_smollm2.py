"""SmolLM2-135M through Megatron in several layouts: bits, logits, greedy text and perplexity stay."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from genac_megatron.cli import main
from genac_megatron.models.hf_folder import HfFolder
from genac_megatron.models.registry import hf_config, shape_from_folder
from genac_megatron.models.sizes import parameters
from genac_megatron.recipe.schema import EngineConfig
from genac_megatron.serving.sglang.client import ServerClient
from genac_megatron.serving.sglang.fleet import Endpoint, Fleet
from genac_megatron.serving.sglang.server import Zygote, serving_python
from tests.conversion.real_cases import (
    LAYOUTS,
    NEW_TOKENS,
    TEXT,
    chat,
    greedy,
    greedy_case,
    perplexity,
    plain,
    save_case,
    scores_case,
    serve_case,
    text_ids,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
LIMIT_S = 600.0
WEIGHTS = ".safetensors"
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


@pytest.fixture(scope="module")
def said() -> dict[Any, tuple[list[int], list[int], float]]:
    """Folders' token ids of the text and of the question, and their perplexity, by all but their weights."""
    return {}


@pytest.mark.parametrize("name", list(LAYOUTS))
def test_there_and_back_is_exact(
    name: str, smollm2: Path, checkpoint: Path, model: Any, six: Any, said: Any, tmp_path: Path
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
    rest = tuple(sorted((path.name, path.read_bytes()) for path in back.iterdir() if path.suffix != WEIGHTS))
    if rest not in said:  # the same bits beside the same files say the same
        said[rest] = (ids := text_ids(back)), chat(back), perplexity(plain(back), ids)  # by what came out
    ids = text_ids(smollm2)
    assert said[rest] == (ids, chat(smollm2), perplexity(model, ids))


@dataclass
class Scored:
    """What Megatron in a layout says of the text, and of the question with transformers' greedy answer."""

    layout: str
    text: tuple[torch.Tensor, torch.Tensor]  # log-probs [T - 1], logits [T, vocab]
    answer: tuple[torch.Tensor, torch.Tensor]


@pytest.fixture(scope="module")
def answer(smollm2: Path, model: Any) -> list[int]:
    """transformers' greedy answer to the question."""
    return greedy(model, chat(smollm2))


@pytest.fixture(scope="module", params=list(LAYOUTS))
def scored(
    request: pytest.FixtureRequest, smollm2: Path, checkpoint: Path, answer: list[int], six: Any
) -> Scored:
    texts = [text_ids(smollm2), [*chat(smollm2), *answer]]
    layout = LAYOUTS[request.param]
    by_rank = six.run(scores_case, str(smollm2), str(checkpoint), layout, texts, timeout=LIMIT_S)
    last = next(found for found in by_rank if found[0][1] is not None)
    return Scored(request.param, *((torch.tensor(logprobs), logits) for logprobs, logits in last))


def test_scores_are_those_of_transformers(scored: Scored, smollm2: Path, model: Any) -> None:
    ids = text_ids(smollm2)
    assert len(ids) > 90, TEXT
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0]
    wanted = torch.log_softmax(logits, -1)[:-1].gather(1, torch.tensor(ids)[1:, None])[:, 0]
    logprobs, ours = scored.text
    assert relative(logprobs, wanted) < TOLERANCE
    assert relative(ours, logits) < TOLERANCE
    assert float((-logprobs).mean().exp()) == pytest.approx(perplexity(model, ids), rel=TOLERANCE)


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The largest difference, of the largest value; shown by pytest -rP."""
    difference = float((ours - theirs).abs().max() / theirs.abs().max())
    print(f"relative difference {difference:.3g}")
    return difference


def test_megatrons_own_greedy_text_is_that_of_transformers(scored: Scored, answer: list[int]) -> None:
    """After each beginning of that text its likeliest token is the text's next: so it writes it too."""
    _, logits = scored.answer
    assert len(answer) == NEW_TOKENS
    assert logits[-NEW_TOKENS - 1 : -1].argmax(-1).tolist() == answer


def test_greedy_text_after_publication_is_that_of_transformers(
    scored: Scored, smollm2: Path, checkpoint: Path, answer: list[int], six: Any
) -> None:
    ids, layout = chat(smollm2), LAYOUTS[scored.layout]
    results = six.run(greedy_case, str(smollm2), str(checkpoint), layout, ids, timeout=LIMIT_S)
    assert results[0] == answer


@pytest.fixture(scope="module")
def endpoint(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    """A real SGLang server of the model, on random weights. Needs $GENAC_SERVE_PYTHON."""
    folder = tmp_path_factory.mktemp("served")
    config = EngineConfig(kind="sglang", dtype="fp32", max_batch=8, max_batch_tokens=4096)
    fleet = Fleet("actor", config, hf_config(shape_from_folder(smollm2)), folder / "model", folder, "cpu")
    zygote = Zygote(serving_python(), folder / "zygote.log")
    try:
        fleet.start(zygote=zygote)
        (made,) = fleet.ready()
        yield made
    finally:
        fleet.close()
        zygote.close()


# With `scored` for the order alone: ranks keep a layout's role from one test to the next.
@pytest.mark.parametrize("scored", ["tp1", "tp3", "pp2"], indirect=True)
def test_a_real_server_says_what_transformers_does(
    scored: Scored,
    smollm2: Path,
    checkpoint: Path,
    answer: list[int],
    six: Any,
    endpoint: Endpoint,
    tmp_path: Path,
) -> None:
    version = 1 + list(LAYOUTS).index(scored.layout)
    figures = six.run(
        serve_case,
        str(smollm2),
        str(checkpoint),
        LAYOUTS[scored.layout],
        [endpoint],
        str(tmp_path),
        version,
        timeout=LIMIT_S,
    )[0]
    assert figures["bytes"] == 4 * parameters(shape_from_folder(smollm2))
    sampling = {"temperature": 0.0, "max_new_tokens": NEW_TOKENS, "ignore_eos": True}
    client = ServerClient(endpoint.url, endpoint.key, name=endpoint.name)
    (said,) = asyncio.run(client.generate(chat(smollm2), sampling, limit_s=LIMIT_S))
    assert list(said.ids) == answer
    assert said.spans == ((str(version), NEW_TOKENS),)
