"""FP8 as far as a machine without a GPU can tell: Megatron takes our arguments, rules refuse what cannot be,
states and master weights go where they should. What computes in FP8 is in tests/gpu."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from genac_megatron.errors import InputError
from genac_megatron.models import build
from genac_megatron.models.mapping import load_hf_into, random_weights
from genac_megatron.models.registry import shape_of
from genac_megatron.models.specs import fuse_weight_gradients
from genac_megatron.platform import fp8
from genac_megatron.recipe.precision import check_precision
from genac_megatron.recipe.rules import nowhere
from genac_megatron.recipe.schema import ModelConfig, ModelShape, RoleConfig, TrainingConfig
from genac_megatron.training.layout import Layout, init_world
from tests.distributed.cases import make_role, role_config

SIZES: dict[str, Any] = {
    "layers": 4, "hidden": 128, "ffn": 256, "heads": 4, "kv_heads": 2, "head_dim": 32, "vocab": 128,
}  # fmt: skip
HOPPER, BLACKWELL, AMPERE, CONSUMER = (9, 0), (10, 0), (8, 0), (12, 0)


def megatron_config(**training: Any) -> Any:
    shape = shape_of(ModelConfig(family="qwen3", shape=ModelShape(**SIZES)), 128)
    return build.transformer_config(shape, Layout("actor", 0, 1), TrainingConfig(**training), "torch")


def test_there_is_a_mapping_for_every_recipe() -> None:
    assert set(build.FP8) == set(fp8.RECIPES)


@pytest.mark.parametrize("recipe", fp8.RECIPES)
def test_megatron_knows_the_recipe_and_takes_its_arguments(recipe: str) -> None:
    from megatron.core.enums import Fp8Recipe

    config = megatron_config(fp8=recipe, fp8_amax_history=64)
    assert config.fp8_recipe == Fp8Recipe(recipe)
    assert config.fp8 in ("hybrid", "e4m3")
    assert (config.fp8_amax_history_len, config.fp8_amax_compute_algo) == (64, "max")
    assert config.tp_only_amax_red  # else ranks of other roles would be waited for


def test_megatron_takes_layers_in_bf16_and_refuses_them_under_delayed_scaling() -> None:
    from megatron.core.fp8_utils import is_first_last_bf16_layer

    config = megatron_config(fp8="blockwise", bf16_first_layers=1, bf16_last_layers=2)
    assert [is_first_last_bf16_layer(config, layer) for layer in range(4)] == [True, False, True, True]
    config = megatron_config(fp8="blockwise", bf16_last_layers=1)
    assert [is_first_last_bf16_layer(config, layer) for layer in range(4)] == [False, False, False, True]
    with pytest.raises(ValueError, match="Delayed scaling does not support first / last layer in BF16"):
        megatron_config(fp8="delayed", bf16_first_layers=1)


@pytest.mark.parametrize("recipe", ["tensorwise", "blockwise"])
def test_megatron_takes_parameters_in_fp8(recipe: str) -> None:
    assert megatron_config(fp8=recipe, fp8_param=True).fp8_param


def test_bf16_and_fp32_have_no_fp8_argument() -> None:
    assert megatron_config().fp8 is None


@pytest.mark.parametrize(
    ("recipe", "capability", "cuda", "said"),
    [
        ("mxfp8", HOPPER, "13.0", "needs Blackwell"),
        ("mxfp8", AMPERE, "13.0", "needs Blackwell"),
        ("mxfp8", CONSUMER, "13.0", "no mxfp8 on compute capability 12"),
        ("blockwise", AMPERE, "13.0", "needs Hopper"),
        ("blockwise", HOPPER, "12.8", "CUDA 12.9"),
        ("delayed", AMPERE, "13.0", "8.9 or newer"),
        ("tensorwise", AMPERE, "13.0", "8.9 or newer"),
    ],
)
def test_a_gpu_that_lacks_a_recipe_is_told_why(
    recipe: str, capability: tuple[int, int], cuda: str, said: str
) -> None:
    assert said in fp8.refusal(recipe, capability, cuda)


def test_each_gpu_has_its_recipes() -> None:
    assert fp8.available(AMPERE, "13.0") == []
    assert fp8.available(HOPPER, "13.0") == ["delayed", "tensorwise", "blockwise"]
    assert fp8.available(BLACKWELL, "13.0") == ["delayed", "tensorwise", "blockwise", "mxfp8"]


def test_fp8_without_transformer_engine_is_refused_when_the_model_is_built() -> None:
    shape = shape_of(ModelConfig(family="qwen3", shape=ModelShape(**SIZES)), 128)
    with pytest.raises(InputError, match="needs Transformer Engine"):
        build.check(shape, Layout("actor", 0, 1), TrainingConfig(fp8="blockwise"), "torch")
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="needs a GPU"):
            build.check(shape, Layout("actor", 0, 1), TrainingConfig(fp8="mxfp8"), "te")


@pytest.mark.parametrize(
    ("training", "layout", "sizes", "said"),
    [
        ({"fp8_param": True}, {}, {}, "trains without it"),
        ({"bf16_first_layers": 1}, {}, {}, "trains without it"),
        ({"fp8": "blockwise", "specs": "torch"}, {}, {}, "torch's layers"),
        ({"fp8": "blockwise", "dtype": "fp32"}, {}, {}, "fp32 training"),
        ({"fp8": "delayed"}, {"tp": 2}, {}, "tp > 1"),
        ({"fp8": "delayed", "bf16_last_layers": 1}, {}, {}, "delayed scaling, which cannot"),
        ({"fp8": "tensorwise", "bf16_first_layers": 3}, {"pp": 2}, {}, "2 layers in a pipeline stage"),
        ({"fp8": "mxfp8", "fp8_param": True}, {}, {}, "under mxfp8"),
        ({"fp8": "blockwise", "fp8_param": True, "distributed_optimizer": False}, {}, {}, "master weights"),
        ({"fp8": "blockwise"}, {}, {"ffn": 200}, "its ffn is 200"),
        ({"fp8": "mxfp8"}, {}, {"hidden": 144}, "its hidden is 144"),
    ],
)
def test_settings_that_do_not_fit_are_refused_by_name(
    training: dict[str, Any], layout: dict[str, Any], sizes: dict[str, Any], said: str
) -> None:
    role = role_of(training, layout, sizes)
    with pytest.raises(InputError, match=said):
        check_precision("actor", role, shape_of(role.model, 128), nowhere)


@pytest.mark.parametrize("recipe", fp8.RECIPES)
def test_settings_that_fit_are_not(recipe: str) -> None:
    role = role_of({"fp8": recipe}, {}, {})
    check_precision("actor", role, shape_of(role.model, 128), nowhere)


def role_of(training: dict[str, Any], layout: dict[str, Any], sizes: dict[str, Any]) -> RoleConfig:
    return RoleConfig.model_validate(
        {
            "model": {"family": "qwen3", "shape": SIZES | sizes, "tokenizer": "builtin:tiny"},
            "layout": layout,
            "training": training,
        }
    )


# --- parameters in FP8, with Transformer Engine's methods stood in for ------------------------------


def standing_in(parameter: Tensor) -> Tensor:
    """A parameter with the methods by which Transformer Engine keeps what an FP8 one was made from."""
    held: Any = parameter
    held._high_precision_init_val = torch.full_like(parameter, 7.0).detach()
    held.get_high_precision_init_val = lambda: getattr(held, "_high_precision_init_val", None)
    held.clear_high_precision_init_val = lambda: delattr(held, "_high_precision_init_val")
    return parameter


def test_a_stand_in_for_an_fp8_parameter_remembers_what_was_loaded_not_megatrons_random_value() -> None:
    init_world()
    role = make_role("actor", role_config(layout={"count": 1}), 1)
    name = "decoder.layers.0.mlp.linear_fc2.weight"
    parameter = standing_in(dict(role.models[0].named_parameters())[name])
    load_hf_into(role.models, role.layout, role.shape, random_weights(role.shape, 5))
    torch.testing.assert_close(parameter.get_high_precision_init_val(), parameter.data)  # type: ignore[attr-defined]


def test_a_stand_in_that_remembers_nothing_is_given_its_value_before_a_second_optimizer() -> None:
    parameter = standing_in(nn.Parameter(torch.arange(6.0)))
    parameter.clear_high_precision_init_val()  # type: ignore[attr-defined]
    fp8.ready_for_master([parameter, nn.Parameter(torch.ones(2))])
    assert parameter.get_high_precision_init_val().tolist() == [0, 1, 2, 3, 4, 5]  # type: ignore[attr-defined]


def test_a_layer_that_can_fuse_weight_gradients_is_asked_to_by_a_stand_in() -> None:
    layer, other = nn.Linear(2, 2), nn.Linear(2, 2)
    layer.fuse_wgrad_accumulation = False  # type: ignore[assignment]
    assert fuse_weight_gradients(nn.Sequential(layer, other)) == 1
    assert layer.fuse_wgrad_accumulation
    assert not hasattr(other, "fuse_wgrad_accumulation")


class Halved:
    """A stand-in's two functions of Megatron: it keeps half of each value, as FP8 keeps another form."""

    @staticmethod
    def holds(tensor: Any) -> bool:
        return getattr(tensor, "halved", False)

    @staticmethod
    def whole(tensor: Tensor) -> Tensor:
        return tensor.detach() * 2


