"""Saves and resumes planned on ranks that one process plays: every byte once, and no rank looks at a weight's
whole grid of pieces."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest

from benchmarks import scale_checkpoint
from benchmarks.scale_checkpoint import FileSystemReader, read, rows, saved, strategies
from genac_megatron.models.registry import shape_of
from genac_megatron.models.sizes import parameters
from genac_megatron.recipe.schema import RoleConfig
from genac_megatron.training.layout import Layout, close_world, init_world

RANKS = 8
CONFIG = RoleConfig.model_validate(
    {
        "model": {
            "family": "qwen3_moe",
            "tokenizer": "builtin:tiny",
            "shape": {
                "layers": 4,
                "hidden": 64,
                "ffn": 128,
                "heads": 4,
                "kv_heads": 2,
                "head_dim": 16,
                "vocab": 132,
                "experts": 4,
                "experts_per_token": 2,
                "expert_ffn": 32,
                "norm_topk": True,
                "tie_embeddings": False,
            },
        },
        "layout": {"count": RANKS, "tp": 2, "pp": 2, "ep": 2},
        "training": {"dtype": "bf16"},
    }
)


@pytest.fixture(autouse=True)
def world() -> Iterator[None]:
    init_world()
    grid = mock.Mock(side_effect=AssertionError("torch would compare all pieces of a weight"))
    with mock.patch.object(strategies, "sharded_tensor_to_torch_sharded_tensor", grid):
        yield
    close_world()


def test_every_byte_is_written_once_and_read_once(tmp_path: Path) -> None:
    shape, layout = shape_of(CONFIG.model, 132), Layout.from_config("actor", CONFIG.layout, RANKS)
    written, told = saved(CONFIG, shape, layout, tmp_path, None)
    assert written.of_tensors == 14 * parameters(shape)
    assert len(written.files) == 2 * RANKS
    scale_checkpoint.validated(told, layout)
    metadata = FileSystemReader(tmp_path).read_metadata()
    assert not hasattr(metadata, "all_local_plans"), "which each rank would read at a resume"
    resumed = [one for stage in (0, 1) for one in read(CONFIG, shape, layout, stage, told, metadata)]
    ranks = [dp * layout.tp + stage * RANKS // 2 for stage in (0, 1) for dp in range(layout.dp)]
    for (nbytes, files, _, calls, weights), rank in zip(resumed, ranks, strict=True):
        # Its own states again, and a share of the weights, which other replicas may have written.
        assert 0.8 * written.by_rank[rank] < nbytes < 1.25 * written.by_rank[rank]
        assert 2 <= files <= 2 * layout.dp
        assert calls > 0
        # A rank's weights: its half of a stage's, and norms. Those that it reads it sends.
        assert weights == pytest.approx(2 * parameters(shape) / layout.tp / layout.pp, rel=0.05)


def test_a_part_of_the_groups_can_be_played(tmp_path: Path) -> None:
    shape, layout = shape_of(CONFIG.model, 132), Layout.from_config("actor", CONFIG.layout, RANKS)
    (part,) = rows(CONFIG, shape, layout, tmp_path, 1)
    assert part["files"] == "2"
    assert part["told all, KB"] > 0
