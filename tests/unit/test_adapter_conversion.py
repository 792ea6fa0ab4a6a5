"""`genac convert to-hf` of adapters: a PEFT folder, or merged with the base that they were trained beside."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from genac_megatron.cli import main
from genac_megatron.conversion.safetensors_file import write_safetensors
from genac_megatron.models.mapping import random_weights
from genac_megatron.models.registry import hf_config
from genac_megatron.models.sizes import hf_names
from genac_megatron.tasks.tokenizer import tokenizer_size
from genac_megatron.training.checkpoint import Checkpoints
from genac_megatron.training.layout import init_world
from genac_megatron.training.role import Role
from tests.distributed.cases import published, train
from tests.distributed.test_adapter_layouts import ALPHA, RANK, SOME, adapted, adapter_role


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A run's checkpoint of an actor's adapters and of a critic's on the same base, the folder of that, and
    what the trainer publishes of each.
    """
    init_world()
    folder = tmp_path_factory.mktemp("made")
    vocab = tokenizer_size("builtin:tiny")
    role = adapter_role(adapted({"count": 1}, SOME, shape={"vocab": vocab}))
    role.begin_stage(None, 10)
    train(role, 2)
    config = adapted({"count": 1}, {"rank": 2}, shape={"vocab": vocab})
    layout = replace(role.layout, name="critic")
    critic = Role("critic", config, role.shape, layout, layout.groups(), beside=role)
    critic.base = role.base
    critic.begin_stage(None, 10)
    train(critic, 2)
    roles = {"actor": role, "critic": critic}
    Checkpoints(folder / "checkpoints", 2, False).save("ppo-00002", roles, {})
    models = {name: {"model": {"hf": str(folder / "base3")}} for name in roles}
    (folder / "recipe.yaml").write_text(yaml.safe_dump({"roles": models}))
    for seed in (3, 4):
        write_base(folder / f"base{seed}", role.shape, seed)
    return folder, role.shape, {name: published(each, 1 << 17) for name, each in roles.items()}


def write_base(folder: Path, shape: Any, seed: int) -> None:
    folder.mkdir()
    get, names = random_weights(shape, seed), hf_names(shape)
    tensors = ((name, get(name)) for name in names)
    write_safetensors(folder / "model.safetensors", list(names.items()), torch.float32, tensors)
    (folder / "config.json").write_text(json.dumps(hf_config(shape)))


def convert(folder: Path, dst: Path, *more: str) -> int:
    return main(["convert", "to-hf", str(folder), str(dst), "--quiet", *more])


def test_a_peft_folder_has_what_was_trained(made: Any, tmp_path: Path) -> None:
    """Its parts, by PEFT's names, make of the base what is published."""
    folder, shape, wanted = made
    assert convert(folder, tmp_path / "peft") == 0
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", RANK, ALPHA)
    assert config["target_modules"] == sorted(SOME["targets"])
    assert config["base_model_name_or_path"] == str(folder / "base3")
    found = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    get = random_weights(shape, 3)
    assert len(found) == 2 * 4 * 3  # A and B, layers, projections
    for name, weight in wanted["actor"].items():
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{stem}.lora_A.weight" in found:
            delta = found.pop(f"{stem}.lora_B.weight") @ found.pop(f"{stem}.lora_A.weight")
            torch.testing.assert_close(get(name) + ALPHA / RANK * delta, weight, atol=1e-6, rtol=0, msg=name)
    assert not found
    assert convert(folder, tmp_path / "peft") == 2  # it exists


def test_of_several_ranks_one_writes_a_peft_folder(
    made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others end well, before it is there and after."""
    folder, _, _ = made
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, there in (("1", False), ("0", True), ("1", True)):
        monkeypatch.setenv("RANK", rank)
        assert convert(folder, tmp_path / "peft") == 0
        assert (tmp_path / "peft").exists() == there


@pytest.mark.parametrize("role", ["actor", "critic"])
def test_a_merged_folder_is_what_is_published(made: Any, tmp_path: Path, role: str) -> None:
    """Of the role that stands on another's base too."""
    folder, _, published_of = made
    wanted = published_of[role]
    given = ("--role", role, "--merge", str(folder / "base3"), "--assets", "builtin:tiny")
    assert convert(folder, tmp_path / "whole", *given) == 0
    found = load_file(tmp_path / "whole" / "model.safetensors")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], weight) for name, weight in wanted.items())


def test_what_cannot_be_converted(made: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, _, _ = made
    assert convert(folder, tmp_path / "x", "--merge", str(folder / "base4"), "--assets", "builtin:tiny") == 2
    assert "not the model that actor's adapter was trained beside" in capsys.readouterr().err
    assert convert(folder, tmp_path / "x", "--verify") == 2
    assert "--verify is of whole models" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