@pytest.fixture
def halved(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A role with one parameter in the stand-in's form, and what it stands for."""
    from megatron.core import fp8_utils

    monkeypatch.setattr(fp8_utils, "is_float8tensor", Halved.holds)
    monkeypatch.setattr(fp8_utils, "dequantize_fp8_tensor", Halved.whole)
    init_world()
    role = make_role("actor", role_config(layout={"count": 1}), 1)
    parameter: Any = dict(role.models[0].named_parameters())["decoder.layers.0.mlp.linear_fc2.weight"]
    parameter.halved = True
    return role, Halved.whole(parameter)


def test_what_a_stand_in_keeps_in_fp8_is_published_in_full(halved: Any) -> None:
    from tests.distributed.cases import published

    role, value = halved
    torch.testing.assert_close(published(role)["model.layers.0.mlp.down_proj.weight"], value)


def test_what_a_stand_in_keeps_in_fp8_is_saved_in_full(halved: Any, tmp_path: Path) -> None:
    """So a checkpoint becomes a Hugging Face folder by the same tool, whatever its weights were kept in."""
    from genac_megatron.conversion.stored import StoredWeights
    from genac_megatron.conversion.units import units
    from genac_megatron.training.checkpoint import Checkpoints

    role, value = halved
    shards = role.models[0].sharded_state_dict
    key = "decoder.layers.0.mlp.linear_fc2.weight"

    def marked(**options: Any) -> Any:  # Megatron's copies of a parameter are of its class; a mark is lost
        state = shards(**options)
        state[key].data.halved = True
        return state

    role.models[0].sharded_state_dict = marked
    Checkpoints(tmp_path, 1, False).save("sft-1", {"actor": role}, {})
    stored = StoredWeights(tmp_path / "sft-1" / "weights", "actor", role.shape)
    (unit,) = [
        u for u in units(role.shape) if u.rule.stored.endswith("mlp.linear_fc2.weight") and u.at[0] == 0
    ]
    torch.testing.assert_close(stored.get(unit), value.view(unit.size))


def test_a_base_that_a_stand_in_keeps_in_fp8_is_known_by_what_was_loaded(halved: Any) -> None:
    """So a checkpoint beside it names the folder that it came from; then host memory has it no more."""
    from genac_megatron.publication.digest import know_base

    plain = make_role("actor", role_config(layout={"count": 1}, training={"adapter": {"rank": 2}}), 1)
    role = make_role("actor", plain.config, 1)
    know_base(plain)
    parameter: Any = standing_in(
        dict(role.models[0].named_parameters())["decoder.layers.0.mlp.linear_fc2.weight"]
    )
    fp8.remember(parameter, parameter)
    parameter.data /= 3  # as rounding to another form leaves it
    parameter.halved = True
    know_base(role)
    assert role.base == plain.base
    assert parameter.get_high_precision_init_val() is None
    role.begin_stage(None, 10)  # a frozen parameter has no master weight to remember anything for
    assert parameter.get_high_precision_init_val() is None
    know_base(role)
    assert role.base != plain.base


def test_fp8_weights_beside_adapters_need_no_master_weights() -> None:
    adapter = {"adapter": {"rank": 8}, "fp8": "blockwise", "fp8_param": True, "distributed_optimizer": False}
    role = role_of(adapter, {}, {})
    check_precision("actor", role, shape_of(role.model, 128), nowhere)
    assert megatron_config(**adapter).fp8_param


# --- the layers' own states in checkpoints ------------------------------------------------------------


class StatefulNorm(nn.Module):
    """A norm that keeps a state, as Transformer Engine's do, around the torch one's weight."""

    def __init__(self, norm: nn.Module, state: bytes) -> None:
        super().__init__()
        self.weight, self.eps, self.kept = norm.weight, norm.eps, state
        self.asked: list[Any] = []

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.rms_norm(x, self.weight.shape, self.weight, self.eps)  # type: ignore[arg-type]

    def get_extra_state(self) -> Any:
        return io.BytesIO(self.kept)

    def set_extra_state(self, state: Any) -> None:
        self.asked.append(None if state is None else state.getvalue())


def role_with_state(state: bytes | None) -> Any:
    role = make_role("actor", role_config(layout={"count": 1}), 1)
    if state is not None:
        decoder = role.models[0].decoder
        decoder.final_layernorm = StatefulNorm(decoder.final_layernorm, state)
    return role


@pytest.mark.parametrize(
    ("saved", "loading", "told"),
    [
        (b"amax", b"", b"amax"),  # what a layer keeps comes back
        (None, b"", None),  # a checkpoint of torch's layers, loaded into those that keep a state
        (b"amax", None, None),  # and the other way round
        (None, None, None),
    ],
)
def test_layers_states_are_in_checkpoints_and_may_be_missing(
    tmp_path: Path, saved: bytes | None, loading: bytes | None, told: bytes | None
) -> None:
    from genac_megatron.training.checkpoint import Checkpoints, load_checkpoint

    init_world()
    checkpoints = Checkpoints(tmp_path, 2, False)
    checkpoints.save("sft-1", {"actor": role_with_state(saved)}, {})
    role = role_with_state(loading)
    load_checkpoint(tmp_path / "sft-1", {"actor": role})
    if loading is not None:
        assert role.models[0].decoder.final_layernorm.asked == [told]
