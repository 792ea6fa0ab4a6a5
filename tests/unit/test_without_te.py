"""Megatron's faults without Transformer Engine and apex are mended where CUDA is, too; what is told there.

Megatron-core is loaded as it is there; that there is a GPU is all that is made up.
"""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

from genac_megatron import platform
from genac_megatron.models.specs import without_engine

AS_IT_IS = """
from types import SimpleNamespace
import torch
from genac_megatron.platform import megatron, optimizer_shards
real, torch.cuda.is_available = torch.cuda.is_available, lambda: True
megatron.install(), megatron._has_cuda()
torch.cuda.is_available = real
"""
OPTIMIZER = """
from megatron.core.optimizer.distrib_optimizer import HAVE_APEX_OR_TE, DistributedOptimizer
from megatron.core.optimizer.optimizer import param_group_identifier_keys
assert not HAVE_APEX_OR_TE
optimizer_shards.install()
optimizer_shards.install()
own = DistributedOptimizer.__new__(DistributedOptimizer)  # of a rank, without Megatron's groups and buffers
own.is_stub_optimizer, own.grad_scaler, own.gbuf_ranges = False, None, []
own.config, own.ddp_config = SimpleNamespace(fp16=False), SimpleNamespace(use_megatron_fsdp=False)
weights = [torch.nn.Parameter(torch.ones(3)) for _ in range(4)]
groups = [{"params": weights, **dict.fromkeys(param_group_identifier_keys, 1.0)}]
own.optimizer = torch.optim.AdamW(groups)
form = {"distrib_optim_sharding_type": "fully_reshardable"}
def saved(): return own.sharded_state_dict({}, metadata=form)
def loaded(): return own.sharded_state_dict({}, is_loading=True, metadata=form)
def step():
    for weight in weights: weight.grad = torch.ones(3)
    own.optimizer.step()
def steps(): return sorted({float(state["step"]) for state in own.optimizer.state.values()})
print(saved()["optimizer"]["param_groups"][0]["step"])  # before any step
step()
own.load_state_dict({"optimizer": loaded()["optimizer"]})
step()
print(steps(), saved()["optimizer"]["param_groups"][0]["step"])
"""
ROUTER = """
from megatron.core.transformer.transformer_config import TransformerConfig
from genac_megatron.models.specs import torch_layer_spec
from megatron.core.transformer.moe.moe_utils import RouterGatingLinearFunction
shape = {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 2, "normalization": "RMSNorm"}
torch_layer_spec(TransformerConfig(**shape, num_moe_experts=4, moe_router_topk=2, moe_ffn_hidden_size=8))
weight = torch.eye(4, 8, requires_grad=True)
out = RouterGatingLinearFunction.apply(torch.ones(2, 8), weight, None, torch.float32)
out.sum().backward()
print(out.tolist() == [[1.0] * 4] * 2, weight.grad.tolist() == [[2.0] * 8] * 4)
"""
LOADED = """
import megatron.core, sys
print(type(megatron.core.__loader__).__name__, [name for name in sys.modules if "without_cuda" in name])
"""


@pytest.mark.skipif(
    any(map(find_spec, ("transformer_engine", "apex"))), reason="the repairs are for machines without either"
)
def test_states_are_saved_and_loaded_and_experts_routed_where_there_is_cuda_and_no_engine() -> None:
    """Before any step there are states of zeros; after a load each parameter counts its own steps."""
    code = AS_IT_IS + OPTIMIZER + ROUTER + LOADED
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False
    )
    told = done.stdout.splitlines()
    assert told == ["0.0", "[2.0] 2.0", "True True", "SourceFileLoader []"], done.stdout + done.stderr


@pytest.mark.parametrize(
    ("device", "engine", "specs", "tells"),
    [
        ("cuda", False, ["torch", "auto"], True),
        ("cuda", False, ["torch", "torch"], False),
        ("cuda", True, ["auto"], False),
        ("cpu", False, ["auto"], False),
    ],
)
def test_torchs_layers_on_a_gpu_are_told_of_where_nobody_asked_for_them(
    monkeypatch: pytest.MonkeyPatch, device: str, engine: bool, specs: list[str], tells: bool
) -> None:
    monkeypatch.setattr(platform, "device", lambda: torch.device(device))
    monkeypatch.setattr(platform, "has_te", lambda: engine)
    told = without_engine(specs)
    assert ("torch's layers" in told and "genac doctor" in told) if tells else not told
