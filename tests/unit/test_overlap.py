"""Megatron's own overlap and optimizer memory: what it is handed, what is refused, one queue on GPUs.

Transformer Engine's Adam and its user buffers, and an optimizer in host memory, are of GPUs: what they are
asked for is checked here, on stand-ins where a class of theirs must be there. Not run on a GPU.
"""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from genac_megatron import platform
from genac_megatron.errors import InputError
from genac_megatron.models import build
from genac_megatron.models.registry import shape_of
from genac_megatron.recipe.estimate import Place, memory_of
from genac_megatron.recipe.loader import load_recipe
from genac_megatron.recipe.megatron_rules import queue_environment
from genac_megatron.recipe.schema import ModelConfig, ModelShape, OptimizerConfig, RoleConfig, TrainingConfig
from genac_megatron.records import Sample
from genac_megatron.training import optimizer, overlap
from genac_megatron.training.distributed_batch import everywhere
from genac_megatron.training.layout import Layout, init_world
from genac_megatron.training.microbatches import planned

SIZES: dict[str, Any] = {
    "layers": 4, "hidden": 128, "ffn": 256, "heads": 4, "kv_heads": 2, "head_dim": 32, "vocab": 128,
}  # fmt: skip
SHAPE = shape_of(ModelConfig(family="qwen3", shape=ModelShape(**SIZES)), 128)
NEW_ENOUGH = "megatron.core.optimizer.optimizer_config.is_te_min_version"
AWARE = {"use_precision_aware_optimizer": True, "exp_avg_dtype": "bf16", "exp_avg_sq_dtype": "bf16"}
OFFLOADED = {"use_precision_aware_optimizer": True, "optimizer_cpu_offload": True}
BOTH = {"overlap_grad_reduce": True, "overlap_param_gather": True}
RECIPE = """
name: overlap
seed: 1
world: {ranks: 4}
task: {kind: state_tracking}
roles:
  actor:
    model: {family: qwen3, tokenizer: "builtin:tiny", shape: {layers: 4, hidden: 32, ffn: 64, heads: 4, kv_heads: 2}}
  critic:
    model: {family: qwen3, tokenizer: "builtin:tiny", shape: {layers: 2, hidden: 32, ffn: 64, heads: 4, kv_heads: 2}}
stages:
  - {kind: reinforce, name: judge, steps: 1}
"""  # noqa: E501


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


def told(keys: dict[str, Any], where: str = "roles.actor.training") -> list[str]:
    return [f"{where}.{key}={str(value).lower()}" for key, value in keys.items()]


BUFFERED = ["roles.actor.layout.tp=2", *told({"tp_comm_overlap": True})]


@pytest.mark.parametrize(
    "overrides", [told(BOTH), told(AWARE), told(OFFLOADED), told({**OFFLOADED, **BOTH}), BUFFERED]
)
def test_what_goes_together_passes(path: Path, overrides: list[str]) -> None:
    load_recipe(path, overrides)


@pytest.mark.parametrize(
    ("overrides", "said", "place"),
    [
        (told({"overlap_param_gather": True}), "without overlap_grad_reduce", "overlap_param_gather"),
        (
            told({**BOTH, "distributed_optimizer": False}),
            "without distributed_optimizer",
            "overlap_param_gather",
        ),
        ([*told(BOTH), "roles.actor.training.adapter={rank: 2}"], "no layer could wait", "overlap_param"),
        (told({"exp_avg_dtype": "bf16"}), "without an optimizer that can", "exp_avg_dtype"),
        (told({**OFFLOADED, "exp_avg_dtype": "bf16"}), "Megatron's optimizer keeps fp32", "exp_avg_dtype"),
        (told({"optimizer_cpu_offload": True}), "a form of the precision-aware one", "optimizer_cpu_offload"),
        (told({"optimizer_offload_fraction": 0.5}), "and it is not", "optimizer_offload_fraction"),
        (told({**AWARE, "dtype": "fp32"}), "over bf16 weights", "use_precision_aware_optimizer"),
        (
            [*told({"use_precision_aware_optimizer": True}), "roles.actor.training.adapter={rank: 2}"],
            "trains an adapter",
            "use_precision_aware_optimizer",
        ),
        (told({"tp_comm_overlap": True}), "exchanges of sequence parallelism", "tp_comm_overlap"),
        ([*BUFFERED, "roles.actor.layout.sequence_parallel=false"], "and has none", "tp_comm_overlap"),
        ([*BUFFERED, *told({"specs": "torch"})], "with torch's layers", "tp_comm_overlap"),
        ([*BUFFERED, *told({"variable_seq_lengths": True})], "buffers of one size", "tp_comm_overlap"),
        ([*BUFFERED, *told({"tokens_per_microbatch": 8190})], "cut evenly", "tokens_per_microbatch"),
        (
            [*BUFFERED, "roles.actor.layout.first_rank=1", "roles.actor.layout.count=2"],
            "begins at rank 1",
            "tp_comm_overlap",
        ),
        (
            [
                *BUFFERED,
                "roles.critic.layout.tp=2",
                *told({"tp_comm_overlap": True, "tokens_per_microbatch": 4096}, "roles.critic.training"),
            ],
            r"differ in \(tp, cp, tokens, hidden\)",
            "tp_comm_overlap",
        ),
    ],
)
def test_what_cannot_be_is_refused_where_it_stands(
    path: Path, overrides: list[str], said: str, place: str
) -> None:
    with pytest.raises(InputError, match=said) as raised:
        load_recipe(path, overrides)
    assert place in str(raised.value.where)
    assert raised.value.way_out


