"""Megatron's distributed optimizer and learning-rate schedule from a recipe's block."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from genac_megatron.dtypes import DTYPES
from genac_megatron.platform.fp8 import ready_for_master
from genac_megatron.recipe.schema import OptimizerConfig, TrainingConfig

PARAMETER_GROUP_EXCHANGES = 2  # get_megatron_optimizer asks for dense and for expert groups


def build_optimizer(
    chunks: list[Any], groups: Any | None, optimizer: OptimizerConfig, training: TrainingConfig
) -> Any | None:
    """AdamW over the role's DDP chunks: fp32 master weights, sharded over its data-parallel group.

    Collective over the whole world, since Megatron aligns parameter groups over all ranks, also those
    outside the role's block (groups None): there it returns None.
    """
    config = _megatron_config(optimizer, training)
    if groups is None:
        for _ in range(PARAMETER_GROUP_EXCHANGES):
            dist.all_gather_object([None] * dist.get_world_size(), [])
        return None
    ready_for_master(parameter for chunk in chunks for parameter in chunk.parameters())
    return get_megatron_optimizer(config, chunks, use_gloo_process_groups=False, pg_collection=groups)


def _megatron_config(optimizer: OptimizerConfig, training: TrainingConfig) -> MegatronOptimizerConfig:
    return MegatronOptimizerConfig(
        optimizer="adam",
        lr=optimizer.lr,
        min_lr=optimizer.min_lr,
        weight_decay=optimizer.weight_decay,
        adam_beta1=optimizer.beta1,
        adam_beta2=optimizer.beta2,
        adam_eps=optimizer.eps,
        clip_grad=optimizer.clip_grad,
        bf16=training.dtype == "bf16",
        params_dtype=DTYPES[training.dtype],
        use_distributed_optimizer=training.distributed_optimizer,
        fp8_recipe=None if training.fp8 == "off" else training.fp8,
        overlap_param_gather=training.overlap_param_gather,
        use_precision_aware_optimizer=training.use_precision_aware_optimizer,
        store_param_remainders=False,  # whole masters, as checkpoints of any other setting have them
        exp_avg_dtype=DTYPES[training.exp_avg_dtype],
        exp_avg_sq_dtype=DTYPES[training.exp_avg_sq_dtype],
        optimizer_cpu_offload=training.optimizer_cpu_offload,
        optimizer_offload_fraction=training.optimizer_offload_fraction,
        overlap_cpu_optimizer_d2h_h2d=training.overlap_cpu_optimizer_d2h_h2d,
    )


@torch.no_grad()
def reload_weights(optimizer: Any) -> None:
    """Have the fp32 masters begin at the model's weights, which were written from outside.

    Under `use_precision_aware_optimizer` they are Transformer Engine's to hold, and Megatron (0.16.1, 0.19.2)
    leaves them as they are. Not collective.
    """
    optimizer.reload_model_params()
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        inner = getattr(part, "optimizer", None)
        aware = part.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8
        if inner is None or not aware or isinstance(inner, HybridDeviceOptimizer):
            continue
        for parameter in (one for group in inner.param_groups for one in group["params"]):
            if inner.state.get(parameter):  # else they are made at the first step
                inner.set_scaled_state(parameter, "master_param", parameter.detach().float())


def build_scheduler(megatron_optimizer: Any, optimizer: OptimizerConfig, total_steps: int) -> Any:
    """Warm-up from lr / warmup_steps, then constant, linear or cosine down to min_lr behind the last step."""
    rising = max(optimizer.warmup_steps - 1, 0)  # steps between the first one's lr and the whole
    decay_steps = max(total_steps, rising + 1)
    return OptimizerParamScheduler(
        megatron_optimizer,
        init_lr=optimizer.lr / max(optimizer.warmup_steps, 1),
        max_lr=optimizer.lr,
        min_lr=min(optimizer.min_lr, optimizer.lr),
        lr_warmup_steps=rising,
        lr_decay_steps=decay_steps,
        lr_decay_style=optimizer.schedule,
        start_wd=optimizer.weight_decay,
        end_wd=optimizer.weight_decay,
        wd_incr_steps=decay_steps,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
    )


def build_cooldown(
    megatron_optimizer: Any, optimizer: OptimizerConfig, lr: float, after: int, steps: int
) -> Any:
    """`lr` for `after` steps, then linearly down to min_lr over `steps`: a schedule's end, begun early."""
    floor = min(optimizer.min_lr, lr)
    for group in megatron_optimizer.param_groups:  # Megatron's schedule goes by a group's own bounds
        group.update(max_lr=lr, min_lr=floor)
    return OptimizerParamScheduler(
        megatron_optimizer,
        init_lr=lr,
        max_lr=lr,
        min_lr=floor,
        lr_warmup_steps=after,
        lr_decay_steps=after + steps,
        lr_decay_style="linear",
        start_wd=optimizer.weight_decay,
        end_wd=optimizer.weight_decay,
        wd_incr_steps=after + steps,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
    )
