"""Megatron's distributed optimizer and learning-rate schedule from a recipe's block."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from genac_megatron.recipe.schema import OptimizerConfig, TrainingConfig

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def build_optimizer(
    chunks: list[Any], groups: Any, optimizer: OptimizerConfig, training: TrainingConfig
) -> Any:
    """AdamW over the role's DDP chunks: fp32 master weights, sharded over its data-parallel group."""
    config = MegatronOptimizerConfig(
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
    )
    return get_megatron_optimizer(config, chunks, use_gloo_process_groups=False, pg_collection=groups)


def build_scheduler(megatron_optimizer: Any, optimizer: OptimizerConfig, total_steps: int) -> Any:
    """Linear warm-up from 0, then constant, linear or cosine down to min_lr at the stage's last step."""
    decay_steps = max(total_steps, optimizer.warmup_steps + 1)
    return OptimizerParamScheduler(
        megatron_optimizer,
        init_lr=0.0 if optimizer.warmup_steps else optimizer.lr,
        max_lr=optimizer.lr,
        min_lr=min(optimizer.min_lr, optimizer.lr),
        lr_warmup_steps=optimizer.warmup_steps,
        lr_decay_steps=decay_steps,
        lr_decay_style=optimizer.schedule,
        start_wd=optimizer.weight_decay,
        end_wd=optimizer.weight_decay,
        wd_incr_steps=decay_steps,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
    )