def test_a_machine_without_transformer_engine_says_so_before_a_model_is_built() -> None:
    for keys in (AWARE, OFFLOADED, {"tp_comm_overlap": True}):
        with pytest.raises(InputError, match="needs Transformer Engine, on a GPU"):
            build.check(SHAPE, Layout("actor", 0, 1), TrainingConfig.model_validate(keys), "torch")


def test_megatron_gets_its_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(NEW_ENOUGH, lambda _: True)
    ddp = overlap.ddp_config(TrainingConfig.model_validate(BOTH))
    assert (ddp.overlap_grad_reduce, ddp.overlap_param_gather, ddp.align_param_gather) == (True, True, True)
    plain = overlap.ddp_config(TrainingConfig())
    given = (plain.overlap_grad_reduce, plain.overlap_param_gather, plain.align_param_gather)
    assert given == (False, False, False)
    offloaded = {**OFFLOADED, "optimizer_offload_fraction": 0.5, "overlap_cpu_optimizer_d2h_h2d": True}
    given = optimizer._megatron_config(OptimizerConfig(), TrainingConfig.model_validate(offloaded))
    assert given.use_precision_aware_optimizer_no_fp8_or_ds_fp8
    assert (given.optimizer_cpu_offload, given.optimizer_offload_fraction) == (True, 0.5)
    assert given.overlap_cpu_optimizer_d2h_h2d
    training = TrainingConfig(tp_comm_overlap=True)
    assert build.transformer_config(SHAPE, Layout("actor", 0, 2, tp=2), training, "torch").tp_comm_overlap


class FusedAdam:
    """The arguments of Transformer Engine's that Megatron asks for."""

    def __init__(
        self,
        params: Any,
        master_weight_dtype: Any,
        exp_avg_dtype: Any,
        exp_avg_sq_dtype: Any,
        use_decoupled_grad: Any,
    ) -> None:
        raise AssertionError("not made here")


def engine(monkeypatch: pytest.MonkeyPatch, **parts: Any) -> None:
    """A stand-in for Transformer Engine with these attributes in its modules."""
    for name in ("", ".pytorch", ".pytorch.optimizers", ".pytorch.module"):
        module = types.ModuleType(f"transformer_engine{name}")
        monkeypatch.setitem(sys.modules, module.__name__, module)
    for name, part in parts.items():
        module = "module" if name == "base" else "optimizers"
        setattr(sys.modules[f"transformer_engine.pytorch.{module}"], name, part)


def test_moments_in_bf16_reach_megatron(monkeypatch: pytest.MonkeyPatch) -> None:
    engine(monkeypatch, FusedAdam=FusedAdam)
    monkeypatch.setattr(NEW_ENOUGH, lambda _: True)
    given = optimizer._megatron_config(OptimizerConfig(), TrainingConfig.model_validate(AWARE))
    assert (given.exp_avg_dtype, given.exp_avg_sq_dtype) == (torch.bfloat16, torch.bfloat16)
    assert (given.main_params_dtype, given.store_param_remainders) == (torch.float32, False)


