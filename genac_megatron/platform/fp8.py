"""FP8: which GPUs have which recipe, and parameters that are kept in it. Not run on a GPU.

Transformer Engine keeps a parameter in FP8 as a tensor class of its own (`training.fp8_param`). Its fp32
master weight begins from the high-precision value that the parameter remembers, which Transformer Engine
sets to Megatron's own random one: whoever sets the weights afterwards says so with `remember`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

RECIPES = ("delayed", "tensorwise", "blockwise", "mxfp8")
HOPPER, BLACKWELL, CONSUMER_BLACKWELL = (9, 0), (10, 0), (12, 0)
ADA = (8, 9)
BLOCKWISE_CUDA = (12, 9)


def refusal(recipe: str, capability: tuple[int, int], cuda: str) -> str:
    """Why a GPU of this compute capability cannot train by an FP8 recipe; "" where it can.

    cuda: the version that torch was built for, such as "13.0". After Transformer Engine 2.12's own checks
    (pytorch/quantization.py), which come only in the first forward pass.
    """
    here = f"this GPU's compute capability is {capability[0]}.{capability[1]}"
    if recipe == "mxfp8":
        if capability < BLACKWELL:
            return f"mxfp8 needs Blackwell's tensor cores (compute capability 10.x), {here}"
        if capability >= CONSUMER_BLACKWELL:
            return f"Transformer Engine has no mxfp8 on compute capability 12 and above, {here}"
        return ""
    if recipe == "blockwise":
        if capability < HOPPER:
            return f"blockwise needs Hopper or newer (compute capability 9.0), {here}"
        version = tuple(int(part) for part in cuda.split(".")[:2] if part.isdigit())
        if version < BLOCKWISE_CUDA:
            return f"blockwise needs CUDA 12.9 or newer, torch was built for {cuda or 'none'}"
        return ""
    if capability < ADA:
        return f"{recipe} needs compute capability 8.9 or newer, {here}"
    return ""


def refusal_here(recipe: str) -> str:
    """`refusal` of this rank's GPU."""
    import torch

    if not torch.cuda.is_available():
        return f"{recipe} needs a GPU, and there is none"
    return refusal(recipe, torch.cuda.get_device_capability(), torch.version.cuda or "")


def serving_refusal(capability: tuple[int, int] | None) -> str:
    """Why SGLang cannot serve weights in blocks of FP8 here; "" where it can. None: on a CPU.

    After SGLang 0.5.23's `Fp8LinearMethod` (quantization/fp8.py): on a CPU it asserts AMX, which it looks for
    in a CPU build of sgl-kernel; on GPUs before 8.9 it repacks weights for Marlin: new ones do not fit.
    """
    if capability is None:
        return "SGLang's FP8 needs a GPU (on a CPU: AMX, and a build of sgl-kernel for it, which PyPI lacks)"
    if capability < ADA:
        here = f"this GPU's compute capability is {capability[0]}.{capability[1]}"
        return f"weights in FP8 cannot be replaced in a running SGLang before compute capability 8.9, {here}"
    return ""


def fp8_arguments(capability: tuple[int, int] | None) -> tuple[str, ...]:
    """More of SGLang's command line for weights in FP8.

    On Blackwell DeepGEMM packs the scales after loading (`requant_block_scale_ue8m0_for_deepgemm`), so that
    the next publication's would not fit; Triton's kernels take them as they come. Not run on a GPU.
    """
    if capability is None or capability < BLACKWELL:
        return ()
    return ("--fp8-gemm-backend", "triton", "--moe-runner-backend", "triton")


def available(capability: tuple[int, int], cuda: str) -> list[str]:
    """The recipes that a GPU has."""
    return [recipe for recipe in RECIPES if not refusal(recipe, capability, cuda)]


def kept_in_fp8(parameter: Tensor) -> bool:
    """Whether a parameter's values lie in FP8."""
    from megatron.core import fp8_utils

    return bool(fp8_utils.is_float8tensor(parameter))


def plain(parameter: Tensor) -> Tensor:
    """A parameter's values in its high precision: dequantized where it is kept in FP8."""
    from megatron.core import fp8_utils

    if kept_in_fp8(parameter):
        dequantized: Tensor = fp8_utils.dequantize_fp8_tensor(parameter)
        return dequantized
    return parameter


def as_set(parameter: Tensor) -> Tensor:
    """The values that a parameter was set to, while it remembers them; else `plain`."""
    asked = getattr(parameter, "get_high_precision_init_val", None)
    remembered: Tensor | None = None if asked is None else asked()
    return plain(parameter) if remembered is None else remembered.to(parameter.device)


def forget(parameters: Iterable[Any]) -> None:
    """Let parameters that have no master weight forget what they were set to: it lies in host memory."""
    for parameter in (parameter for parameter in parameters if not parameter.requires_grad):
        asked = getattr(parameter, "get_high_precision_init_val", None)
        if asked is not None and asked() is not None:
            parameter.clear_high_precision_init_val()


def data_tensors(value: Any) -> list[Tensor]:
    """The tensors that hold a tensor's bytes: itself or, of one in FP8, its data and scales."""
    from megatron.core import fp8_utils
    from torch import Tensor

    if isinstance(value, Tensor) and not fp8_utils.is_float8tensor(value):
        return [value]
    return [held for name, held in vars(value).items() if name.startswith("_") and isinstance(held, Tensor)]


def remember(parameter: Any, value: Tensor) -> None:
    """Have the master weight of a parameter kept in FP8 begin at `value`, what it was set to."""
    if hasattr(parameter, "get_high_precision_init_val"):
        parameter._high_precision_init_val = value.detach().to("cpu", copy=True)


def ready_for_master(parameters: Iterable[Any]) -> None:
    """Before an optimizer is made: parameters in FP8 that remember nothing remember what they hold.

    Megatron forgets the values after it made its first optimizer, and would fail at a second one: a stage's
    master weights then begin from the FP8 weights that the stage before left. Frozen ones have none.
    """
    for parameter in (parameter for parameter in parameters if parameter.requires_grad):
        asked = getattr(parameter, "get_high_precision_init_val", None)
        if asked is not None and asked() is None:
            remember(parameter, plain(parameter))
