"""Weights served in FP8: what recipes may ask for, what a server is started with, where parity alarms."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from genac_megatron.errors import InputError
from genac_megatron.models.registry import hf_config
from genac_megatron.observe.report_page import _parity_alarm
from genac_megatron.platform import fp8
from genac_megatron.publication.disk import write_safetensors
from genac_megatron.recipe.loader import load_recipe
from genac_megatron.recipe.rules import read_shape
from genac_megatron.recipe.schema import EngineConfig, Recipe
from genac_megatron.serving.sglang.fleet import Fleet

RECIPE = """\
name: tiny
world: {ranks: 1}
roles:
  actor: &role
    model:
      family: qwen2
      tokenizer: builtin:tiny
      shape: {layers: 2, hidden: 512, ffn: 1024, heads: 8, kv_heads: 4, head_dim: 64}
    engine: {kind: sglang, quantization: fp8}
  critic: *role
task: {kind: state_tracking}
stages: [{kind: ppo, steps: 1}]
"""
WRITTEN = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
}


def load(folder: Path, *overrides: str) -> Recipe:
    path = folder / "recipe.yaml"
    path.write_text(RECIPE)
    return load_recipe(path, list(overrides))


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["roles.actor.engine.tp=2"],  # 128 rows of keys on each
        ["roles.actor.engine={kind: embedded, quantization: fp8, dtype: fp32}"],
        ["roles.actor.engine={kind: embedded, quantization: fp8}", "roles.actor.model.shape.ffn=1000"],
        ["roles.actor.model.shape.kv_heads=2", "roles.actor.engine.tp=1"],
        ["roles.actor.model.shape.ffn=1000", "roles.actor.engine.quantization=off"],
    ],
)
def test_what_can_be_served_passes(tmp_path: Path, overrides: list[str]) -> None:
    load(tmp_path, *overrides)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["roles.actor.engine.dtype=fp32"], "with fp32 activations, which SGLang cannot"),
        (["roles.actor.model.family=llama"], "SGLang's loader for Llama leaves out"),
        (["roles.actor.model.shape.ffn=1000"], "its model's ffn is 1000"),
        (["roles.actor.model.shape.hidden=576"], "its model's hidden is 576"),
        (["roles.actor.model.shape.kv_heads=1"], "its model's kv_heads x head_dim is 64"),
        (["roles.actor.engine.tp=4"], "kv_heads x head_dim is 64 on each of 4 engine ranks"),
        (["roles.actor.engine.tp=16"], "heads x head_dim is 32 on each of 16 engine ranks"),
        (["roles.critic.engine.quantization=fp9"], "fp9"),
    ],
)
def test_what_cannot_be_served_is_refused(tmp_path: Path, overrides: list[str], said: str) -> None:
    with pytest.raises(InputError, match=said) as raised:
        load(tmp_path, *overrides)
    assert "recipe.yaml:" in raised.value.where or "engine." in raised.value.where, (
        "the line, or the override"
    )


def test_the_way_out_of_too_many_ranks_is_fewer(tmp_path: Path) -> None:
    with pytest.raises(InputError) as raised:
        load(tmp_path, "roles.actor.engine.tp=4")
    assert "lower engine.tp" in (raised.value.way_out or "")


def test_a_cpu_and_old_gpus_cannot_and_say_so(tmp_path: Path) -> None:
    assert "on a CPU" in fp8.serving_refusal(None)
    assert "8.9" in fp8.serving_refusal((8, 0))
    assert [fp8.serving_refusal(capability) for capability in ((8, 9), (9, 0), (10, 0))] == [""] * 3
    assert fp8.fp8_arguments((9, 0)) == ()
    assert "triton" in fp8.fp8_arguments((10, 0))
    shape = read_shape(load(tmp_path).roles["actor"].model)
    config = EngineConfig(kind="sglang", quantization="fp8")
    with pytest.raises(InputError, match="AMX") as raised:
        Fleet("actor", config, hf_config(shape), tmp_path / "model", tmp_path, "cpu")
    assert raised.value.where == "roles.actor.engine.quantization"
    assert "embedded" in (raised.value.way_out or "")
    assert not (tmp_path / "model").exists()


def test_the_model_folder_says_fp8_and_blackwell_gets_its_arguments_with_a_mocked_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = read_shape(load(tmp_path).roles["actor"].model)
    for quantization, capability, wanted in (("fp8", (9, 0), 0), ("fp8", (10, 0), 4), ("off", (10, 0), 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda given=capability: given)
        config = EngineConfig.model_validate({"kind": "sglang", "quantization": quantization})
        fleet = Fleet("actor", config, hf_config(shape), tmp_path / "model", tmp_path, "cuda")
        written = json.loads((tmp_path / "model" / "config.json").read_text())
        assert written.get("quantization_config") == (WRITTEN if quantization == "fp8" else None)
        assert len(fleet._spec(0, 1).args) == wanted


def test_a_safetensors_file_holds_fp8_and_its_scales(tmp_path: Path) -> None:
    from safetensors import safe_open

    from genac_megatron.models.quantize import quantize

    weight, scales = quantize(torch.randn(130, 200))
    flat = torch.cat([scales.view(-1).view(torch.uint8), weight.view(-1).view(torch.uint8)])
    tensors = [("a.weight_scale_inv", (2, 2)), ("a.weight", (130, 200))]
    write_safetensors(tmp_path / "x.safetensors", flat, tensors, [torch.float32, torch.float8_e4m3fn])
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert torch.equal(file.get_tensor("a.weight").view(torch.uint8), weight.view(torch.uint8))
        assert torch.equal(file.get_tensor("a.weight_scale_inv"), scales)


def test_parity_has_an_alarm_of_its_own_where_either_side_is_in_fp8(tmp_path: Path) -> None:
    recipe = load(
        tmp_path,
        "roles.critic.engine.quantization=off",
        "observe.parity_alarm=0.1",
        "observe.parity_alarm_fp8=0.3",
    )
    assert recipe.parity_alarm("actor") == ("parity_alarm_fp8", 0.3)
    assert recipe.parity_alarm("critic") == ("parity_alarm", 0.1)
    trained: Any = load(
        tmp_path, "roles.critic.engine.quantization=off", "roles.critic.training.fp8=blockwise"
    )
    assert trained.parity_alarm("critic")[0] == "parity_alarm_fp8"
    assert _parity_alarm(recipe.model_dump()) == 0.3, "the report's is the highest"
    assert (
        _parity_alarm(
            load(tmp_path, *(f"roles.{r}.engine.quantization=off" for r in recipe.roles)).model_dump()
        )
        == 0.5
    )