@pytest.mark.parametrize("version", ["2.4", "2.8"])
def test_user_buffers_are_made_once_for_all_roles(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    import megatron.core.utils as utils

    made: list[dict[str, Any]] = []
    modes = types.SimpleNamespace(NONE="none", FP8="fp8")
    base = types.SimpleNamespace(initialize_ub=lambda **a: made.append(a), UserBufferQuantizationMode=modes)
    engine(monkeypatch, base=base)
    monkeypatch.setattr(platform, "has_te", lambda: True)
    monkeypatch.setattr(utils, "is_te_min_version", lambda _: version == "2.8")
    training = TrainingConfig(tp_comm_overlap=True, tokens_per_microbatch=4096)
    role = RoleConfig.model_validate(
        {"model": {"family": "qwen3", "shape": SIZES}, "layout": {"tp": 2, "cp": 2}, "training": training}
    )
    overlap.make_buffers([(role, SHAPE), (role, SHAPE)])
    word = {"quantization_modes": ["none"]} if version == "2.8" else {"use_fp8": False}
    assert made == [{"shape": [2048, 128], "tp_size": 2, "ub_cfgs": {}, "bootstrap_backend": "nccl", **word}]
    overlap.make_buffers([(role.model_copy(update={"training": TrainingConfig()}), SHAPE)])
    assert len(made) == 1


def test_every_pack_fills_the_buffers() -> None:
    def plan(lengths: list[int]) -> Any:
        training = TrainingConfig(tp_comm_overlap=True, tokens_per_microbatch=64)
        layout = Layout("actor", 0, 4, tp=2, sequence_parallel=True)
        how: dict[str, Any] = {"training": training, "shape": SHAPE, "multiple": 2, "trees": False}
        return planned(everywhere([Sample([1] * (n + 1), n) for n in lengths]), layout, None, **how)

    init_world()
    assert plan([10, 20, 30, 9]).pad_to == 64
    with pytest.raises(InputError, match="takes 65 positions, and tp_comm_overlap has buffers for 64"):
        plan([65, 9])


class Held:
    """An inner optimizer that holds masters itself, as Transformer Engine's does."""

    def __init__(self, weights: torch.Tensor, begun: bool) -> None:
        self.param_groups = [{"params": [weights]}]
        self.state = {weights: {"master_param": torch.zeros(3)}} if begun else {}

    def set_scaled_state(self, weights: torch.Tensor, name: str, value: torch.Tensor) -> None:
        self.state[weights][name] = value


@pytest.mark.parametrize("aware", [True, False])
def test_masters_that_the_optimizer_holds_follow_the_weights(aware: bool) -> None:
    """A stand-in for what needs a GPU; Megatron's own reload leaves such masters as they are."""
    weights = torch.tensor([1.0, 2.0, 3.0], dtype=torch.bfloat16)
    inner, fresh = Held(weights, True), Held(weights, False)
    config = types.SimpleNamespace(use_precision_aware_optimizer_no_fp8_or_ds_fp8=aware)
    parts = [types.SimpleNamespace(optimizer=one, config=config) for one in (inner, fresh, None)]
    reloaded: list[bool] = []
    optimizer.reload_weights(
        types.SimpleNamespace(chained_optimizers=parts, reload_model_params=lambda: reloaded.append(True))
    )
    master = inner.state[weights]["master_param"]
    assert torch.equal(master, weights.float() if aware else torch.zeros(3))
    assert master.dtype == torch.float32
    assert (reloaded, fresh.state) == ([True], {})


def test_the_estimate_counts_what_stays_on_the_gpu() -> None:
    def states(**training: Any) -> float:
        role = RoleConfig.model_validate(
            {"model": {"family": "qwen3", "shape": SIZES}, "training": {"dtype": "bf16", **training}}
        )
        return memory_of(role, SHAPE, Place(0, 0, 0, 0), 1).optimizer

    whole = states()
    assert states(**AWARE) == whole * 8 / 12
    assert states(**OFFLOADED) == 0
    assert states(**OFFLOADED, optimizer_offload_fraction=0.75) == whole / 4


def test_ranks_that_cut_layers_have_one_queue(path: Path) -> None:
    plain, cut = load_recipe(path, []), load_recipe(path, ["roles.actor.layout.tp=2"])
    key = "CUDA_DEVICE_MAX_CONNECTIONS"
    assert queue_environment(plain, {}) == {}
    assert queue_environment(cut, {}) == {key: "1"}
    assert queue_environment(cut, {key: "8"}) == {}, "the user's own stays"
    buffered = load_recipe(path, BUFFERED)
    assert queue_environment(buffered, {key: "1"}) == {}
    with pytest.raises(InputError, match=f"{key} is 8, and tp_comm_overlap needs 1"):
        queue_environment(buffered, {key: "8"})
