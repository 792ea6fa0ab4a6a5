"""What of megatron-core fails or is silently wrong where there is neither CUDA nor Transformer Engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def _repair_random(module: Any) -> None:
    """`_set_cuda_rng_state` silently does nothing without CUDA: use torch's CPU generator.

    Megatron's tracker would keep and restore the state of a generator that does not exist, so dropout in
    recomputed layers would not repeat. Its warning that the CPU generator changed is then expected.
    """
    import torch

    def get_state(device: Any = None, clone: bool = False, graph_safe: bool = False) -> torch.Tensor:
        return torch.get_rng_state()

    def set_state(state: torch.Tensor, device: Any = -1, graph_safe: bool = False) -> None:
        torch.set_rng_state(state)

    module._get_cuda_rng_state, module._set_cuda_rng_state = get_state, set_state
    module.logging.getLogger(module.__name__).addFilter(
        lambda record: "CPU RNG state changed within GPU" not in record.getMessage()
    )


def _repair_jit(module: Any) -> None:
    """The jit fuser is torch.compile: without a C++ compiler it fails, and importing it takes seconds."""
    module.disable_jit_fuser()


def _repair_moe(module: Any) -> None:
    """Two faults without CUDA or Transformer Engine.

    1. 0.16 without Transformer Engine uses a name that it never binds (NameError in the router).
    2. What brings token counts from the GPU records a stream, and there is none.
    """
    if not hasattr(module, "te_general_gemm"):
        module.te_general_gemm = None

    def on_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.cpu().numpy() if as_numpy and hasattr(tensor, "numpy") else tensor

    module.maybe_move_tensor_to_cpu = on_cpu


def _repair_distributed_optimizer(module: Any) -> None:
    """Saving and loading a DistributedOptimizer over torch's Adam, four faults where there is no TE or apex.

    1. A sharded state dict asked for before the first step fails: there is no Adam state yet.
    2. Loading writes to leaves that require grad, outside of no_grad.
    3. Loading raises KeyError on `step`, which torch's Adam keeps per parameter.
    4. After a load all parameters share one `step` tensor, so that each step advances it many times. Silent.
    """
    import torch

    if module.HAVE_APEX_OR_TE:
        return
    optimizer = module.DistributedOptimizer
    stock_sharded, stock_load = optimizer.sharded_state_dict, optimizer.load_state_dict

    def sharded_state_dict(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not self.is_stub_optimizer:
            _fill_adam_state(self.optimizer)
        return stock_sharded(self, *args, **kwargs)

    @torch.no_grad()
    def set_states(self: Any, model_param: Any, tensors: dict[str, torch.Tensor]) -> None:
        group, index = self.model_param_group_index_map[model_param]
        main = self.optimizer.param_groups[group]["params"][index]
        targets = {**self.optimizer.state[main], "param": main}
        for name in targets.keys() & tensors.keys():
            targets[name].copy_(tensors[name])

    def load_state_dict(self: Any, *args: Any, **kwargs: Any) -> None:
        stock_load(self, *args, **kwargs)
        for state in self.optimizer.state.values():
            state["step"] = state["step"].clone()

    optimizer.sharded_state_dict = sharded_state_dict
    optimizer.load_state_dict = load_state_dict
    optimizer._set_main_param_and_optimizer_states = set_states


def _fill_adam_state(adam: torch.optim.Optimizer) -> None:
    """Give torch's Adam the zero state that it would make itself at its first step."""
    import torch

    for group in adam.param_groups:
        for parameter in group["params"]:
            if not adam.state[parameter]:
                adam.state[parameter] = {
                    "step": torch.zeros(()),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }


REPAIRS: dict[str, Callable[[Any], None]] = {
    "megatron.core.jit": _repair_jit,
    "megatron.core.optimizer.distrib_optimizer": _repair_distributed_optimizer,
    "megatron.core.tensor_parallel.random": _repair_random,
    "megatron.core.transformer.moe.moe_utils": _repair_moe,
}
