"""What of megatron-core fails or is silently wrong without Transformer Engine and apex, on any device."""

from __future__ import annotations

from typing import Any

import torch


def repair_router() -> None:
    """0.16 without Transformer Engine uses a name that it never binds: NameError in the experts' router."""
    from megatron.core.transformer.moe import moe_utils

    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None


def repair_optimizer() -> None:
    """Saving and loading a DistributedOptimizer over torch's Adam, four faults. Call it once.

    1. A sharded state dict asked for before the first step fails: there is no Adam state yet.
    2. Loading writes to leaves that require grad, outside of no_grad.
    3. Loading raises KeyError on `step`, which torch's Adam keeps per parameter.
    4. After a load all parameters share one `step` tensor, so that each step advances it many times. Silent.
    """
    from megatron.core.optimizer import distrib_optimizer

    if distrib_optimizer.HAVE_APEX_OR_TE:
        return
    optimizer = distrib_optimizer.DistributedOptimizer
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
    for group in adam.param_groups:
        for parameter in group["params"]:
            if not adam.state[parameter]:
                adam.state[parameter] = {
                    "step": torch.zeros(()),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }
