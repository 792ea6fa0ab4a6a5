"""Every recipe for a cluster: it loads, its layout fits its model and its GPU, its script renders."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from genac_megatron.cluster import script
from genac_megatron.cluster.gpus import gpu
from genac_megatron.cluster.placement import heaviest, misfits, placement
from genac_megatron.recipe.loader import load_recipe

FOLDER = Path(__file__).resolve().parents[2] / "recipes" / "cluster"
RECIPES = sorted(path.stem for path in FOLDER.glob("*-*.yaml"))
NAME = re.compile(
    r"(sft|reinforce|ppo|pipeline)-([a-z0-9.-]+)-(\d+)n(\d+)g-(dp\d+|(?:tp(\d+))?(?:pp(\d+))?(?:ep(\d+))?)(-fp8)?"
)
# Sizes as their publishers' config.json state them.
QWEN3 = {
    "model_type": "qwen3", "head_dim": 128, "num_key_value_heads": 8, "vocab_size": 151_936,
    "max_position_embeddings": 40_960, "rope_theta": 1e6,
}  # fmt: skip
LLAMA = {
    "model_type": "llama", "head_dim": 128, "num_key_value_heads": 8, "vocab_size": 128_256,
    "tie_word_embeddings": False, "max_position_embeddings": 131_072, "rope_theta": 5e5,
    "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                     "original_max_position_embeddings": 8192},
}  # fmt: skip
SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")


def config(family: dict[str, Any], *sizes: int, **more: Any) -> dict[str, Any]:
    return {**family, **dict(zip(SIZES, sizes, strict=True)), **more}


MODELS = {
    "Qwen3-0.6B": config(QWEN3, 1024, 28, 16, 3072, tie_word_embeddings=True),
    "Qwen3-1.7B": config(QWEN3, 2048, 28, 16, 6144, tie_word_embeddings=True),
    "Qwen3-4B": config(QWEN3, 2560, 36, 32, 9728, tie_word_embeddings=True),
    "Qwen3-8B": config(QWEN3, 4096, 36, 32, 12_288, tie_word_embeddings=False),
    "Qwen3-14B": config(QWEN3, 5120, 40, 40, 17_408, tie_word_embeddings=False),
    "Qwen3-32B": config(QWEN3, 5120, 64, 64, 25_600, tie_word_embeddings=False),
    "Qwen3-30B-A3B": config(
        QWEN3, 2048, 48, 32, 6144, model_type="qwen3_moe", num_key_value_heads=4, num_experts=128,
        num_experts_per_tok=8, moe_intermediate_size=768, norm_topk_prob=True, tie_word_embeddings=False,
    ),
    "Qwen2.5-7B": {
        "model_type": "qwen2", "hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28,
        "num_key_value_heads": 4, "intermediate_size": 18_944, "vocab_size": 152_064,
        "tie_word_embeddings": False, "max_position_embeddings": 131_072, "rope_theta": 1e6,
    },
    "Llama-3.1-8B": config(LLAMA, 4096, 32, 32, 14_336),
    "Llama-3.1-70B": config(LLAMA, 8192, 80, 64, 28_672),
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the models' config.json and the data that the recipes name."""
    folder = tmp_path_factory.mktemp("cluster")
    for name, content in MODELS.items():
        (folder / "models" / name).mkdir(parents=True)
        (folder / "models" / name / "config.json").write_text(json.dumps(content))
    (folder / "data").mkdir()
    (folder / "data" / "sft.jsonl").write_text("")
    return folder


def test_every_model_has_every_stage_in_both_precisions() -> None:
    seen = [match.groups() for match in map(NAME.fullmatch, RECIPES) if match]
    assert len(seen) == len(RECIPES)
    for stage in ("sft", "reinforce", "ppo", "pipeline"):
        for fp8 in (None, "-fp8"):
            have = {model for kind, model, *_, precision in seen if (kind, precision) == (stage, fp8)}
            assert have == {name.lower() for name in MODELS}


@pytest.mark.parametrize("name", RECIPES)
def test_recipe(name: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    recipe = load_recipe(FOLDER / f"{name}.yaml")
    assert recipe.name == name
    assert misfits(recipe) == []
    match = NAME.fullmatch(name)
    assert match is not None
    stage, model, nodes, gpus, layout, tp, pp, ep, fp8 = match.groups()
    where = placement(recipe)
    assert (where.nodes, where.gpus_per_node) == (int(nodes), int(gpus))
    assert script.kind_of(recipe) == stage
    for role in recipe.roles.values():
        assert Path(role.model.hf or "").name.lower() == model
        assert [role.layout.tp, role.layout.pp, role.layout.ep] == [int(size or 1) for size in (tp, pp, ep)]
        assert layout != "dp1"
        assert role.training.fp8 == ("blockwise" if fp8 else "off")
    need = heaviest(recipe)[1]
    assert 0.2 * gpu("h100-80g").usable_gib < need <= gpu("h100-80g").usable_gib, "it fits, and is no waste"
    text = script.render(recipe, FOLDER / f"{name}.yaml", [], {})
    assert f"#SBATCH --nodes={nodes}\n" in text


@pytest.mark.parametrize("path", sorted(FOLDER.rglob("*.yaml")), ids=lambda path: path.stem)
def test_recipes_are_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 30
