"""A scalar critic's head is beside its adapter's base, and no part of it: what that base is called."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from genac_megatron.errors import InputError
from genac_megatron.models.mapping import load_hf_into, random_weights, with_head
from genac_megatron.models.sizes import hf_names
from genac_megatron.publication.digest import WeightDigest, know_base
from genac_megatron.publication.publisher import Publisher
from genac_megatron.training.checkpoint import Checkpoints, load_checkpoint
from genac_megatron.training.layout import init_world
from tests.distributed.cases import make_role, make_samples
from tests.distributed.test_adapter_layouts import adapted
from tests.distributed.test_value import train_values


def beside_drawn_head(weights: int, head: int) -> Any:
    """A scalar critic's adapter beside a language model of seed `weights`, its head drawn by seed `head`."""
    config = adapted({"count": 1})
    model = config.model.model_copy(update={"head": "value"})
    role = make_role("critic", config.model_copy(update={"model": model}), 1)
    get, names = random_weights(role.shape, weights), hf_names(role.shape)
    its = [name for name in names if not name.startswith("score.")]
    load_hf_into(role.models, role.layout, role.shape, with_head(get, its, role.shape, head))
    know_base(role)
    role.begin_stage(None, 10)
    return role


def test_a_scalar_head_is_no_part_of_what_an_adapter_stands_beside(tmp_path: Path) -> None:
    """Critics of one base take each other's adapter, whatever seed their heads were drawn by."""
    init_world()
    role, again, other = (beside_drawn_head(*seeds) for seeds in ((3, 0), (3, 1), (4, 0)))
    assert role.values(make_samples(5, 7)) != again.values(make_samples(5, 7))
    assert role.base == again.base != other.base
    train_values(role, 2)
    Checkpoints(tmp_path, 2, False).save("value-00002", {"critic": role}, {})
    load_checkpoint(tmp_path / "value-00002", {"critic": again})
    assert again.values(make_samples(5, 7)) == role.values(make_samples(5, 7))
    with pytest.raises(InputError, match="an adapter beside another base"):
        load_checkpoint(tmp_path / "value-00002", {"critic": other})


def test_a_checkpoint_whose_base_is_named_with_its_head_loads(tmp_path: Path) -> None:
    """As version 0.1.0 named it: for a recipe that draws the same head, as a resumed run's does."""
    init_world()
    role, same, other = (beside_drawn_head(3, head) for head in (0, 0, 1))
    Checkpoints(tmp_path, 2, False).save("value-00000", {"critic": role}, {})
    sink = WeightDigest()
    Publisher(role, [sink], base=True).publish(0)
    manifest = tmp_path / "value-00000" / "manifest.json"
    said = json.loads(manifest.read_text())
    assert said["adapters"]["critic"]["base"] != sink.hexdigest()
    said["adapters"]["critic"]["base"] = sink.hexdigest()
    manifest.write_text(json.dumps(said))
    load_checkpoint(tmp_path / "value-00000", {"critic": same})
    with pytest.raises(InputError, match="an adapter beside another base"):
        load_checkpoint(tmp_path / "value-00000", {"critic": other})
