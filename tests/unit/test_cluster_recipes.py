"""Every recipe for a cluster: it loads, its layout fits its model and its GPU, its script renders."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks.published_models import MODELS, write_place
from genac_megatron.cluster import script
from genac_megatron.cluster.gpus import gpu
from genac_megatron.cluster.placement import heaviest, misfits, placement, server_shares, tenants
from genac_megatron.recipe.loader import load_recipe
from genac_megatron.recipe.memory import Phase, kv_pool, timelines
from genac_megatron.recipe.schema import Recipe
from genac_megatron.recipe.share import GIB
from genac_megatron.recipe.tasks import DatasetTask

FOLDER = Path(__file__).resolve().parents[2] / "recipes" / "cluster"
RECIPES = sorted(path.stem for path in FOLDER.glob("*-*.yaml"))
NAME = re.compile(
    r"(sft|reinforce|ppo|pipeline)-([a-z0-9.-]+)-(\d+)n(\d+)g-"
    r"(dp\d+|(?:tp(\d+))?(?:pp(\d+))?(?:cp(\d+))?(?:ep(\d+))?)(-32k)?(?:-dapo)?(-lora)?(-fp8)?"
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the models' config.json and the data that the recipes name."""
    folder = tmp_path_factory.mktemp("cluster")
    write_place(folder)
    return folder


def test_every_model_has_every_stage_in_both_precisions() -> None:
    seen = [match.groups() for match in map(NAME.fullmatch, RECIPES) if match]
    assert len(seen) == len(RECIPES)
    for stage in ("sft", "reinforce", "ppo", "pipeline"):
        for fp8 in (None, "-fp8"):
            have = {model for kind, model, *_, precision in seen if (kind, precision) == (stage, fp8)}
            assert have == {name.lower() for name in MODELS}


def test_dapos_data_take_the_place_of_gsm8ks_whole(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    recipe = load_recipe(FOLDER / "pipeline-qwen3-8b-2n8g-tp4-dapo.yaml")
    task = recipe.task
    assert isinstance(task, DatasetTask)
    assert (task.name, task.question_key) == ("BytedTsinghua-SIA/DAPO-Math-17k", "prompt")
    assert (task.config, task.heldout_split, task.answer_pattern, task.conflicting) == (
        None,
        None,
        None,
        "drop",
    )
    asked = {suite.name for suite in (*recipe.evaluation.suites, *recipe.evaluation.test)}
    assert task.decontaminate is not None
    assert asked <= {source.name for source in task.decontaminate.against}


def test_adapters_on_one_base_take_fewer_nodes() -> None:
    """8B and 14B on one, 32B on two, 70B on four, where whole models take two, four, five and nine."""
    seen = [match.groups() for match in map(NAME.fullmatch, RECIPES) if match]
    nodes = {model: int(count) for _, model, count, *_, lora, fp8 in seen if lora and fp8}
    assert nodes == {"qwen3-8b": 1, "qwen3-14b": 1, "qwen3-32b": 2, "llama-3.1-70b": 4}
    whole = {
        model: int(count) for kind, model, count, *_, lora, fp8 in seen if kind == "pipeline" and not lora
    }
    found = {model: whole[model] for model in nodes}
    assert found == {"qwen3-8b": 2, "qwen3-14b": 4, "qwen3-32b": 5, "llama-3.1-70b": 9}


@pytest.mark.parametrize("name", RECIPES)
def test_recipe(name: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    recipe = load_recipe(FOLDER / f"{name}.yaml")
    assert recipe.name == name
    assert misfits(recipe) == []
    match = NAME.fullmatch(name)
    assert match is not None
    stage, model, nodes, gpus, layout, tp, pp, cp, ep, _, lora, fp8 = match.groups()
    where = placement(recipe)
    assert (where.nodes, where.gpus_per_node) == (int(nodes), int(gpus))
    assert script.kind_of(recipe) == stage
    for role in recipe.roles.values():
        assert Path(role.model.hf or "").name.lower() == model
        sizes = [getattr(role.layout, axis) for axis in ("tp", "pp", "cp", "ep")]
        assert sizes == [int(size or 1) for size in (tp, pp, cp, ep)]
        assert layout != "dp1"
        assert role.training.fp8 == ("blockwise" if fp8 else "off")
        assert (role.training.adapter is not None) == bool(lora)
    assert [role.model.share for role in recipe.roles.values()] == (
        [None, "actor"] if lora else [None] * len(recipe.roles)
    )
    need, has = heaviest(recipe)[1], gpu("h100-80g").memory_gib
    assert 0.2 * has < need <= has * (1 + 1e-9), "it fits, and is no waste"
    _check_memory(recipe)
    text = script.render(recipe, FOLDER / f"{name}.yaml", [], {})
    assert f"#SBATCH --nodes={nodes}\n" in text


def _check_memory(recipe: Recipe) -> None:
    """No phase needs more than a GPU has, and every server gets its KV cache, when it starts first and when
    it comes back amid a run: by SGLang's own formula, with what others hold then.
    """
    total = gpu("h100-80g").memory_gib * GIB
    lines, shares = timelines(recipe, tenants(recipe), total), server_shares(recipe)
    for line in lines:
        for phase in Phase:
            assert line.used(phase) <= total * (1 + 1e-9), (line.tenants, phase)
        for name in line.tenants.servers:
            share = shares[name]
            assert share.cache > 4 * share.least, "four responses of the largest size at a time"
            own = share.static + share.runtime
            for phase in (Phase.START, Phase.RESTART):
                free = total - (line.used(phase) - own)
                for contexts in (0.5, 1.0, 1.5):  # GiB, of `runtime`
                    at_start = free - contexts * GIB
                    pool = kv_pool(at_start, at_start - share.weights, share.fraction(free))
                    assert abs(pool - share.cache) < 0.5 * GIB, (name, phase)


@pytest.mark.parametrize("path", sorted(FOLDER.rglob("*.yaml")), ids=lambda path: path.stem)
def test_recipes_are_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 30
