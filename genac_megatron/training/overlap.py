"""Megatron's own overlap of a role's exchanges with its passes, and Transformer Engine's user buffers.

An update leaves each data-parallel rank with its share of the new weights. Under `overlap_param_gather`
`begin_gather` launches the gathers of all buckets at once, on every rank, in the order of the forward pass,
where Megatron by itself would launch each from the pass that needs it. So nothing that follows has to be
collective: a layer waits for its own weights (DDP's hook), and whatever else reads weights waits for all of
them (`end_gather`), on one rank or on many.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

from genac_megatron import platform
from genac_megatron.models.families.base import Shape
from genac_megatron.recipe.schema import RoleConfig, TrainingConfig


def ddp_config(training: TrainingConfig) -> DistributedDataParallelConfig:
    """How a role's gradients are reduced and its weights gathered."""
    return DistributedDataParallelConfig(
        use_distributed_optimizer=training.distributed_optimizer,
        overlap_grad_reduce=training.overlap_grad_reduce,
        overlap_param_gather=training.overlap_param_gather,
        align_param_gather=training.overlap_param_gather,  # hooks wait and launch nothing: begin_gather has
        grad_reduce_in_fp32=True,
        fp8_param_gather=training.fp8_param and training.adapter is None,
        check_for_nan_in_grad=False,  # the step looks at the gradient norm instead
    )


def wait_for_the_head(ddp: DistributedDataParallel) -> None:
    """Let a chunk wait for all its weights when its decoder ends: the last stage reads the output layer's
    without calling it, so no hook of DDP's would.
    """
    decoder = ddp.module
    while not hasattr(decoder, "decoder"):  # within Float16Module
        decoder = decoder.module
    decoder.decoder.register_forward_hook(lambda *_: end_gather([ddp]))


def _groups(chunks: Iterable[Any]) -> Iterator[Any]:
    """DDP's groups of buckets in the order of the forward pass; DDP fills them from the last layer on."""
    for chunk in chunks:
        if isinstance(chunk, DistributedDataParallel) and chunk.ddp_config.overlap_param_gather:
            yield from reversed(chunk.bucket_groups + chunk.expert_parallel_bucket_groups)


def begin_gather(chunks: Sequence[Any]) -> None:
    """Launch the gathers of all updated weights. Collective over the role's data-parallel groups."""
    end_gather(chunks)
    for group in _groups(chunks):
        group.start_param_sync()


def end_gather(chunks: Sequence[Any]) -> None:
    """Wait for what `begin_gather` launched, if anything is under way. Not collective."""
    for group in _groups(chunks):
        if group.param_gather_handle is not None:
            group.finish_param_sync(skip_next_bucket_dispatch=True)


def make_buffers(roles: Iterable[tuple[RoleConfig, Shape]]) -> None:
    """Transformer Engine's user buffers, once in a process, where a role has tp_comm_overlap.

    The recipe's rules see to it that all such roles want the same (recipe/megatron_rules.py). Collective over
    the world, before any model is built. Not run on a GPU.
    """
    wanted = [role.user_buffers(shape.hidden) for role, shape in roles if role.training.tp_comm_overlap]
    if not wanted or not platform.has_te():  # build_model says what is missing
        return
    from megatron.core.utils import is_te_min_version
    from transformer_engine.pytorch.module import base

    tp, cp, tokens, hidden = wanted[0]
    arguments: dict[str, Any] = {"use_fp8": False}
    if is_te_min_version("2.7.0"):
        arguments = {"quantization_modes": [base.UserBufferQuantizationMode.NONE]}
    base.initialize_ub(
        shape=[tokens // cp, hidden], tp_size=tp, ub_cfgs={}, bootstrap_backend="nccl", **arguments
    )
