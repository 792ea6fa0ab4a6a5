"""What of megatron-core fails or is silently wrong where there is no CUDA."""

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
    """What brings token counts from the GPU records a stream, and there is none."""

    def on_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.cpu().numpy() if as_numpy and hasattr(tensor, "numpy") else tensor

    module.maybe_move_tensor_to_cpu = on_cpu


REPAIRS: dict[str, Callable[[Any], None]] = {
    "megatron.core.jit": _repair_jit,
    "megatron.core.tensor_parallel.random": _repair_random,
    "megatron.core.transformer.moe.moe_utils": _repair_moe,
}
